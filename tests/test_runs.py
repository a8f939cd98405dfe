"""Whole runs on a tiny dataset: names, what is written, that it repeats, that nothing is lost."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, arrays, load, outcome, same
from torch.utils._python_dispatch import TorchDispatchMode

import balance
import data
import dimml
import joint_baseline
import udi
from data import DataError, store
from data.run import claim, current_code, exit_codes, half_done

BOTH, OURS = {"audio", "image"}, {"fused", "fusion", "own", "unweighted"}
RUNS = {        # script, flags, epochs, our heads, the modalities' own
    "dimml": (dimml, "--epochs 3 --warmup 1 --fusion-epochs 2", 5, OURS, BOTH),
    "udi": (udi, "--epochs 2", 6, {"fused"}, BOTH),
    "gated": (joint_baseline, "--epochs 2 --fusion gated", 2, {"fused"}, set()),
    "ensemble": (joint_baseline, "--epochs 2 --ensemble", 2, {"fused", "calibrated"}, BOTH),
    "ogm_ge": (balance, "--epochs 4 --balance ogm_ge", 4, {"fused"}, set()),
    "mmpareto": (balance, "--epochs 2 --balance mmpareto", 2, {"fused", "own"}, BOTH),
}
QUICK = ["--modality", "image", "--batch-size", "8", "--epochs", "2"]
QUICK_FILE = "joint_baseline.only-image-tiny-official-seed0"


def argv_of(name, folder, out, *more):
    return ["--dataset", folder, "--batch-size", "8", *RUNS[name][1].split(), "--out", str(out),
            *more]


@pytest.fixture
def quick(tiny, tmp_path):
    """Flags of a short run into tmp_path."""
    return ["--dataset", tiny, *QUICK, "--out", str(tmp_path)]


def stopped(script, argv):
    """A run that is interrupted when it has trained one epoch."""
    def interrupt(*_):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError) as stop:
        patch.setattr(data, "print_epoch", interrupt)
        script.main(argv)
    return stop


def typed(argv):
    return subprocess.Popen([sys.executable, "joint_baseline.py", *argv], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONUNBUFFERED": "1"})


# ---- what a run writes, and that it repeats ------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_after_any_epoch_writes_the_same_bits(name, tiny, tmp_path, small, capsys):
    script, _, n_epochs, *_ = RUNS[name]
    result = script.main(argv_of(name, tiny, tmp_path / "whole"))
    answer = f"fused (the answer)      {100 * result['heads']['fused']['last']['accuracy']:8.1f}"
    assert answer in capsys.readouterr().out
    check_result(name, result)

    argv = argv_of(name, tiny, tmp_path / "broken", "--resume")
    for _ in range(n_epochs - 1):
        stopped(script, argv)
    broken = script.main(argv)
    assert same(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))
    assert [entry["epoch"] for entry in broken["code"]] == list(range(n_epochs))


def check_result(name, result):
    """What docs/result.md says of every result, and of that of some methods."""
    *_, n_epochs, ours, own = RUNS[name]
    assert (result["n_train"], result["n_val"], result["n_test"]) == (30, 6, 12)
    assert [epoch["epoch"] for epoch in result["epochs"]] == list(range(n_epochs))
    decimals = re.findall(r"\d\.(\d+)", json.dumps([result["test"], result["epochs"][0]["test"]]))
    assert max(map(len, decimals)) <= 5                     # a file of 2,468 items stays small
    assert (set(result["heads"]), set(result["modality_heads"])) == (ours, own)
    assert set(result["probes"]) == BOTH and max(result["probes"].values()) > 0.6
    for group in ("heads", "modality_heads"):
        for head, rules in result[group].items():
            hits = np.array(result["test"][group][head]["predictions"]) == result["test"]["labels"]
            assert hits.mean() == pytest.approx(rules["last"]["accuracy"])
            trained = [e for e in result["epochs"] if head in e["test"].get(group, {})]
            if name == "udi":                                           # the stage of it alone
                trained = [e for e in trained if e["stage"] == trained[-1]["stage"]]
            assert rules["last"]["epoch"] == trained[-1]["epoch"]
            for part in ("val", "test"):
                accuracy = {e["epoch"]: e[part][group][head]["accuracy"] for e in trained}
                assert rules[f"best_{part}"]["epoch"] == max(accuracy, key=accuracy.get)

    # stages, losses, heads and entries stand on the pages; modalities' own names in their own dicts
    pages = [(ROOT / f"docs/{page}.md").read_text("utf-8") for page in ("result", result["method"])]
    explained = re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", "".join(pages))))
    names = {*result, *result["heads"], *result["test"], *result.get("choice", {})}
    names |= {key for stretch in result["code"] for key in stretch}
    for record in result["epochs"]:
        names |= {*record, record["stage"], *record["loss"], *record.get("interaction", {})}
        names |= {key for row in record.get("balance", {}).values() for key in row}
        names |= {key for score in record["test"]["heads"].values() for key in score}
    assert names <= set(explained)

    if name == "udi":
        follower, = BOTH - {result["choice"]["anchor"]}
        stages = dict.fromkeys((e["stage"], e["modality"]) for e in result["epochs"])
        assert list(stages) == [("alone", "audio"), ("alone", "image"), ("guided", follower)]


def test_the_same_bits_again_in_bfloat16_with_two_threads(quick, tmp_path, small):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for folder in "ab":
        result = joint_baseline.main([*quick, "--amp", "bf16", "--out", str(tmp_path / folder)])
    torch.set_num_threads(before)
    assert result["precision"] == "bfloat16"
    assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(quick, tmp_path):
    """With the real encoder, so that much of the time goes to checkpoints of 90 MB."""
    argv, begun = [*quick, "--epochs", "3", "--resume", "--out"], time.time()
    joint_baseline.main([*argv, str(tmp_path / "whole")])
    seconds = time.time() - begun
    run = typed([*argv, str(tmp_path / "killed")])
    while "done before" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(random.uniform(0, seconds))
    run.kill()
    run.communicate()
    joint_baseline.main([*argv, str(tmp_path / "killed")])
    assert same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_without_validation_items(tiny, tmp_path, small):
    result = joint_baseline.main(argv_of("ensemble", tiny, tmp_path, "--val", "0"))
    assert (result["n_val"], result["n_train"], result["temperatures"]) == (0, 36, {})
    assert list(result["heads"]) == ["fused"]           # not calibrated
    assert set(result["heads"]["fused"]) == {"last", "best_test"}


class NoWaits(TorchDispatchMode):
    """Refuses what makes a GPU's host wait: a value is read, a constant sent over."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in {
            "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh",
            "_unique2"}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name,more", [
    *((name, "") for name in RUNS), ("ogm_ge", "--balance dgl"),
    ("udi", "--complement cka --anchor image --interaction 0.5 0.5")])
def test_no_step_waits_for_the_device(name, more, tiny, tmp_path, small, monkeypatch):
    """From the end of a pass's first step to its last: the first may make constants."""
    def watched(batches, **_):
        batches = iter(batches)
        yield next(batches)
        with NoWaits():
            yield from batches

    monkeypatch.setattr(RUNS[name][0], "tqdm", watched)
    RUNS[name][0].main(argv_of(name, tiny, tmp_path, *more.split()))


# ---- names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("script,flags,name", [
    (dimml, "--tau 50", "dimml"), (dimml, "--tau 10 --shared-weight 0.5", "dimml.shared0.5.tau10"),
    (dimml, "--epochs 3 --fusion-epochs 2 --warmup 1 --batch-size 8 --lr 1 --lr-step 2", "dimml"),
    (udi, "--complement cka --anchor audio --interaction 0 0.5",
     "udi.anchor-audio.interaction0-0.5.cka"),
    (joint_baseline, "--modality audio", "joint_baseline.only-audio"),
    (balance, "--balance ogm_ge --ogm-alpha 0.5", "balance.ogm_ge.alpha0.5")])
def test_the_name_of_a_run(script, flags, name, tiny):
    *_, path, config = script.plan(["--dataset", tiny, "--seed", "7", *flags.split()])
    assert path.name == f"{name}-tiny-official-seed7"
    assert ".".join(filter(None, [config["method"], config["variant"]])) == name
    if flags == "--tau 50":
        assert config == dimml.plan(["--dataset", tiny, "--seed", "7"])[-1]


def test_a_dataset_has_its_recipe_and_epochs_scale_its_schedule(tmp_path):
    (tmp_path / "ave").symlink_to(store.write(tmp_path / "disk", **arrays()))
    argv = ["--dataset", "ave", "--data-dir", str(tmp_path)]
    for tau, variant in (("10", "dimml"), ("50", "dimml.tau50")):
        assert dimml.plan([*argv, "--tau", tau])[3].name == f"{variant}-ave-official-seed0"
    for epochs, warmup, lr_step in ((150, 20, 70), (50, 7, 23), (1, 0, 1)):
        r = dimml.plan([*argv, "--epochs", str(epochs)])[2]
        assert (r.warmup, r.lr_step) == (warmup, lr_step)
    assert dimml.plan([*argv, "--epochs", "30", "--lr-step", "70"])[2].lr_step == 70


def test_a_copied_script_is_a_method_of_its_own(tiny, tmp_path, capsys):
    """And what trained its run is kept: which code, from which epoch on."""
    path = tmp_path / "mine.py"
    text = (ROOT / "dimml.py").read_text(encoding="utf-8")
    entries = "    strength=1.0,\n    bold=False,\n    tau=50.0,"
    path.write_text(text.replace("    tau=50.0,", entries))
    argv = ["--dataset", tiny, "--batch-size", "8", "--epochs", "2", "--warmup", "1",
            "--fusion-epochs", "1", "--bold", "--strength", "2", "--out", str(tmp_path / "runs"),
            "--resume"]
    stopped(load(path), argv)
    path.write_text(path.read_text() + "# changed\n")
    result = load(path).main(argv)
    assert (tmp_path / "runs/mine.strength2.bold1-tiny-official-seed0.json").exists()
    first, second = result["code"]
    assert (first["epoch"], second["epoch"]) == (0, 1) and first["sha256"] != second["sha256"]
    assert capsys.readouterr().err.count("has changed since") == 1

    load(path).main(argv)                               # finished, by the same code
    assert not capsys.readouterr().err
    path.write_text(path.read_text() + "# again\n")
    assert load(path).main(argv)["code"] == result["code"]
    assert "has changed since mine.strength2.bold1" in capsys.readouterr().err


def test_the_commit_is_the_last_that_touched_the_script_or_data(tmp_path):
    commits, script = [], tmp_path / "mine.py"
    for file in (script, tmp_path / "results.json", tmp_path / "data/run.py"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
        for words in ("init", "add .", "commit -m made"):
            subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words.split()],
                           cwd=tmp_path, check=True, capture_output=True)
        commits.append(current_code(script)["commit"])
    assert len(commits[0]) == 40 and commits[0] == commits[1] != commits[2]
    script.write_text("# changed")
    assert current_code(script)["commit"] == f"{commits[2]}-dirty"


# ---- one name, one run ---------------------------------------------------------------------------
def test_a_name_belongs_to_one_config(quick, tmp_path, small, monkeypatch, capsys):
    written = json.loads(json.dumps(joint_baseline.main(quick)))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", None)                     # nothing can be trained
        assert joint_baseline.main(quick) == written                # finished: the table again
        assert "encoder of image" in capsys.readouterr().out

    result = tmp_path / f"{QUICK_FILE}.json"
    other = str(store.write(tmp_path / "other/tiny", **arrays(seed=1)))     # one name, other data
    for _ in ("by the result", "by the checkpoint alone"):
        for flags, word in ((["--lr", "0.5"], r"lr 0.003 \(now 0.5\)"),
                            (["--dataset", other], "audio.npy|image.npy")):
            with pytest.raises(DataError, match=word):
                joint_baseline.main([*quick, *flags, "--resume"])
        result.unlink(missing_ok=True)
    result.write_text("[]")
    with pytest.raises(DataError, match="is no result: remove it"):
        joint_baseline.main(quick)


def test_a_half_done_run_is_not_started_over_and_keeps_its_precision(quick, small):
    stopped(joint_baseline, [*quick, "--amp", "bf16"])
    with pytest.raises(DataError, match="is at epoch 1: --resume goes on"):
        joint_baseline.main(quick)
    wrong = "was trained in bfloat16, --amp off asks for float32"
    with pytest.raises(DataError, match=wrong):
        joint_baseline.main([*quick, "--resume", "--amp", "off"])
    assert joint_baseline.main([*quick, "--resume"])["precision"] == "bfloat16"
    with pytest.raises(DataError, match=wrong):                     # finished now
        joint_baseline.main([*quick, "--amp", "off"])
    for amp in ("auto", "bf16"):
        joint_baseline.main([*quick, "--amp", amp])


def test_the_lock_of_a_run(quick, tmp_path, small):
    with claim(tmp_path / QUICK_FILE), pytest.raises(DataError, match="under way in another"):
        joint_baseline.main(quick)
    assert not list(tmp_path.glob("joint*"))
    kept = stopped(joint_baseline, quick)               # its traceback too, as a notebook does
    joint_baseline.main([*quick, "--resume"])
    assert kept.tb


# ---- nothing is lost -----------------------------------------------------------------------------
def test_a_cut_or_flipped_checkpoint_is_never_taken_for_a_good_one(tmp_path):
    draw, file, weights = np.random.default_rng(0), tmp_path / "run.pt", torch.arange(9000)
    made = dict(precision="float32")
    torch.save(dict(config={}, log=[1], provenance=made, weights=weights), file)
    whole, refused = file.read_bytes(), []
    for trial in range(60):
        at, bit = int(draw.integers(len(whole))), 1 << int(draw.integers(8))
        flipped = bytes([whole[at] ^ bit]) + whole[at + 1:]
        file.write_bytes(whole[:at] + (b"" if trial % 2 else flipped))
        try:
            assert torch.equal(half_done(tmp_path / "run", {}, resume=True)["weights"], weights)
            refused.append(False)
        except DataError:
            refused.append(True)
    assert all(refused[1::2]) and np.mean(refused[::2]) > 0.8       # the other bits are padding


def test_a_checkpoint_whose_weights_do_not_fit(quick, tmp_path, small):
    stopped(joint_baseline, quick)
    file = tmp_path / f"{QUICK_FILE}.pt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["model"]["heads.image.weight"] = torch.zeros(4, 512)
    torch.save(checkpoint, file)
    with pytest.raises(DataError, match="does not fit this version of the script .*: remove it"):
        joint_baseline.main([*quick, "--resume"])


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(quick, tmp_path, small):
    with pytest.raises(FloatingPointError, match="epoch 1: loss .*nan.*: lower --lr"):
        joint_baseline.main([*quick, "--lr", "1e30"])
    assert not list(tmp_path.glob("*.pt*"))


def test_a_full_disk_leaves_nothing_half_written(quick, tmp_path, small):
    """A limit on the size of files, less than a checkpoint, fails in the middle, as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '.*{QUICK_FILE}.pt'"):
            joint_baseline.main(quick)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("joint*.pt*"))


# ---- how a command ends --------------------------------------------------------------------------
@pytest.mark.parametrize("error,code,line", [
    (DataError("no"), 2, "error: no"), (OSError(28, "full", "here"), 2, "error: here: full"),
    (FloatingPointError("loss"), 1, "error: loss"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2,
     "error: out of memory (CUDA out of memory.): free some of it and go on (a training run: with"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
    (ValueError("a bug"), None, "")])
def test_exit_codes(error, code, line, capsys):
    with pytest.raises(SystemExit if code else ValueError) as stop, exit_codes("some/x.py"):
        raise error
    assert code is None or stop.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(f"x.py: {line}") and said.count("\n") == 1 if code else said == ""


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 141)])
def test_an_interrupted_run_ends_with_a_line(number, code, tiny, tmp_path):
    """By Ctrl-C, by SIGTERM, and (None) where the reader of its output goes away."""
    runs = tmp_path / "runs"
    run = typed(["--dataset", tiny, *QUICK, "--epochs", "500", "--out", str(runs)])
    while not run.stdout.readline().startswith("alone 1/500"):
        assert run.poll() is None
    if number:
        run.send_signal(number)
    else:
        run.stdout.close()
    errors = run.stderr.read()
    assert run.wait(60) == code and "Traceback" not in errors
    ending = "interrupted; what was finished" if number else "stopped: nobody reads the output"
    assert errors.strip().splitlines()[-1].startswith(f"joint_baseline.py: {ending}")
    assert not list(runs.glob("*.partial")) and len(list(runs.glob("*.pt"))) == 1


# ---- nothing impossible begins -------------------------------------------------------------------
PARTS, LABELS = arrays()["splits"]["official"], arrays()["labels"]         # 0 train, 2 test
ONE_CLASS = {"official": np.where((LABELS > 0) & (PARTS == 0), 255, PARTS)}
ALONE = arrays(modalities=["image"])


@pytest.mark.parametrize("message,script,flags,changes", [
    ("--epochs cannot be 0", dimml, "--epochs 0", {}),
    ("--lr cannot be inf", dimml, "--lr inf", {}),
    ("--duc-weight cannot be -1", dimml, "--duc-weight -1", {}),
    ("--warmup 15 of 15 epochs: DUC would not start", dimml, "--warmup 15", {}),
    ("val is 1.5", dimml, "--val 1.5", {}), ("--seed -1 is not in", dimml, "--seed -1", {}),
    ("larger than the 30 train items", dimml, "--batch-size 31", {}),
    ("--batch-size must be at least 2", dimml, "--batch-size 1", {}),
    ("--interaction cannot be", udi, "--interaction nan 0", {}),
    ("no modality smell: it has audio, image", udi, "--anchor smell", {}),
    ("no validation items to choose the anchor by", udi, "--val 0", {}),
    ("group of train can spare any.: give", udi, "", {"groups": PARTS // 2}),       # it is but one
    ("no modality smell", joint_baseline, "--modality smell", {}),
    ("is a control of --ensemble", joint_baseline, "--encoder-lr-factor 2", {}),
    ("of one class", joint_baseline, "--batch-size 8", {"splits": ONE_CLASS}),
    ("is of --balance ogm_ge", balance, "--ogm-alpha 0.5", {}),
    ("has one modality, 2 are needed", dimml, "", ALONE),
])
def test_what_cannot_be_is_said_before_any_work(message, script, flags, changes, tmp_path):
    folder = store.write(tmp_path / "mine", **{**arrays(), **changes})
    with pytest.raises(DataError, match=message):
        script.main(["--dataset", str(folder), *flags.split(), "--out", str(tmp_path / "runs")])
    assert not list((tmp_path / "runs").glob("*.pt"))


@pytest.mark.parametrize("script,recipe,flags,message", [
    ("mine.py", {"hidden": (3, 4)}, "", "hidden is .3, 4.: only numbers, bools and words"),
    ("mine.py", {"weights": "50%"}, "--weights ../x.pt", "--weights cannot be '../x.pt': a word"),
    ("mine.py", {"margin": 0.0}, "", "--margin cannot be 0.0: .* may_be_0 names it"),
    ("mine.v2.py", {"epochs": 2}, "", "a dot in the name of a script")])
def test_what_a_fork_cannot_have_is_said(script, recipe, flags, message, tmp_path):
    with pytest.raises(DataError, match=message):
        args = data.parser(None, recipe).parse_args([*flags.split(), "--out", str(tmp_path)])
        data.parse(script, [], args, recipe, {}, {})        # without lr_step, which others scale
