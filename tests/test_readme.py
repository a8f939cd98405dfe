"""README fits one screen, and what it and the pages under docs/ say can be typed as it stands."""

import contextlib
import importlib
import io
import json
import re
import textwrap

import pytest
from conftest import ROOT

from data import prepare, print_table
from results import sweep, table

PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "results/DEVIATIONS.md",
                      *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
SCRIPTS = ("joint_baseline", "dimml", "udi")
MODULES = {"data.prepare": prepare, "results.sweep": sweep, "results.table": table}


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_readme_fits_one_screen():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
    assert sum(line.startswith("|") for line in lines) <= 30


def test_the_code_that_readme_quotes_is_that_of_the_files():
    part = section("Read the code in this order")
    counts = re.findall(r"\[`(\w+)\.py`\]\(\1\.py\), (\d+) lines", part)
    assert [name for name, _ in counts] == list(SCRIPTS)
    for name, count in counts:
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) == int(count)
    loop, = re.findall(r"```python\n(.*?)```", part, re.S)
    assert textwrap.indent(loop, " " * 16) in (ROOT / "dimml.py").read_text(encoding="utf-8")


def test_results_are_those_of_the_runs():
    shown = README.split(table.BEGIN + "\n")[1].split(table.END)[0]
    assert shown == table.readme(table.without_ablations(table.load()))


def test_what_the_two_commands_print_is_that_of_the_runs():
    printed = re.findall(r"```text\n(.*?)```", section("Two commands"), re.S)
    for name, text in zip(("joint_baseline.concat", "dimml"), printed, strict=True):
        run = table.RUNS / f"{name}-synthetic-official-seed0.json"
        compare = importlib.import_module(name.split(".")[0]).COMPARE
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_table(json.loads(run.read_text(encoding="utf-8")), compare)
        assert text == out.getvalue().lstrip("\n")


def test_commands_parse(tmp_path, monkeypatch):
    """Every script's with `plan`, whatever dataset it names; every module's flags with --help."""
    text = re.sub(r"```text\n.*?```", "", "".join(PAGES.values()), flags=re.S)
    commands = re.findall(r"python (\w+)\.py([^`\n|#]*)", text)
    commands = [(name, words) for name, words in commands if name in SCRIPTS]
    assert len(commands) >= 25
    for name, words in commands:
        words = re.sub(r"--(dataset|split) \S+|--gpu 0", "", words).split()
        importlib.import_module(name).plan([*words, "--out", str(tmp_path)])
    for name, words in re.findall(r"python -m ([\w.]+)([^`\n|#]*)", text):
        module = importlib.import_module(name)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            monkeypatch.setattr("sys.argv", [name, "--help"])
            module.main()
        assert set(re.findall(r"--[a-z-]+", words)) <= set(re.findall(r"--[a-z-]+", out.getvalue()))


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        named = dict(re.findall(r"^\[(\w+)\]: (\S+)", text, re.M))
        assert set(re.findall(r"\]\[(\w+)\]", text)) == set(named)
        for target in [*re.findall(r"\]\(([^)]+)\)", text), *named.values()]:
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            file = (path.parent / file).resolve() if file else path
            assert file.exists(), f"{target} in {path.name}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                                  for title in titles]
