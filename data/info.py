"""What stands in a prepared dataset, for people who would rather look.

    python -m data.info ave

prints the items of each class and part, sizes, what was skipped, and who or what stands in more than one part (actors,
videos, groups of clips), and draws a contact sheet: a few items of each modality, as they are stored.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import resize
from torchvision.utils import flow_to_image

from data import find_prepared, store
from data.batches import log_spectrogram
from data.errors import exit_codes
from data.store import PARTS, UNUSED, plain

TILE = 128      # pixels, height and width of one picture of the contact sheet


def describe(folder):
    """Print the tables."""
    meta, modalities, labels, splits, ids, groups = store.read(folder)
    print(f"{folder}: {len(labels)} items, {len(meta['classes'])} classes")
    for name, mod in modalities.items():
        shape = " x ".join(map(str, mod.array.shape[1:]))
        print(f"  {name:10} {mod.kind:12} {mod.array.dtype} {shape}, {mod.array.nbytes / 1e9:.2f} GB")
    print(f"skipped: {len(meta.get('skipped', {}))} items")
    for item, reason in meta.get("skipped", {}).items():
        print(f"  {plain(item)}: {plain(reason)}")

    for split, codes in splits.items():
        parts = [part for part, code in PARTS.items() if (codes == code).any()]
        counts = {part: np.bincount(labels[codes == PARTS[part]], minlength=len(meta["classes"])) for part in parts}
        print(f"\nsplit {split}: " + ", ".join(f"{counts[part].sum()} {part}" for part in parts)
              + f", {(codes == UNUSED).sum()} unused")
        width = max(map(len, meta["classes"])) + 2
        print("  " + "class".ljust(width) + "".join(part.rjust(7) for part in parts))
        for c, name in enumerate(meta["classes"]):
            print("  " + name.ljust(width) + "".join(f"{counts[part][c]:7}" for part in parts))
        if groups is None:
            print("  groups: none recorded, so leaks between parts cannot be seen")
            continue
        names = [plain(name) for name in meta["groups"]] if "groups" in meta else None
        of_part = {part: set(groups[codes == PARTS[part]].tolist()) for part in parts}
        print("  groups: " + ", ".join(f"{len(of_part[part])} in {part}" for part in parts))
        for i, a in enumerate(parts):
            for b in parts[i + 1:]:
                shared = sorted(of_part[a] & of_part[b])
                shown = ", ".join(names[g] if names else str(g) for g in shared[:5])
                print(f"  in both {a} and {b}: {len(shared)}" + (f" ({shown}{', ...' if len(shared) > 5 else ''})" if shared else ""))
        if split == "clean" and names and len(names) < 200:
            for part in parts:
                print(f"  {part}: " + " ".join(names[g] for g in sorted(of_part[part])))


def tile(picture):
    """uint8 (C, H, W), C = 1 or 3 -> uint8 (3, TILE, TILE)."""
    return resize(torch.as_tensor(picture).expand(3, -1, -1), [TILE, TILE], antialias=True)


def tiles(mod, item):
    """The pictures that show one item of a modality: a list of uint8 (3, TILE, TILE)."""
    stored = torch.from_numpy(np.array(mod.array[item]))
    if mod.kind == "audio":
        wave = torch.full((TILE, TILE), 255, dtype=torch.uint8)          # each column from its lowest to its highest sample
        parts = torch.tensor_split(stored, TILE)
        level = [((1 - torch.stack([p.max(), p.min()]) / 32768) * (TILE - 1) / 2).long() for p in parts]
        for column, (top, bottom) in enumerate(level):
            wave[top:bottom + 1, column] = 60
        return [tile(wave[None]), tile(grey(log_spectrogram(stored[None])[0, 0].flip(1)))]
    if mod.kind == "spectrogram":
        return [tile(grey(channel[None].float().flip(1))) for channel in stored[:3]]
    if mod.kind == "flow":                                               # colour: direction, strength: length
        return [tile(flow_to_image(frame.float() - 127.5)) for frame in stored[[0, len(stored) // 2, -1]]]
    return [tile(frame) for frame in stored[:4]]


def grey(values):
    """float (1, H, W) -> uint8, the lowest black, the highest white."""
    low, high = values.min(), values.max()
    return ((values - low) / (high - low).clamp(min=1e-9) * 255).to(torch.uint8)


def contact_sheet(folder, path, n=8, seed=0):
    """Write a PNG of n items drawn at random (those that are in use), a row each."""
    meta, modalities, labels, splits, ids, _ = store.read(folder)
    used = np.flatnonzero(np.any([codes != UNUSED for codes in splits.values()], axis=0))
    rows = []
    for item in sorted(np.random.default_rng(seed).choice(used, min(n, len(used)), replace=False)):
        pictures = [picture for mod in modalities.values() for picture in tiles(mod, item)]
        rows.append((f"{ids[item]}   {meta['classes'][labels[item]]}", torch.cat(pictures, 2)))
    line = 16
    width = rows[0][1].shape[2]
    sheet = Image.new("RGB", (width, len(rows) * (TILE + line) + line), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for name, mod in modalities.items():
        count = len(tiles(mod, 0))
        draw.text((x + 4, 2), {"audio": f"{name}: waveform, spectrogram"}.get(mod.kind, name), fill="black")
        x += count * TILE
    for i, (title, row) in enumerate(rows):
        top = line + i * (TILE + line)
        sheet.paste(Image.fromarray(row.permute(1, 2, 0).numpy()), (0, top))
        draw.text((4, top + TILE + 1), title, fill="black")
    sheet.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m data.info", description="Counts, leaks and a contact sheet of a prepared dataset.")
    parser.add_argument("name", help="a name under --data-dir or the path of a prepared folder")
    parser.add_argument("--data-dir", default="datasets", help="where prepared datasets lie (default: %(default)s)")
    parser.add_argument("--sheet", help="where the contact sheet goes (default: NAME-contact-sheet.png here)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        folder = find_prepared(args.name, args.data_dir)
        describe(folder)
        sheet = args.sheet or f"{Path(folder).resolve().name}-contact-sheet.png"
        contact_sheet(folder, sheet)
        print(f"\ncontact sheet: {sheet}")


if __name__ == "__main__":
    main()
