"""Official downloads -> prepared arrays.

    python -m data.prepare ave --raw DIR

decodes on all cores into `datasets/ave.partial` and renames it to `datasets/ave` when whole. Killed
and started again, it goes on where it was and ends with the same bytes; a raw file that was
replaced meanwhile is decoded again. A file that cannot be used, or takes its decoder longer than
TIME_LIMIT, is named at the end and fails the run, after everything else was done; with --skip-bad
its item is left out of every split and recorded in meta.json.

A dataset's module (`data.ave`, ...) says where its raw files lie, which splits there are and how
one item is decoded:

    index(raw) -> Index
    decode(item) -> {modality: array}, (height, width) of the frames or None
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
from concurrent.futures import TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from data import NAMES, media, store
from data.run import claim, exit_codes
from data.media import BadFile
from data.store import KINDS, PARTS, UNUSED, DataError, check

TIME_LIMIT = 600      # seconds for one item; the slowest, TV-L1 flow, takes a tenth on a slow core
# what they decode may differ by their version
PACKAGES = ("numpy", "av", "torch", "torchaudio", "torchvision", "pillow",
            "opencv-contrib-python-headless")


@dataclass
class Item:
    id: str
    label: int
    group: str              # actor, video: what should not stand in two parts
    files: list
    detail: dict = field(default_factory=dict)      # whatever else `decode` needs


@dataclass
class Index:
    items: list
    classes: list
    modalities: dict    # {name: dict(kind, shape of one item, options of data.store.Modality)}
    splits: dict        # {name: {item id: 0 train, 1 val, 2 test}}, other items are unused in it
    expected: dict      # {split: (train, val, test)}, the counts of a complete download
    groups: dict = field(default_factory=dict)      # {split: {group: its part}}, where it is known
    notes: list = field(default_factory=list)       # printed, and kept in meta.json


def find_files(folder, pattern):
    """Files and folders below `folder` that match, by name; the ending in upper or lower case,
    without what macOS leaves behind (`._*`, `__MACOSX`)."""
    stem, ending = os.path.splitext(pattern)
    return sorted(path for path in Path(folder).glob(stem) if path.suffix.lower() == ending
                  and not path.name.startswith(".") and "__MACOSX" not in path.parts)


def find_folder(raw, *names):
    """raw/name or raw/*/name, of the first of these names that is there. Raises DataError where
    none is."""
    for name in names:
        for folder in (*find_files(raw, name), *find_files(raw, f"*/{name}")):
            return folder
    raise DataError(f"{raw} holds no folder {' or '.join(names)}, nor does a folder in it: see "
                    "docs/datasets.md for what to put where")


def read_list(path, separator):
    """The rows of a split list, each a list of its fields; a row without a digit is a header."""
    check(path.is_file(), f"the list {path} is missing: see docs/datasets.md for its source")
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = list(csv.reader(file, delimiter=separator))
    return [row for row in rows if any(map(str.isdigit, "".join(row)))]


def assign(codes, item, part, path):
    """Put an item into a part of a split, {item id: code}. Raises DataError if a list put it into
    another one before."""
    check(codes.setdefault(item, part) == part,
          f"{path}: {item!r} stands in another list too, an item cannot be in two parts")


def check_complete(index, n_classes, skip_bad):
    """Raise DataError for counts, classes or groups that are not those of the complete download,
    and for missing files, unless `skip_bad`: they can be left out, being known by name."""
    for split, expected in index.expected.items():
        codes = list(index.splits[split].values())
        found = tuple(codes.count(code) for code in PARTS.values())
        check(found == expected, f"split {split}: the complete download has {expected} train, val "
                                 f"and test items, found {found}: complete it and its lists")
        if split in index.groups:
            parts = {(item.group, index.splits[split][item.id]) for item in index.items}
            odd = {group for group, _ in parts ^ set(index.groups[split].items())}
            check(not odd, f"split {split}: missing, or not in the part where they belong: "
                           f"{', '.join(sorted(odd))}")
    check(not index.expected or len(index.classes) == n_classes,
          f"there are {n_classes} classes, found {len(index.classes)}: {', '.join(index.classes)}")
    missing = {path for item in index.items for path in item.files if not os.path.exists(path)}
    check(skip_bad or not missing,
          f"{len(missing)} files are missing, the first: {min(missing, default='')}. Complete the "
          "download, or pass --skip-bad to go on without them")


def keep_some(index, limit):
    """`limit` of the items whose files are there, from the first to the last, for a try; of the
    split `trial` every fourth is test."""
    there = [item for item in index.items if all(map(os.path.exists, item.files))]
    limit = min(limit, len(there))
    check(limit > 1, f"--limit: {limit} items whose files are there, a trial needs two")
    index.items = [there[i * len(there) // limit] for i in range(limit)]
    index.splits = {"trial": {item.id: PARTS["test"] if i % 4 == 1 else PARTS["train"]
                              for i, item in enumerate(index.items)}}
    index.expected = {}


def stamp(files):
    """A number above 0 that is another one where a file, or one in a folder of these, is."""
    seen = []
    for path in map(Path, files):
        for file in (path, *sorted(path.glob("*"))):        # of a file there are none in it
            if file.exists():
                seen.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    digest = hashlib.sha256(json.dumps(seen).encode()).digest()
    return 1 + int.from_bytes(digest[:7], "big")


def work(name, item, number, folder):
    """In a worker: decode one item and write its rows. Returns the stamp of its files, or why they
    cannot be used: a few bytes, as a worker killed while it sends many can hang the pool."""
    try:
        seen = stamp(item.files)
        arrays, frame = importlib.import_module(f"data.{name}").decode(item)
    except BadFile as error:
        return str(error)
    except (OSError, ImportError, MemoryError):     # the machine's fault, not the file's
        raise
    except Exception as error:      # whatever else a strange file leads to must not end the run
        return f"{item.files[0]}: {type(error).__name__}: {error}"
    if frame is not None:
        arrays.update({path.stem: np.array(frame, np.int32) for path in folder.glob("*.frame.npy")})
    for key, array in arrays.items():
        rows = np.load(folder / f"{key}.npy", mmap_mode="r")
        assert (array.shape, array.dtype) == (rows.shape[1:], rows.dtype), (key, array.shape)
        with open(folder / f"{key}.npy", "r+b") as file:    # not the map: a full disk is an OSError
            file.seek(rows.offset + number * array.nbytes)
            file.write(array.tobytes())
    return seen


def settle_in():
    """In a new worker: one thread, an end at once when told to, none later than its parent's."""
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()


def decode_all(name, items, todo, folder, workers):
    """Decode the items whose numbers are in `todo`; yields (number, what `work` returned) as each
    is done. Raises what a worker raised, and DataError for one ended from outside."""
    pool = ProcessPool(max(1, min(workers, len(todo))), initializer=settle_in,
                       context=multiprocessing.get_context("spawn"))
    try:
        # Workers start deaf to Ctrl-C, which reaches them too: ending them is this process's task.
        resource_tracker.ensure_running()                           # it unblocks what comes next
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        numbers = {pool.schedule(work, (name, items[number], number, folder), timeout=TIME_LIMIT):
                   number for number in todo}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(numbers):
            number = numbers[future]
            try:
                yield number, future.result()
            except TimeoutError:
                yield number, f"{items[number].files[0]}: is not decoded after {TIME_LIMIT} s"
            except (ProcessExpired, BrokenProcessPool):
                raise DataError("a worker process was ended from outside (out of memory? fewer "
                                "--workers need less); what is done is kept: run the same "
                                "command to go on") from None
    finally:
        pool.stop()
        pool.join()


def allocate(folder, index, fingerprint):
    """Empty arrays of the final shapes in a new folder. Raises DataError if the disk has no room
    for them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)
    n, needed = len(index.items), 0
    for name, spec in index.modalities.items():
        dtype, shape = KINDS[spec["kind"]][0], (n, *spec["shape"])
        needed += np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).nbytes
        if spec.get("framed"):
            np.lib.format.open_memmap(folder / f"{name}.frame.npy", "w+", np.int32, (n, 2))
    free = shutil.disk_usage(folder).free
    check(needed <= free, f"no room: the arrays take {needed / 1e9:.1f} GB, {folder} has "
                          f"{free / 1e9:.1f} GB (another disk: --data-dir)")
    np.save(folder / "state/done.npy", np.zeros(n, np.int64))
    with store.whole_file(folder / "state/begun") as file:      # last: from here on, it is begun
        file.write(fingerprint.encode())


def prepare(name, raw, data_dir, workers, limit, skip_bad):
    """Prepare a dataset, as the flags say. Raises DataError for what the user can fix."""
    module = importlib.import_module(f"data.{name}")
    raw, data_dir = Path(raw).expanduser(), Path(data_dir).expanduser()
    folder = data_dir / (name if limit is None else f"{name}-limit{limit}")
    check(raw.is_dir(), f"--raw {raw} is not a folder")
    index = module.index(raw)
    index.items.sort(key=lambda item: item.id)      # the order of files on a disk must not matter
    if limit is None:
        check_complete(index, module.N_CLASSES, skip_bad)
    else:
        keep_some(index, limit)
    store.check_lines("ids", [item.id for item in index.items])
    for note in index.notes:
        print(f"note: {note}")

    with claim(folder):
        check(not os.path.lexists(folder), f"{folder} is there already: remove it to make it anew")
        fill(folder, name, index, workers, skip_bad)


def fill(folder, name, index, workers, skip_bad):
    """Decode the items of an index, those that are not done yet, and write the prepared folder."""
    module, partial = importlib.import_module(f"data.{name}"), Path(f"{folder}.partial")
    ids, versions = [item.id for item in index.items], {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    thresholds = {key: value for source in (media, module) for key, value in vars(source).items()
                  if key.isupper() and isinstance(value, (int, float))}

    # what is done of a half-done folder is kept if it is of the same items, thresholds and packages
    details = {item.id: item.detail for item in index.items}
    said = json.dumps([details, index.modalities, thresholds, versions])
    fingerprint = hashlib.sha256(said.encode()).hexdigest()
    if (begun := partial / "state/begun").exists():
        check(begun.read_text() == fingerprint,
              f"{partial} was begun with other files or other versions of the packages: remove it "
              "to start over")
        print(f"going on in {partial}")
    else:
        allocate(partial, index, fingerprint)

    done = np.load(partial / "state/done.npy", mmap_mode="r+")      # the stamps, 0 until then
    stamps = [stamp(item.files) for item in index.items]
    todo = [i for i, seen in enumerate(stamps) if done[i] != seen]
    done[todo], reasons = 0, {}
    bar = tqdm(decode_all(name, index.items, todo, partial, workers), total=len(todo), unit="item",
               mininterval=0.1 if sys.stderr.isatty() else 30)
    for number, answer in bar:
        if isinstance(answer, str):
            reasons[ids[number]] = answer
        else:
            done[number] = answer
    moved = [ids[i] for i in todo if stamp(index.items[i].files) != stamps[i]]
    check(not moved, f"the raw files of {len(moved)} items, the first {''.join(moved[:1])}, went "
                     "or changed meanwhile; what is done is kept: run the same command to go on")
    reasons = dict(sorted(reasons.items()))
    for item, reason in reasons.items():
        print(f"  {item}: {reason}", file=sys.stderr)
    check(skip_bad or not reasons,
          f"{len(reasons)} of {len(ids)} items cannot be used (listed above); all others are kept. "
          "Replace them and run the same command again, or pass --skip-bad to go on without them")

    specs, splits = {}, {}
    for split, codes in index.splits.items():
        kept = [UNUSED if i in reasons else codes.get(i, UNUSED) for i in ids]
        splits[split] = np.array(kept, np.uint8)
    for key, spec in index.modalities.items():
        specs[key] = {k: v for k, v in spec.items() if k not in ("shape", "framed")}
        specs[key]["array"] = np.load(partial / f"{key}.npy", mmap_mode="r")
        if spec.get("framed"):
            specs[key]["frame"] = np.load(partial / f"{key}.frame.npy")
            specs[key]["frame"][done == 0] = spec["shape"][-2:]
    labels = [item.label for item in index.items]
    group_names, groups = np.unique([item.group for item in index.items], return_inverse=True)
    expected = {split: dict(zip(PARTS, counts)) for split, counts in index.expected.items()}
    notes = dict(skipped=reasons, notes=index.notes, groups=group_names.tolist(),
                 expected=expected, thresholds=thresholds, versions=versions)
    store.write(folder, specs, labels, splits, index.classes, ids, groups, notes, partial)
    print(f"{folder}: {len(ids) - len(reasons)} items, {len(reasons)} left out")
    for split, codes in splits.items():
        print(f"  split {split}: {store.counts(codes)}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m data.prepare", "python -m data.prepare NAME --raw DIR ...",
        "Turn the official download of a dataset into prepared arrays.")
    add = parser.add_argument
    add("name", choices=NAMES)
    add("--raw", required=True, help="the folder with the download")
    add("--data-dir", default="datasets", help="where the prepared folder goes (%(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    add("--limit", type=int, help="only N items, for a try, into NAME-limitN")
    add("--skip-bad", action="store_true",
        help="leave out what cannot be used, and record it in meta.json")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        prepare(**vars(args))


if __name__ == "__main__":
    main()
