"""The pages under docs/: what they name exists, and the fork they describe works as it is typed."""

import ast
import importlib.util
import json
import re
import subprocess

import pytest
from conftest import ROOT, ledger, quotes

from results import table

METHODS = ("dimml", "udi", "joint_baseline")


def page(name):
    return (ROOT / f"docs/{name}.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_implementation_detail_names_the_function_that_holds_it(method):
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    section, = re.findall(r"## Implementation details\n(.*?)\n\n[A-Z]", page(method), re.S)
    details = re.split(r"^\d+\. ", section, flags=re.M)[1:]
    assert len(details) >= 5
    for detail in details:
        named = re.findall(r"\(`(\w+)`\)", detail)
        assert named and set(named) <= functions, detail


@pytest.mark.parametrize("method", METHODS)
def test_every_logged_number_is_explained(method):
    """Stages, losses, heads and entries of the published runs; modalities' own names stand for all of them."""
    common = set(re.findall(r"`(\w+)`", page("result")))
    for results in (results for methods in table.load().values() for results in methods.values()):
        for result in results.values():
            if result["method"] == method:
                names = set(result) - common
                for record in result["epochs"]:
                    names |= {record["stage"], *record["loss"], *record["test"], *(set(record) - common)}
                names = {re.sub("|".join(result["probes"]), "audio", name) for name in names}
                assert names <= set(re.findall(r"`([\w ]+)`", page(method)))


def test_the_fork_that_is_described_trains_and_records_its_loss(tiny, tmp_path):
    diff, = re.findall(r"```diff\n(.*?)```", page("fork"), re.S)
    assert diff.count("\n") <= 30
    fork = tmp_path / "mine.py"
    fork.write_text((ROOT / "joint_baseline.py").read_text())
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=tmp_path, check=True)
    assert fork.read_text().count('"joint_baseline"') == 1                   # the name that the page says to change
    fork.write_text(fork.read_text().replace('"joint_baseline"', '"mine"'))
    spec = importlib.util.spec_from_file_location("mine", fork)
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    mine.main(["--dataset", tiny, "--epochs", "2", "--batch-size", "8", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "mine.concat-tiny-official-seed0.json").read_text())
    first, second = (record["loss"] for record in result["epochs"])
    assert second["own"] < first["own"] and set(first) == {"joint", "own"}
    entries = set(re.findall(r"`(\w+)`", page("result")))
    assert set(result) | set(result["epochs"][0]) | set(result["test"]) <= entries
    assert set(table.load(tmp_path)["tiny", "official"]) == {"mine.concat"}


def test_the_informative_anchor_can_be_repeated_and_its_numbers_are_those_of_its_runs():
    folder = ROOT / "results/informative_anchor"
    subprocess.run(["git", "apply", "--check", folder / "udi.diff"], cwd=ROOT, check=True)
    runs, measured = table.load(), set()
    for section, methods in table.load(folder).items():
        tried, plain = methods["udi"], runs[section]["udi"]
        assert len(tried) == 5 and not table.differing(tried[0], plain[0])
        for measure in (table.follower_probes, lambda results: table.accuracy(results, "fused")):
            measured.add(table.points(*table.paired(measure(tried), measure(plain))[:2]))
    words, = re.findall(r"\*\*Tried beyond the paper.*?## Limits", page("udi"), re.S)
    for text, count in ((words, 2), (ledger("U10"), 4)):
        assert len(set(quotes(text))) == count and set(quotes(text)) <= measured
