"""Run the missing cells of a grid of methods, variants, datasets and seeds; each cell is a command a user could type.

    python -m results.sweep --methods dimml udi joint_baseline --datasets synthetic avmnist:small --seeds 5
    python -m results.sweep --methods udi --datasets ave --gpus 0 1                  # one process a GPU
    python -m results.sweep --methods udi --datasets ave --slurm slurm_partition=gpu timeout_min=600 gpus_per_node=1

A finished run, one whose JSON stands in --out, is never repeated; a half one goes on after its last epoch. The variants of
UDI with one seed share one stage 1, which is theirs to the bit: it is trained once. A cell's output goes to <out>/<run>.log.
"""

import argparse
import ctypes
import fcntl
import itertools
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

import udi
from data import DataError, checkpoint, cli

ROOT = Path(__file__).parent.parent

INTERACTIONS = {"": None, "interaction0-0": [0.0, 0.0], "interaction1-0": [1.0, 0.0], "interaction0-1": [0.0, 1.0],
                "interaction0.5-0.5": [0.5, 0.5]}
UDI = {}                                  # variant: what it changes in the recipe
for init, complement, (name, pair) in itertools.product(("scratch", "stage1"), ("club", "cka"), INTERACTIONS.items()):
    if complement == "club" or pair is None or pair[1]:          # without the complementary term its kind is all one
        changed = {"interaction": pair, "complement": complement, "follower_init": init}
        label = ".".join(part for part in (name, complement, init) if part not in ("", "club", "scratch"))
        UDI[label] = {key: value for key, value in changed.items() if value not in (None, "club", "scratch")}
VARIANTS = {"dimml": [""], "joint_baseline": ["concat", "sum", "film", "gated", "ensemble"], "udi": list(UDI)}


class Cell:
    """One run: `command` for a user, `path` of its files less their suffixes."""

    def __init__(self, method, variant, dataset, seed, out, data_dir, flags):
        dataset, _, split = dataset.partition(":")
        self.method, self.variant = method, variant
        self.common = ["--dataset", dataset, "--seed", str(seed), "--out", out, *(["--split", split] if split else []),
                       *(["--data-dir", data_dir] if data_dir != "datasets" else []), *flags]
        if method == "udi":
            self.flags = [str(word) for key, value in UDI[variant].items()
                          for word in (f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [value]))]
        else:
            self.flags = {"": [], "ensemble": ["--ensemble"]}.get(variant, ["--fusion", variant])
        self.split = split or udi.open_dataset(dataset, data_dir).split
        self.tail = f"{Path(dataset).name}-{self.split}-seed{seed}"
        self.path = f"{out}/{method}{'.' * bool(variant)}{variant}-{self.tail}"
        self.stage_1 = f"{out}/udi.stage1only-{self.tail}"

    def finished(self):
        return os.path.exists(f"{self.path}.json")


def train_stage_1(argv):
    """Stage 1 of UDI and nothing else, under the variant's name "stage1only"; goes on where it was."""
    parser = argparse.ArgumentParser("udi.py")
    cli.common_flags(parser)
    with cli.exit_codes("stage 1 of udi.py"), udi.Run(cli.parse(parser, argv), udi.RECIPES, "udi", "stage1only") as run:
        model = run.restore(udi.UDI({m: mod.in_channels for m, mod in run.ds.modalities.items()}, len(run.ds.classes)))
        for m in run.ds.modalities:
            udi.train_alone(run, model, m)


def begin_with_stage_1(cell):
    """A checkpoint for a variant of UDI that has none: stage 1's, with the variant's name and recipe."""
    if not os.path.exists(f"{cell.path}.pt"):
        state = checkpoint.load(cell.stage_1)
        state["config"] = {**state["config"], "variant": cell.variant, "recipe": {**state["config"]["recipe"], **UDI[cell.variant]}}
        checkpoint.save(cell.path, state)


def end_with_parent():
    """In a child, on Linux: killed when the sweep is, so that a second sweep never meets a run of the first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_cell(cell, gpu=None, threads=None):
    """Run a cell to its end and return its exit code. Its checkpoints, hundreds of MB, go when its JSON stands."""
    device = [] if gpu is None else ["--gpu", str(gpu)]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}

    def call(*command):
        log.flush()
        return subprocess.call([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent)

    with open(f"{cell.path}.log", "ab") as log:
        if cell.method == "udi":
            with open(f"{cell.stage_1}.log", "ab") as lock:              # one cell trains it, the others wait
                fcntl.flock(lock, fcntl.LOCK_EX)
                trained = Path(f"{cell.stage_1}.trained")
                if not trained.exists():
                    code = call("-c", "import sys; from results.sweep import train_stage_1; train_stage_1(sys.argv[1:])",
                                *cell.common, *device, "--resume")
                    if code:
                        return code
                    trained.touch()
            begin_with_stage_1(cell)
        code = call(f"{cell.method}.py", *cell.common, *cell.flags, *device, "--resume")
    if code == 0:
        for suffix in (".pt", ".previous.pt"):
            Path(cell.path + suffix).unlink(missing_ok=True)
    return code


def run_here(cells, gpus, workers):
    """Run the cells side by side, one process a GPU or `workers` processes on the CPU. Yields (cell, exit code)."""
    devices = queue.SimpleQueue()
    for device in gpus or [None] * workers:
        devices.put(device)
    threads = None if gpus else max(1, len(os.sched_getaffinity(0)) // workers)

    def on_a_free_device(cell):
        device = devices.get()
        try:
            return run_cell(cell, device, threads)
        finally:
            devices.put(device)

    with ThreadPoolExecutor(len(gpus) or workers) as pool:
        futures = {pool.submit(on_a_free_device, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt:                                        # the children have had it too
            pool.shutdown(cancel_futures=True)
            raise


def run_slurm(cells, folder, options):
    """The same cells as one job array through submitit (its local executor where there is no Slurm). Yields likewise."""
    import submitit
    executor = submitit.AutoExecutor(folder=folder)
    executor.update_parameters(**options)
    jobs = executor.map_array(run_cell, cells)
    for cell, job in zip(cells, jobs):
        yield cell, job.result()


def option(text):
    key, _, value = text.partition("=")
    return key, int(value) if value.isdecimal() else value


def main(argv=None):
    """Command line -> exit code 0 if every cell of the grid stands, 1 if one failed, 2 for a usage that cannot be."""
    parser = argparse.ArgumentParser("python -m results.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", help="only these, e.g. udi.cka joint_baseline.concat dimml")
    parser.add_argument("--datasets", nargs="+", default=["synthetic"], help="names or paths, with :SPLIT where it is not the first")
    parser.add_argument("--seeds", type=int, default=5, help="0 .. N-1 (default: %(default)s)")
    parser.add_argument("--data-dir", default="datasets")
    parser.add_argument("--out", default="runs", help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="*", default=[], help="numbers of the GPUs, a process each")
    parser.add_argument("--workers", type=int, default=1, help="processes on the CPU, which share its cores (default: %(default)s)")
    parser.add_argument("--slurm", nargs="*", type=option, metavar="KEY=VALUE", help="submit as an array, with submitit's parameters")
    parser.add_argument("flags", nargs="*", help="after --: flags for every run, e.g. -- --epochs 5 --amp off")
    args = parser.parse_args(argv)
    with cli.exit_codes(parser.prog):
        names = {f"{method}{'.' * bool(variant)}{variant}": (method, variant) for method in args.methods for variant in VARIANTS[method]}
        for name in set(args.variants or names) - set(names):
            raise DataError(f"--variants {name}: of {', '.join(args.methods)} there are {', '.join(names)}")
        if args.seeds < 1 or args.workers < 1:
            raise DataError("--seeds and --workers count from 1")
        cells = [Cell(*names[name], dataset, seed, args.out, args.data_dir, args.flags)
                 for dataset in args.datasets for name in args.variants or names for seed in range(args.seeds)]
        missing = [cell for cell in cells if not cell.finished()]
        print(f"{len(cells)} runs, {len(cells) - len(missing)} of them finished before", flush=True)
        os.makedirs(args.out, exist_ok=True)
        finished = (run_here(missing, args.gpus, args.workers) if args.slurm is None else
                    run_slurm(missing, f"{args.out}/slurm", dict(args.slurm)))
        failed, start = [], time.time()
        for count, (cell, code) in enumerate(tqdm(finished, total=len(missing), disable=None, unit="run"), 1):
            left = (time.time() - start) / count * (len(missing) - count)
            tqdm.write(f"[{count}/{len(missing)}] {cell.path} " + (f"failed with code {code}: see its .log" if code else "finished")
                       + f", {left / 60:.0f} min left")
            failed += [cell] * bool(code)
        for cell in cells:                                               # stage 1 is kept while a variant may need it
            if cell.method == "udi" and not failed:
                for suffix in (".pt", ".previous.pt", ".log", ".trained"):
                    Path(cell.stage_1 + suffix).unlink(missing_ok=True)
        return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
