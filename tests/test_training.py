"""Whole runs on a tiny dataset: what they write, that they repeat, and that a killed one goes on to the same end."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arrays
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dimml
import joint_baseline
import udi
from data import DataError, checkpoint, store

ROOT = Path(__file__).parent.parent
RUNS = {  # name: (script, flags, file)
    "dimml": (dimml, ["--epochs", "3", "--warmup", "1", "--fusion-epochs", "1"], "dimml-tiny-official-seed0"),
    "udi": (udi, ["--epochs", "2"], "udi-tiny-official-seed0"),
    "joint": (joint_baseline, ["--epochs", "2", "--fusion", "gated"], "joint_baseline.gated-tiny-official-seed0"),
    "alone": (joint_baseline, ["--epochs", "2", "--modality", "image"], "joint_baseline.image-tiny-official-seed0"),
    "ensemble": (joint_baseline, ["--epochs", "2", "--ensemble"], "joint_baseline.ensemble-tiny-official-seed0"),
}
HEADS = {"udi": {"audio", "image", "fused"}, "dimml": {"audio", "image", "fusion", "fused"}, "joint": {"fused"}, "alone": {"image"},
         "ensemble": {"audio", "image", "fused"}}


def comparable(result):
    """A result without what a clock or a machine decides."""
    result = {key: value for key, value in result.items() if key not in ("seconds", "items_per_second", "command", "commit")}
    result["epochs"] = [{k: v for k, v in e.items() if k not in ("seconds", "items_per_second")} for e in result["epochs"]]
    return result


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_its_result_and_repeats_bit_for_bit(name, tiny, tmp_path, capsys):
    script, flags, file = RUNS[name]
    common = ["--dataset", tiny, "--batch-size", "8", *flags]
    result = script.main([*common, "--out", str(tmp_path / "a")])
    assert comparable(result) == comparable(json.loads((tmp_path / f"a/{file}.json").read_text()))
    assert set(result["heads"]) == HEADS[name]
    assert (result["n_train"], result["n_val"], result["n_test"]) == (30, 6, 12)
    for head, rules in result["heads"].items():
        assert set(rules) == {"last", "best_val", "best_test"}
        curve = [epoch["test"][head]["accuracy"] for epoch in result["epochs"] if head in epoch["test"]]
        assert rules["last"]["accuracy"] == curve[-1] and rules["best_test"]["accuracy"] == max(curve)
        hits = np.mean(np.array(result["test"]["predictions"][head]) == result["test"]["labels"])
        assert hits == pytest.approx(rules["last"]["accuracy"])
    assert set(result["probes"]) == ({"image"} if name == "alone" else {"audio", "image"})
    assert max(result["probes"].values()) > 0.6          # the tiny set can be learned
    printed = capsys.readouterr().out
    assert all(head in printed for head in HEADS[name]) and "best test" in printed and "probe" in printed

    again = script.main([*common, "--out", str(tmp_path / "b")])
    assert comparable(again) == comparable(result)
    assert same_weights(tmp_path / f"a/{file}.pt", tmp_path / f"b/{file}.pt")
    if name == "alone":
        other = script.main([*common, "--out", str(tmp_path / "b"), "--seed", "1"])
        assert comparable(other)["epochs"] != comparable(result)["epochs"]


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True)["model"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_runs_killed_at_random_moments_end_with_the_same_bits():
    trials = subprocess.run([sys.executable, "tests/kill_trials.py", "--trials", os.environ.get("NANOMML_TRIALS", "2")], cwd=ROOT,
                            capture_output=True, text=True)
    assert trials.returncode == 0, trials.stdout + trials.stderr


@pytest.mark.parametrize("name", ["dimml", "udi"])
def test_ctrl_c_ends_a_run_between_two_steps_and_it_goes_on_from_there(name, tiny, tmp_path, monkeypatch, capsys):
    script, flags, file = RUNS[name]
    command = ["--dataset", tiny, "--batch-size", "8", *flags, "--out"]
    batch = data.batches.to_input

    def batch_and_ctrl_c(*args):
        calls.append(None)
        if len(calls) == moment:
            signal.raise_signal(signal.SIGINT)
        return batch(*args)

    monkeypatch.setattr(data.batches, "to_input", batch_and_ctrl_c)
    calls, moment = [], None
    whole = script.main([*command, str(tmp_path / "whole")])
    moments = np.random.default_rng(0).integers(1, len(calls), int(os.environ.get("NANOMML_TRIALS", "1")))
    for trial, moment in enumerate(moments.tolist()):
        calls = []
        with pytest.raises(SystemExit) as stop:
            script.main([*command, str(tmp_path / f"{trial}")])
        assert stop.value.code == 130 and "goes on with --resume" in capsys.readouterr().err
        assert moment <= len(calls) <= moment + 2                            # not one batch more than the one under way
        moment = None
        assert comparable(script.main([*command, str(tmp_path / f"{trial}"), "--resume"])) == comparable(whole)
        assert same_weights(tmp_path / f"whole/{file}.pt", tmp_path / f"{trial}/{file}.pt")


def test_two_runs_of_one_name(tiny, tmp_path, capsys):
    command = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    with checkpoint.lock(tmp_path / "joint_baseline.concat-tiny-official-seed0"), pytest.raises(SystemExit) as stop:
        joint_baseline.main(command)
    assert stop.value.code == 2 and "a run of this name is under way" in capsys.readouterr().err
    assert list(tmp_path.glob("joint*")) == []
    joint_baseline.main(command)


def test_a_lock_that_its_holder_removes_while_it_is_taken(tmp_path, monkeypatch):
    take = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *args: (os.remove(tmp_path / "run.lock"), take(*args)))
    with pytest.raises(DataError, match="a run of this name is under way"), checkpoint.lock(tmp_path / "run"):
        pass


def test_a_full_disk_leaves_the_checkpoint_before(tiny, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle, as on a full one."""
    command = [sys.executable, "joint_baseline.py", "--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--out", str(tmp_path)]
    limit = 20_000_000                                                       # less than a checkpoint
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    file = f"{tmp_path}/joint_baseline.concat-tiny-official-seed0.pt"
    assert run.returncode == 2 and run.stderr.strip().splitlines()[-1] == f"joint_baseline.py: error: {file}: File too large"
    assert "Traceback" not in run.stderr and list(tmp_path.glob("joint*")) == []

    checkpoint.save(tmp_path / "run", {"epoch": 1})
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            checkpoint.save(tmp_path / "run", {"epoch": torch.arange(10_000)})
        except OSError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert checkpoint.load(tmp_path / "run") == {"epoch": 1} and [path.name for path in tmp_path.glob("run*")] == ["run.pt"]


def test_a_cut_or_flipped_checkpoint_is_never_taken_for_a_good_one(tmp_path, capsys):
    path, draw = tmp_path / "run", np.random.default_rng(0)
    checkpoint.save(path, {"epoch": 1, "weights": torch.arange(1000)})
    checkpoint.save(path, {"epoch": 2, "weights": torch.arange(1000)})
    whole, found = Path(f"{path}.pt").read_bytes(), []
    for trial in range(300):
        at, bit = int(draw.integers(len(whole))), 1 << int(draw.integers(8))
        damaged = whole[:at] + (b"" if trial % 2 else bytes([whole[at] ^ bit]) + whole[at + 1:])
        Path(f"{path}.pt").write_bytes(damaged)
        state = checkpoint.load(path)
        assert state["epoch"] in (1, 2) and torch.equal(state["weights"], torch.arange(1000))
        warned = f"{path}.pt cannot be read" in capsys.readouterr().err
        assert warned == (state["epoch"] == 1)
        found.append(warned)
    assert all(found[1::2]) and np.mean(found[::2]) > 0.5                    # the rest of the bits is padding


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny, tmp_path, capsys):
    script, flags, file = RUNS["joint"]
    command = ["--dataset", tiny, "--batch-size", "8", *flags, "--out", str(tmp_path)]
    whole = script.main(command)
    checkpoint = tmp_path / f"{file}.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    resumed = script.main([*command, "--resume"])
    assert f"{checkpoint} cannot be read" in capsys.readouterr().err
    assert comparable(resumed) == comparable(whole)


def test_a_run_resumed_elsewhere_says_so(tiny, tmp_path, monkeypatch, capsys):
    command = ["--dataset", tiny, "--modality", "image", "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    whole = joint_baseline.main(command)
    assert whole["resumed_with"] == joint_baseline.main([*command, "--resume"])["resumed_with"] == []
    assert "resumed with another" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "__version__", "2.0")
    result = joint_baseline.main([*command, "--resume"])
    assert f"warning: resumed with another torch {whole['versions']['torch']} (now 2.0): the bits" in capsys.readouterr().out
    assert result["versions"] == whole["versions"]
    assert [made["versions"]["torch"] for made in result["resumed_with"]] == ["2.0"]


def test_resume_refuses_another_run(tiny, tmp_path, capsys):
    command = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    joint_baseline.main(command)
    for flags in (["--resume", "--lr", "0.5"], ["--lr", "0.5"]):       # nor may another run overwrite it
        with pytest.raises(SystemExit) as stop:
            joint_baseline.main([*command, *flags])
        assert stop.value.code == 2 and "was made with another lr 0.003 (now 0.5)" in capsys.readouterr().err
    other = store.write(tmp_path / "other/tiny", **arrays(seed=1))          # the same name, other data
    with pytest.raises(SystemExit) as stop:
        joint_baseline.main(["--dataset", str(other), *command[2:], "--resume"])
    assert stop.value.code == 2 and "was made with another data audio.npy" in capsys.readouterr().err


@pytest.mark.parametrize("last_act", ["remove", "link", "replace"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_while_a_checkpoint_is_written_leaves_one(last_act, damaged, tmp_path, monkeypatch):
    path = tmp_path / "run"
    for epoch in (1, 2):
        checkpoint.save(path, {"epoch": epoch})
    if damaged:
        Path(f"{path}.pt").write_bytes(b"damaged")
    monkeypatch.setattr(os, last_act, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"epoch": 3})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"epoch": 3 if damaged else 2}
    checkpoint.save(path, {"epoch": 4})
    assert checkpoint.load(path) == {"epoch": 4}


@pytest.mark.parametrize("script,flags", [(dimml, ["--fusion-epochs", "1"]), *((joint_baseline, ["--fusion", kind]) for kind in (
    "concat", "sum", "film", "gated"))])
def test_three_modalities(script, flags, tmp_path):
    folder = store.write(tmp_path / "three", **arrays(n=24, modalities=("audio", "image", "depth")))
    result = script.main(["--dataset", str(folder), "--batch-size", "6", "--epochs", "1", *flags, "--out", str(tmp_path)])
    assert set(result["probes"]) == {"audio", "image", "depth"}


def test_stage_2_leaves_encoders_and_own_heads_alone(tiny, tmp_path):
    flags = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--duc-weight", "0"]
    for epochs in (1, 3):
        dimml.main([*flags, "--fusion-epochs", str(epochs), "--out", str(tmp_path / str(epochs))])
    one, three = (torch.load(tmp_path / f"{n}/dimml.duc0-tiny-official-seed0.pt", weights_only=True)["model"] for n in (1, 3))
    changed = {key for key in one if not torch.equal(one[key], three[key])}
    assert changed == {"fusion_head.weight", "fusion_head.bias"}


def test_without_validation(tiny, tmp_path):
    result = dimml.main(["--dataset", tiny, "--val", "0", "--batch-size", "8", "--epochs", "1", "--fusion-epochs", "1",
                         "--out", str(tmp_path)])
    assert result["n_val"] == 0 and result["n_train"] == 36
    assert all(set(rules) == {"last", "best_test"} for rules in result["heads"].values())


@pytest.mark.parametrize("flags,message", [
    (["--gpu", "99"], "--gpu 99: this machine has"),
    (["--dataset", "cremad"], "Download CREMA-D"),
    (["--dataset", "nowhere"], "there is no prepared folder 'nowhere'"),
    (["--batch-size", "0"], "--batch-size cannot be 0"),
    (["--batch-size", "-3"], "--batch-size cannot be -3"),
    (["--batch-size", "1000"], "batch size 1000 is larger than the 168 train items"),
    (["--epochs", "0"], "--epochs cannot be 0"),
    (["--lr", "-1"], "--lr cannot be -1"),
    (["--lr", "nan"], "--lr cannot be nan"),
    (["--seed", "99999999999999999999"], "is not in 0 .. 2^32 - 1"),
    (["--val", "1.5"], "val is 1.5"),
    (["--split", "clean"], "no split 'clean'"),
    (["--amp", "int8"], "invalid choice"),
    (["--modality", "smell"], "synthetic has no modality smell: it has audio, image"),
    (["--ensemble", "--fusion", "sum"], "not allowed with argument --ensemble"),
])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        joint_baseline.main([*flags, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        joint_baseline.main(["--dataset", tiny, "--batch-size", "8", "--epochs", "3", "--lr", "1e30", "--out", str(tmp_path / "o")])
    assert stop.value.code == 1 and "loss 'joint' is" in capsys.readouterr().err
    assert list((tmp_path / "o").iterdir()) == []


def test_bf16_trains_and_says_so(tiny, tmp_path):
    command = ["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--fusion-epochs", "1", "--amp", "bf16", "--out"]
    results = [dimml.main([*command, str(tmp_path / out)]) for out in "ab"]
    assert results[0]["amp"] == "bfloat16" and comparable(results[0]) == comparable(results[1])
    files = [tmp_path / out / "dimml-tiny-official-seed0.pt" for out in "ab"]
    assert same_weights(*files)
    assert all(value.isfinite().all() for value in torch.load(files[0], weights_only=True)["model"].values())


def test_fp16_trains_through_the_overflows_of_its_first_steps(tiny, tmp_path):
    result = joint_baseline.main(["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--amp", "fp16", "--out", str(tmp_path)])
    assert result["amp"] == "float16" and all(np.isfinite(epoch["loss"]["joint"]) for epoch in result["epochs"])


class Waits(TorchDispatchMode):
    """Notes each operation that would make a GPU's host wait: a value is read, or a constant sent over."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "_unique2"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += {function.overloadpacket.__name__} & self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name,more", [*((name, []) for name in RUNS), ("dimml", ["--amp", "fp16"]),
                                       *(("joint", ["--fusion", kind]) for kind in ("concat", "sum", "film")),
                                       ("udi", ["--complement", "cka"]), ("udi", ["--interaction", "0.5", "0.5"])])
def test_no_step_waits_for_the_device(name, more, tiny, tmp_path, monkeypatch):
    """From the end of a pass's first step to the end of its last one, batches and all: the first may make constants."""
    script, flags, _ = RUNS[name]
    steps, train_epoch, stop_if_interrupted = [], script.Run.train_epoch, script.Run.stop_if_interrupted

    def watched_epoch(run, losses, optimizer):
        run.waits = Waits()
        with run.waits:
            train_epoch(run, losses, optimizer)
        del run.waits                                                        # the losses' values are read once a pass

    def watched_step(run):
        stop_if_interrupted(run)
        if hasattr(run, "waits"):
            steps.append(run.waits.seen if len(run.history) > 1 else [])
            run.waits.seen = []

    monkeypatch.setattr(script.Run, "train_epoch", watched_epoch)
    monkeypatch.setattr(script.Run, "stop_if_interrupted", watched_step)
    script.main(["--dataset", tiny, "--batch-size", "8", *flags, *more, "--out", str(tmp_path)])
    assert len(steps) >= 6 and not any(steps)


def test_without_git_a_run_still_ends(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = joint_baseline.main(["--dataset", tiny, "--modality", "image", "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)])
    assert result["commit"] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(threads, tiny, tmp_path):
    command, before = ["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--out"], torch.get_num_threads()
    torch.set_num_threads(threads)
    results = [joint_baseline.main([*command, str(tmp_path / out)]) for out in "ab"]
    torch.set_num_threads(before)
    assert comparable(results[0]) == comparable(results[1])
    assert same_weights(*(tmp_path / out / "joint_baseline.concat-tiny-official-seed0.pt" for out in "ab"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dimml", "udi", "joint"])
def test_the_same_seed_gives_the_same_bits_on_a_gpu(name, tiny, tmp_path):
    script, flags, file = RUNS[name]
    results = [script.main(["--dataset", tiny, "--batch-size", "8", *flags, "--gpu", "0", "--out", str(tmp_path / out)]) for out in "ab"]
    assert comparable(results[0]) == comparable(results[1])
    assert same_weights(*(tmp_path / out / f"{file}.pt" for out in "ab"))


def test_a_set_smaller_than_a_batch_or_of_one_class(tmp_path, capsys):
    few = store.write(tmp_path / "few", **arrays(n=16))
    one = store.write(tmp_path / "one", **arrays(n_classes=1))
    for folder, message in ((few, "batch size 16 is larger than the 9 train items"), (one, "one class: nothing to tell apart")):
        with pytest.raises(SystemExit) as stop:
            joint_baseline.main(["--dataset", str(folder), "--out", str(tmp_path)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        joint_baseline.main(["--dataset", tiny, "--batch-size", "8", "--out", str(tmp_path / "file/runs")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"joint_baseline.py: error: {tmp_path / 'file/runs'}: Not a directory\n"
