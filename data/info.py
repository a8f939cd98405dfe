"""What stands in a prepared dataset, for people who would rather look.

    python -m data.info ave

prints the items of each class and part, sizes, what was skipped, and who or what stands in more
than one part (actors, videos, groups of clips), and draws a contact sheet: some items of each part.
"""

import argparse
import itertools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import resize
from torchvision.utils import flow_to_image

from data import find_prepared, store
from data.batches import log_spectrogram
from data.run import exit_codes
from data.store import PARTS, UNUSED, check, plain

TILE, LINE = 128, 18    # pixels of the contact sheet: a picture's sides, the height of a text line
ROWS = 8
CONTRAST = 0.05         # spectrograms: this share of the values is shown black, as much white
STILL = 8.0             # flow: shorter motion (in grey levels; 1.3 pixels) never has full colour


def describe(folder):
    """Print the tables."""
    meta, modalities, labels, splits, ids, groups = store.read(folder)
    print(f"{folder}: {len(labels)} items, {len(meta['classes'])} classes")
    for name, mod in modalities.items():
        shape = " x ".join(map(str, mod.array.shape[1:]))
        size = f"{mod.array.nbytes / 1e9:.2f} GB"
        print(f"  {name:10} {mod.kind:12} {mod.array.dtype} {shape}, {size}")
    print(f"skipped: {len(meta.get('skipped', {}))} items")
    for item, reason in meta.get("skipped", {}).items():
        print(f"  {plain(item)}: {plain(reason)}")

    names = [plain(name) for name in meta.get("groups", [])]
    for split, codes in splits.items():
        parts = [part for part, code in PARTS.items() if (codes == code).any()]
        counts = {part: np.bincount(labels[codes == PARTS[part]], minlength=len(meta["classes"]))
                  for part in parts}
        print(f"\nsplit {split}: " + ", ".join(f"{counts[part].sum()} {part}" for part in parts)
              + f", {(codes == UNUSED).sum()} unused")
        width = max(map(len, meta["classes"])) + 2
        print("  " + "class".ljust(width) + "".join(part.rjust(7) for part in parts))
        for c, name in enumerate(meta["classes"]):
            print("  " + name.ljust(width) + "".join(f"{counts[part][c]:7}" for part in parts))
        if groups is None:
            print("  groups: none recorded, so leaks between parts cannot be seen")
            continue
        inside = {part: set(groups[codes == PARTS[part]].tolist()) for part in parts}
        print("  groups: " + ", ".join(f"{len(inside[part])} in {part}" for part in parts))
        for a, b in itertools.combinations(parts, 2):
            shared = sorted(inside[a] & inside[b])
            shown = ", ".join([names[g] if names else str(g) for g in shared[:5]]
                              + ["..."] * (len(shared) > 5))
            print(f"  in both {a} and {b}: {len(shared)}" + (f" ({shown})" if shared else ""))
        if split == "clean" and 0 < len(names) < 200:
            for part in parts:
                print(f"  {part}: " + " ".join(names[g] for g in sorted(inside[part])))


def tile(picture):
    """uint8 (C, H, W), C = 1 or 3 -> uint8 (3, TILE, TILE)."""
    return resize(torch.as_tensor(picture).expand(3, -1, -1), [TILE, TILE], antialias=True)


def tiles(mod, items):
    """The pictures that show items of a modality: for each a list of uint8 (3, TILE, TILE)."""
    stored = [torch.from_numpy(np.array(mod.array[item])) for item in items]
    if mod.kind == "audio":
        return [[tile(curve(wave)), tile(grey(log_spectrogram(wave[None])[0, 0]))]
                for wave in stored]
    if mod.kind == "spectrogram":
        return [[tile(grey(channel[None].float())) for channel in values[:3]] for values in stored]
    if mod.kind == "flow":
        three = [frames[[0, len(frames) // 2, -1]].float() - 127.5 for frames in stored]
        return [[tile(frame) for frame in frames] for frames in colours(torch.stack(three))]
    return [[tile(frame) for frame in frames[:4]] for frames in stored]


def curve(wave):
    """int16 (L,) -> uint8 (1, TILE, TILE): each column from its lowest to its highest sample."""
    picture = torch.full((TILE, TILE), 255, dtype=torch.uint8)
    for column, part in enumerate(torch.tensor_split(wave, TILE)):
        highest_lowest = torch.stack([part.max(), part.min()])
        top, bottom = ((1 - highest_lowest / 32768) * (TILE - 1) / 2).long()
        picture[top:bottom + 1, column] = 60
    return picture[None]


def grey(values):
    """float (1, F, L) -> uint8, low frequencies below; black and white are percentiles."""
    low, high = np.quantile(values.numpy(), [CONTRAST, 1 - CONTRAST])
    shares = (values.flip(1) - low) / max(high - low, 1e-9)
    return (shares.clamp(0, 1) * 255).to(torch.uint8)


def colours(flow):
    """float (n, T, 2, H, W), 0 = no motion -> uint8 (n, T, 3, H, W): hue is direction, strength
    length, on one scale for all: the length that 1 in 100 pixels exceeds, at least STILL."""
    length = flow.norm(dim=2, keepdim=True)
    scale = max(np.quantile(length.numpy(), 0.99), STILL)
    flow = flow / length.clamp(min=scale)                # none is longer than 1
    one = torch.ones_like(flow[0, :1]) / 2 ** 0.5        # flow_to_image divides by the longest
    return torch.stack([flow_to_image(torch.cat([frames, one]))[:-1] for frames in flow])


def choose(splits, n):
    """Numbers of about n items, drawn at random, as many of each part of the first split."""
    codes, rng = next(iter(splits.values())), np.random.default_rng(0)
    parts = [np.flatnonzero(codes == code) for code in PARTS.values() if (codes == code).any()]
    return np.concatenate([np.sort(rng.choice(part, min(n // len(parts), len(part)), replace=False))
                           for part in parts])


def writer(size):
    """write(draw, x, y, text), which shows an escape, no box, where the font lacks a character."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    known, font = FT2Font(str(path)).get_charmap(), ImageFont.truetype(str(path), size)

    def write(draw, x, y, text):
        shown = "".join(c if ord(c) in known else c.encode("ascii", "backslashreplace").decode()
                        for c in text)
        draw.text((x, y), shown, fill="black", font=font)
    return write


def contact_sheet(folder, path):
    """Write a PNG of some items of each part of the first split, a row each, as they are stored."""
    meta, modalities, labels, splits, ids, _ = store.read(folder)
    items, write = choose(splits, ROWS), writer(LINE - 6)
    shown = {name: tiles(mod, items) for name, mod in modalities.items()}
    width = TILE * max(4, sum(len(rows[0]) for rows in shown.values()))
    sheet = Image.new("RGB", (width, len(items) * (TILE + LINE) + LINE), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for name, rows in shown.items():
        audio = modalities[name].kind == "audio"
        write(draw, x + 4, 1, f"{name}: waveform, spectrogram" if audio else name)
        for i, pictures in enumerate(rows):
            row = torch.cat(pictures, 2).permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(row), (x, LINE + i * (TILE + LINE)))
        x += TILE * len(rows[0])
    codes = next(iter(splits.values()))
    for i, item in enumerate(items):
        part = list(PARTS)[codes[item]]
        title = f"{meta['classes'][labels[item]]:.30}, {part}: {ids[item]}"     # a long id is cut
        write(draw, 4, (i + 1) * (TILE + LINE) + 1, title)
    with store.whole_file(path) as file:
        sheet.save(file, "PNG")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m data.info", description="Counts, leaks, contact sheet of a prepared dataset.")
    parser.add_argument("name", help="a name under --data-dir or the path of a prepared folder")
    parser.add_argument("--data-dir", default="datasets",
                        help="where prepared datasets lie (default: %(default)s)")
    parser.add_argument("--sheet", help="where the PNG goes (default: NAME-contact-sheet.png here)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        name = Path(os.path.abspath(os.path.expanduser(args.name))).name
        sheet = Path(os.path.expanduser(args.sheet or f"{name}-contact-sheet.png"))
        check(sheet.suffix in ("", ".png"),
              f"--sheet {sheet}: the contact sheet is a PNG, call it {sheet.stem}.png")
        folder, sheet = find_prepared(args.name, args.data_dir), sheet.with_suffix(".png")
        describe(folder)
        contact_sheet(folder, sheet)
        print(f"\ncontact sheet: {sheet}")


if __name__ == "__main__":
    main()
