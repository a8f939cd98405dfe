"""The prepared format: a folder of plain NumPy arrays that training opens as memory maps.

    meta.json                what stands here: shapes, classes, counts, SHA-256 of every file
    <modality>.npy           one array over all items: pictures, waveforms or spectrograms (KINDS)
    <modality>.frame.npy     optional, (N, 2) height and width of the original pictures, for crops
                             in true proportions
    label.npy                (N,) int64
    ids.txt                  one line an item
    group.npy                optional, (N,) int64: items of one group (actor, video) belong together
    split.<name>.npy         (N,) uint8: 0 train, 1 val, 2 test, 255 unused
    SHA256SUMS               `sha256sum -c SHA256SUMS` says whether a copy is whole

It is written to `<folder>.partial` and renamed when whole, so a folder under its final name is
complete. Nothing in it is ever unpickled.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

SCHEMA = 1
PARTS = {"train": 0, "val": 1, "test": 2}
UNUSED = 255
KINDS = {  # kind: (dtype, dimensions of the array, its options)
    "audio": (np.int16, 2, ("standardize",)),                   # (N, L) mono at 16 kHz
    "rgb": (np.uint8, 5, ("size", "scale", "flip")),            # (N, T, C, H, W), C = 1 or 3
    "flow": (np.uint8, 5, ("size", "scale", "flip")),           # (N, T, 2, H, W), 127.5: no motion
    "spectrogram": (np.float16, 4, ("mean", "std")),            # (N, C, F, L), precomputed features
}
CHANNELS = {"rgb": (1, 3), "flow": (2,)}
PICTURES = tuple(CHANNELS)
WINDOW = 512                # samples: what `data.batches.log_spectrogram` needs at least
# what files, heads and losses are called, so no modality can be
RESERVED = ("label", "group", "fused", "fusion", "own", "unweighted", "calibrated", "joint",
            "shared", "duc", "consistency", "complement")


class DataError(Exception):
    """What the user can mend; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Modality:
    """One modality: its array over all items and how it becomes the encoder's input."""

    kind: str                   # one of KINDS
    array: np.ndarray           # as stored, first dimension N
    # pictures: height and width fed to the encoder (224 for stored 256, else as stored), the share
    # of the frame that a random crop covers, whether half of the training items are mirrored
    size: tuple = None
    scale: tuple = (0.08, 1.0)
    flip: bool = True
    frame: np.ndarray = None    # (N, 2) height and width of the original frames, None if as stored
    standardize: bool = False   # audio: each clip's log spectrogram to mean 0, variance 1
    mean: float = 0.0           # spectrogram: what is subtracted, and divided by
    std: float = 1.0

    @property
    def in_channels(self):
        """Channels of the encoder's first convolution."""
        if self.kind == "audio":
            return 1
        return self.array.shape[1 if self.kind == "spectrogram" else 2]

    @property
    def options(self):
        """The settings that meta.json keeps for this kind."""
        return {key: getattr(self, key) for key in KINDS[self.kind][2]}


def check(right, wrong):
    """Raise DataError(wrong) unless it is right."""
    if not right:
        raise DataError(wrong)


def modality(kind, array, frame=None, **options):
    """A checked Modality: what `data.batches` and an encoder can take. Raises DataError."""
    check(kind in KINDS, f"kind {kind!r} is not one of {', '.join(KINDS)}")
    dtype, ndim, known = KINDS[kind]
    array, unknown = np.asanyarray(array), set(options) - set(known)
    check(array.dtype == dtype and array.ndim == ndim and array.size,
          f"kind {kind!r} is stored as {np.dtype(dtype)} with {ndim} dimensions, this array is "
          f"{array.dtype} of shape {array.shape}")
    check(not unknown, f"kind {kind!r} has no option {', '.join(sorted(unknown))}")
    if kind == "audio":
        check(array.shape[1] >= WINDOW,
              f"sound of {array.shape[1]} samples is shorter than a window of {WINDOW}")
    elif kind == "spectrogram":
        mean, std = float(options.get("mean", 0)), float(options.get("std", 1))
        check(np.isfinite(mean) and 0 < std < np.inf,
              f"mean is {mean} and std {std}: they must be finite, and std above 0")
        options.update(mean=mean, std=std)
    else:
        check(array.shape[2] in CHANNELS[kind], f"kind {kind!r} cannot have {array.shape[2]} "
                                                f"channels, but {CHANNELS[kind]}")
        stored, scale = array.shape[-2:], options.get("scale", Modality.scale)
        size = options.get("size", (224, 224) if stored == (256, 256) else stored)
        check(np.shape(size) == (2,) and all(side == int(side) > 0 for side in size),
              f"size is {size}, not a height and a width")
        check(np.shape(scale) == (2,) and 0 < scale[0] <= scale[1] <= 1,
              f"scale is {scale}, not 0 < smallest <= largest <= 1")
        options.update(size=tuple(map(int, size)), scale=tuple(scale))
    for key in ("flip", "standardize"):
        check(options.get(key, True) in (True, False), f"{key} is {options.get(key)!r}, not a bool")
    return Modality(kind, array, frame=None if frame is None else np.asanyarray(frame), **options)


def modalities_of(specs):
    """{name: dict(kind, array, options)} -> {name: Modality}. Raises DataError, with the name."""
    checked = {}
    for name, spec in specs.items():
        try:
            checked[name] = modality(**spec)
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"modality {name!r}: {error}") from None
    return checked


def check_lines(what, names):
    """Raise DataError unless each name is one line of text and there once."""
    for name in names:
        check(name and name.isprintable(), f"{what}: each must be one line of text, not {name!r}")
    often, times = Counter(names).most_common(1)[0]
    check(times == 1, f"{what}: {often!r} comes more than once")


def check_items(modalities, labels, splits, classes, ids, groups=None):
    """Raise DataError unless the arrays describe the same items."""
    n = len(ids)

    def whole_numbers(array):
        return array.shape == (n,) and array.dtype.kind in "iu"

    check(modalities and splits and classes and ids,
          "modalities, splits, classes and ids: none of them may be empty")
    check_lines("ids", ids)
    check_lines("classes", classes)
    for name, mod in modalities.items():
        check(re.fullmatch(r"[a-z][a-z0-9_]*", str(name)),
              f"modality name {name!r}: use a to z, 0 to 9 and _, a letter first")
        # the scripts keep encoders and heads in a ModuleDict, whose own words they cannot have
        check(name not in RESERVED and not hasattr(nn.ModuleDict(), name),
              f"modality name {name!r} means something else in the scripts: choose another")
        check(len(mod.array) == n,
              f"modality {name!r} has {len(mod.array)} items, there are {n} ids")
        check(mod.frame is None or mod.frame.shape == (n, 2) and mod.frame.min() > 0,
              f"frame of modality {name!r} must hold height and width in pixels for {n} items")
    crops = {(mod.scale, mod.flip) for mod in modalities.values() if mod.kind in PICTURES}
    check(len(crops) < 2 or "flow" not in {mod.kind for mod in modalities.values()},
          f"flow and pictures see the same crop: give them one scale and one flip, not {crops}")
    check(whole_numbers(labels) and 0 <= labels.min() <= labels.max() < len(classes),
          f"labels must be whole numbers 0 .. {len(classes) - 1}, one for each of {n} items")
    check(groups is None or whole_numbers(groups),
          f"groups must be whole numbers, one for each of {n} items")
    for name, split in splits.items():
        check(re.fullmatch(r"[a-z0-9_]+", str(name)), f"split name {name!r}: use a-z, 0-9 and _")
        check(whole_numbers(split) and np.isin(split, [*PARTS.values(), UNUSED]).all(),
              f"split {name!r} must hold 0 (train), 1 (val), 2 (test) or 255 (unused), {n} in all")
        for part in ("train", "test"):
            check((split == PARTS[part]).any(), f"split {name!r} has no {part} items")


@contextlib.contextmanager
def whole_file(path):
    """A buffer to write bytes to, which stand at `path`, whole, when the block has ended well.

    A kill or a full disk leaves what stood there before.
    """
    buffer, partial = io.BytesIO(), f"{path}.partial"
    yield buffer
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:        # a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def write(folder, modalities, labels, splits, classes, ids, groups=None, notes={}, partial=None):
    """Write a prepared folder from arrays in memory.

    modalities  {name: dict(kind=..., array=..., options of Modality)}
    labels      (N,) int; classes: list of their names
    splits      {name: (N,) uint8 of 0 train, 1 val, 2 test, 255 unused}
    ids         N different strings; groups: (N,) int or None
    notes       for meta.json: what was skipped and why, versions, sources
    partial     a folder in which <modality>.npy stands already: it becomes `folder`
    Returns the folder's Path. Raises DataError, before anything is written, if they do not fit.
    """
    folder = Path(folder).expanduser()
    # a link whose target is gone would exist only when the renaming fails
    check(not os.path.lexists(folder), f"{folder} exists already: remove it or choose another name")
    for what, names in (("classes", classes), ("ids", ids)):
        check(isinstance(names, (list, tuple, np.ndarray)),
              f"{what}: a list is needed, in the order of the numbers, not {type(names)}")
    for what, named in (("modalities", modalities), ("splits", splits)):
        check(isinstance(named, dict), f"{what}: a dict of names is needed, not {type(named)}")
    labels, classes, ids = np.asarray(labels), list(map(str, classes)), list(map(str, ids))
    splits = {name: np.asarray(split) for name, split in splits.items()}
    groups = None if groups is None else np.asarray(groups)
    modalities = modalities_of(modalities)
    check_items(modalities, labels, splits, classes, ids, groups)
    arrays = {f"split.{name}": split.astype(np.uint8) for name, split in splits.items()}
    arrays["label"] = labels.astype(np.int64)
    if groups is not None:
        arrays["group"] = groups.astype(np.int64)
    for name, mod in modalities.items():
        if mod.frame is not None:
            arrays[f"{name}.frame"] = mod.frame.astype(np.int32)
        if not partial:
            check_values(name, mod)
            arrays[name] = mod.array
    if not partial:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    for name, array in arrays.items():
        try:
            np.save(partial / f"{name}.npy", array)
        except OSError as error:        # NumPy's does not say which file
            raise DataError(f"{partial}/{name}.npy cannot be written ({error}): is the disk "
                            "full?") from None
    (partial / "ids.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    files = {"ids.txt", *(f"{name}.npy" for name in (*arrays, *modalities))}
    sums = {file: sha256(partial / file) for file in sorted(files)}
    meta = dict(
        schema=SCHEMA, items=len(ids), classes=classes,
        modalities={name: dict(kind=mod.kind, shape=mod.array.shape, **mod.options)
                    for name, mod in modalities.items()},
        splits={name: counts(split) for name, split in splits.items()},
        **{"versions": {"python": platform.python_version(), "numpy": np.__version__}, **notes},
        sha256=sums)
    # options and notes may be NumPy's scalars and arrays, or paths
    text = json.dumps(meta, indent=1,
                      default=lambda value: getattr(value, "tolist", value.__str__)()) + "\n"
    (partial / "meta.json").write_text(text, encoding="utf-8")
    sums["meta.json"] = sha256(partial / "meta.json")
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (partial / "SHA256SUMS").write_text(lines, encoding="utf-8")
    os.replace(partial, folder)
    shutil.rmtree(folder / "state", ignore_errors=True)         # of data.prepare
    return folder


def check_values(name, mod):
    """Raise DataError for values that are not what a kind holds."""
    if mod.kind == "spectrogram":
        check(np.isfinite(mod.array).all(), f"modality {name!r} holds values that are not finite")
    else:
        check(mod.array.max() > 1 or mod.array.min() < -1,
              f"modality {name!r} has no value beyond 1: it was cast to {mod.array.dtype} before "
              f"it was multiplied by {np.iinfo(mod.array.dtype).max}")


def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def counts(split):
    """{part: how many items of it a split has}."""
    return {part: int((split == code).sum()) for part, code in PARTS.items()}


def read(folder):
    """Open a prepared folder: (meta, modalities, labels, splits, ids, groups), arrays as read-only
    memory maps.

    Raises DataError for what is missing, cut, or does not fit together, and for labels, splits and
    the like that are not those written. The large arrays' bytes are not looked at: `sha256sum -c
    SHA256SUMS` in the folder does that.
    """
    folder = Path(folder).expanduser()
    check((folder / "meta.json").exists(), f"{folder} is no prepared folder: it has no meta.json")

    def array(name):
        try:
            return np.load(folder / f"{name}.npy", mmap_mode="r")
        except (ValueError, EOFError) as error:         # they do not say which file
            raise DataError(f"{name}.npy cannot be read: {error}") from None

    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        check(meta["schema"] == SCHEMA, f"meta.json is not of schema {SCHEMA}")
        for file in meta["sha256"].keys() - {f"{name}.npy" for name in meta["modalities"]}:
            check(sha256(folder / file) == meta["sha256"][file], f"{file} has changed since it was "
                                                                 "written")
        ids = (folder / "ids.txt").read_text(encoding="utf-8").splitlines()
        labels, specs = array("label"), {}
        splits = {name: array(f"split.{name}") for name in meta["splits"]}
        groups = array("group") if "group.npy" in meta["sha256"] else None
        for name, spec in meta["modalities"].items():
            shape = tuple(spec.pop("shape"))
            specs[name] = {**spec, "array": array(name)}
            check(specs[name]["array"].shape == shape, f"{name}.npy is not of shape {shape}")
            if f"{name}.frame.npy" in meta["sha256"]:
                specs[name]["frame"] = array(f"{name}.frame")
        modalities = modalities_of(specs)
        check_items(modalities, labels, splits, meta["classes"], ids, groups)
    except Exception as error:      # of many kinds: damage can be anywhere
        wrong = error if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{folder} cannot be used: {wrong} (`sha256sum -c SHA256SUMS` there says "
                        "what is damaged)") from None
    return meta, modalities, labels, splits, ids, groups
