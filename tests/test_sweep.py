"""The sweep: every cell once, through interrupts, and nothing over a result of another config."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import joint_baseline
from data import DataError
from results import sweep

SHORT = ["--seeds", "1", "--", "--batch-size", "16", "--epochs", "2"]
ROWS = ["--rows", "joint_baseline.concat", "joint_baseline.sum"]


# ---- which cells there are -----------------------------------------------------------------------
@pytest.mark.parametrize("row", sweep.ROWS)
def test_a_row_is_called_as_its_script_calls_it(row, tiny, tmp_path):
    argv = ["--dataset", tiny, "--out", str(tmp_path), *sweep.ROWS[row].split()]
    cell, config, done = sweep.planned(row, argv)
    assert cell.path == tmp_path / f"{row}-tiny-official-seed0" and not done
    assert Path(cell.script) == ROOT / f"{row.split('.')[0]}.py"


class Grid:
    rows, datasets, seeds, workers = ["udi.cka", "main"], ["synthetic", "ave:clean"], 2, 1
    data_dir, out, flags = "datasets", "runs", ["--epochs", "3"]

    def __init__(self, **changed):
        vars(self).update(changed)


def test_seed_by_seed_and_main_rows_of_all_sets_before_ablations():
    cells = [(row, argv[argv.index("--seed") + 1], argv[1]) for row, argv in sweep.grid(Grid())]
    assert len(cells) == 2 * 2 * 11
    assert cells[0] == ("joint_baseline.ensemble", "0", "synthetic")
    assert cells[10] == ("joint_baseline.ensemble", "0", "ave")
    assert cells[20] == ("joint_baseline.ensemble", "1", "synthetic")
    assert [cell for cell in cells if cell[0] == "udi.cka"] == cells[40:]
    argv = dict(sweep.grid(Grid()))["dimml.duc0"]
    assert argv == ("--dataset ave --split clean --data-dir datasets --seed 1 --out runs "
                    "--duc-weight 0 --epochs 3").split()


@pytest.mark.parametrize("flag", ["--seed", "--seed=3", "--data", "--out", "--gpu", "--sp", "--bal",
                                  "--duc-weight=1", "--resume", "--help", "-h", "--modality"])
def test_what_a_cell_sets_itself_is_refused_after_the_dashes(flag):
    with pytest.raises(DataError, match=f"{flag} after --"):
        list(sweep.grid(Grid(flags=["--epochs", "3", flag])))


@pytest.mark.parametrize("flags,message", [
    (["--rows", "udi.never"], "--rows udi.never: there are main, ablations"),
    (["--seeds", "0"], "--seeds and --workers must be at least 1"),
    (["--datasets", "nowhere"], "nowhere"),
])
def test_usage(flags, message, tmp_path):
    with pytest.raises(DataError, match=message):
        sweep.main([*flags, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


# ---- nothing is written over another run ---------------------------------------------------------
@pytest.mark.parametrize("suffix,message", [
    ("json", "sum-tiny-official-seed0.json.*epochs 1 .now 2."),
    ("pt", "sum-tiny-official-seed0.pt is of another run: epochs 1")])
def test_a_file_of_another_config_is_named_before_anything_is_trained(suffix, message, tiny,
                                                                      tmp_path):
    flags = ["--dataset", tiny, "--out", str(tmp_path), "--fusion", "sum", "--epochs", "1"]
    *_, path, config = joint_baseline.plan(flags)
    if suffix == "json":
        Path(f"{path}.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        torch.save({"config": config, "log": []}, f"{path}.pt")
    with pytest.raises(DataError, match=message):
        sweep.main([*ROWS, "--datasets", tiny, "--out", str(tmp_path), *SHORT])
    assert not list(tmp_path.glob("*.log"))


def test_two_folders_of_one_name_are_refused(tiny, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other" / "tiny")
    meta = json.loads((other / "meta.json").read_text(encoding="utf-8"))
    file = next(iter(meta["sha256"]))
    meta["sha256"][file] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(DataError, match="two runs would both be called .*concat-tiny"):
        sweep.main([*ROWS, "--datasets", tiny, str(other), "--out", str(tmp_path), *SHORT])


# ---- training for real ---------------------------------------------------------------------------
def test_from_another_folder_and_again(tiny, tmp_path, monkeypatch, capsys):
    """Relative paths mean the same in parent and child; started again, nothing is trained."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    argv = [*ROWS, "--datasets", "tiny", "--data-dir", "..", "--workers", "2", "--out", "runs",
            *SHORT]
    assert not sweep.main(argv)
    results = sorted((here / "runs").glob("*.json"))
    assert [path.name for path in results] == [f"joint_baseline.{fusion}-tiny-official-seed0.json"
                                               for fusion in ("concat", "sum")]
    assert {path.suffix for path in (here / "runs").iterdir()} == {".json", ".log"}
    before = [path.stat().st_mtime_ns for path in results]
    assert not sweep.main(argv)
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in results] == before


def children(process):
    said = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True).stdout
    pairs = [line.split() for line in said.splitlines()]
    return [int(pid) for parent, pid in pairs if int(parent) == process.pid]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("sent,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_of_the_sweep_alone_ends_its_children(sent, code, tiny, tmp_path):
    argv = [*ROWS, "--datasets", tiny, "--workers", "2", "--out", str(tmp_path), *SHORT[:-1], "500"]
    process = subprocess.Popen([sys.executable, "-m", "results.sweep", *argv], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(list(tmp_path.glob("*.pt"))) < 2:      # both are training
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    pids = children(process)
    assert len(pids) == 2
    process.send_signal(sent)
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == code
    assert not any(map(alive, pids))
    assert not list(tmp_path.glob("*.json"))         # but checkpoints, to go on from
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_threads(tmp_path, monkeypatch):
    """A child has its share of the cores, unless the user has said how many threads."""
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'])", encoding="utf-8")
    for said, threads, expected in ((None, 3, "3"), ("7", 3, "7"), ("7", None, "7")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if said:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        cell = sweep.Cell(str(script), [], tmp_path / f"out{said}{threads}")
        assert sweep.end(cell, sweep.start(cell, threads=threads)) == 0
        assert Path(f"{cell.path}.log").read_text(encoding="utf-8") == f"{expected}\n"


def test_slurm_submits_the_same_cells_and_one_that_fails_is_named(tiny, tmp_path, capsys):
    """Where there is no Slurm, submitit's local executor runs the array as processes."""
    argv = ["--rows", ROWS[2], "--datasets", tiny, "--out", str(tmp_path), "--slurm",
            "timeout_min=10", *SHORT, "--lr", "1e30"]
    assert sweep.main(argv) == 1
    assert "sum-tiny-official-seed0 failed with code 1: see its .log" in capsys.readouterr().out
    log = tmp_path / "joint_baseline.sum-tiny-official-seed0.log"
    assert "not finite" in log.read_text(encoding="utf-8")
