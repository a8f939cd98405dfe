"""What loading costs: the speed of training on random arrays in the datasets' shapes, as a share of
that on one batch which is already there. A ratio within one run: machines are shared and noisy.

    python -m results.benchmark [--gpu N]       # prints the table that docs/speed.md holds
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from unittest import mock

import numpy as np
import torch

import dimml
from data import exit_codes, pick_device, store
from data.batches import Batches
from results.table import markdown

TURNS = 5
PICTURE = {"kind": "rgb", "shape": (1, 3, 256, 256)}
VIEW = {"kind": "rgb", "shape": (1, 1, 256, 256)}
SHAPES = {      # as prepared
    "cremad": {"audio": {"kind": "audio", "shape": (48_000,)},
               "rgb": {"kind": "rgb", "shape": (3, 3, 256, 256)}},
    "ave": {"audio": {"kind": "audio", "shape": (160_000,), "standardize": True},
            "rgb": {"kind": "rgb", "shape": (4, 3, 256, 256)}},
    "ucf101": {"flow": {"kind": "flow", "shape": (10, 2, 256, 256)}, "rgb": PICTURE},
    "modelnet40": {"front": VIEW, "rear": VIEW},
}


def random_folder(folder, modalities, n):
    """A prepared folder of random bytes with `n` items for train and 8 for test."""
    rng, specs = np.random.default_rng(0), {}
    for name, spec in modalities.items():
        shape, sound = (n + 8, *spec["shape"]), spec["kind"] == "audio"
        specs[name] = {key: value for key, value in spec.items() if key != "shape"}
        specs[name]["array"] = (rng.integers(-3000, 3000, shape, dtype=np.int16) if sound else
                                rng.integers(0, 256, shape, dtype=np.uint8))
    number = np.arange(n + 8)
    return str(store.write(folder, specs, number % 4, {"official": np.where(number < n, 0, 2)},
                           list("abcd"), list(map(str, number))))


def training(name, gpu):
    """DI-MML with DUC, through its own `main`, on one dataset -> a line of the table. On a CPU
    small batches and few steps, which take long enough."""
    batch, steps = (4, 3) if gpu is None else (16, 100)
    speeds, whole = [], Batches.__iter__        # items a second of each training pass

    def timed(batches):
        loaded = whole(batches)
        if not batches.boxes:           # nothing is cropped: no training pass
            yield from loaded
            return
        if len(speeds) % 2:             # nothing to load: the first batch again and again
            loaded = iter([next(loaded)] * len(batches))
        start = time.perf_counter()
        yield from loaded
        if batches.device.type == "cuda":
            torch.cuda.synchronize(batches.device)
        seconds = time.perf_counter() - start
        speeds.append(len(batches) * batches.batch_size / seconds)

    with (tempfile.TemporaryDirectory() as out, mock.patch.object(Batches, "__iter__", timed),
          contextlib.redirect_stdout(io.StringIO())):
        dataset, size = name, 16        # the embedded set as it is
        if name in SHAPES:
            dataset, size = random_folder(f"{out}/{name}", SHAPES[name], batch * steps), batch
        result = dimml.main([
            "--dataset", dataset, "--val", "0", "--batch-size", str(size), "--out", out,
            "--epochs", str(2 * TURNS + 2), "--warmup", "1", "--fusion-epochs", "1",
            *([] if gpu is None else ["--gpu", str(gpu)])])
    real, limit = speeds[2:2 * TURNS + 2:2], speeds[3:2 * TURNS + 2:2]      # two were to warm up
    share = statistics.median(r / most for r, most in zip(real, limit))
    return [name, f"{share:.0%}", f"{statistics.median(real):.3g}", str(size), result["precision"]]


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.benchmark", description="Ratios of speed.")
    parser.add_argument("--gpu", type=int, help="GPU number (default: the CPU)")
    args = parser.parse_args(argv)
    if args.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""         # else dimml takes the first GPU
        device = f"A CPU, {torch.get_num_threads()} threads"
    else:
        device = torch.cuda.get_device_name(pick_device(args.gpu, "auto")[0])
    print(f"{device}, torch {torch.__version__}:\n")
    header = ["shapes of", "share of the speed without loading", "items/s", "batch", "precision"]
    print(markdown(header, []), end="", flush=True)
    for name in ("synthetic", *SHAPES):
        print(f"| {' | '.join(training(name, args.gpu))} |", flush=True)


if __name__ == "__main__":
    with exit_codes("results.benchmark"):
        main()
