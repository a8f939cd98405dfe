"""What the tests share: a dataset that a few steps learn, a small encoder, commands."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

# a shell that starts pytest in the background makes it, and what it starts, deaf to Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"     # two tests at a time are faster so; child processes too
# everything runs on the CPU, child processes too; NANOMML_GPU=1 asks for tests/test_gpu.py as well
if not os.environ.get("NANOMML_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import balance  # noqa: E402
import dimml  # noqa: E402
import joint_baseline  # noqa: E402
import udi  # noqa: E402
from data import store  # noqa: E402

REAL = ROOT.parent / "shared/real"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")


def arrays(n=48, n_classes=3, size=24, modalities=("audio", "image"), seed=0):
    """Arguments of store.write for a tiny dataset: a mean that tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    specs = {}
    for name in modalities:
        noise = rng.normal(0, 0.3, (n, 3, size, size)) + labels[:, None, None, None]
        if name == "image":
            pictures = (noise * 60).clip(0, 255).astype(np.uint8)[:, None]
            specs[name] = {"kind": "rgb", "array": pictures, "scale": (0.5, 1)}
        else:
            specs[name] = {"kind": "spectrogram", "array": noise[:, :1].astype(np.float16)}
    return {"modalities": specs, "labels": labels, "ids": [f"item {i}" for i in range(n)],
            "classes": [f"class {c}" for c in range(n_classes)],
            "splits": {"official": np.where(np.arange(n) % 4 == 3, 2, 0)}}


@pytest.fixture
def tiny(tmp_path):
    """A prepared folder of 48 items, 36 to train (6 of them val), 12 to test."""
    return str(store.write(tmp_path / "tiny", **arrays()))


class SmallEncoder(torch.nn.Sequential):
    """(B, T, C, H, W) -> (B, 512), as that of the scripts, in a thousandth of its time."""

    def __init__(self, in_channels):
        super().__init__(torch.nn.Conv2d(in_channels, 4, 5, stride=4), torch.nn.BatchNorm2d(4),
                         torch.nn.ReLU(), torch.nn.Conv2d(4, 512, 1))

    def forward(self, x):
        return super().forward(x[:, 0]).mean((2, 3)).to(self[0].weight.dtype)


def load(path):
    """A script as a module, with the small encoder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Encoder = SmallEncoder
    return module


@pytest.fixture
def small(monkeypatch):
    """The scripts with the small encoder."""
    for script in (balance, dimml, joint_baseline, udi):
        monkeypatch.setattr(script, "Encoder", SmallEncoder)


def outcome(folder):
    """Result and weights of the one run in a folder, less what says how it was made, and when."""
    path, = Path(folder).glob("*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    for part in (result, *result["epochs"]):
        for key in ("seconds", "command", "commit", "code", "peak_memory"):
            part.pop(key, None)
    return result, torch.load(path.with_suffix(".pt"), weights_only=True)["model"]


def same(a, b):
    """That two outcomes are the same, bit for bit."""
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(
        torch.equal(a[1][key], b[1][key]) for key in a[1])


def prepared(name, root, *flags, code=0):
    """`data.prepare NAME` of root/raw into root/out, as typed; the folder it makes."""
    from data import prepare        # needs packages that a machine which only trains may lack
    argv = ["--raw", str(root / "raw"), "--data-dir", str(root / "out"), "--workers", "1"]
    if code:
        with pytest.raises(SystemExit) as stop:
            prepare.main([name, *argv, *flags])
        assert stop.value.code == code
    else:
        prepare.main([name, *argv, *flags])
    return root / "out" / name


@pytest.fixture
def expect(monkeypatch):
    """expect(module, classes, official=(train, val, test)): the counts that raw files of ours have;
    without any, none are asserted."""
    def expect(module, classes=None, **counts):
        monkeypatch.setattr(module, "EXPECTED", counts)
        if classes:
            monkeypatch.setattr(module, "N_CLASSES", classes)
    return expect


ODD = """
import ctypes, os, time, data.modelnet40 as m
from data import prepare
m.EXPECTED, whole, prepare.TIME_LIMIT = {{}}, m.decode, {limit}
def decode(item):
    {body}
    return whole(item)
m.decode = decode
if __name__ == "__main__":
    prepare.main()
"""


def odd_decoder(root, body, workers, limit=600):
    """Arguments of subprocess: `data.prepare modelnet40` of root/raw, whose decoder begins so."""
    (root / "odd.py").write_text(ODD.format(body=body, limit=limit))
    argv = [sys.executable, str(root / "odd.py"), "modelnet40", "--raw", str(root / "raw"),
            "--workers", str(workers), "--data-dir", str(root / "out")]
    return {"args": argv, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
