"""README fits one screen, and what it and the pages under docs/ say can be typed as it stands."""

import contextlib
import importlib
import io
import json
import re
import textwrap

from conftest import ROOT

from data import print_table
from results import table

PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "results/DEVIATIONS.md",
                      *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
SCRIPTS = ("dimml", "joint_baseline", "udi", "balance")     # in the order of reading


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_readme_fits_one_screen_and_the_report_is_small():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines if not line.startswith("|")) <= 100
    assert (ROOT / "results/report.ipynb").stat().st_size < 1_000_000


def test_the_code_that_readme_quotes_is_that_of_the_files():
    part = section("Read the code in this order")
    counts = re.findall(r"\[`(\w+)\.py`\]\(\1\.py\), (\d+) lines", part)
    lines = {name: len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
             for name in SCRIPTS}
    assert [(name, int(count)) for name, count in counts] == list(lines.items())
    loop, = re.findall(r"```python\n(.*?)```", part, re.S)
    assert textwrap.indent(loop, " " * 12) in (ROOT / "dimml.py").read_text(encoding="utf-8")


def test_what_the_first_command_prints_is_that_of_the_run():
    text, = re.findall(r"```text\n(.*?)```", section("Two commands"), re.S)
    run = table.RUNS / "dimml-synthetic-official-seed0.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_table(json.loads(run.read_text(encoding="utf-8")))
    assert text == out.getvalue().lstrip("\n")


def test_results_are_those_of_the_runs():
    shown = README.split(table.BEGIN + "\n")[1].split(table.END)[0]
    assert shown == table.readme(table.without_ablations(table.load()))


def test_differences_on_the_pages_are_those_of_the_runs():
    ensemble, again = "joint_baseline.ensemble", "udi.interaction0-0"
    dimml = [("dimml", "own", ensemble, None), ("dimml", None, "dimml", "own"),
             ("dimml", "fusion", "dimml", "own")]
    rest = [("dimml", "own", "dimml.duc0", "own")]
    for cure in ("balance.auxiliary", "balance.mmpareto"):
        rest += [(cure, "own", cure, None), (cure, "own", ensemble, None)]
    order = [(again, None, ensemble, None), (again, None, ensemble, "calibrated")]
    runs = table.load()
    for section, asked in {("synthetic", "official"): dimml + rest + order,
                           ("avmnist", "small"): dimml + rest,
                           ("utdmhad", "official"): dimml}.items():
        rows = runs[section]
        for row, head, base, other in asked:
            d = table.compare(rows[row], rows[base], table.head(head), table.head(other))
            text = PAGES[ROOT / f"docs/{row.split('.')[0]}.md"]
            assert table.points(d) in " ".join(text.split())


def test_cosines_on_the_page_are_those_of_the_runs():
    cosines = [run["epochs"][-1]["interaction"]["cos_consistency"]
               for rows in table.load().values() for run in rows.get("udi", {}).values()]
    close = f"above 0.75 in {sum(c > 0.75 for c in cosines)} of {len(cosines)} published runs"
    assert close in PAGES[ROOT / "docs/udi.md"]


def test_minutes_on_the_page_are_those_of_the_runs():
    runs = table.load()
    for row in ("joint_baseline.concat", "dimml", "balance.mmpareto", "udi"):
        minutes = [table.cost_of_a_run(rows[row])[0] if row in rows else ""
                   for rows in runs.values()]
        assert f"| `{row}` | {' | '.join(minutes)} |" in PAGES[ROOT / "docs/speed.md"]


def test_commands_parse(tmp_path, monkeypatch):
    """Every script's with `plan`, whatever dataset it names; every module's flags with --help."""
    text = re.sub(r"```text\n.*?```", "", "".join(PAGES.values()), flags=re.S)
    commands = re.findall(r"python (\w+)\.py([^`\n|#]*)", text)
    commands = [(name, words) for name, words in commands if name in SCRIPTS]
    assert len(commands) >= 25
    for name, words in commands:
        words = re.sub(r"--(dataset|split) \S+|--gpu 0", "", words).split()
        importlib.import_module(name).plan([*words, "--out", str(tmp_path)])
    for name, words in re.findall(r"python -m\s([\w.]+)([^`\n|#]*)", text):
        module = importlib.import_module(name)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            monkeypatch.setattr("sys.argv", [name, "--help"])
            module.main()
        assert set(re.findall(r"--[a-z-]+", words)) <= set(re.findall(r"--[a-z-]+", out.getvalue()))


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            file = (path.parent / file).resolve() if file else path
            assert file.exists(), f"{target} in {path.name}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                                  for title in titles], f"{target} in {path.name}"
