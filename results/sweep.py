"""Run the missing cells of a grid of rows, datasets and seeds; each is a command you could type.

    python -m results.sweep --datasets synthetic avmnist:small --seeds 5 --workers 2
    python -m results.sweep --rows main udi.cka --datasets ave --gpus 0 1     # one process a GPU
    python -m results.sweep --rows main mine.py "mine.py --alpha 2" --gpus 0 0 0    # three on one
    python -m results.sweep --datasets ave --slurm slurm_partition=gpu gpus_per_node=1

Seed by seed, main rows of every dataset before ablations. A finished run is never repeated, a half
one goes on after its last epoch: started again, the same command goes on. What a run prints goes to
<its name>.log; its checkpoint is removed when its result stands.
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from data import DataError, exit_codes, finished, half_done, pick_device
from data.run import differences
from results.table import ROOT, is_ablation, main_rows

ROWS = {        # the flags of each row of the table; a row is called <script>[.<variant>]
    "joint_baseline.ensemble": "--ensemble",
    "joint_baseline.concat": "",
    "balance.auxiliary": "--balance auxiliary",
    "balance.ogm_ge": "--balance ogm_ge",
    "balance.mmpareto": "--balance mmpareto",
    "balance.dgl": "--balance dgl",
    "dimml": "",
    "dimml.duc0": "--duc-weight 0",
    "udi": "",
    "udi.interaction0-0": "--interaction 0 0",
    "joint_baseline.sum": "--fusion sum",
    "joint_baseline.film": "--fusion film",
    "joint_baseline.gated": "--fusion gated",
    "joint_baseline.ensemble.encoder2": "--ensemble --encoder-lr-factor 2",
    "balance.auxiliary.encoder1.5": "--balance auxiliary --encoder-lr-factor 1.5",
    "dimml.shared0": "--shared-weight 0",
    "udi.interaction1-0": "--interaction 1 0",
    "udi.interaction0-1": "--interaction 0 1",
    "udi.interaction0.5-0.5": "--interaction 0.5 0.5",
    "udi.cka": "--complement cka",
    "udi.stage1": "--follower-init stage1",
}
OF_A_CELL = ("--dataset", "--data-dir", "--split", "--seed", "--out", "--gpu", "--resume")


class Cell(NamedTuple):
    """One run: its script and command line, and what `plan` says of them: the path of its files
    without suffix, its config, the precision that was asked for."""
    script: Path
    argv: list
    path: Path
    config: dict
    amp: str

    @property
    def order(self):        # stable: the datasets and rows of a seed stay as they were named
        row = ".".join(filter(None, (self.config["method"], self.config["variant"])))
        return is_ablation(row, self.config["dataset"]), self.config["seed"]


# ---- which cells there are -----------------------------------------------------------------------
def rows_of(names, dataset):
    """(script, flags) of each row that --rows names: a group, a row of ours, or a command line."""
    groups = {"main": main_rows(dataset),
              "ablations": [row for row in ROWS if is_ablation(row, dataset)]}
    for name in dict.fromkeys(row for name in names for row in groups.get(name, [name])):
        script, *flags = name.split() or [""]
        if name in ROWS:
            yield ROOT / f"{name.split('.')[0]}.py", ROWS[name].split()
        elif script.endswith(".py"):
            yield Path(script).expanduser().resolve(), flags
        else:
            raise DataError(f"--rows {name}: there are main, ablations, {', '.join(ROWS)}, and "
                            "scripts (FILE.py, with flags or without)")


def planner(script):
    """A script's `plan`. Raises DataError, a line, where there is none."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.plan
    except Exception as error:      # somebody's script: whatever it raises
        raise DataError(f"{script} is no script of a row, with a function `plan` like that of "
                        f"dimml.py ({type(error).__name__}: {error})") from None


def grid(args):
    """All cells, in the order in which they run. A row whose script cannot run on a dataset is left
    out there, with its reason; raises DataError where none is left, and for two runs of one
    name."""
    for flag in args.flags:
        if flag.startswith("--") and any(own.startswith(flag.split("=")[0]) for own in OF_A_CELL):
            raise DataError(f"{flag} after --: that is for the sweep to set, see --help")
    plans, cells = {}, {}
    for name in args.datasets:
        dataset, _, split = name.partition(":")
        runs, left_out = 0, []
        for script, flags in rows_of(args.rows, Path(dataset).name):
            if script not in plans:
                plans[script] = planner(script)
            for seed in range(args.seeds):
                argv = ["--dataset", dataset, "--data-dir", args.data_dir, "--seed", str(seed),
                        "--out", args.out, *(["--split", split] if split else []), *flags,
                        *args.flags]
                try:
                    parsed, *_, path, config = plans[script](argv)
                except DataError as error:
                    left_out.append(f"{shlex.join([script.name, *flags])} on {name}: {error}")
                    break
                runs += 1
                cell = Cell(script, [*argv, "--resume"], path, config, parsed.amp)
                other = cells.setdefault(path, cell)
                if (other.script, other.config) != (script, config):    # two folders of one name
                    what = differences(other.config, config) or [str(other.script), str(script)]
                    raise DataError(f"two runs would both be called {path}: {', '.join(what)}")
        if not runs:
            raise DataError(f"no row can be run: {left_out[0]}")
        for why in left_out:
            print(f"results.sweep: left out: {why}", file=sys.stderr)
    return sorted(cells.values(), key=lambda cell: cell.order)


def missing(cells):
    """Those that are not finished. Raises DataError if a result or checkpoint of another run has
    the name of one."""
    there = []
    for cell in cells:
        if not finished(cell.path, cell.config, cell.amp):
            half_done(cell.path, cell.config, resume=True, amp=cell.amp)
            there.append(cell)
    return there


# ---- running them --------------------------------------------------------------------------------
def start(cell, flags=(), **environment):
    """The process of a cell, in the folder that the sweep was started in."""
    # threads that spin while they wait slow down the other runs
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ, **environment}
    # so that a script in any folder finds `data`
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{cell.path}.log", "ab") as log:
        return subprocess.Popen([sys.executable, str(cell.script), *cell.argv, *flags],
                                env=environment, stdout=log, stderr=log)


def end(cell, process):
    """Wait for a cell's end -> its exit code. A finished one needs no checkpoint (180 MB)."""
    code = process.wait()
    for suffix in (".pt", ".lock") if code == 0 else ():
        Path(f"{cell.path}{suffix}").unlink(missing_ok=True)
    return code


def run_one(cell):      # as a job of Slurm
    return end(cell, start(cell))


def run_here(cells, gpus, workers):
    """Run cells side by side, one for each entry of `gpus`, or `workers` on the CPU. Yields (cell,
    exit code). Whatever ends the sweep ends them too, but for a SIGKILL: runs that it leaves finish
    their work, and keep their names locked until then."""
    free, running, waiting = list(gpus or [None] * workers), [], list(cells)
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    share = str(max(1, cores // len(free)))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""        # else the scripts take the first GPU
    try:
        while waiting or running:
            while free and waiting:
                cell, gpu = waiting.pop(0), free.pop(0)
                flags = [] if gpu is None else ["--gpu", str(gpu)]
                running.append((cell, gpu, start(cell, flags, **environment)))
            time.sleep(0.1)
            for cell, gpu, process in list(running):
                if process.poll() is not None:
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


def main(argv=None):
    """-> exit code: 0 if every cell of the grid stands, 1 if one failed. Raises DataError before
    anything is trained if one cannot be."""
    parser = argparse.ArgumentParser("python -m results.sweep", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", nargs="+", default=["main"],
        help="main, ablations, single ones, or scripts: \"mine.py --alpha 2\" (default: main)")
    add("--datasets", nargs="+", default=["synthetic"],
        help="names or paths; NAME:SPLIT for a split that is not the first")
    add("--seeds", type=int, default=5, help="0 .. N-1 (default: %(default)s)")
    add("--data-dir", default="datasets")
    add("--out", default="runs", help="(default: %(default)s)")
    where = parser.add_mutually_exclusive_group().add_argument
    where("--gpus", type=int, nargs="+", default=[],
          help="a process for each number; a number may stand there more than once")
    where("--workers", type=int, default=1, help="processes on the CPU (default: %(default)s)")
    where("--slurm", nargs="*", type=option, metavar="KEY=VALUE", help="submitit's parameters")
    add("flags", nargs="*", help="after --: flags for every run, e.g. -- --epochs 5 --amp off")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.workers < 1:
        raise DataError("--seeds and --workers must be at least 1")
    for gpu in args.gpus:
        pick_device(gpu, "auto")            # raises DataError if it cannot be used

    cells = grid(args)
    left = missing(cells)
    print(f"{len(cells)} runs, {len(cells) - len(left)} of them finished before", flush=True)
    runs = (run_here(left, args.gpus, args.workers) if args.slurm is None else
            run_slurm(left, Path(args.out).expanduser() / "slurm", dict(args.slurm)))
    failed, began = 0, time.time()
    with contextlib.closing(runs):          # whatever ends this loop ends the children
        for count, (cell, code) in enumerate(runs, 1):
            minutes = (time.time() - began) / count * (len(left) - count) / 60
            failed += code != 0
            said = f"failed with code {code}: see its .log" if code else "finished"
            print(f"[{count}/{len(left)}] {cell.path} {said}, {minutes:.0f} min left", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    with exit_codes("results.sweep"):
        sys.exit(main())
