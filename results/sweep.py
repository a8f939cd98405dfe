"""Run the missing cells of a grid of rows, datasets and seeds; each is a command you could type.

    python -m results.sweep --datasets synthetic avmnist:small --seeds 5 --workers 2
    python -m results.sweep --rows main udi.cka --datasets ave --gpus 0 1     # one process a GPU
    python -m results.sweep --datasets ave --slurm slurm_partition=gpu gpus_per_node=1

Seed by seed, main rows of every dataset before ablations. A finished run is never repeated, a half
one goes on after its last epoch: started again, the same command goes on. What a run prints goes to
<its name>.log; its checkpoint is removed when its result stands.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import dimml
import joint_baseline
import udi
from data import DataError, exit_codes, finished, half_done, pick_device
from data.files import differences
from results.table import MAIN, is_ablation

SCRIPTS = {"joint_baseline": joint_baseline, "dimml": dimml, "udi": udi}
ROWS = {        # what makes each row of the table; the first ten are the main ones
    "joint_baseline.ensemble": "--ensemble",
    "joint_baseline.concat": "",
    "joint_baseline.auxiliary": "--balance auxiliary",
    "joint_baseline.ogm_ge": "--balance ogm_ge",
    "joint_baseline.mmpareto": "--balance mmpareto",
    "joint_baseline.dgl": "--balance dgl",
    "dimml": "",
    "dimml.duc0": "--duc-weight 0",
    "udi": "",
    "udi.interaction0-0": "--interaction 0 0",
    "joint_baseline.sum": "--fusion sum",
    "joint_baseline.film": "--fusion film",
    "joint_baseline.gated": "--fusion gated",
    "joint_baseline.auxiliary.encoder1.5": "--balance auxiliary --encoder-lr-factor 1.5",
    "dimml.shared0": "--shared-weight 0",
    "udi.interaction1-0": "--interaction 1 0",
    "udi.interaction0-1": "--interaction 0 1",
    "udi.interaction0.5-0.5": "--interaction 0.5 0.5",
    "udi.cka": "--complement cka",
    "udi.stage1": "--follower-init stage1",
}
GROUPS = {"main": MAIN, "ablations": [row for row in ROWS if is_ablation(row)]}
OF_A_CELL = {"--dataset", "--data-dir", "--split", "--seed", "--out", "--gpu", "--resume",
             "--modality", "--help", "-h",
             *(word for flags in ROWS.values() for word in flags.split() if word.startswith("--"))}


class Cell(NamedTuple):
    """One run: its script's path, its command line, and the path of its files less their suffix."""
    script: str
    argv: list
    path: Path


def planned(row, argv):
    """What a row's script says of a command line: a Cell, its config, and whether it is finished.
    Raises DataError if another run, finished or not, has its name."""
    script = SCRIPTS[row.split(".")[0]]
    try:
        *_, path, config = script.plan(argv)
    except DataError as error:
        raise DataError(f"{row}: {error}") from None
    done = finished(path, config)
    if not done:
        half_done(path, config, n_epochs=None, resume=True)     # raises if it cannot go on
    return Cell(str(Path(script.__file__).resolve()), [*argv, "--resume"], path), config, bool(done)


def end_with_parent():
    """In a child, on Linux: it ends when the sweep is killed, so that no other sweep meets it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def start(cell, flags=(), threads=None):
    """The process of a cell, in the folder that the sweep was started in."""
    environment = dict(os.environ)
    if threads:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{cell.path}.log", "ab") as log:
        return subprocess.Popen([sys.executable, cell.script, *cell.argv, *flags], env=environment,
                                stdout=log, stderr=log, preexec_fn=end_with_parent)


def end(cell, process):
    """Wait for a cell's end -> its exit code. A finished one needs no checkpoint (180 MB)."""
    code = process.wait()
    for suffix in (".pt", ".lock") if code == 0 else ():
        Path(f"{cell.path}{suffix}").unlink(missing_ok=True)
    return code


def run_one(cell):      # as a job of Slurm
    return end(cell, start(cell))


def run_here(cells, gpus, workers):
    """Run cells side by side, one a GPU or `workers` on the CPU. Yields (cell, exit code). Whatever
    ends the sweep ends them too."""
    free, running, waiting = list(gpus or [None] * workers), [], list(cells)
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    threads = max(1, cores // len(free))
    try:
        while waiting or running:
            while free and waiting:
                cell, gpu = waiting.pop(0), free.pop(0)
                flags = [] if gpu is None else ["--gpu", str(gpu)]
                running.append((cell, gpu, start(cell, flags, threads)))
            time.sleep(0.1)
            for cell, gpu, process in [entry for entry in running if entry[2].poll() is not None]:
                running.remove((cell, gpu, process))
                free.append(gpu)
                yield cell, end(cell, process)
    finally:
        for *_, process in running:
            process.terminate()         # at most one epoch is lost
        for *_, process in running:
            process.wait()


def run_slurm(cells, folder, options):
    """The same as one job array through submitit, whose local executor serves where no Slurm is."""
    import submitit
    executor = submitit.AutoExecutor(folder=folder)
    try:
        executor.update_parameters(**options)
    except NameError as error:
        raise DataError(f"--slurm: {str(error).splitlines()[0]}") from None
    jobs = executor.map_array(run_one, cells)
    try:
        for cell, job in zip(cells, jobs):
            yield cell, 1 if job.exception() else job.result()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()


def option(text):
    key, _, value = text.partition("=")
    return key, int(value) if value.isdecimal() else value


def grid(args):
    """The command lines of a grid, (row, argv), in the order in which they run."""
    rows = [row for name in args.rows for row in GROUPS.get(name, [name])]
    for row in rows:
        if row not in ROWS:
            raise DataError(f"--rows {row}: there are main, ablations, {', '.join(ROWS)}")
    for word in args.flags:
        flag = word.split("=")[0]
        if flag.startswith("-") and any(own.startswith(flag) for own in OF_A_CELL):
            raise DataError(f"{word} after --: that is for the sweep to set, see --help")
    if args.seeds < 1 or args.workers < 1:
        raise DataError("--seeds and --workers must be at least 1")
    for group in (GROUPS["main"], GROUPS["ablations"]):
        for seed in range(args.seeds):
            for name in args.datasets:
                dataset, _, split = name.partition(":")
                for row in dict.fromkeys(row for row in rows if row in group):
                    yield row, ["--dataset", dataset, *(["--split", split] if split else []),
                                "--data-dir", args.data_dir, "--seed", str(seed), "--out", args.out,
                                *ROWS[row].split(), *args.flags]


def main(argv=None):
    """-> exit code: 0 if every cell of the grid stands, 1 if one failed. Raises DataError before
    anything is trained if a cell cannot be."""
    parser = argparse.ArgumentParser("python -m results.sweep", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", nargs="+", default=["main"],
        help="main, ablations or single ones (default: main)")
    add("--datasets", nargs="+", default=["synthetic"],
        help="names or paths; NAME:SPLIT for a split that is not the first")
    add("--seeds", type=int, default=5, help="0 .. N-1 (default: %(default)s)")
    add("--data-dir", default="datasets")
    add("--out", default="runs", help="(default: %(default)s)")
    where = parser.add_mutually_exclusive_group().add_argument
    where("--gpus", type=int, nargs="*", default=[], help="numbers of the GPUs, a process each")
    where("--workers", type=int, default=1, help="processes on the CPU (default: %(default)s)")
    where("--slurm", nargs="*", type=option, metavar="KEY=VALUE", help="submitit's parameters")
    add("flags", nargs="*", help="after --: flags for every run, e.g. -- --epochs 5 --amp off")
    args = parser.parse_args(argv)

    for gpu in args.gpus:
        pick_device(gpu, "auto")            # raises DataError if there is none
    cells, configs, missing = {}, {}, []
    for row, command in grid(args):
        cell, config, done = planned(row, command)
        if configs.setdefault(cell.path, config) != config:     # two folders of one name
            raise DataError(f"two runs would both be called {cell.path}: "
                            f"{', '.join(differences(configs[cell.path], config))}")
        if cell.path not in cells and not done:
            missing.append(cell)
        cells[cell.path] = cell
    print(f"{len(cells)} runs, {len(cells) - len(missing)} of them finished before", flush=True)

    runs = (run_here(missing, args.gpus, args.workers) if args.slurm is None else
            run_slurm(missing, Path(os.path.expanduser(args.out)) / "slurm", dict(args.slurm)))
    failed, began = 0, time.time()
    with contextlib.closing(runs):          # whatever ends this loop ends the children
        for count, (cell, code) in enumerate(runs, 1):
            left = (time.time() - began) / count * (len(missing) - count)
            failed += code != 0
            print(f"[{count}/{len(missing)}] {cell.path} "
                  + (f"failed with code {code}: see its .log" if code else "finished")
                  + f", {left / 60:.0f} min left", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    with exit_codes("results.sweep"):
        sys.exit(main())
