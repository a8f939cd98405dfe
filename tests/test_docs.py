"""The pages under docs/ and the ledger: what they name exists, what they show runs."""

import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, arrays, load
from PIL import Image
from scipy.io import wavfile
from torchvision.models import resnet18

import balance
import dimml
from data import open_dataset, store
from results import sweep, table

METHODS = ("dimml", "joint_baseline", "udi", "balance")
FLAGS = ["--batch-size", "8", "--epochs", "2"]


def page(name):
    return (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder `tiny` of sounds and pictures as docs/your_data.md makes them."""
    made = arrays(size=64)
    sound = np.random.default_rng(0).normal(0, 1000, (48, 32_000)).astype(np.int16)
    made["modalities"]["audio"] = dict(kind="audio", array=sound, standardize=True)
    return str(store.write(tmp_path_factory.mktemp("docs") / "tiny", **made))


def test_functions_in_brackets_and_lines_of_the_ledger_exist():
    ledger = (ROOT / "results/DEVIATIONS.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8")
                   for path in (*ROOT.glob("*.py"), *ROOT.glob("[dr]*/*.py")))
    pages = "".join(map(page, METHODS))
    text = re.findall(r"## Implementation details\n(.*?)\n\n[A-Z#]", pages, re.S)
    text += re.findall(r"^\| [DUJ]\d+ .*", ledger, re.M)
    groups = re.findall(r"\((`[\w.]+`(?:,\s`[\w.]+`)*)\)", "".join(text))
    functions = {name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", " ".join(groups))}
    assert len(functions) > 30
    assert functions <= set(re.findall(r"^ *(?:def|class) (\w+)", code, re.M))
    lines = re.findall(r"^\| ([DUJ]\d+) \|", ledger, re.M)
    assert len(lines) == len(set(lines)) and set(re.findall(r"\b[DUJ]\d+\b", code)) <= set(lines)


def test_rows_are_called_as_the_sweep_calls_them():
    pages = "".join(map(page, METHODS))
    rows = re.findall(r"^\| `([\w.-]+)` \| `python (\w+)\.py ?(.*?)` \|", pages, re.M)
    assert all(row.split(".")[0] == script for row, script, _ in rows)
    assert {row: flags for row, _, flags in rows} == {
        row: flags or ("--balance auxiliary" if row == "balance.auxiliary" else "")
        for row, flags in sweep.ROWS.items()}


def test_a_checkpoint_predicts_as_its_run_did_and_for_files(folder, small, tmp_path, monkeypatch):
    predict, prepare = re.findall(r"```python\n(.*?)```", page("predict"), re.S)
    ds, result = open_dataset(folder), dimml.main([
        "--dataset", folder, "--out", str(tmp_path), *FLAGS, "--warmup", "1"])
    items = {m: np.array(mod.array[ds.indices("test")]) for m, mod in ds.modalities.items()}
    given = {"path": tmp_path / "dimml-tiny-official-seed0.pt", "items": items}
    exec(predict, given)
    predictions = result["test"]["heads"]["fused"]["predictions"]
    assert given["answers"] == [ds.classes[c] for c in predictions]
    assert len(set(given["answers"])) > 1

    monkeypatch.chdir(tmp_path)
    wavfile.write("new.wav", 16_000, items["audio"][0, :20_000])
    Image.fromarray(items["image"][0, 0].transpose(1, 2, 0)).resize((80, 60)).save("new.jpg")
    exec(prepare, given)
    assert given["items"]["audio"].shape == (1, 32_000)     # of 1.25 s, the rest is silence
    assert (given["items"]["audio"][0, :20_000] == items["audio"][0, :20_000]).all()
    exec(predict, given)
    assert given["answers"][0] in ds.classes


def test_the_fork_trains_under_its_own_name(folder, small, tmp_path):
    diff, = re.findall(r"```diff\n(.*?)```", page("fork"), re.S)
    fork = tmp_path / "mine.py"
    fork.write_text((ROOT / "balance.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=tmp_path, check=True)
    mine = load(fork)
    flags = ["--dataset", folder, *FLAGS, "--out", str(tmp_path)]
    runs = [balance.main(flags), mine.main(flags), mine.main([*flags, "--alpha", "2"])]
    assert set(table.load(tmp_path)["tiny", "official"]) == {
        "balance.auxiliary", "mine.auxiliary", "mine.auxiliary.alpha2"}
    assert len({run["epochs"][1]["loss"]["joint"] for run in runs}) == 3    # each its own loop


def test_the_encoder_can_begin_with_the_weights_of_torchvision():
    lines, = re.findall(r"```python\n(.*?)```", page("fork"), re.S)
    last = "        del self.avgpool, self.fc\n"
    source = (ROOT / "dimml.py").read_text(encoding="utf-8").replace(last, lines + last)
    trained = resnet18(weights=None).eval()
    mine = {"__name__": "mine", "resnet18": lambda weights: trained}
    exec(source, mine)
    x = torch.rand(2, 3, 64, 64)
    pooled = {}
    trained.avgpool.register_forward_hook(lambda _, z, pool: pooled.update(z=z[0].mean((2, 3))))
    trained(x)
    with torch.no_grad():
        assert torch.allclose(mine["Encoder"](3).eval()(x[:, None]), pooled["z"], atol=1e-5)
        assert mine["Encoder"](1).eval()(x[:, None, :1]).shape == (2, 512)
