"""What the data path and the losses cost, as ratios within one run: machines are shared and noisy,
so seconds elsewhere will differ.

    python -m results.benchmark [--gpu N] [--only SECTION ...]
    python -m results.benchmark --docs      # measure nothing, put the tables into docs/speed.md

Figures are medians of five turns and go to results/benchmark-<device>.json, a section at a time.
Arrays are random bytes in the shapes of the datasets: good for throughput, not for accuracy.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image

import dimml
from data import Dataset, exit_codes, open_dataset, store, whole_file
from results.table import put_between

BEGIN, END = "<!-- results.benchmark begins -->", "<!-- results.benchmark ends -->"
TURNS = 5
PICTURE = {"kind": "rgb", "shape": (1, 3, 256, 256)}
VIEW = {"kind": "view", "shape": (1, 1, 256, 256)}
SHAPES = {      # as prepared
    "cremad": {"audio": {"kind": "audio", "shape": (48_000,)},
               "rgb": {"kind": "rgb", "shape": (3, 3, 256, 256)}},
    "ave": {"audio": {"kind": "audio", "shape": (160_000,), "standardize": True},
            "rgb": {"kind": "rgb", "shape": (4, 3, 256, 256)}},
    "ucf101": {"flow": {"kind": "flow", "shape": (10, 2, 256, 256)}, "rgb": PICTURE},
    "modelnet40": {"front": VIEW, "rear": VIEW},
}


def in_turns(functions, clock=time.perf_counter):
    """{name: function} -> {name: median seconds}. They take turns, after one to warm up, so that a
    machine that slows down slows all of them."""
    spent = {name: [] for name in functions}
    for _ in range(TURNS + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(clock() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}


def random_folder(folder, modalities, n, frame=None):
    """A prepared folder of random bytes with `n` items for train and 8 for test."""
    rng, specs = np.random.default_rng(0), {}
    for name, spec in modalities.items():
        shape, sound = (n + 8, *spec["shape"]), spec["kind"] == "audio"
        specs[name] = {key: value for key, value in spec.items() if key != "shape"}
        specs[name]["array"] = (rng.integers(-3000, 3000, shape, dtype=np.int16) if sound else
                                rng.integers(0, 256, shape, dtype=np.uint8))
        if frame and spec["kind"] == "rgb":
            specs[name]["frame"] = np.tile(frame, (n + 8, 1))
    number = np.arange(n + 8)
    return str(store.write(folder, specs, number % 4, {"official": np.where(number < n, 0, 2)},
                           list("abcd"), list(map(str, number))))


# ---- training: a real epoch against the same steps on a batch that is already there --------------
class OneBatch:
    """A pass of as many steps as `batches` has, each on its first one: nothing to load."""

    def __init__(self, batches):
        self.steps, self.batch = len(batches), next(iter(batches))

    def __len__(self):
        return self.steps

    def __iter__(self):
        return iter([self.batch] * self.steps)


def training(device):
    """DI-MML with DUC, through its own `main`. Odd epochs load and augment, even ones do not: the
    limit. On a CPU small batches and few steps, which take long enough."""
    batch, steps = (16, 100) if device.type == "cuda" else (4, 3)
    whole, figures = Dataset.batches, {}
    for name in ("synthetic", *SHAPES):
        passes = iter(range(10**6))

        def batches(ds, part, *rest, augment=False, **more):
            real = whole(ds, part, *rest, augment=augment, **more)
            return OneBatch(real) if augment and next(passes) % 2 else real

        with (tempfile.TemporaryDirectory() as out, mock.patch.object(Dataset, "batches", batches),
              contextlib.redirect_stdout(io.StringIO())):
            dataset, size = name, 16        # the embedded set as it is
            if name in SHAPES:
                dataset, size = random_folder(f"{out}/{name}", SHAPES[name], batch * steps), batch
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            result = dimml.main([
                "--dataset", dataset, "--val", "0", "--batch-size", str(size), "--out", out,
                "--epochs", str(2 * TURNS + 2), "--warmup", "1", "--fusion-epochs", "1",
                *([] if device.index is None else ["--gpu", str(device.index)])])
        speeds = [epoch["items_per_second"] for epoch in result["epochs"]][2:2 * TURNS + 2]
        real, limit = speeds[0::2], speeds[1::2]        # the first two epochs were to warm up
        figures[name] = {
            "batch": size, "precision": result["precision"],
            "items_a_second": statistics.median(real),
            "share_of_limit": statistics.median(r / most for r, most in zip(real, limit)),
            "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}
    return figures


# ---- loading: the processor's time for an item ---------------------------------------------------
class UsualDataset:
    """As most repositories of the field load an item: JPEG frames through PIL and torchvision's
    transforms, one by one, and an unpickled float32 spectrogram. The files are held in memory, so
    that no disk is timed."""

    def __init__(self, n, frames, height, width, spectrogram):
        rng, self.frames, self.jpegs = np.random.default_rng(0), frames, []
        self.augment = transforms.Compose([
            transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
        for _ in range(n * frames):
            coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            jpeg = io.BytesIO()
            picture = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
            picture.save(jpeg, "JPEG", quality=90)
            self.jpegs.append(jpeg.getvalue())
        self.pickled = pickle.dumps(rng.normal(size=spectrogram).astype(np.float32))

    def __getitem__(self, item):
        jpegs = self.jpegs[item * self.frames:(item + 1) * self.frames]
        frames = [self.augment(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]
        return torch.from_numpy(pickle.loads(self.pickled))[None], torch.stack(frames)


def loading(device):
    """Milliseconds of one core for an item: as usual, as here, and of that what remains where a GPU
    augments, its launches aside: random numbers and reading the rows."""
    figures, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)            # waiting threads would be counted
    for name, width, n_frames in (("ave", 640, 1004), ("cremad", 480, 299)):
        usual = UsualDataset(16, SHAPES[name]["rgb"]["shape"][0], 360, width, (257, n_frames))
        with tempfile.TemporaryDirectory() as out:
            folder = random_folder(f"{out}/{name}", SHAPES[name], 256, (360, width))
            ds = open_dataset(folder, val=0)

            def draw(device):
                generator = torch.Generator().manual_seed(0)
                return ds.batches("train", 16, device, augment=True, generator=generator)

            def read():
                for rows in np.split(draw("cpu").order, 16):
                    for mod in ds.modalities.values():
                        torch.from_numpy(mod.array[rows])

            seconds = in_turns({"usual": lambda: [usual[item] for item in range(16)],
                                "here": lambda: [None for _ in draw(device)], "read": read},
                               time.process_time)
        figures[name] = {f"{what}_ms": 1e3 * seconds[what] / items
                         for what, items in (("usual", 16), ("here", 256), ("read", 256))}
    torch.set_num_threads(threads)
    return figures


# ---- the DUC loss --------------------------------------------------------------------------------
def looped_duc_loss(z, effective, tau):
    """DUC as loops over the batch, as the published code has it."""
    loss = 0
    for t, s in (("a", "b"), ("b", "a")):
        dims = effective[t] & ~effective[s]
        student, teacher = z[s][:, dims], z[t][:, dims].detach()
        for i in range(len(student)):
            terms = [torch.exp((student[i] * other).sum() / tau) for other in teacher]
            loss = loss - torch.log(terms[i] / sum(terms)) / len(student)
    return loss


def duc(device):
    """Forward and backward at batch 64, against the loop."""
    z = {m: torch.randn(64, 512, device=device, requires_grad=True) for m in "ab"}
    effective = {m: torch.rand(512, device=device) < 0.5 for m in "ab"}
    torch.testing.assert_close(dimml.duc_loss(z, effective, 50.0),
                               looped_duc_loss(z, effective, 50.0))
    seconds = in_turns({
        "here": lambda: [dimml.duc_loss(z, effective, 50.0).backward() for _ in range(20)],
        "loop": lambda: looped_duc_loss(z, effective, 50.0).backward()})
    return {**seconds, "here": seconds["here"] / 20}


# ---- memory --------------------------------------------------------------------------------------
def reading_memory(n):
    """Growth of this process's memory, page cache aside, while it reads n items of UCF101's shapes,
    in bytes. Linux alone says how much that is."""
    def anonymous():
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    with tempfile.TemporaryDirectory() as out:
        folder = random_folder(f"{out}/ucf101", SHAPES["ucf101"], n)
        before, peak, generator = anonymous(), 0, torch.Generator().manual_seed(0)
        for _ in open_dataset(folder, val=0).batches("train", 16, "cpu", True, generator):
            peak = max(peak, anonymous())
    return peak - before


def memory(device):
    """The same for 256 and 768 items, each in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {str(n): pool.apply(reading_memory, (n,)) for n in (256, 768)}


# ---- tables --------------------------------------------------------------------------------------
SECTIONS = {"training": training, "loading": loading, "duc": duc, "memory": memory}


def markdown(result):
    """The table of one benchmark file; a section that it lacks is left out."""
    rows = []
    for name, f in result.get("training", {}).items():
        peak = f"; {f['peak_bytes'] / 2**30:.1f} GiB of the device" if f["peak_bytes"] else ""
        rows.append((f"training on {name}'s shapes, relative to the same without loading",
                     f"{f['share_of_limit']:.0%}; {f['items_a_second']:.3g} items/s in "
                     f"{f['precision']}, batch {f['batch']}{peak}"))
    for name, f in result.get("loading", {}).items():
        rows.append((f"loading an item of {name}'s shapes, time of one core",
                     f"{f['here_ms']:.1f} ms, {f['usual_ms'] / f['here_ms']:.1f} times less than "
                     f"as usual; {f['read_ms']:.2f} ms of it, {f['usual_ms'] / f['read_ms']:.0f} "
                     "times less, where a GPU augments (its launches aside)"))
    if f := result.get("duc"):
        rows.append(("`duc_loss`, forward and backward, batch 64, against a loop",
                     f"{f['loop'] / f['here']:.0f} times faster"))
    for n, size in result.get("memory", {}).items():
        rows.append((f"memory to read {n} items of UCF101's shapes, page cache aside",
                     f"{size / 1e6:.0f} MB"))
    return "\n".join([f"**{result['device']}**, torch {result['torch']}", "",
                      "| what | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""])


def tables():
    """The tables of the files that stand, for docs/speed.md."""
    files = sorted(Path(__file__).parent.glob("benchmark-*.json"))
    return "\n".join(markdown(json.loads(path.read_text(encoding="utf-8"))) for path in files)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.benchmark", description="Ratios of speed.")
    parser.add_argument("--gpu", type=int, help="GPU number (default: the CPU)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/speed.md")
    args = parser.parse_args(argv)
    if args.docs:
        return put_between(BEGIN, END, tables(), Path(__file__).parent.parent / "docs/speed.md")
    if args.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""         # else the scripts would take the first one
    device = torch.device("cpu") if args.gpu is None else torch.device("cuda", args.gpu)
    path = Path(__file__).parent / f"benchmark-{device.type}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result["torch"], result["device"] = torch.__version__, f"{torch.get_num_threads()} CPU threads"
    if args.gpu is not None:
        result["device"] = torch.cuda.get_device_name(device)
    for section in args.only:
        result[section] = SECTIONS[section](device)
        print(json.dumps({section: result[section]}, indent=1), flush=True)
        with whole_file(path) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    print(markdown(result))


if __name__ == "__main__":
    with exit_codes("results.benchmark"):
        main()
