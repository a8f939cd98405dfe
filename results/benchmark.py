"""What the data path costs, as ratios within one run (machines are shared and noisy, seconds elsewhere will differ).

    python results/benchmark.py [--raw cremad=DIR ave=DIR ...]

Each figure is the median of five repetitions, in CPU time of one core; the result is written to
results/benchmark-<device>.json. --raw also times the preparation of real files, of which a few are enough.
"""

import argparse
import importlib
import io
import json
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Dataset, media, store  # noqa: E402

REPEATS = 5


def cpu_seconds(function):
    """Median CPU time of `function()` over REPEATS calls, after one to warm up."""
    function()
    spent = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def usual_dataset(n, frames, height, width, spectrogram):
    """As most repositories of the field load an item: JPEG frames through PIL and torchvision's transforms, one by one,
    and an unpickled float32 spectrogram. The files are held in memory, so that no disk is timed."""
    rng = np.random.default_rng(0)
    jpegs, augment = [], transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    for _ in range(n * frames):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        jpegs.append(io.BytesIO())
        coarse.resize((width, height), Image.BICUBIC).save(jpegs[-1], "JPEG", quality=90)
    pickled = pickle.dumps(rng.normal(size=spectrogram).astype(np.float32))

    def load():
        for item in range(n):
            torch.stack([augment(Image.open(jpegs[item * frames + t]).convert("RGB")) for t in range(frames)])
            torch.from_numpy(pickle.loads(pickled))

    return load


def ours(n, frames, height, width, samples, folder):
    """The same items from a prepared folder."""
    rng = np.random.default_rng(0)
    store.write(folder, {
        "audio": {"kind": "audio", "array": rng.integers(-3000, 3000, (n, samples)).astype(np.int16), "standardize": True},
        "rgb": {"kind": "rgb", "array": rng.integers(0, 256, (n, frames, 3, 256, 256), dtype=np.uint8),
                "frame": np.tile([height, width], (n, 1))}},
        np.arange(n) % 2, {"official": np.where(np.arange(n) < n - 1, 0, 2)}, ["a", "b"], [str(i) for i in range(n)])
    _, modalities, labels, splits, ids, _ = store.read(folder)
    ds = Dataset("made", "official", ["a", "b"], modalities, labels, ids, None, splits["official"], {}, 0)
    generator = torch.Generator().manual_seed(0)

    def augmented():
        for _ in ds.batches("train", 16, "cpu", True, generator):
            pass

    def rows():       # what is left to the CPU where a GPU augments: the random numbers and the rows of the memory map
        batches = ds.batches("train", 16, "cpu", True, generator)
        for start in range(0, len(batches.order), 16):
            for mod in modalities.values():
                torch.from_numpy(mod.array[batches.order[start:start + 16]])

    return augmented, rows


def loader():
    """CPU time an item, in milliseconds, for the shapes of two of the datasets."""
    figures = {}
    for name, frames, height, width, samples, spectrogram in (
            ("ave", 4, 360, 640, 160_000, (257, 1004)), ("cremad", 3, 360, 480, 48_000, (257, 299))):
        n = 65        # 64 to train
        with tempfile.TemporaryDirectory() as folder:
            augmented, rows = ours(n, frames, height, width, samples, f"{folder}/made")
            usual = cpu_seconds(usual_dataset(16, frames, height, width, spectrogram)) / 16 * 1e3
            whole, read = (cpu_seconds(function) / 64 * 1e3 for function in (augmented, rows))
        figures[name] = {"usual_ms": usual, "ours_augmented_on_cpu_ms": whole, "ours_rows_only_ms": read,
                         "ratio_augmented_on_cpu": usual / whole, "ratio_rows_only": usual / read}
    return figures


def rendering():
    """CPU seconds for one view of a ball of about 10,000 faces."""
    n = 72
    around, down = np.meshgrid(np.linspace(0, 2 * np.pi, n), np.linspace(0, np.pi, n))
    vertices = np.stack([np.cos(around) * np.sin(down), np.sin(around) * np.sin(down), np.cos(down)], -1).reshape(-1, 3)
    corner = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.stack([corner, corner + 1, corner + n], 1), np.stack([corner + 1, corner + n + 1, corner + n], 1)])
    return {"faces": len(faces), "seconds_a_view": cpu_seconds(lambda: media.render(vertices, faces, 0))}


def preparing(name, raw, most=4):
    """Items a second on one core for the first raw items that are there, and the share of it inside FFmpeg's decoders."""
    module, options = importlib.import_module(f"data.{name}"), {"flow": "tvl1"} if name == "ucf101" else {}
    items = [item for item in module.index(Path(raw), options).items if all(map(os.path.exists, item.files))][:most]
    decoding = [0.0]

    def timed(*arguments):
        start = time.process_time()
        frames = plain(*arguments)
        decoding[0] += time.process_time() - start
        return frames

    plain, media.decode_stream = media.decode_stream, timed
    try:
        whole = cpu_seconds(lambda: [module.decode(item, options) for item in items])
    finally:
        media.decode_stream = plain
    return {"items": len(items), "seconds_an_item": whole / len(items), "share_in_decoder": decoding[0] / (REPEATS + 1) / whole}


def main():
    parser = argparse.ArgumentParser(description="Measure the data path; figures are medians of five repetitions.")
    parser.add_argument("--raw", nargs="*", default=[], metavar="NAME=DIR", help="raw datasets to time the preparation of")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the JSON (default: results)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"device": "one CPU core", "processor": platform.processor() or platform.machine(),
              "versions": {"torch": torch.__version__, "python": platform.python_version()},
              "loader": loader(), "rendering": rendering()}
    result["preparing"] = {name: preparing(name, folder) for name, _, folder in (raw.partition("=") for raw in args.raw)}
    (args.out / "benchmark-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
