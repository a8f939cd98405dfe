"""The sweep: every cell once, through interrupts, and nothing over a result of another config."""

import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT

import joint_baseline
from data import DataError
from results import sweep

SHORT = ["--seeds", "1", "--", "--batch-size", "16", "--epochs", "2"]
ROWS = ["--rows", "joint_baseline.concat", "joint_baseline.sum"]
MINE = """
import argparse, os, sys
from pathlib import Path
import data

def plan(argv):
    flags = dict(zip(argv[::2], argv[1::2]))
    alpha = "alpha" + flags["--alpha"] if "--alpha" in flags else ""
    if alpha == "alpha0":
        raise data.DataError("--alpha cannot be 0")
    dataset = Path(flags["--dataset"]).name
    path = Path(flags["--out"]) / f"mine{alpha}-{dataset}-seed{flags['--seed']}"
    config = dict(method="mine", variant=alpha, dataset=dataset, seed=int(flags["--seed"]))
    return argparse.Namespace(amp="auto"), path, config

if __name__ == "__main__":
    print(os.environ["OMP_NUM_THREADS"], repr(os.environ["CUDA_VISIBLE_DEVICES"]), sys.argv[-1])
"""


def names(*argv):
    """The names of a grid's runs, in their order."""
    flags = {"rows": ["main"], "datasets": ["synthetic"], "seeds": 1, "data_dir": "datasets",
             "out": "runs", "flags": [], **dict(zip(argv[::2], argv[1::2]))}
    return [path.name for path in sweep.grid(Namespace(**flags))]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A script that is not ours, in the folder that the sweep is started from."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


# ---- which cells there are -----------------------------------------------------------------------
def test_a_row_is_called_as_its_script_calls_it(tiny):
    rows = list(sweep.ROWS)
    found = names("rows", rows, "datasets", [tiny])
    assert sorted(found) == sorted(f"{row}-tiny-official-seed0" for row in rows)


def test_seed_by_seed_and_main_rows_of_all_sets_before_ablations(tiny, tmp_path, mine):
    other = shutil.copytree(tiny, tmp_path / "synergy")
    found = names("rows", ["udi.cka", "mine.py", "main", "mine.py --alpha 2"], "seeds", 2,
                  "datasets", [tiny, str(other)])
    main = 10 + 2 + 12 + 2      # with two rows of mine; on synergy two more are main rows
    assert [int(name[-1]) for name in found] == [0] * main + [1] * main + [0, 0, 1, 1]
    assert found[:3] == ["mine-tiny-seed0", "joint_baseline.ensemble-tiny-official-seed0",
                         "joint_baseline.concat-tiny-official-seed0"]
    assert "joint_baseline.gated-synergy-official-seed0" in found
    assert not any("udi.cka" in name for name in found[:-4])


@pytest.mark.parametrize("flags,message", [
    (["--rows", "udi.never"], "--rows udi.never: there are main, ablations"),
    (["--rows", "empty.py --alpha 2"], "empty.py is no script of a row, with a function `plan`"),
    (["--rows", "mine.py --alpha 0"], "no row can be run: mine.py --alpha 0 on synthetic: --alpha"),
    (["--rows", "mine.py --alpha"], "no row can be run: mine.py --alpha on synthetic: KeyError"),
    (["--rows", "dimml.py --seed 7"], "dimml.py --seed 7: .* are the sweep's to set"),
    (["--rows", "udi.cka", "--", "--tau", "2"], "udi.py .*cka does not take these flags: .*--tau"),
    (["--slurm", "slurm_partition=gpu"], "--slurm: say timeout_min=.., the minutes that a run"),
    (["--slurm", "timeout_min=9"], "--slurm: .*"),
    (["--seeds", "0"], "--seeds and --workers must be at least 1"),
    (["--datasets", "nowhere"], "no row can be run: joint_baseline.py --ensemble on nowhere"),
])
def test_usage(flags, message, tmp_path, mine):
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        sweep.main(flags)
    assert not (tmp_path / "runs").exists()


def test_a_row_that_cannot_run_is_left_out_with_its_reason(tiny, capsys):
    """A dataset without validation items: udi cannot choose its anchor."""
    found = names("rows", ["joint_baseline.concat", "udi"], "datasets", [tiny],
                  "flags", ["--val", "0"])
    assert found == ["joint_baseline.concat-tiny-official-seed0"]
    assert "left out: udi.py on " in capsys.readouterr().err


# ---- nothing is written over another run ---------------------------------------------------------
def test_a_result_of_another_config_is_named_before_anything_is_trained(tiny, tmp_path):
    flags = ["--dataset", tiny, "--out", str(tmp_path), "--fusion", "sum", "--epochs", "1"]
    *_, path, config = joint_baseline.plan(flags)
    Path(f"{path}.json").write_text(json.dumps(config), encoding="utf-8")
    message = "sum-tiny-official-seed0.json is of another run: epochs 1 .now 2."
    with pytest.raises(DataError, match=message):
        sweep.main([*ROWS, "--datasets", tiny, "--out", str(tmp_path), *SHORT])
    assert not list(tmp_path.glob("*.log"))


def test_two_runs_of_one_name_are_refused(tmp_path, mine):
    (tmp_path / "other").mkdir()
    shutil.copy("mine.py", "other/mine.py")
    with pytest.raises(DataError, match="both be called runs/mine-synthetic-seed0: .*/m"):
        names("rows", ["mine.py", "other/mine.py"])


# ---- training for real ---------------------------------------------------------------------------
def test_from_another_folder_and_again(tiny, tmp_path, monkeypatch, capsys):
    """Relative paths mean the same in parent and child; started again, nothing is trained."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    argv = [*ROWS, "--datasets", "tiny", "--data-dir", "..", "--workers", "2", *SHORT]
    assert not sweep.main(argv)
    results = sorted((here / "runs").glob("*.json"))
    assert [path.name for path in results] == [f"joint_baseline.{fusion}-tiny-official-seed0.json"
                                               for fusion in ("concat", "sum")]
    assert {path.suffix for path in (here / "runs").iterdir()} == {".json", ".log"}
    before = [path.stat().st_mtime_ns for path in results]
    assert not sweep.main(argv)
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in results] == before


def test_an_interrupt_of_the_sweep_alone_ends_its_children(tiny, tmp_path):
    argv = [*ROWS, "--datasets", tiny, "--workers", "2", "--out", str(tmp_path), *SHORT[:-1], "500"]
    process = subprocess.Popen([sys.executable, "-m", "results.sweep", *argv], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(list(tmp_path.glob("*.pt"))) < 2:      # both are training
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    said = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True).stdout
    pairs = [line.split() for line in said.splitlines()]
    children = [pid for parent, pid in pairs if int(parent) == process.pid]
    assert len(children) == 2
    process.terminate()
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 143
    assert subprocess.run(["ps", "-p", ",".join(children)], capture_output=True).returncode == 1
    assert not list(tmp_path.glob("*.json"))         # but checkpoints, to go on from
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_what_children_see(tmp_path, mine, monkeypatch):
    """On the CPU a share of the cores, unless the user has said how many threads, and no GPU; three
    entries of --gpus are three processes."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sweep.os, "process_cpu_count", lambda: 6, raising=False)
    monkeypatch.setattr(sweep, "pick_device", lambda gpu: None)
    for flags, said in ((["--workers", "2"], "3 '' --resume\n"),
                        (["--gpus", "1", "1", "1"], "2 '0' 1\n")):
        out = tmp_path / flags[0]
        assert not sweep.main(["--rows", "mine.py", "--seeds", "4", "--out", str(out), *flags])
        assert [log.read_text(encoding="utf-8") for log in out.glob("*.log")] == [said] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert not sweep.main(["--rows", "mine.py", "--seeds", "1", "--out", "own"])
    assert next(Path("own").glob("*.log")).read_text(encoding="utf-8").startswith("7 ")


def test_slurm_submits_the_same_cells_and_one_that_fails_is_named(tiny, tmp_path, capsys,
                                                                  monkeypatch):
    """Here submitit's local executor runs the array, as processes."""
    monkeypatch.setattr(sweep, "CLUSTER", "local")
    argv = ["--rows", ROWS[2], "--datasets", tiny, "--out", str(tmp_path), "--slurm",
            "timeout_min=10", *SHORT, "--lr", "1e30"]
    assert sweep.main(argv) == 1
    assert "sum-tiny-official-seed0 failed with code 1: see its .log and" in capsys.readouterr().out
    log = tmp_path / "joint_baseline.sum-tiny-official-seed0.log"
    assert "not finite" in log.read_text(encoding="utf-8")
