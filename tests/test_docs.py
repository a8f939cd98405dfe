"""The pages under docs/ and the ledger: what they name exists, what they show runs."""

import ast
import importlib.util
import re
import subprocess

import numpy as np
import pytest
from conftest import ROOT, SmallEncoder, arrays, shrink

import dimml
import joint_baseline
import udi
from data import open_dataset, store
from results import sweep, table

FLAGS = ["--batch-size", "8", "--epochs", "2"]
RUNS = {"dimml": [(dimml, ["--warmup", "1", "--fusion-epochs", "1"])], "udi": [(udi, [])],
        "joint_baseline": [(joint_baseline, ["--balance", "ogm_ge"]),
                           (joint_baseline, ["--balance", "mmpareto"]),
                           (joint_baseline, ["--modality", "image"])]}


def page(name):
    return (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


def definitions(path):
    """Names of the functions and classes of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def in_brackets(text):
    """["f", "g"] of a text that says (`f`, `g`)."""
    return [name for names in re.findall(r"\((`[\w.]+`(?:, `[\w.]+`)*)\)", text)
            for name in re.findall(r"`([\w.]+)`", names)]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder `tiny` of 48 items, with room for runs beside it."""
    return store.write(tmp_path_factory.mktemp("docs") / "tiny", **arrays())


@pytest.fixture(scope="module")
def results(folder):
    """{method: results on it}."""
    given = ["--dataset", str(folder), "--out", str(folder.parent), *FLAGS]
    return {method: [script.main([*given, *flags]) for script, flags in runs]
            for method, runs in RUNS.items()}


@pytest.mark.parametrize("method", RUNS)
def test_every_implementation_detail_names_the_function_that_holds_it(method):
    section, = re.findall(r"## Implementation details\n(.*?)\n\n[A-Z#]", page(method), re.S)
    details = re.split(r"^\d+\. ", section, flags=re.M)[1:]
    assert len(details) >= 5
    for detail in details:
        named = in_brackets(detail)
        assert named and set(named) <= definitions(f"{method}.py"), detail


def test_every_line_of_the_ledger_names_what_exists():
    text = (ROOT / "results/DEVIATIONS.md").read_text(encoding="utf-8")
    scripts, count = {"D": "dimml.py", "U": "udi.py", "J": "joint_baseline.py"}, 0
    for letter, number, line in re.findall(r"^\| ([DUJ])(\d+) (\|.*)", text, re.M):
        for name in in_brackets(line):
            *module, function = name.split(".")
            path = "/".join(module) + ".py" if module else scripts[letter]
            path = "data/__init__.py" if module == ["data"] else path
            assert function in definitions(path), f"{letter}{number}: {name}"
            count += 1
    assert count >= 40
    for letter in scripts:
        numbers = re.findall(rf"^\| {letter}(\d+) \|", text, re.M)
        assert numbers == [str(1 + n) for n in range(len(numbers))]
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in scripts.values())
    assert set(re.findall(r"\b[DUJ]\d+\b", code)) <= set(re.findall(r"^\| (\w+) \|", text, re.M))


@pytest.mark.parametrize("method", RUNS)
def test_every_logged_entry_is_explained(method, results):
    """Stages, losses, heads and entries; modalities' own names stand in dicts of their own."""
    named = re.findall(r"`([^`\n]+)`", page("result") + page(method))
    explained = set(re.findall(r"\w+", " ".join(named)))
    for result in results[method]:
        names = {*result, *result["heads"], *result["test"], *result.get("choice", {})}
        for record in result["epochs"]:
            names |= {*record, record["stage"], *record["loss"], *record.get("interaction", {})}
            names |= {key for row in record.get("balance", {}).values() for key in row}
            names |= {key for score in record["test"]["heads"].values() for key in score}
        assert names <= explained


def test_ablations_are_called_as_the_sweep_calls_them():
    rows = re.findall(r"^\| `(udi[\w.-]*)` \| `python udi.py ?(.*?)` \|", page("udi"), re.M)
    assert dict(rows) == {row: flags for row, flags in sweep.ROWS.items() if row.startswith("udi")}


def test_a_checkpoint_predicts_as_its_run_did(folder, results):
    code, = re.findall(r"```python\n(.*?)```", page("predict"), re.S)
    ds, result = open_dataset(folder), results["dimml"][0]
    items = {m: np.array(mod.array[ds.indices("test")]) for m, mod in ds.modalities.items()}
    given = {"path": folder.parent / "dimml-tiny-official-seed0.pt", "items": items}
    exec(code, given)
    predictions = result["test"]["heads"]["fused"]["predictions"]
    assert given["answers"] == [ds.classes[c] for c in predictions]
    assert len(set(given["answers"])) > 1
    exec(code, given | {"items": {m: array[:1] for m, array in items.items()}})     # a single item


def test_the_fork_trains_under_its_own_name(folder, tmp_path):
    diff, = re.findall(r"```diff\n(.*?)```", page("fork"), re.S)
    fork = tmp_path / "mine.py"
    fork.write_text((ROOT / "joint_baseline.py").read_text(encoding="utf-8"), encoding="utf-8")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("mine", fork)
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    mine.Encoder = SmallEncoder
    flags = ["--dataset", str(folder), *FLAGS, "--out", str(tmp_path)]
    result, plain = mine.main(flags), joint_baseline.main(flags)
    assert (result["method"], result["variant"]) == ("mine", "concat")
    assert result["commit"].endswith("-dirty")                      # untracked
    assert (tmp_path / "mine.concat-tiny-official-seed0.json").exists()
    assert set(table.load(tmp_path)["tiny", "official"]) == {"mine.concat", "joint_baseline.concat"}
    ours, theirs = (run["epochs"][1]["loss"]["joint"] for run in (result, plain))
    assert ours != theirs                                           # the loop is another one
