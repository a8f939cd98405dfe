"""The sweep: every cell once, through kills, and a shared stage 1 that changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import udi
from results import sweep

SHORT = ["--batch-size", "16", "--epochs", "2"]


def comparable(path):
    """A result without what differs between two runs of the same procedure: when, where and how fast."""
    result = json.loads(path.read_text())
    for key in ("command", "seconds", "items_per_second"):
        del result[key]
    for epoch in result["epochs"]:
        del epoch["seconds"], epoch["items_per_second"]
    return result


def test_a_variant_that_shares_stage_1_is_the_run_of_its_own(tiny, tmp_path):
    out = tmp_path / "sweep"
    assert sweep.main(["--methods", "udi", "--variants", "udi.cka", "--datasets", tiny, "--seeds", "1", "--workers", "2",
                       "--out", str(out), "--", *SHORT]) == 0
    udi.main(["--dataset", tiny, "--complement", "cka", *SHORT, "--out", str(tmp_path)])
    name = "udi.cka-tiny-official-seed0.json"
    assert comparable(out / name) == comparable(tmp_path / name)
    assert not list(out.glob("*.pt"))


def test_killed_and_started_again_it_runs_what_is_missing(tiny, tmp_path):
    command = [sys.executable, "-m", "results.sweep", "--methods", "joint_baseline", "--variants", "joint_baseline.sum",
               "joint_baseline.concat", "--datasets", tiny, "--seeds", "1", "--out", str(tmp_path), "--", *SHORT]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("*.json")):                             # one is finished, others are under way
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    process.communicate()
    time.sleep(1)                                                        # its children have gone with it
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(before) == 1
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "2 runs, 1 of them finished before" in again.stdout
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_slurm_submits_the_same_cells_and_one_that_fails_is_named(tiny, tmp_path, capsys):
    """Where there is no Slurm, submitit's local executor runs the array as processes."""
    (tmp_path / "joint_baseline.sum-tiny-official-seed0.pt").write_bytes(b"not a checkpoint")
    command = ["--methods", "joint_baseline", "--variants", "joint_baseline.sum", "joint_baseline.concat", "--datasets", tiny,
               "--seeds", "1", "--out", str(tmp_path), "--slurm", "timeout_min=10", "--", *SHORT]
    assert sweep.main(command) == 1
    assert "joint_baseline.sum-tiny-official-seed0 failed with code 2: see its .log" in capsys.readouterr().out
    assert "no checkpoint can be read" in (tmp_path / "joint_baseline.sum-tiny-official-seed0.log").read_text()
    assert (tmp_path / "joint_baseline.concat-tiny-official-seed0.json").exists()


@pytest.mark.parametrize("flags,message", [
    (["--variants", "udi.never"], "--variants udi.never"),
    (["--seeds", "0"], "--seeds and --workers count from 1"),
    (["--datasets", "nowhere"], "there is no prepared folder 'nowhere'"),
])
def test_usage(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*flags, "--out", str(tmp_path)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
