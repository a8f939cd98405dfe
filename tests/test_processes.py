"""Two processes take the step of one: a real torchrun, gloo, on the CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, arrays

from data import DataError, cli, open_dataset, processes, store

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_processes_take_the_steps_of_one_and_count_every_item_once(tmp_path):
    """All losses of all scripts, the contrastive and the mutual-information terms and the cosines of the gradients too."""
    folder = str(store.write(tmp_path / "tiny", **arrays(n=50)))             # 12 test items, 38 to train: nothing is even
    command = ["tests/frozen_batchnorm.py", folder]
    subprocess.run([*TORCHRUN, *command, str(tmp_path / "two")], cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "TMPDIR": str(tmp_path)})              # torchrun leaves a folder
    subprocess.run([sys.executable, *command, str(tmp_path / "one")], cwd=ROOT, check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.json"))
    assert len(names) == 3
    for name in names:
        one, two = (json.loads((tmp_path / out / name).read_text()) for out in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2) and two["device"].startswith("2 x ")
        assert one["test"]["labels"] == two["test"]["labels"] and len(two["test"]["labels"]) == two["n_test"] == 12
        for a, b in zip(one["epochs"], two["epochs"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a.get("interaction") == pytest.approx(b.get("interaction"), abs=1e-5)
            for head, score in a["test"].items():
                assert score == pytest.approx(b["test"][head], abs=1e-5)
        for head, confidence in one["test"]["confidence"].items():
            assert confidence == pytest.approx(two["test"]["confidence"][head], abs=1e-3)
        weights = [torch.load(tmp_path / out / name.replace(".json", ".pt"), weights_only=True)["model"] for out in ("one", "two")]
        assert all(torch.allclose(weights[0][key].float(), weights[1][key].float(), rtol=1e-4, atol=1e-5) for key in weights[0])


def test_usage(monkeypatch, tmp_path):
    """As a process of two sees it, without the other one."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    ds = open_dataset(store.write(tmp_path / "tiny", **arrays()))
    with pytest.raises(DataError, match="batch size 7 cannot be split evenly over 2 processes"):
        ds.batches("train", 7, augment=True, generator=torch.Generator())
    monkeypatch.setattr(processes, "join", lambda: 0)
    with pytest.raises(DataError, match="--gpu does not go with torchrun"):
        cli.pick_device(0, "off")
