"""The prepared format: a folder of plain NumPy arrays that training opens as memory maps.

    meta.json                what stands here: shapes, classes, counts, SHA-256 of every file
    <modality>.npy           one array over all items: uint8 pictures, int16 waveforms or float16 spectrograms
    <modality>.frame.npy     optional, (N, 2) height and width of the original pictures, for crops in true proportions
    label.npy                (N,) int64
    ids.txt                  one line an item
    group.npy                optional, (N,) int64: items of one group (actor, video) should not be split apart
    split.<name>.npy         (N,) uint8: 0 train, 1 val, 2 test, 255 unused

It is written to `<folder>.partial` and renamed when whole, so a folder under its final name is complete.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCHEMA = 1
PARTS = {"train": 0, "val": 1, "test": 2}
UNUSED = 255
KINDS = {  # kind: (dtype, dimensions of the array)
    "audio": (np.int16, 2),        # (N, L) mono waveform at 16 kHz
    "rgb": (np.uint8, 5),          # (N, T, C, H, W), C = 1 or 3
    "view": (np.uint8, 5),         # (N, 1, C, H, W)
    "flow": (np.uint8, 5),         # (N, T, 2, H, W), 127.5 = no motion
    "spectrogram": (np.float16, 4),  # (N, C, F, L) precomputed features
}
PICTURES = ("rgb", "view", "flow")


class DataError(Exception):
    """Something about the data that the user can mend; the message says what, where and how."""


@dataclass(frozen=True)
class Modality:
    """One modality: its array over all items and how it becomes the encoder's input (see `data.batches`).

    kind         one of KINDS
    array        the stored array, first dimension N
    size         pictures: height and width fed to the encoder (224 for stored 256, else the stored size)
    scale        pictures: share of the frame's area that a random crop covers, (smallest, largest)
    flip         pictures: whether half of the training items are mirrored
    standardize  audio: each clip's log spectrogram to mean 0, variance 1
    mean, std    spectrogram: what is subtracted and divided by
    frame        pictures: (N, 2) height and width of the original frames, None if they are the stored ones
    """

    kind: str
    array: np.ndarray
    size: tuple = None
    scale: tuple = (0.08, 1.0)
    flip: bool = True
    standardize: bool = False
    mean: float = 0.0
    std: float = 1.0
    frame: np.ndarray = None

    OPTIONS = {"audio": ("standardize",), "spectrogram": ("mean", "std"),
               "rgb": ("size", "scale", "flip"), "view": ("size", "scale", "flip"), "flow": ("size", "scale", "flip")}

    @property
    def in_channels(self):
        """Channels of the encoder's first convolution."""
        return {"audio": 1, "spectrogram": self.array.shape[1]}.get(self.kind) or self.array.shape[2]

    @property
    def options(self):
        """The settings that meta.json keeps for this kind."""
        return {key: getattr(self, key) for key in self.OPTIONS[self.kind]}


def modality(kind, array, **options):
    """A checked Modality. Raises DataError for a kind, dtype, shape or option that does not fit."""
    if kind not in KINDS:
        raise DataError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    dtype, ndim = KINDS[kind]
    if array.dtype != dtype or array.ndim != ndim:
        raise DataError(f"kind {kind!r} is stored as {np.dtype(dtype)} with {ndim} dimensions, "
                        f"this array is {array.dtype} of shape {array.shape}")
    if 0 in array.shape:
        raise DataError(f"the array is empty: shape {array.shape}")
    if kind == "rgb" and array.shape[2] not in (1, 3) or kind == "flow" and array.shape[2] != 2:
        raise DataError(f"kind {kind!r} cannot have {array.shape[2]} channels (array of shape {array.shape})")
    unknown = set(options) - set(Modality.OPTIONS[kind]) - ({"frame"} if kind in PICTURES else set())
    if unknown:
        raise DataError(f"kind {kind!r} has no option {', '.join(sorted(unknown))}")
    if kind in PICTURES:
        height, width = array.shape[-2:]
        default = (224, 224) if (height, width) == (256, 256) else (height, width)
        options["size"] = options.get("size") or default
        options["scale"] = options.get("scale", (0.08, 1.0))
        for key in ("size", "scale"):
            if not isinstance(options[key], (tuple, list)) or len(options[key]) != 2:
                raise DataError(f"{key} is {options[key]!r}, not a pair")
            options[key] = tuple(options[key])
        if not 0 < options["scale"][0] <= options["scale"][1] <= 1:
            raise DataError(f"scale {options['scale']} is not 0 < smallest <= largest <= 1")
    if kind == "spectrogram" and not options.get("std", 1.0) > 0:
        raise DataError(f"std {options['std']} is not above 0")
    return Modality(kind, array, **options)


def check_items(modalities, labels, splits, classes, ids, groups=None):
    """Raise DataError unless the arrays describe the same items: lengths, ranges, unique ids."""
    n = len(labels)
    if not modalities or n == 0:
        raise DataError("there are no modalities" if not modalities else "there are no items")
    for name, mod in modalities.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise DataError(f"modality name {name!r}: use a-z, 0-9 and _ (it becomes a file name)")
        if len(mod.array) != n:
            raise DataError(f"modality {name!r} has {len(mod.array)} items, there are {n} labels")
        if mod.frame is not None and mod.frame.shape != (n, 2):
            raise DataError(f"frame of modality {name!r} has shape {mod.frame.shape}, not ({n}, 2)")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"labels must be whole numbers 0 .. {len(classes) - 1}, one an item")
    if len(ids) != n or len(set(ids)) != n:
        raise DataError(f"ids: {len(set(ids))} different ones for {n} items")
    if any(str(i).splitlines() != [str(i)] for i in ids):
        raise DataError("ids: each must be one line of text, not empty")
    if groups is not None and len(groups) != n:
        raise DataError(f"groups: {len(groups)} for {n} items")
    if not splits:
        raise DataError("there is no split")
    for name, split in splits.items():
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise DataError(f"split name {name!r}: use a-z, 0-9 and _ (it becomes a file name)")
        if split.shape != (n,) or not np.isin(split, [*PARTS.values(), UNUSED]).all():
            raise DataError(f"split {name!r} must hold 0 (train), 1 (val), 2 (test) or 255 (unused) for {n} items")
        for part in ("train", "test"):
            if not (split == PARTS[part]).any():
                raise DataError(f"split {name!r} has no {part} items")


@contextlib.contextmanager
def whole_file(path):
    """Open a file to write bytes to; it appears as `path` when the block ends well, and not at all otherwise."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def sha256(path):
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(folder, modalities, labels, splits, classes, ids, groups=None):
    """Write a prepared folder from arrays in memory.

    modalities  {name: dict(kind=..., array=..., options of Modality)}
    labels      (N,) int; classes: list of their names
    splits      {name: (N,) uint8 of 0 train, 1 val, 2 test, 255 unused}
    ids         N different strings; groups: (N,) int or None
    Returns the folder's Path. Raises DataError, and leaves nothing behind, if the arrays do not fit together.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already: remove it or choose another name")
    labels, splits = np.asarray(labels), {name: np.asarray(split) for name, split in splits.items()}
    checked = {}
    for name, spec in modalities.items():
        try:
            checked[name] = modality(**spec)
        except DataError as error:
            raise DataError(f"modality {name!r}: {error}") from None
        if checked[name].kind == "spectrogram" and not np.isfinite(checked[name].array).all():
            raise DataError(f"modality {name!r} holds values that are not finite")
    check_items(checked, labels, splits, classes, ids, groups)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, mod in checked.items():
            np.save(partial / f"{name}.npy", mod.array)
        finish(partial, folder, checked, labels, splits, classes, ids, groups)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def finish(partial, folder, modalities, labels, splits, classes, ids, groups=None, notes=None, leave_out=()):
    """Complete `partial`, in which each <modality>.npy stands already, with labels, ids, splits and meta.json,
    and rename it to `folder`. `notes` is a dict added to meta.json: what was skipped and why, versions, sources.
    Files named in `leave_out` are removed at the end."""
    np.save(partial / "label.npy", np.asarray(labels, dtype=np.int64))
    (partial / "ids.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    if groups is not None:
        np.save(partial / "group.npy", np.asarray(groups, dtype=np.int64))
    for name, split in splits.items():
        np.save(partial / f"split.{name}.npy", np.asarray(split, dtype=np.uint8))
    for name, mod in modalities.items():
        if mod.frame is not None:
            np.save(partial / f"{name}.frame.npy", np.asarray(mod.frame, dtype=np.int32))
    meta = {
        "schema": SCHEMA,
        "items": len(labels),
        "classes": list(classes),
        "modalities": {name: {"kind": mod.kind, "shape": list(mod.array.shape), **mod.options}
                       for name, mod in modalities.items()},
        "splits": {name: {part: int((np.asarray(split) == code).sum()) for part, code in PARTS.items()}
                   for name, split in splits.items()},
        **(notes or {}),
        "sha256": {path.name: sha256(path) for path in sorted(partial.iterdir()) if path.suffix in (".npy", ".txt") and path.name not in leave_out},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **(notes or {}).get("versions", {})},
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    for name in leave_out:
        (partial / name).unlink()
    os.replace(partial, folder)


def read(folder):
    """Open a prepared folder: (meta, modalities, labels, splits, ids, groups), arrays as read-only memory maps.

    Raises DataError, naming the file, for whatever is missing or does not agree with meta.json.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} is not a prepared folder: it has no meta.json") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'meta.json'} cannot be read: {error}") from None
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        raise DataError(f"{folder / 'meta.json'} is not of schema {SCHEMA}: prepare the dataset again")

    def load(name):
        try:
            return np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / name} cannot be read: {error}") from None

    try:
        modalities = {}
        for name, spec in meta["modalities"].items():
            spec, array = dict(spec), load(f"{name}.npy")
            if list(array.shape) != spec.pop("shape"):
                raise DataError(f"{folder / name}.npy has shape {list(array.shape)}, meta.json says otherwise")
            frame = load(f"{name}.frame.npy") if (folder / f"{name}.frame.npy").exists() else None
            modalities[name] = modality(array=array, **spec, **({} if frame is None else {"frame": frame}))
        labels, ids = load("label.npy"), (folder / "ids.txt").read_text(encoding="utf-8").splitlines()
        splits = {name: load(f"split.{name}.npy") for name in meta["splits"]}
        groups = load("group.npy") if (folder / "group.npy").exists() else None
        check_items(modalities, labels, splits, meta["classes"], ids, groups)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{folder / 'meta.json'} is damaged: {type(error).__name__} {error}") from None
    return meta, modalities, labels, splits, ids, groups
