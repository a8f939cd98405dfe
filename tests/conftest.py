import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"      # two tests at a time run faster than one with two threads; for child processes too

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared/real"       # real samples, where there are any: the tests that use them are skipped without
TRIALS = int(os.environ.get("NANOMML_TRIALS", 1))     # a long trial: so many times the random cases, and other ones each time
sys.path.insert(0, str(ROOT))
from data import store  # noqa: E402


def arrays(n=48, n_classes=3, size=24, modalities=("audio", "image"), seed=0):
    """Arguments of store.write for a tiny dataset that can be learned in a few steps: a mean that tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    specs = {}
    for name in modalities:
        noise = rng.normal(0, 0.3, (n, 3, size, size)) + labels[:, None, None, None]
        if name == "image":
            specs[name] = {"kind": "rgb", "array": (noise * 60).clip(0, 255).astype(np.uint8)[:, None], "scale": (0.5, 1)}
        else:
            specs[name] = {"kind": "spectrogram", "array": noise[:, :1].astype(np.float16)}
    return {"modalities": specs, "labels": labels, "classes": [f"class {c}" for c in range(n_classes)],
            "ids": [f"item {i}" for i in range(n)], "splits": {"official": np.where(np.arange(n) % 4 == 3, 2, 0)}}


def quotes(text):
    """The differences with their intervals, as `results.table.points` writes them, that a text quotes, in its order."""
    return [re.sub(r"\s+", " ", quote) for quote in re.findall(r"[+−][\d.]+\s\[[^]]*\]", text)]


def ledger(row):
    """A row of results/DEVIATIONS.md, by its number."""
    line, = re.findall(rf"^\| {row} \|.*", (ROOT / "results/DEVIATIONS.md").read_text(), re.M)
    return line


@pytest.fixture
def tiny(tmp_path):
    """A prepared folder of 48 items, 36 to train (4 of them val), 12 to test."""
    return str(store.write(tmp_path / "tiny", **arrays()))
