"""Run the missing cells of a grid of rows, datasets and seeds; each is a command you could type.

    python -m results.sweep --datasets synthetic avmnist:small --seeds 5 --workers 2
    python -m results.sweep --rows main udi.cka --datasets ave --gpus 0 1     # one process a GPU
    python -m results.sweep --rows main mine.py "mine.py --alpha 2" --gpus 0 0 0    # three on one
    python -m results.sweep --datasets ave --slurm slurm_partition=gpu gpus_per_node=1 \\
        timeout_min=600

Seed by seed, main rows of every dataset before ablations. A finished run is never repeated, a half
one goes on after its last epoch: started again, the same command goes on. What a run prints goes to
<its name>.log; its checkpoint is removed when its result stands.
"""

import argparse
import contextlib
import functools
import os
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data import DataError, exit_codes, finished, half_done, pick_device
from data.run import first_line
from data.store import check
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
CLUSTER = "slurm"       # of submitit


# ---- which runs there are ------------------------------------------------------------------------
def rows_of(names, dataset):
    """(script, flags) of each row that --rows names: a group, a row of ours, or a command line."""
    groups = {"main": main_rows(dataset),
              "ablations": [row for row in ROWS if is_ablation(row, dataset)]}
    for name in dict.fromkeys(row for name in names for row in groups.get(name, [name])):
        script, *flags = shlex.split(name) or [""]
        if name in ROWS:
            yield ROOT / f"{name.split('.')[0]}.py", ROWS[name].split()
        elif script.endswith(".py"):
            yield Path(script).expanduser().resolve(), flags
        else:
            raise DataError(f"--rows {name}: there are main, ablations, {', '.join(ROWS)}, and "
                            "scripts (FILE.py, with flags or without)")


@functools.cache
def plan_of(script):
    """A script's `plan`. Raises DataError, a line, where there is none."""
    try:
        return runpy.run_path(str(script))["plan"]
    except Exception as error:      # somebody's script: whatever it raises
        raise DataError(f"{script} is no script of a row, with a function `plan` like that of "
                        f"dimml.py ({type(error).__name__}: {error})") from None


def grid(args):
    """{path of its files without suffix: (command line, config, --amp)} of all runs, in the order
    in which they run. A row whose script cannot run on a dataset is left out there, with its
    reason; raises DataError where none is left, and for two runs of one name."""
    runs, order = {}, {}
    for name in args.datasets:
        dataset, _, split = name.partition(":")
        left_out, planned = [], 0
        for script, flags in rows_of(args.rows, Path(dataset).name):
            for seed in range(args.seeds):
                argv = [*flags, *args.flags, "--dataset", dataset, "--data-dir", args.data_dir,
                        *(["--split", split] if split else []), "--seed", str(seed),
                        "--out", args.out]
                row = shlex.join([script.name, *flags])
                own = {"--seed", "--out", "--dataset", "--split", "--data-dir"}
                check(not own.intersection([*flags, *args.flags]),
                      f"{row}: {', '.join(sorted(own))} are the sweep's to set")
                try:
                    parsed, *_, path, config = plan_of(script)(argv)
                except SystemExit:      # of argparse, which has said why
                    raise DataError(f"{row} does not take these flags: "
                                    f"{shlex.join(argv)}") from None
                except Exception as error:      # somebody's script: whatever it raises
                    kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
                    left_out.append(f"{row} on {name}: {kind}{error}")
                    break
                planned += 1
                run = [str(script), *argv, "--resume"], config, parsed.amp
                check(runs.setdefault(path, run) == run,
                      f"two runs would both be called {path}: of {shlex.join(runs[path][0])} and "
                      f"of {shlex.join(run[0])}, or their data differ")
                row = ".".join(filter(None, (config["method"], config["variant"])))
                order[path] = is_ablation(row, config["dataset"]), seed
        check(planned, f"no row can be run: {''.join(left_out[:1])}")
        for why in left_out:
            print(f"results.sweep: left out: {why}", file=sys.stderr)
    # stable: the datasets and rows of a seed stay as they were named
    return {path: runs[path] for path in sorted(runs, key=order.get)}


# ---- running them --------------------------------------------------------------------------------
def start(path, command, flags=(), **environment):
    """The process of a run, in the folder that the sweep was started in."""
    # threads that spin while they wait slow down the other runs
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ, **environment}
    # so that a script in any folder finds `data`
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.log", "ab") as log:
        return subprocess.Popen([sys.executable, *command, *flags], env=environment, stdout=log,
                                stderr=log)


def end(path, process):
    """Wait for a run's end -> its exit code. A finished one needs no checkpoint (180 MB)."""
    code = process.wait()
    if code == 0:
        Path(f"{path}.pt").unlink(missing_ok=True)
    return code


def run_one(path, command):      # as a job of Slurm
    return end(path, start(path, command))


def run_here(commands, gpus, workers):
    """Run {path: command} side by side, one for each entry of `gpus`, or `workers` on the CPU.
    Yields (path, exit code). Whatever ends the sweep ends them too, but for a SIGKILL: runs that it
    leaves finish their work, and keep their names locked until then."""
    free, running, waiting = list(gpus or [None] * workers), [], list(commands)
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    share = str(max(1, cores // len(free)))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""        # else the scripts take the first GPU
    try:
        while waiting or running:
            while free and waiting:
                path, gpu = waiting.pop(0), free.pop(0)
                flags = [] if gpu is None else ["--gpu", str(gpu)]
                running.append((path, gpu, start(path, commands[path], flags, **environment)))
            time.sleep(0.1)
            for path, gpu, process in list(running):
                if process.poll() is not None:
                    running.remove((path, gpu, process))
                    free.append(gpu)
                    yield path, end(path, process)
    finally:
        for *_, process in running:
            process.terminate()         # at most one epoch is lost
        for *_, process in running:
            process.wait()


def run_slurm(commands, folder, options):
    """The same as one job array of Slurm, through submitit."""
    import submitit
    check("timeout_min" in options, "--slurm: say timeout_min=.., the minutes that a run may take: "
                                    "Slurm ends it after 5 otherwise")
    try:
        executor = submitit.AutoExecutor(folder, cluster=CLUSTER)
        executor.update_parameters(**options)
        jobs = executor.map_array(run_one, commands, commands.values())
    except Exception as error:      # submitit and Slurm refuse in many ways
        raise DataError(f"--slurm: {first_line(error)}") from None
    try:
        for path, job in zip(commands, jobs):
            yield path, 1 if job.exception() else job.result()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()


def option(text):
    key, _, value = text.partition("=")
    return key, int(value) if value.isdecimal() else value


def main(argv=None):
    """-> exit code: 0 if all of the grid is finished, 1 if one failed. Raises DataError before
    anything is trained if one cannot be, or if a file of another run has its name."""
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
    check(args.seeds > 0 and args.workers > 0, "--seeds and --workers must be at least 1")
    for gpu in args.gpus:
        pick_device(gpu)                # raises DataError if it cannot be used

    runs, missing = grid(args), {}
    for path, (command, config, amp) in runs.items():
        if not finished(path, config, amp):
            half_done(path, config, resume=True, amp=amp)
            missing[path] = command
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before", flush=True)
    ended = (run_here(missing, args.gpus, args.workers) if args.slurm is None else
             run_slurm(missing, Path(args.out).expanduser() / "slurm", dict(args.slurm)))
    failed, began = 0, time.time()
    seen = "its .log" if args.slurm is None else f"its .log and {args.out}/slurm"
    with contextlib.closing(ended):         # whatever ends this loop ends the children
        for count, (path, code) in enumerate(ended, 1):
            minutes = (time.time() - began) / count * (len(missing) - count) / 60
            failed += code != 0
            said = f"failed with code {code}: see {seen}" if code else "finished"
            print(f"[{count}/{len(missing)}] {path} {said}, {minutes:.0f} min left", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    with exit_codes("results.sweep"):
        sys.exit(main())
