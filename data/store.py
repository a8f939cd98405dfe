"""The prepared format: a folder of plain NumPy arrays that training opens as memory maps.

    meta.json                what stands here: shapes, classes, counts, SHA-256 of every file
    <modality>.npy           one array over all items: pictures, waveforms or spectrograms (KINDS)
    <modality>.frame.npy     optional, (N, 2) height and width of the original pictures, for crops
                             in true proportions
    label.npy                (N,) int64
    ids.txt                  one line an item
    group.npy                optional, (N,) int64: items of one group (actor, video) belong together
    split.<name>.npy         (N,) uint8: 0 train, 1 val, 2 test, 255 unused

It is written to `<folder>.partial` and renamed when whole, so a folder under its final name is
complete. It may come from anybody: reading one executes nothing, opens no file outside it and takes
no number in it on trust.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError

SCHEMA = 1
PARTS = {"train": 0, "val": 1, "test": 2}
UNUSED = 255
KINDS = {  # kind: (dtype, dimensions of the array)
    "audio": (np.int16, 2),             # (N, L) mono waveform at 16 kHz
    "rgb": (np.uint8, 5),               # (N, T, C, H, W), C = 1 or 3
    "view": (np.uint8, 5),              # (N, 1, C, H, W), C = 1 or 3
    "flow": (np.uint8, 5),              # (N, T, 2, H, W), 127.5 = no motion
    "spectrogram": (np.float16, 4),     # (N, C, F, L) precomputed features
}
CHANNELS = {"rgb": (1, 3), "view": (1, 3), "flow": (2,)}
PICTURES = tuple(CHANNELS)
WINDOW = 512                # samples: what `data.batches.log_spectrogram` needs at least
NAME = r"[a-z][a-z0-9_]*"   # of a modality: it becomes a file's
LARGEST = 4096              # pixels: how high or wide pictures may become that are stored smaller
LARGEST_TEXT = 1 << 28      # bytes of meta.json or ids.txt
# text that a terminal and UTF-8 can show
LINE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


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

    OPTIONS = {"audio": ("standardize",), "spectrogram": ("mean", "std"),
               **dict.fromkeys(PICTURES, ("size", "scale", "flip"))}

    @property
    def in_channels(self):
        """Channels of the encoder's first convolution."""
        if self.kind == "audio":
            return 1
        return self.array.shape[1 if self.kind == "spectrogram" else 2]

    @property
    def options(self):
        """The settings that meta.json keeps for this kind."""
        return {key: getattr(self, key) for key in self.OPTIONS[self.kind]}


def check(right, wrong):
    """Raise DataError(wrong) unless it is right."""
    if not right:
        raise DataError(wrong)


def modality(kind, array, **options):
    """A checked Modality: what `data.batches` and an encoder can take. Raises DataError otherwise.

    NumPy's scalars and arrays serve as options, and become Python's numbers and lists.
    """
    check(kind in list(KINDS), f"kind {kind!r:.60} is not one of {', '.join(KINDS)}")
    (dtype, ndim), array = KINDS[kind], np.asanyarray(array)
    check(array.dtype == dtype and array.ndim == ndim,
          f"kind {kind!r} is stored as {np.dtype(dtype)} with {ndim} dimensions, this array is "
          f"{array.dtype} of shape {array.shape}")
    check(0 not in array.shape, f"the array is empty: shape {array.shape}")
    if kind in PICTURES:
        check(array.shape[2] in CHANNELS[kind],
              f"kind {kind!r} cannot have {array.shape[2]} channels: it has "
              f"{' or '.join(map(str, CHANNELS[kind]))} (array of shape {array.shape})")
    if kind == "audio":
        check(array.shape[1] >= WINDOW, f"sound of {array.shape[1]} samples is shorter than a "
                                        f"window of {WINDOW}")
    frame = options.pop("frame", None) if kind in PICTURES else None
    unknown = set(options) - set(Modality.OPTIONS[kind])
    check(not unknown, f"kind {kind!r} has no option {', '.join(sorted(map(repr, unknown)))}")
    options = {key: python(options.get(key, getattr(Modality, key)))
               for key in Modality.OPTIONS[kind]}

    def need(key, right, why):
        check(right, f"{key} is {options[key]!r:.60}, {why}")

    if kind in PICTURES:
        stored = array.shape[-2:]
        options["size"] = options["size"] or ((224, 224) if stored == (256, 256) else stored)
        for key in ("size", "scale"):
            need(key, isinstance(options[key], (tuple, list)) and len(options[key]) == 2,
                 "not a pair")
            options[key] = tuple(map(python, options[key]))
        need("size", all(type(side) is int and 0 < side <= max(LARGEST, *stored)
                         for side in options["size"]),
             f"not a height and a width in pixels, at most {LARGEST}")
        smallest, largest = options["scale"]
        need("scale", is_number(smallest) and is_number(largest) and 0 < smallest <= largest <= 1,
             "not 0 < smallest <= largest <= 1")
    for key in {"flip", "standardize"} & set(options):
        need(key, isinstance(options[key], bool), "neither true nor false")
    for key in {"mean", "std"} & set(options):
        need(key, is_number(options[key]), "not a finite number")
    if kind == "spectrogram":
        mean, std = options["mean"], options["std"]
        need("std", std > 0, "not above 0")
        need("std", (abs(mean) + float(np.finfo(dtype).max)) / std <= 1e38,
             f"so small that (x - {mean:g}) / std overflows float32")
    return Modality(kind, array, frame=None if frame is None else np.asanyarray(frame), **options)


def modalities_of(specs):
    """{name: dict(kind, array, options)} -> {name: Modality}. Raises DataError, with the name."""
    checked = {}
    for name, spec in specs.items():
        try:
            checked[name] = modality(**spec)
        except DataError as error:
            raise DataError(f"modality {name!r}: {error}") from None
    return checked


def not_finite(array):
    """Numbers of the items that hold a value which is not finite."""
    return [i for i, features in enumerate(array) if not np.isfinite(features).all()]


def python(value):
    """NumPy's scalars and arrays as Python's numbers and lists, anything else as it is."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e30


def plain(text):
    """In one line, without what a terminal would obey or cannot show: for text of others."""
    return " ".join(LINE.findall(str(text)))


def check_ids(ids):
    """Raise DataError unless each id is one line of text and there once."""
    for i in ids:
        check(LINE.fullmatch(i), f"ids: each must be one line of text, not {i!r:.60}")
    if len(set(ids)) != len(ids):
        raise DataError(f"ids: {len(set(ids))} different ones for {len(ids)} items, "
                        f"{Counter(ids).most_common(1)[0][0]!r:.60} comes more than once")


def check_items(modalities, labels, splits, classes, ids, groups=None):
    """Raise DataError unless the arrays describe the same items."""
    n = len(ids)

    def whole_numbers(array):
        return array.shape == (n,) and array.dtype.kind in "iu"

    for what, there in {"modalities": modalities, "items": ids, "splits": splits}.items():
        check(there, f"there are no {what}")
    for name, mod in modalities.items():
        check(isinstance(name, str) and re.fullmatch(NAME, name),
              f"modality name {name!r:.60}: use a to z, 0 to 9 and _, a letter first")
        check(name not in ("label", "group"),
              f"modality name {name!r}: {name}.npy holds the items' {name}s, choose another")
        check(len(mod.array) == n,
              f"modality {name!r} has {len(mod.array)} items, there are {n} ids")
        frame = mod.frame
        check(frame is None or (frame.shape == (n, 2) and frame.dtype.kind in "iu"
                                and 0 < frame.min() <= frame.max() < 2 ** 31),
              f"frame of modality {name!r} must hold height and width in pixels for {n} items")
    check(all(isinstance(name, str) and LINE.fullmatch(name) for name in classes),
          "classes: each name must be one line of text")
    check(whole_numbers(labels) and 0 <= labels.min() <= labels.max() < len(classes),
          f"labels must be whole numbers 0 .. {len(classes) - 1}, one for each of {n} items")
    check_ids(ids)
    check(groups is None or whole_numbers(groups),
          f"groups must be whole numbers, one for each of {n} items")
    for name, split in splits.items():
        check(isinstance(name, str) and re.fullmatch(r"[a-z0-9_]+", name),
              f"split name {name!r:.60}: use a-z, 0-9 and _ (it becomes a file name)")
        check(whole_numbers(split) and np.isin(split, [*PARTS.values(), UNUSED]).all(),
              f"split {name!r} must hold 0 (train), 1 (val), 2 (test) or 255 (unused) for {n} "
              "items")
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


def sha256(path, progress=lambda n: None):
    """Hex digest of a file's bytes; `progress` is told of every block how long it was."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def write(folder, modalities, labels, splits, classes, ids, groups=None):
    """Write a prepared folder from arrays in memory.

    modalities  {name: dict(kind=..., array=..., options of Modality)}; a name is any of a to z, 0
                to 9 and _, a letter first, but not label or group: label.npy is there already
    labels      (N,) int; classes: list of their names
    splits      {name: (N,) uint8 of 0 train, 1 val, 2 test, 255 unused}
    ids         N different strings; groups: (N,) int or None
    Returns the folder's Path. Raises DataError, and leaves nothing behind, if they do not fit.
    """
    folder = Path(os.path.expanduser(folder))
    check(not folder.exists(), f"{folder} exists already: remove it or choose another name")
    labels, ids = np.asarray(labels), list(map(str, ids))
    splits = {name: np.asarray(split) for name, split in splits.items()}
    groups = None if groups is None else np.asarray(groups)
    modalities = modalities_of(modalities)
    for name, mod in modalities.items():
        check(mod.kind != "spectrogram" or not not_finite(mod.array),
              f"modality {name!r} holds values that are not finite")
    check_items(modalities, labels, splits, classes, ids, groups)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, mod in modalities.items():
            np.save(partial / f"{name}.npy", mod.array)
        finish(partial, folder, modalities, labels, splits, classes, ids, groups)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def finish(partial, folder, modalities, labels, splits, classes, ids, groups=None, notes={},
           leave_out=()):
    """Complete `partial`, in which each <modality>.npy stands already, with everything else, and
    rename it to `folder`. `notes` is added to meta.json: what was skipped and why, versions,
    sources. Files named in `leave_out` are removed at the end."""
    np.save(partial / "label.npy", labels.astype(np.int64))
    (partial / "ids.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    if groups is not None:
        np.save(partial / "group.npy", groups.astype(np.int64))
    for name, split in splits.items():
        np.save(partial / f"split.{name}.npy", split.astype(np.uint8))
    for name, mod in modalities.items():
        if mod.frame is not None:
            np.save(partial / f"{name}.frame.npy", mod.frame.astype(np.int32))
    meta = {
        "schema": SCHEMA,
        "items": len(labels),
        "classes": list(classes),
        "modalities": {name: {"kind": mod.kind, "shape": list(mod.array.shape), **mod.options}
                       for name, mod in modalities.items()},
        "splits": {name: counts(split) for name, split in splits.items()},
        **notes,
        "sha256": {path.name: sha256(path) for path in sorted(partial.iterdir())
                   if path.name not in leave_out},
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     **notes.get("versions", {})},
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    for name in leave_out:
        (partial / name).unlink()
    os.replace(partial, folder)


def counts(split):
    """{part: how many items of it a split has}."""
    return {part: int((split == code).sum()) for part, code in PARTS.items()}


def own_file(folder, name):
    """The path of a file of a prepared folder. Raises DataError unless it is a plain file: no link
    to elsewhere, no pipe."""
    path = Path(folder) / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DataError(f"{path} {'is missing' if missing else error.strerror}") from None
    check(stat.S_ISREG(mode), f"{path} is not a plain file: links are not followed, put the file "
                              "itself there (the folder may be a link)")
    return path


def read_text(folder, name):
    """The text of a file of a prepared folder. Raises DataError."""
    path = own_file(folder, name)
    size = path.stat().st_size
    check(size <= LARGEST_TEXT, f"{path} has {size} bytes: no prepared folder has so long a one")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_array(folder, name):
    """An array of a prepared folder, a read-only memory map. Raises DataError, also where its
    length is not the header's."""
    path = own_file(folder, name)
    try:
        with np.errstate(over="raise"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.lib.format.open_memmap(path, mode="r")
        surplus = path.stat().st_size - array.offset - array.nbytes
    except Exception as error:      # of any kind: NumPy evaluates a header, which may be made up
        raise DataError(f"{path} cannot be read: {plain(error)[:200]}") from None
    check(not surplus, f"{path} cannot be read: it is {surplus} bytes longer than its header says")
    return array


def read_meta(folder):
    """meta.json of a prepared folder as a dict, each entry of the kind that `finish` wrote, naming
    no file but the format's. Raises DataError. Whether it agrees with the arrays `read` sees.
    """
    path = Path(folder) / "meta.json"
    check(path.exists(), f"{folder} is not a prepared folder: it has no meta.json")
    try:
        meta = json.loads(read_text(folder, "meta.json"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    check(isinstance(meta, dict) and meta.get("schema") == SCHEMA,
          f"{path} is not of schema {SCHEMA}: prepare the dataset again")

    def need(right, what):
        check(right, f"{path} is damaged: {what}; copy or prepare the folder again")

    for key, kind in {"classes": list, "modalities": dict, "splits": dict, "sha256": dict}.items():
        need(isinstance(meta.get(key), kind), f"{key} is not what it should be")
    for key, kind in {"skipped": dict, "groups": list}.items():
        need(isinstance(meta.get(key, kind()), kind), f"{key} is not what it should be")
    for name in [*meta["modalities"], *meta["splits"]]:
        need(re.fullmatch(r"[a-z0-9_]+", name), f"{name!r:.60} cannot name a modality or split")
    for name, spec in meta["modalities"].items():
        need(isinstance(spec, dict) and spec.get("kind") in list(KINDS),
             f"modality {name!r:.60} is of no known kind")
        need(set(spec) <= {"kind", "shape", *Modality.OPTIONS[spec["kind"]]},
             f"modality {name!r:.60} has unknown options")
    always = {"ids.txt", "label.npy", *(f"{name}.npy" for name in meta["modalities"]),
              *(f"split.{name}.npy" for name in meta["splits"])}
    at_times = {"group.npy", *(f"{name}.frame.npy" for name in meta["modalities"])}
    need(always <= set(meta["sha256"]) <= always | at_times,
         "sha256 does not list the files of its modalities and splits")
    return meta


def read(folder):
    """Open a prepared folder: (meta, modalities, labels, splits, ids, groups), arrays as read-only
    memory maps.

    Raises DataError, naming the file, for whatever is missing or does not agree with meta.json. The
    arrays' bytes are not looked at, apart from labels, groups and splits: `python -m data.verify`
    does that.
    """
    folder = Path(os.path.expanduser(folder))
    meta, specs = read_meta(folder), {}
    ids, labels = read_text(folder, "ids.txt").splitlines(), read_array(folder, "label.npy")
    splits = {name: read_array(folder, f"split.{name}.npy") for name in meta["splits"]}
    groups = read_array(folder, "group.npy") if "group.npy" in meta["sha256"] else None
    for name, spec in meta["modalities"].items():
        array = read_array(folder, f"{name}.npy")
        check(list(array.shape) == spec.get("shape"),
              f"{folder / name}.npy has shape {list(array.shape)}, meta.json says otherwise")
        specs[name] = {**spec, "array": array}
        del specs[name]["shape"]
        if f"{name}.frame.npy" in meta["sha256"]:
            specs[name]["frame"] = read_array(folder, f"{name}.frame.npy")
    try:
        modalities = modalities_of(specs)
        check_items(modalities, labels, splits, meta["classes"], ids, groups)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    counted = {name: counts(split) for name, split in splits.items()}
    check(meta.get("items") == len(ids) and meta["splits"] == counted,
          f"{folder / 'meta.json'} counts other items than the arrays hold: copy or prepare the "
          "folder again")
    check(groups is None or "groups" not in meta
          or 0 <= groups.min() <= groups.max() < len(meta["groups"]),
          f"{folder / 'group.npy'} has groups that meta.json does not name: copy or prepare the "
          "folder again")
    return meta, modalities, labels, splits, ids, groups
