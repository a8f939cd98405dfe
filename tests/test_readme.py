"""What the README and the pages under docs/ say can be typed as it stands."""

import contextlib
import functools
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np

import joint_baseline
from results import benchmark, table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def test_bring_your_own_dataset(tmp_path):
    code, = re.findall(r"## Bring your own dataset.*?```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 20
    rng = np.random.default_rng(0)
    n = 40
    labels = np.arange(n) % 2
    given = {
        "folder": tmp_path / "mine", "rate": 8_000, "labels": labels, "classes": ["low", "high"],
        "waveforms": [(3000 * np.sin(np.arange(rng.integers(2_000, 5_000)) * (0.1 + 0.3 * label))).astype(np.int16)
                      for label in labels],
        "images": rng.integers(0, 256, (n, 14, 14), dtype=np.uint8), "ids": [f"item {i}" for i in range(n)],
        "splits": {"official": np.where(np.arange(n) < 28, 0, 2)},
    }
    exec(code, given)
    result = joint_baseline.main(["--dataset", str(tmp_path / "mine"), "--modality", "audio", "--epochs", "2",
                                  "--batch-size", "8", "--out", str(tmp_path)])
    assert result["probes"]["audio"] > 0.9      # a low and a high tone


def test_every_command_is_one_that_the_scripts_take():
    commands = re.findall(r"python ((?:dimml|joint_baseline|udi)\.py[^`\n|&#]*)", "".join(PAGES.values()))
    assert len(commands) >= 15
    for command in commands:
        script, *words = command.split()
        flags = [word for word in words if word.startswith("--")]
        assert set(flags) <= set(re.findall(r"--[a-z-]+", usage(script))), command


@functools.cache
def usage(script):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main(["--help"])
    return text.getvalue()


def test_files_that_are_named_exist():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith("http") or (path.parent / target.split("#")[0]).exists(), f"{target} in {path.name}"
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
    ledger = re.findall(r"\((`[\w.]+`(?:, `[\w.]+`)*)\)", (ROOT / "results/DEVIATIONS.md").read_text())
    functions = {name for named in ledger for name in re.findall(r"(\w+)`", named)} - {"py"}
    assert len(functions) >= 20
    for function in functions:
        assert re.search(rf"(def|class) {function}\b", sources), function


def test_the_results_are_those_of_the_runs():
    shown = README.split(table.BEGIN + "\n")[1].split(table.END)[0]
    assert shown == table.markdown(table.load()) and shown.count("\n") > 5


def test_the_speed_table_is_that_of_the_benchmark():
    shown = README.split(benchmark.BEGIN + "\n")[1].split(benchmark.END)[0]
    assert shown == benchmark.tables() and shown.count("\n") > 5


def test_the_core_seconds_are_those_of_the_benchmark():
    measured = json.loads((ROOT / "results/benchmark-cpu.json").read_text())["preparing"]
    row, = re.findall(r"\| core-seconds an item[^|]*\|(.*)\|", README)
    for cell, name in zip(row.split("|"), ("cremad", "ave", "ucf101", "modelnet40")):
        assert float(cell.split()[0]) == float(f"{measured[name]['seconds_an_item']:.2g}"), name
