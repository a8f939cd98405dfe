"""What stands in a prepared dataset, for people who would rather look.

    python -m data.info ave

prints the items of each class and part, what was skipped, and who or what stands in more than one
part (actors, videos, groups of clips), and draws NAME-contact-sheet.png: some items of each part.
"""

import argparse
import itertools
import os
from pathlib import Path

import numpy as np
import torch

from data import find_prepared, store
from data.batches import log_spectrogram
from data.run import exit_codes
from data.store import PARTS, UNUSED

ROWS = 8


def describe(folder):
    """Print the tables."""
    meta, modalities, labels, splits, ids, groups = store.read(folder)
    print(f"{folder}: {len(labels)} items, {len(meta['classes'])} classes")
    for name, mod in modalities.items():
        shape = " x ".join(map(str, mod.array.shape[1:]))
        print(f"  {name:10} {mod.kind:12} {shape}, {mod.array.nbytes / 1e9:.2f} GB")
    print(f"skipped: {len(meta.get('skipped', {}))} items")
    for item, reason in meta.get("skipped", {}).items():
        print(f"  {item}: {reason}")

    for split, codes in splits.items():
        parts = {part: codes == code for part, code in PARTS.items() if (codes == code).any()}
        sizes = [f"{inside.sum()} {part}" for part, inside in parts.items()]
        print(f"\nsplit {split}: {', '.join(sizes)}, {(codes == UNUSED).sum()} unused")
        for c, name in enumerate(meta["classes"]):
            counts = [f"{(labels[inside] == c).sum():7}" for inside in parts.values()]
            print(f"  {name:25}" + "".join(counts))
        if groups is None:
            print("  groups: none recorded, so leaks between parts cannot be seen")
            continue
        members = {part: set(groups[inside].tolist()) for part, inside in parts.items()}
        for a, b in itertools.combinations(parts, 2):
            shared = sorted(members[a] & members[b])
            names = [meta["groups"][g] if "groups" in meta else str(g) for g in shared[:5]]
            shown = f" ({', '.join(names)})" * bool(shared)
            print(f"  groups in both {a} and {b}: {len(shared)}{shown}")


def picture(mod, item):
    """What shows one modality of an item: (H, W), or (H, W, 3) uint8."""
    stored = np.array(mod.array[item])
    if mod.kind == "audio":                                             # low frequencies below
        return log_spectrogram(torch.from_numpy(stored)[None])[0, 0, 0].numpy()[::-1]
    if mod.kind == "spectrogram":
        return np.concatenate(stored[:3, ::-1].astype(np.float32), 1)
    frames = stored[:4]
    if mod.kind == "flow":          # u is red, v is green, grey is no motion
        frames = stored[[0, len(stored) // 2, -1]]
        frames = np.concatenate([frames, np.full_like(frames[:, :1], 127)], 1)
    frames = np.broadcast_to(frames, (len(frames), 3, *frames.shape[2:]))
    return np.concatenate(frames.transpose(0, 2, 3, 1), 1)


def contact_sheet(folder, path):
    """Write a PNG of some items of each part of the first split, a row each, as they are stored."""
    from matplotlib.figure import Figure
    meta, modalities, labels, splits, ids, _ = store.read(folder)
    codes, rng = next(iter(splits.values())), np.random.default_rng(0)
    parts = {code: part for part, code in PARTS.items() if (codes == code).any()}
    items = []
    for code in parts:
        items += sorted(rng.permutation(np.flatnonzero(codes == code))[:ROWS // len(parts)])
    figure = Figure(figsize=(4 * len(modalities), 1.8 * len(items)), layout="constrained")
    axes = figure.subplots(len(items), len(modalities), squeeze=False)
    for row, item in zip(axes, items):
        for place, (name, mod) in zip(row, modalities.items()):
            shown = picture(mod, item)
            low, high = np.quantile(shown, (0.05, 0.95))
            place.imshow(shown, cmap="gray", vmin=low, vmax=high, aspect="auto")
            place.set(xticks=[], yticks=[], ylabel=name)
            title = f"{meta['classes'][labels[item]]:.30}, {parts[codes[item]]}: {ids[item]:.40}"
            place.set_title(title, fontsize=7, parse_math=False)
    with store.whole_file(path) as file:
        figure.savefig(file, format="png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m data.info", description="Counts, leaks, contact sheet of a prepared dataset.")
    parser.add_argument("name", help="a name under --data-dir or the path of a prepared folder")
    parser.add_argument("--data-dir", default="datasets", help="where it lies (%(default)s)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        folder = find_prepared(args.name, args.data_dir)
        describe(folder)
        sheet = f"{Path(os.path.abspath(folder)).name}-contact-sheet.png"
        contact_sheet(folder, sheet)
        print(f"\ncontact sheet: {sheet}")


if __name__ == "__main__":
    main()
