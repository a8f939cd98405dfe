"""Whole runs on a tiny dataset: what they write, that they repeat, and that nothing is lost."""

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
from conftest import ROOT, arrays
from torch.utils._python_dispatch import TorchDispatchMode

import dimml
import joint_baseline
import udi
from data import DataError, claim, half_done, store, whole_file

RUNS = {  # name: (script, flags, file)
    "dimml": (dimml, ["--epochs", "3", "--warmup", "1", "--fusion-epochs", "1"], "dimml"),
    "udi": (udi, ["--epochs", "2"], "udi"),
    "gated": (joint_baseline, ["--epochs", "2", "--fusion", "gated"], "joint_baseline.gated"),
    "ogm_ge": (joint_baseline, ["--epochs", "2", "--balance", "ogm_ge"], "joint_baseline.ogm_ge"),
    "mmpareto": (joint_baseline, ["--epochs", "2", "--balance", "mmpareto"], "joint_baseline.mmpareto"),
    "alone": (joint_baseline, ["--epochs", "2", "--modality", "image"], "joint_baseline.only-image"),
    "ensemble": (joint_baseline, ["--epochs", "2", "--ensemble"], "joint_baseline.ensemble"),
}
BOTH = {"audio", "image"}
HEADS = {  # ours, and the modalities' own
    "dimml": ({"fused", "fusion", "own", "unweighted"}, BOTH), "udi": ({"fused"}, BOTH),
    "gated": ({"fused"}, set()), "ogm_ge": ({"fused"}, set()), "mmpareto": ({"fused"}, BOTH),
    "alone": ({"fused"}, {"image"}), "ensemble": ({"fused"}, BOTH),
}
QUICK = ["--modality", "image", "--batch-size", "8", "--epochs", "2"]
QUICK_FILE = "joint_baseline.only-image-tiny-official-seed0"


def command(name, tiny, out, *more):
    return ["--dataset", tiny, "--batch-size", "8", *RUNS[name][1], "--out", str(out), *more]


def comparable(result):
    """A result without what a clock or a command decides."""
    drop = ("seconds", "items_per_second", "command", "commit")
    result = {key: value for key, value in result.items() if key not in drop}
    result["epochs"] = [{k: v for k, v in e.items() if k not in drop} for e in result["epochs"]]
    return result


def weights(folder, file):
    return torch.load(Path(folder) / f"{file}-tiny-official-seed0.pt", weights_only=True)["model"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_its_result_and_repeats_bit_for_bit(name, tiny, tmp_path, capsys):
    script, _, file = RUNS[name]
    result = script.main(command(name, tiny, tmp_path / "a"))
    written = json.loads((tmp_path / f"a/{file}-tiny-official-seed0.json").read_text(encoding="utf-8"))
    assert comparable(written) == comparable(result)
    assert (result["n_train"], result["n_val"], result["n_test"]) == (30, 6, 12)
    assert result["answer"] == "fused" and result["precision"] == "float32"
    assert (set(result["heads"]), set(result["modality_heads"])) == HEADS[name]
    for group in ("heads", "modality_heads"):
        for head, rules in result[group].items():
            assert set(rules) == {"last", "best_val", "best_test"}
            outputs = result["test"][group][head]["predictions"]
            hits = np.mean(np.array(outputs) == result["test"]["labels"])
            assert hits == pytest.approx(rules["last"]["accuracy"])
            assert rules["last"]["accuracy"] <= rules["best_test"]["accuracy"]
    assert set(result["probes"]) == ({"image"} if name == "alone" else BOTH)
    assert max(result["probes"].values()) > 0.6          # the tiny set can be learned
    printed = capsys.readouterr().out
    assert "fused (the answer)" in printed and "encoder of image" in printed and "python" in printed

    again = script.main(command(name, tiny, tmp_path / "b"))
    assert comparable(again) == comparable(result)
    assert same_weights(weights(tmp_path / "a", file), weights(tmp_path / "b", file))


def test_another_seed_gives_another_run(tiny, tmp_path):
    one, two = (joint_baseline.main(["--dataset", tiny, *QUICK, "--seed", seed, "--out", str(tmp_path)])
                for seed in "01")
    assert one["epochs"][0]["modality_loss"] != two["epochs"][0]["modality_loss"]


def test_runs_killed_at_random_moments_end_with_the_same_bits():
    trials = subprocess.run([sys.executable, "tests/kill_trials.py", "--trials",
                             os.environ.get("NANOMML_TRIALS", "2")], cwd=ROOT, capture_output=True, text=True)
    assert trials.returncode == 0, trials.stdout + trials.stderr


@pytest.mark.parametrize("name", ["dimml", "udi", "ogm_ge"])
def test_a_run_goes_on_after_any_epoch_to_the_same_bits(name, tiny, tmp_path, monkeypatch):
    """Stopped after each of its epochs in turn: stages, the split of the dimensions, GE's noise."""
    script, _, file = RUNS[name]
    whole = script.main(command(name, tiny, tmp_path / "whole"))

    def save_and_stop(state, target):
        torch_save(state, target)
        if len(state["log"]) < len(whole["epochs"]):
            stops.append(len(state["log"]))

    torch_save, stops = torch.save, []
    replace = os.replace

    def replace_and_stop(a, b):
        replace(a, b)
        if str(b).endswith(".pt") and stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_and_stop)
    monkeypatch.setattr(os, "replace", replace_and_stop)
    for epoch in range(1, len(whole["epochs"])):
        with pytest.raises(KeyboardInterrupt):
            script.main(command(name, tiny, tmp_path / "parts", "--resume"))
        assert stops.pop() == epoch
    result = script.main(command(name, tiny, tmp_path / "parts", "--resume"))
    assert comparable(result) == comparable(whole)
    assert same_weights(weights(tmp_path / "whole", file), weights(tmp_path / "parts", file))


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_a_run_with_a_line(number, code, tiny, tmp_path):
    run = subprocess.Popen([sys.executable, "joint_baseline.py", "--dataset", tiny, *QUICK, "--epochs", "500",
                            "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    while not run.stdout.readline().startswith("epoch 1"):
        assert run.poll() is None
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("joint_baseline.py: interrupted")
    assert not list(tmp_path.glob("*.partial")) and len(list(tmp_path.glob("*.pt"))) == 1


def test_a_reader_that_goes_away_is_no_success(tiny, tmp_path):
    run = subprocess.Popen([sys.executable, "joint_baseline.py", "--dataset", tiny, *QUICK, "--epochs", "50",
                            "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    errors = run.stderr.read().decode()
    assert run.wait() == 141 and "nobody reads the output" in errors and "Traceback" not in errors


def test_two_runs_of_one_name(tiny, tmp_path):
    flags = ["--dataset", tiny, *QUICK, "--out", str(tmp_path)]
    with claim(tmp_path / QUICK_FILE), pytest.raises(DataError, match="a run of this name is under way"):
        joint_baseline.main(flags)
    assert not list(tmp_path.glob("joint*.pt*"))
    joint_baseline.main(flags)


def test_a_full_disk_leaves_nothing_half_written(tiny, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle, as on a full one."""
    limit = 20_000_000                                                       # less than a checkpoint
    run = subprocess.run([sys.executable, "joint_baseline.py", "--dataset", tiny, *QUICK, "--out", str(tmp_path)],
                         cwd=ROOT, capture_output=True, text=True,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1] == (
        f"joint_baseline.py: error: {tmp_path / QUICK_FILE}.pt: File too large")
    assert not [path for path in tmp_path.glob("joint*") if path.suffix != ".lock"]


def test_a_cut_or_flipped_checkpoint_is_never_taken_for_a_good_one(tmp_path):
    path, draw = tmp_path / "run", np.random.default_rng(0)
    with whole_file(f"{path}.pt") as file:
        torch.save({"config": {}, "log": [1], "weights": torch.arange(1000)}, file)
    whole, refused = Path(f"{path}.pt").read_bytes(), []
    for trial in range(300):
        at, bit = int(draw.integers(len(whole))), 1 << int(draw.integers(8))
        damaged = whole[:at] + (b"" if trial % 2 else bytes([whole[at] ^ bit]) + whole[at + 1:])
        Path(f"{path}.pt").write_bytes(damaged)
        try:
            state = half_done(path, {}, 2, resume=True)
            assert state["log"] == [1] and torch.equal(state["weights"], torch.arange(1000))
            refused.append(False)
        except DataError as error:
            assert "run.pt is damaged" in str(error)
            refused.append(True)
    assert all(refused[1::2]) and np.mean(refused[::2]) > 0.5                # the other bits are padding


def test_a_name_belongs_to_one_config(tiny, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", tiny, *QUICK, "--out", str(tmp_path)]
    whole = joint_baseline.main(flags)
    capsys.readouterr()
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **kwargs: None)    # nothing can be trained
    for more in ([], ["--resume"]):                                          # finished: the table again
        assert joint_baseline.main([*flags, *more]) == json.loads(json.dumps(whole))
        assert "encoder of image" in capsys.readouterr().out
    monkeypatch.undo()

    other = str(store.write(tmp_path / "other/tiny", **arrays(seed=1)))      # the same name, other data
    for checkpoint in (True, False):
        for more, word in ((["--lr", "0.5"], r"lr 0.003 \(now 0.5\)"), (["--epochs", "3"], r"epochs 2 \(now 3\)"),
                           (["--dataset", other], "audio.npy|image.npy")):
            for resume in ([], ["--resume"]):
                with pytest.raises(DataError, match=word):
                    joint_baseline.main([*flags, *more, *resume])
        (tmp_path / f"{QUICK_FILE}.json").rename(tmp_path / "kept.json") if checkpoint else None
    (tmp_path / "kept.json").rename(tmp_path / f"{QUICK_FILE}.json")
    (tmp_path / f"{QUICK_FILE}.pt").unlink()
    with pytest.raises(DataError, match="lr 0.003"):
        joint_baseline.main([*flags, "--lr", "0.5"])
    assert json.loads((tmp_path / f"{QUICK_FILE}.json").read_text(encoding="utf-8")) == json.loads(json.dumps(whole))


def test_a_half_done_run_is_not_started_over(tiny, tmp_path, capsys):
    flags = ["--dataset", tiny, *QUICK, "--out", str(tmp_path)]
    joint_baseline.main([*flags, "--resume"])
    assert "none done before" in capsys.readouterr().out
    state = torch.load(tmp_path / f"{QUICK_FILE}.pt", weights_only=True)
    torch.save({**state, "log": state["log"][:1]}, tmp_path / f"{QUICK_FILE}.pt")
    (tmp_path / f"{QUICK_FILE}.json").unlink()
    with pytest.raises(DataError, match="is at epoch 1 of 2: --resume goes on, another --out starts anew"):
        joint_baseline.main(flags)
    joint_baseline.main([*flags, "--resume"])
    assert "1 done before" in capsys.readouterr().out


def test_the_name_that_was_asked_for_decides_name_and_recipe(tmp_path):
    folder = store.write(tmp_path / "disk/prepared-v2", **arrays())
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/ave").symlink_to(folder)
    folder.rename(tmp_path / "disk/ucf101")
    (tmp_path / "datasets/ave").unlink()
    (tmp_path / "datasets/ave").symlink_to(tmp_path / "disk/ucf101")
    for dataset, root, epochs, name in (("ave", "datasets", 150, "ave"), (str(tmp_path / "disk/ucf101"), "none", 150,
                                        "ucf101"), (str(tmp_path / "disk/../disk/ucf101/"), "none", 150, "ucf101")):
        _, ds, recipe, path, _ = dimml.plan(["--dataset", dataset, "--data-dir", str(tmp_path / root)])
        assert (ds.name, recipe["epochs"]) == (name, epochs) and path.name == f"dimml-{name}-official-seed0"


@pytest.mark.parametrize("name", ["dimml", "udi"])
def test_three_modalities(name, tmp_path):
    three = store.write(tmp_path / "three", **arrays(n=24, modalities=("audio", "image", "depth")))
    flags = ["--fusion-epochs", "1"] if name == "dimml" else []
    result = RUNS[name][0].main(["--dataset", str(three), "--batch-size", "6", "--epochs", "1", *flags,
                                 "--out", str(tmp_path)])
    assert set(result["probes"]) == set(result["modality_heads"]) == {"audio", "image", "depth"}


def test_stage_2_leaves_encoders_and_own_heads_alone(tiny, tmp_path):
    flags = ["--dataset", tiny, "--batch-size", "8", "--epochs", "1", "--duc-weight", "0"]
    for epochs in "13":
        dimml.main([*flags, "--fusion-epochs", epochs, "--out", str(tmp_path / epochs)])
    one, three = (weights(tmp_path / n, "dimml.duc0") for n in "13")
    assert {key for key in one if not torch.equal(one[key], three[key])} == {"fusion_head.weight", "fusion_head.bias"}


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
    (["--batch-size", "1"], "--batch-size must be at least 2"),
    (["--batch-size", "1000"], "--batch-size 1000 is larger than the 168 train items"),
    (["--epochs", "0"], "--epochs cannot be 0"),
    (["--lr", "-1"], "--lr cannot be -1"),
    (["--lr", "nan"], "--lr cannot be nan"),
    (["--seed", "99999999999999999999"], "is not in 0 .. 2^32 - 1"),
    (["--val", "1.5"], "val is 1.5"),
    (["--split", "clean"], "no split 'clean'"),
    (["--modality", "smell"], "synthetic has no modality smell: it has audio, image"),
])
def test_what_a_user_can_put_right_is_said_before_any_work(flags, message, tmp_path):
    with pytest.raises(DataError, match=message.replace("^", r"\^")):
        joint_baseline.main([*flags, "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("flags", [["--ensemble", "--fusion", "sum"], ["--balance", "dgl", "--fusion", "film"],
                                   ["--balance", "dgl", "--ensemble"], ["--balance", "dgl", "--modality", "image"],
                                   ["--amp", "int8"]])
def test_flags_that_exclude_each_other(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        joint_baseline.plan(flags)
    assert stop.value.code == 2


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    run = subprocess.run([sys.executable, "dimml.py", "--dataset", "cremad", "--out", str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stderr.startswith("dimml.py: error: ")


def test_data_that_cannot_be_trained_on(tmp_path, capsys):
    def refused(message, script=joint_baseline, flags=(), **changes):
        refused.number += 1
        folder = store.write(tmp_path / f"set{refused.number}", **{**arrays(), **changes})
        if message == "is not finite":
            array = np.load(folder / "audio.npy")
            array[3, 0, 0, 0] = np.inf
            np.save(folder / "audio.npy", array)
        with pytest.raises(DataError, match=message):
            script.main(["--dataset", str(folder), "--batch-size", "8", *flags, "--out", str(tmp_path / "runs")])

    refused.number, n, labels = 0, 48, arrays()["labels"]
    one = np.where(np.arange(n) % 4 == 3, 2, 0)
    one[labels > 0] = np.where(one[labels > 0] == 0, 255, 2)
    refused("of one class", splits={"official": one})
    refused("is not finite")
    groups = np.where(np.arange(n) % 4 == 3, 1, 0)                           # one group is all of train
    refused("each class has but one group", script=udi, groups=groups)
    refused("--val 0 holds none out", script=udi, flags=["--val", "0"])
    assert not list((tmp_path / "runs").glob("*.pt"))


def test_what_is_odd_is_warned_of(tmp_path, capsys):
    labels, split = arrays()["labels"], arrays()["splits"]["official"]
    split = np.where((labels == 2) & (split == 0), 255, split)
    folder = store.write(tmp_path / "odd", **{**arrays(), "splits": {"official": split}})
    ds = joint_baseline.open_dataset(str(folder))
    ds.check(8)
    assert "no train items of 1 classes: class 2" in capsys.readouterr().err
    groups = np.where(np.arange(48) % 4 == 3, 9, np.arange(48) % 2)          # two groups: half is held out
    folder = store.write(tmp_path / "groups", **arrays(), groups=groups)
    joint_baseline.open_dataset(str(folder)).check(8)
    assert "of the training items are held out, not 10%" in capsys.readouterr().err


def test_nothing_after_the_last_epoch_loses_the_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(joint_baseline.pipeline.Pipeline, "fit", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    monkeypatch.setenv("PATH", str(tmp_path))                                # nor does a machine without git
    result = joint_baseline.main(["--dataset", tiny, *QUICK, "--out", str(tmp_path)])
    assert result["probes"] == {"image": None} and result["probe_failures"] == {"image": "no"}
    assert result["commit"] is None and (tmp_path / f"{QUICK_FILE}.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match="lower --lr"):
        joint_baseline.main(["--dataset", tiny, *QUICK, "--lr", "1e30", "--out", str(tmp_path / "o")])
    assert not list((tmp_path / "o").glob("*.pt*"))


def test_bf16_trains_and_says_so(tiny, tmp_path):
    results = [dimml.main(command("dimml", tiny, tmp_path / out, "--amp", "bf16")) for out in "ab"]
    assert results[0]["precision"] == "bfloat16" and comparable(results[0]) == comparable(results[1])
    assert all(value.isfinite().all() for value in weights(tmp_path / "a", "dimml").values())


def test_fp16_trains_through_the_overflows_of_its_first_steps(tmp_path):
    tiny = str(store.write(tmp_path / "tiny", **arrays(n=24, size=12)))      # emulated on a CPU, slowly
    result = joint_baseline.main(["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--balance", "mmpareto",
                                  "--amp", "fp16", "--out", str(tmp_path)])
    assert result["precision"] == "float16"
    assert all(np.isfinite(list(epoch["loss"].values())).all() for epoch in result["epochs"])


class Waits(TorchDispatchMode):
    """Notes each operation that would make a GPU's host wait: a value is read, or a constant sent over."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "_unique2"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += {function.overloadpacket.__name__} & self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name,more", [
    *((name, []) for name in RUNS), *(("gated", ["--fusion", kind]) for kind in ("concat", "sum", "film")),
    ("ogm_ge", ["--balance", "dgl"]), ("udi", ["--complement", "cka"]), ("udi", ["--interaction", "0.5", "0.5"])])
def test_no_step_waits_for_the_device(name, more, tiny, tmp_path, monkeypatch):
    """From the end of a pass's first step to its last: the first may make constants."""
    script, passes = RUNS[name][0], []

    def watched(batches, **kwargs):
        waits = Waits()
        for number, batch in enumerate(batches):
            if number == 1:
                waits.__enter__()
            yield batch
        waits.__exit__(None, None, None)
        passes.append(waits.seen)

    monkeypatch.setattr(script, "tqdm", watched)
    script.main(command(name, tiny, tmp_path, *more))
    assert len(passes) >= 2 and not any(passes)


def test_the_same_seed_gives_the_same_bits_with_two_threads(tiny, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    results = [joint_baseline.main(["--dataset", tiny, *QUICK, "--out", str(tmp_path / out)]) for out in "ab"]
    torch.set_num_threads(before)
    assert comparable(results[0]) == comparable(results[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dimml", "udi", "gated", "ogm_ge", "mmpareto"])
def test_the_same_seed_gives_the_same_bits_on_a_gpu(name, tiny, tmp_path):
    script, _, file = RUNS[name]
    results = [script.main(command(name, tiny, tmp_path / out, "--gpu", "0")) for out in "ab"]
    assert comparable(results[0]) == comparable(results[1])
    assert same_weights(weights(tmp_path / "a", file), weights(tmp_path / "b", file))


def test_a_small_locale_and_a_class_name_from_elsewhere(tmp_path):
    folder = store.write(tmp_path / "tiny", **{**arrays(), "classes": ["né", "два", "三"]})
    run = subprocess.run(
        [sys.executable, "joint_baseline.py", "--dataset", str(folder), *QUICK, "--out", str(tmp_path / "runs")], cwd=ROOT,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, capture_output=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / f"runs/{QUICK_FILE}.json").read_text(encoding="utf-8"))
    assert result["classes"] == ["né", "два", "三"]


def test_an_output_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory|exists"):
        joint_baseline.main(["--dataset", tiny, *QUICK, "--out", str(tmp_path / "file/runs")])
