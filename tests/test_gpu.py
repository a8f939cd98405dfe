"""Which device a run takes (torch.cuda is replaced, so on any machine), and runs on a real GPU:

    NANOMML_GPU=1 pytest -n 0 tests/test_gpu.py
"""

import importlib
import os
import re

import numpy as np
import pytest
import torch
from conftest import arrays, outcome, same

import dimml
from data import DataError, open_dataset, pick_device, store
from results import sweep
from test_runs import stopped

on_a_gpu = pytest.mark.skipif(not (os.environ.get("NANOMML_GPU") and torch.cuda.is_available()),
                              reason="needs a GPU, and NANOMML_GPU=1")


# ---- which device --------------------------------------------------------------------------------
@pytest.fixture
def gpus(monkeypatch):
    """gpus((7, 5), (9, 0)): GPUs of these compute capabilities, so far as pick_device can see;
    `wrong` is raised where one is used."""
    def gpus(*capabilities, wrong=None):
        def ones(*_, device):
            if wrong:
                raise wrong
            return torch.zeros(2)

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
        monkeypatch.setattr(torch, "ones", ones)
    return gpus


@pytest.mark.parametrize("gpu,amp,trained_in,expected", [
    (None, "auto", None, ("cuda:0", torch.float32)),        # by the capability of the GPU asked for
    (1, "auto", None, ("cuda:1", torch.bfloat16)), (1, "off", None, ("cuda:1", torch.float32)),
    (1, "auto", "float32", ("cuda:1", torch.float32))])
def test_the_precision_on_a_gpu(gpu, amp, trained_in, expected, gpus):
    gpus((7, 5), (8, 0))
    torch.backends.cudnn.allow_tf32 = True
    checkpoint = trained_in and dict(provenance=dict(precision=trained_in))
    device, dtype = pick_device(gpu, amp, checkpoint)
    assert (str(device), dtype) == expected
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.are_deterministic_algorithms_enabled()


def test_a_gpu_that_is_not_there(gpus):
    for n, wrong in ((0, 0), (1, 1), (1, -1)):
        gpus(*[(8, 0)] * n)
        with pytest.raises(DataError, match=f"--gpu {wrong}: .* PyTorch sees {n} of them"):
            pick_device(wrong)
    gpus()
    assert pick_device() == (torch.device("cpu"), torch.float32)


def test_a_gpu_that_cannot_be_used(gpus, capsys):
    gpus((9, 0), wrong=RuntimeError("no kernel image is available\nmore"))
    unusable = "GPU 0 cannot be used (no kernel image is available): "
    with pytest.raises(DataError, match=re.escape(f"--gpu 0: {unusable}")):
        pick_device(0)
    assert pick_device() == (torch.device("cpu"), torch.float32)
    assert capsys.readouterr().err == f"note: {unusable}this runs on the CPU\n"


# ---- on a GPU ------------------------------------------------------------------------------------
ROWS = {**sweep.ROWS, "dimml.float32": "--amp off", "udi.flow": "--anchor flow",
        "joint_baseline.only": "--modality rgb"}


@pytest.fixture
def every_kind(tmp_path):
    """A prepared folder with a modality of each kind: waveforms, frames, flow, a spectrogram."""
    rng, made = np.random.default_rng(0), arrays()
    labels = made["labels"]
    tone = np.sin(np.arange(8000) * (labels[:, None] + 1) / 20) + rng.normal(0, 0.1, (48, 8000))
    pixels = rng.integers(0, 200, (48, 2, 5, 64, 64)) + 20 * labels[:, None, None, None, None]
    features = rng.normal(labels[:, None, None, None], 1, (48, 1, 24, 24))
    made["modalities"] = {
        "audio": {"kind": "audio", "array": (8000 * tone).astype(np.int16)},
        "rgb": {"kind": "rgb", "array": pixels[:, :, :3].astype(np.uint8)},
        "flow": {"kind": "flow", "array": pixels[:, :, 3:].astype(np.uint8)},
        "sensor": {"kind": "spectrogram", "array": features.astype(np.float16)}}
    return str(store.write(tmp_path / "kinds", **made))


@on_a_gpu
@pytest.mark.parametrize("streamed", [False, True])
def test_batches_on_a_gpu_are_those_of_the_cpu(streamed, every_kind, monkeypatch):
    if streamed:                                        # as if nothing fitted
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    passes = []
    for device in ("cpu", "cuda:0"):
        ds, generator = open_dataset(every_kind), torch.Generator().manual_seed(0)
        passes.append(list(ds.batches("train", 8, device, augment=True, generator=generator)))
        resident = ds.resident(torch.device(device))
        assert (resident is not None) == (device == "cuda:0" and not streamed)
    assert len(passes[0]) == len(passes[1]) > 1
    for (x, y, index), (x_gpu, y_gpu, index_gpu) in zip(*passes):
        assert torch.equal(y, y_gpu.cpu()) and torch.equal(index, index_gpu.cpu())
        for m in x:
            assert x_gpu[m].device == torch.device("cuda:0") and x_gpu[m].dtype == torch.float32
            torch.testing.assert_close(x_gpu[m].cpu(), x[m], rtol=1e-3, atol=1e-3)


@on_a_gpu
@pytest.mark.parametrize("name", ROWS)
def test_each_row_gives_the_same_bits_again_and_resumed(name, every_kind, tmp_path):
    script = importlib.import_module(name.split(".")[0])
    argv = ["--dataset", every_kind, "--batch-size", "8", "--epochs", "2", "--gpu", "0",
            *(["--warmup", "1", "--fusion-epochs", "1"] if script is dimml else []),
            *ROWS[name].split(), "--out"]
    result = script.main([*argv, str(tmp_path / "whole")])
    new = torch.cuda.get_device_capability(0) >= (8, 0) and name != "dimml.float32"
    assert result["precision"] == ("bfloat16" if new else "float32")
    assert result["device"] == torch.cuda.get_device_name(0) and result["peak_memory"] > 0
    argv += [str(tmp_path / "broken"), "--resume"]
    stopped(script, argv)
    script.main(argv)
    assert same(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))
