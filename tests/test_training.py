"""Whole runs on a tiny dataset: what they write, that they repeat, and that nothing is lost."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PLAIN, ROOT, TRIALS, arrays, outcome, same
from torch.utils._python_dispatch import TorchDispatchMode

import dimml
import joint_baseline
import udi
from data import DataError, claim, half_done, open_dataset, store, whole_file

BOTH, OURS = {"audio", "image"}, {"fused", "fusion", "own", "unweighted"}
RUNS = {        # script, flags, our heads, the modalities' own
    "dimml": (dimml, "--epochs 3 --warmup 1 --fusion-epochs 1", OURS, BOTH),
    "udi": (udi, "--epochs 2", {"fused"}, BOTH),
    "gated": (joint_baseline, "--epochs 2 --fusion gated", {"fused"}, set()),
    "ogm_ge": (joint_baseline, "--epochs 2 --balance ogm_ge", {"fused"}, set()),
    "mmpareto": (joint_baseline, "--epochs 2 --balance mmpareto", {"fused"}, BOTH),
    "alone": (joint_baseline, "--epochs 2 --modality image", {"fused"}, {"image"}),
    "ensemble": (joint_baseline, "--epochs 2 --ensemble", {"fused"}, BOTH),
}
QUICK = ["--modality", "image", "--batch-size", "8", "--epochs", "2"]
QUICK_FILE = "joint_baseline.only-image-tiny-official-seed0"


def train(name, tiny, out, *more):
    script, flags, *_ = RUNS[name]
    return script.main(["--dataset", tiny, "--batch-size", "8", *flags.split(), "--out", str(out),
                        *more])


def twice(name, tiny, out, *more):
    """That the same bits come out again; the result."""
    result, _ = (train(name, tiny, out / folder, *more) for folder in "ab")
    assert same(outcome(out / "a"), outcome(out / "b"))
    return result


@pytest.fixture
def quick(tiny, tmp_path):
    """Flags of a short run into tmp_path."""
    return ["--dataset", tiny, *QUICK, "--out", str(tmp_path)]


def typed(script, argv, end=subprocess.run, env={}, **options):
    return end([sys.executable, f"{script}.py", *argv], cwd=ROOT, stdout=subprocess.PIPE,
               stderr=subprocess.PIPE, env={**os.environ, **env}, **options)


# ---- what a run writes, and that it repeats ------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_its_result_and_repeats_bit_for_bit(name, tiny, tmp_path, capsys):
    result = twice(name, tiny, tmp_path)
    script, _, ours, own = RUNS[name]
    path, = (tmp_path / "a").glob(f"{script.__name__}*-tiny-official-seed0.json")
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert (result["n_train"], result["n_val"], result["n_test"]) == (30, 6, 12)
    assert result["answer"] == "fused" and result["precision"] == "float32"
    assert (set(result["heads"]), set(result["modality_heads"])) == (ours, own)
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
    assert all(words in printed for words in ("fused (the answer)", "encoder of image", "python"))


def test_another_seed_gives_another_run(quick, small):
    one, two = (joint_baseline.main([*quick, "--seed", seed]) for seed in "01")
    assert one["epochs"][0]["modality_loss"] != two["epochs"][0]["modality_loss"]


def test_bf16_trains_and_says_so(tiny, tmp_path):
    assert twice("dimml", tiny, tmp_path, "--amp", "bf16")["precision"] == "bfloat16"
    assert all(value.isfinite().all() for value in outcome(tmp_path / "a")[1].values())


def test_fp16_trains_through_the_overflows_of_its_first_steps(tiny, tmp_path, small, monkeypatch):
    overflows = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, init_scale=2.0**26, **kwargs)

        def update(self):
            before = self.get_scale()
            super().update()
            overflows.append(self.get_scale() < before)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    result = train("mmpareto", tiny, tmp_path, "--amp", "fp16", "--epochs", "4")
    assert result["precision"] == "float16" and overflows[0] and not overflows[-1]
    assert all(np.isfinite(list(epoch["loss"].values())).all() for epoch in result["epochs"])


def test_the_same_seed_gives_the_same_bits_with_two_threads(tiny, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    twice("alone", tiny, tmp_path)
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dimml", "udi", "gated", "ogm_ge", "mmpareto"])
def test_the_same_seed_gives_the_same_bits_on_a_gpu(name, tiny, tmp_path):
    twice(name, tiny, tmp_path, "--gpu", "0")


class Waits(TorchDispatchMode):
    """Notes each operation that makes a GPU's host wait: a value is read, a constant sent over."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh",
             "_unique2"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += {function.overloadpacket.__name__} & self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name,more", [
    *((name, "") for name in RUNS), ("gated", "--fusion concat"), ("gated", "--fusion sum"),
    ("gated", "--fusion film"), ("ogm_ge", "--balance dgl"), ("udi", "--complement cka"),
    ("udi", "--interaction 0.5 0.5")])
def test_no_step_waits_for_the_device(name, more, tiny, tmp_path, small, monkeypatch):
    """From the end of a pass's first step to its last: the first may make constants."""
    passes = []

    def watched(batches, **kwargs):
        waits = Waits()
        for number, batch in enumerate(batches):
            if number == 1:
                waits.__enter__()
            yield batch
        waits.__exit__(None, None, None)
        passes.append(waits.seen)

    monkeypatch.setattr(RUNS[name][0], "tqdm", watched)
    train(name, tiny, tmp_path, *more.split())
    assert len(passes) >= 2 and not any(passes)


def test_without_validation(tiny, tmp_path, small):
    result = train("dimml", tiny, tmp_path, "--val", "0")
    assert result["n_val"] == 0 and result["n_train"] == 36
    assert all(set(rules) == {"last", "best_test"} for rules in result["heads"].values())


# ---- nothing is lost -----------------------------------------------------------------------------
def test_runs_killed_at_random_moments_end_with_the_same_bits():
    argv = ["--trials", str(max(2, TRIALS))]
    trials = typed("tests/kill_trials", argv, text=True)
    assert trials.returncode == 0, trials.stdout + trials.stderr


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_a_run_with_a_line(number, code, quick, tmp_path):
    run = typed("joint_baseline", [*quick, "--epochs", "500"], subprocess.Popen, text=True)
    while not run.stdout.readline().startswith("epoch 1"):
        assert run.poll() is None
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("joint_baseline.py: interrupted")
    assert not list(tmp_path.glob("*.partial")) and len(list(tmp_path.glob("*.pt"))) == 1


def test_a_reader_that_goes_away_is_no_success(quick):
    run = typed("joint_baseline", [*quick, "--epochs", "50"], subprocess.Popen)
    run.stdout.close()
    errors = run.stderr.read().decode()
    assert run.wait() == 141 and "nobody reads the output" in errors and "Traceback" not in errors


def test_a_full_disk_leaves_nothing_half_written(quick, tmp_path):
    """A limit on the size of files, less than a checkpoint, fails in the middle, as a full disk."""
    limit = 20_000_000, 20_000_000
    run = typed("joint_baseline", quick, text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1] == (
        f"joint_baseline.py: error: {tmp_path / QUICK_FILE}.pt: File too large")
    assert not [path for path in tmp_path.glob("joint*") if path.suffix != ".lock"]


def test_two_runs_of_one_name(quick, tmp_path, small):
    with claim(tmp_path / QUICK_FILE), pytest.raises(DataError, match="of this name is under way"):
        joint_baseline.main(quick)
    assert not list(tmp_path.glob("joint*.pt*"))
    joint_baseline.main(quick)


def test_a_cut_or_flipped_checkpoint_is_never_taken_for_a_good_one(tmp_path):
    path, draw = tmp_path / "run", np.random.default_rng(0)
    file = tmp_path / "run.pt"
    with whole_file(file) as out:
        torch.save({"config": {}, "log": [1], "weights": torch.arange(1000)}, out)
    whole, refused = file.read_bytes(), []
    for trial in range(300):
        at, bit = int(draw.integers(len(whole))), 1 << int(draw.integers(8))
        file.write_bytes(whole[:at]
                         + (b"" if trial % 2 else bytes([whole[at] ^ bit]) + whole[at + 1:]))
        try:
            state = half_done(path, {}, 2, resume=True)
            assert state["log"] == [1] and torch.equal(state["weights"], torch.arange(1000))
            refused.append(False)
        except DataError as error:
            assert "run.pt is damaged" in str(error)
            refused.append(True)
    assert all(refused[1::2]) and np.mean(refused[::2]) > 0.5       # the other bits are padding


def test_a_name_belongs_to_one_config(quick, tmp_path, small, monkeypatch, capsys):
    written = json.loads(json.dumps(joint_baseline.main(quick)))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", lambda *_, **__: None)    # nothing can be trained
        for more in ([], ["--resume"]):                             # finished: the table again
            assert joint_baseline.main([*quick, *more]) == written
            assert "encoder of image" in capsys.readouterr().out

    other = str(store.write(tmp_path / "other/tiny", **arrays(seed=1)))     # one name, other data
    result, state = (tmp_path / f"{QUICK_FILE}.{suffix}" for suffix in ("json", "pt"))
    for hidden in (tmp_path / "none", result, state):
        hidden.rename(tmp_path / "kept") if hidden.exists() else None
        for flags, word in ((["--lr", "0.5"], r"lr 0.003 \(now 0.5\)"),
                            (["--epochs", "3"], r"epochs 2 \(now 3\)"),
                            (["--dataset", other], "audio.npy|image.npy")):
            for resume in ([], ["--resume"]):
                with pytest.raises(DataError, match=word):
                    joint_baseline.main([*quick, *flags, *resume])
        (tmp_path / "kept").rename(hidden) if hidden != tmp_path / "none" else None
    assert json.loads(result.read_text(encoding="utf-8")) == written


def test_a_half_done_run_is_not_started_over(quick, tmp_path, small, capsys):
    joint_baseline.main([*quick, "--resume"])
    assert "none done before" in capsys.readouterr().out
    state = torch.load(tmp_path / f"{QUICK_FILE}.pt", weights_only=True)
    torch.save({**state, "log": state["log"][:1]}, tmp_path / f"{QUICK_FILE}.pt")
    (tmp_path / f"{QUICK_FILE}.json").unlink()
    message = "is at epoch 1 of 2: --resume goes on, another --out starts anew"
    with pytest.raises(DataError, match=message):
        joint_baseline.main(quick)
    joint_baseline.main([*quick, "--resume"])
    assert "1 done before" in capsys.readouterr().out


def test_the_name_that_was_asked_for_decides_name_and_recipe(tmp_path):
    store.write(tmp_path / "disk/ucf101", **arrays())
    (tmp_path / "ave").symlink_to(tmp_path / "disk/ucf101")
    for dataset, name in (("ave", "ave"), (tmp_path / "disk/ucf101", "ucf101"),
                          (f"{tmp_path}/disk/../disk/ucf101/", "ucf101")):
        flags = ["--dataset", str(dataset), "--data-dir", str(tmp_path)]
        _, ds, recipe, path, _ = dimml.plan(flags)
        assert (ds.name, recipe["epochs"]) == (name, 150)
        assert path.name == f"dimml-{name}-official-seed0"


def test_nothing_after_the_last_epoch_loses_the_run(quick, tmp_path, small, monkeypatch):
    def fails(*_):
        raise ValueError("no")

    monkeypatch.setattr(joint_baseline.pipeline.Pipeline, "fit", fails)
    monkeypatch.setenv("PATH", str(tmp_path))                       # nor does a machine without git
    result = joint_baseline.main(quick)
    assert result["probes"] == {"image": None} and result["probe_failures"] == {"image": "no"}
    assert result["commit"] is None and (tmp_path / f"{QUICK_FILE}.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(quick, tmp_path, small):
    with pytest.raises(FloatingPointError, match="lower --lr"):
        joint_baseline.main([*quick, "--lr", "1e30"])
    assert not list(tmp_path.glob("*.pt*"))


# ---- nothing impossible begins -------------------------------------------------------------------
@pytest.mark.parametrize("flags,message", [
    ("--gpu 99", "--gpu 99: GPUs count from 0"), ("--dataset cremad", "Download CREMA-D"),
    ("--dataset nowhere", "there is no prepared folder 'nowhere'"),
    ("--batch-size 0", "--batch-size cannot be 0"),
    ("--batch-size 1", "--batch-size must be at least 2"),
    ("--batch-size 1000", "--batch-size 1000 is larger than the 168 train items"),
    ("--epochs 0", "--epochs cannot be 0"), ("--lr -1", "--lr cannot be -1"),
    ("--lr nan", "--lr cannot be nan"), ("--val 1.5", "val is 1.5"),
    ("--seed 99999999999999999999", r"is not in 0 .. 2\^32 - 1"),
    ("--split clean", "no split 'clean'"),
    ("--modality smell", "synthetic has no modality smell: it has audio, image"),
])
def test_what_a_user_can_put_right_is_said_before_any_work(flags, message, tmp_path):
    with pytest.raises(DataError, match=message):
        joint_baseline.main([*flags.split(), "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("flags", [
    "--ensemble --fusion sum", "--balance dgl --fusion film", "--balance dgl --ensemble",
    "--balance dgl --modality image", "--amp int8"])
def test_flags_that_exclude_each_other(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        joint_baseline.plan(flags.split())
    assert stop.value.code == 2
    assert "not allowed with" in (error := capsys.readouterr().err) or "invalid choice" in error


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    run = typed("dimml", ["--dataset", "cremad", "--out", str(tmp_path)], text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("dimml.py: error: ")


PARTS = arrays()["splits"]["official"]          # 0 train, 2 test
LABELS = arrays()["labels"]


def no_numbers(folder):
    array = np.load(folder / "audio.npy")
    array[3, 0, 0, 0] = np.inf
    np.save(folder / "audio.npy", array)


@pytest.mark.parametrize("message,script,flags,changes", [
    ("of one class", joint_baseline, [],
     {"splits": {"official": np.where((LABELS > 0) & (PARTS == 0), 255, PARTS)}}),
    ("is not finite", joint_baseline, [], {}),
    ("each class has but one group", udi, [], {"groups": PARTS // 2}),      # all of train is one
    ("--val 0 holds none out", udi, ["--val", "0"], {}),
])
def test_data_that_cannot_be_trained_on(message, script, flags, changes, tmp_path):
    folder = store.write(tmp_path / "mine", **{**arrays(), **changes})
    if message == "is not finite":
        no_numbers(folder)
    flags = ["--dataset", str(folder), "--batch-size", "8", *flags, "--out", str(tmp_path / "runs")]
    with pytest.raises(DataError, match=message):
        script.main(flags)
    assert not list((tmp_path / "runs").glob("*.pt"))


@pytest.mark.parametrize("message,changes", [
    ("no train items of 1 classes: class 2",
     {"splits": {"official": np.where((LABELS == 2) & (PARTS == 0), 255, PARTS)}}),
    ("of the training items are held out, not 10%",                         # half are: two groups
     {"groups": np.where(PARTS == 2, 9, np.arange(48) % 2)}),
])
def test_what_is_odd_is_warned_of(message, changes, tmp_path, capsys):
    folder = store.write(tmp_path / "odd", **{**arrays(), **changes})
    open_dataset(str(folder)).check(8)
    assert message in capsys.readouterr().err


def test_a_small_locale_and_a_class_name_from_elsewhere(tmp_path):
    classes = ["né", "два", "三"]
    folder = store.write(tmp_path / "tiny", **{**arrays(), "classes": classes})
    argv = ["--dataset", str(folder), *QUICK, "--out", str(tmp_path / "runs")]
    run = typed("joint_baseline", argv, env=PLAIN)
    assert run.returncode == 0, run.stderr
    assert outcome(tmp_path / "runs")[0]["classes"] == classes


def test_an_output_folder_that_cannot_be_written(quick, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory|exists"):
        joint_baseline.main([*quick, "--out", str(tmp_path / "file/runs")])
