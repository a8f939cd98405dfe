"""Official downloads -> prepared arrays.

    python -m data.prepare ave --raw DIR

decodes on all cores into `datasets/ave.partial` and renames it to `datasets/ave` when whole. Killed and started again,
it goes on where it was and ends with the same bytes. A file that cannot be used, or takes its decoder longer than
TIME_LIMIT, is named at the end and fails the run, after everything else was done; with --skip-bad its item is left out of
every split and recorded in meta.json.

A dataset's module (`data.ave`, ...) says where its raw files lie, which splits there are and how one item is decoded:

    index(raw, options) -> Index         decode(item, options) -> {modality: array}, (height, width) of the frames or None
"""

import argparse
import codecs
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from data import HOW_TO_GET, media, store
from data.errors import DataError, exit_codes
from data.media import BadFile
from data.store import KINDS, PARTS, PICTURES, UNUSED, plain

CLASSES = {"cremad": 6, "ave": 28, "ucf101": 101, "modelnet40": 40, "avmnist": 10,
           "avletters": 26}
TODO, DONE, BAD = 0, 1, 2
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir")
TIME_LIMIT = 600      # seconds for one item; TV-L1 flow, the slowest, takes a tenth of it on a slow core


@dataclass
class Item:
    """One item: its id, label, group (actor, video: what should not stand in two parts) and the files it needs."""

    id: str
    label: int
    group: str
    files: list
    detail: dict = field(default_factory=dict)      # whatever else `decode` needs


@dataclass
class Index:
    """All items of a dataset. splits: {name: {item id: 0 train, 1 val, 2 test}}, other items are unused in it;
    expected: {split: (train, val, test)}, the counts of a complete download; lists: the split lists that were read."""

    items: list
    classes: list
    modalities: dict        # {name: dict(kind, shape of one item, options of data.store.Modality)}
    splits: dict
    expected: dict
    lists: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def of_the_system(name):
    """Whether a file or folder is one that macOS, Windows or a network drive leaves behind."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def find_files(folder, pattern):
    """Files below `folder` that match, in the order of their names, without those of a system.

    pattern  names, * and / as Path.glob takes them, upper and lower case alike: clip.AVI is "*.avi"
    """
    any_case = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)
    return sorted(path for path in Path(folder).glob(any_case) if path.is_file()
                  and not any(map(of_the_system, path.relative_to(folder).parts)))


def find_by_name(folder, pattern):
    """{name without its ending, in lower case: file} of the files that match, in `folder` or up to
    two folders deeper. Raises DataError where a name is there twice."""
    found = {}
    for path in (path for up in ("", "*/", "*/*/") for path in find_files(folder, up + pattern)):
        other = found.setdefault(path.stem.lower(), path)
        if other != path:
            raise DataError(f"{other} and {path} have one name: remove the one that is wrong")
    return found


def find_folder(raw, *names):
    """The folder of one of these names, the first that is there, in `raw` or one folder deeper;
    upper and lower case alike. Where it holds nothing but a folder of its own name, that one.

    Raises DataError where there is none, or more than one of a name.
    """
    def folders(place):
        return sorted(path for path in Path(place).iterdir()
                      if path.is_dir() and not of_the_system(path.name))

    for places in ([raw], folders(raw)):
        for name in names:
            found = places
            for part in Path(name).parts:
                found = [path for place in found for path in folders(place)
                         if path.name.lower() == part.lower()]
            if len(found) > 1:
                raise DataError(f"{name} is there more than once, as "
                                f"{' and '.join(map(str, found))}: leave the one that is meant")
            if found:
                inner = [path for path in found[0].iterdir() if not of_the_system(path.name)]
                return inner[0] if [path.name for path in inner] == [found[0].name] else found[0]
    there = ", ".join(path.name for path in folders(raw)[:8]) or "no folder"
    raise DataError(f"{raw} holds none of the folders {', '.join(names)}, nor does a folder in it; "
                    f"it holds {there}: see docs/datasets.md for what to put where")


def read_list(path, separators):
    """The rows of a split list, each a list of its fields. Raises DataError.

    path        UTF-8, or UTF-16 with its mark; a first row without a digit is a header, left out
    separators  each of these characters ends a field; quotes around a field are taken off
    """
    try:
        data = Path(path).read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"the list {path} is missing: see docs/datasets.md for where it comes "
                        "from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read: {error}") from None
    ends = re.compile(f"[{re.escape(separators)}]")
    rows = [[field.strip().strip("'\"").strip() for field in ends.split(line)]
            for line in text.splitlines() if line.strip()]
    if rows and not re.search(r"\d", "".join(rows[0])):
        del rows[0]
    if not rows:
        raise DataError(f"the list {path} is empty: see docs/datasets.md for where it comes from")
    return rows


def assign(codes, item, part, path):
    """Put an item into a part of a split, {item id: code}. Raises DataError if a list put it into another one before."""
    if codes.setdefault(item, part) != part:
        raise DataError(f"{path}: {item!r} stands in another list too, an item cannot be in two parts")


def check_complete(index, name, skip_bad):
    """Raise DataError for counts that are not those of the complete download, and for missing
    files.

    `skip_bad` lets items without their files pass, as they are known by name; a count that is
    short because nobody knows of an item is an error all the same.
    """
    for split, expected in index.expected.items():
        found = tuple(sum(code == PARTS[part] for code in index.splits[split].values()) for part in PARTS)
        if found != expected:
            raise DataError(
                f"{name}, split {split}: the complete download has {expected[0]} train, "
                f"{expected[1]} val and {expected[2]} test items, here are {found[0]}, {found[1]} "
                f"and {found[2]}. Complete the download and its lists (--skip-bad leaves out only "
                "what is known by name)")
    files = dict.fromkeys(path for item in index.items for path in item.files)
    missing = [path for path in files if not os.path.exists(path)]
    if missing and not skip_bad:
        raise DataError(f"{len(missing)} files of {name} are missing, the first: {missing[0]}. "
                        "Complete the download, or pass --skip-bad to go on without them")


def check_classes(index, name, left_out=()):
    """Raise DataError unless there are as many classes as the dataset has, each with train items in
    each split."""
    if index.expected and len(index.classes) != CLASSES[name]:
        raise DataError(f"{name} has {CLASSES[name]} classes, here are {len(index.classes)}: "
                        f"{', '.join(map(plain, index.classes)):.300}")
    for split, codes in index.splits.items():
        train = {item.label for item in index.items
                 if codes.get(item.id) == PARTS["train"] and item.id not in left_out}
        for label, kind in enumerate(index.classes):
            if label not in train:
                raise DataError(f"{name}, split {split}: class {plain(kind)!r} has no train items: "
                                "is it misspelt in a list, or is the download half there?")


def keep_first(index, limit):
    """`limit` of the items whose files are there, from the first to the last, for a try; of the
    split `trial` every fourth is test."""
    there = [item for item in index.items if all(os.path.exists(path) for path in item.files)]
    index.items = [there[i * len(there) // limit] for i in range(limit)] if len(there) > limit else there
    if len(index.items) < 2:
        raise DataError(f"--limit: only {len(index.items)} items have their files, a trial needs "
                        "two")
    index.splits = {"trial": {item.id: 2 if i % 4 == 1 else 0 for i, item in enumerate(index.items)}}
    index.expected = {}


def work(name, item, number, options, folder):
    """In a worker: decode one item and write its rows. Returns None, or why it cannot be used."""
    try:
        arrays, frame = importlib.import_module(f"data.{name}").decode(item, options)
    except BadFile as error:
        return plain(error)
    except (OSError, ImportError):      # the machine's fault, not the file's
        raise
    except Exception as error:      # whatever else a strange file leads to must not end the run
        return plain(f"{item.files[0]}: {type(error).__name__}: {error}")
    if frame is not None:
        arrays.update({path.stem: np.array(frame, np.int32) for path in folder.glob("*.frame.npy")})
    for key, array in arrays.items():
        rows = np.load(folder / f"{key}.npy", mmap_mode="r")
        assert (array.shape, array.dtype) == (rows.shape[1:], rows.dtype), (key, array.shape)
        with open(folder / f"{key}.npy", "r+b") as file:    # not the map: a full disk is an OSError
            file.seek(rows.offset + number * array.nbytes)
            file.write(array.tobytes())
    return None


def settle_in():
    """In a new worker: one thread, an end at once when told to, and none later than its parent's."""
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()


def decode_all(name, items, todo, options, folder, workers):
    """Decode the items whose numbers are in `todo`; yields (number, None or why it cannot be used)
    as each is done. Raises what a worker raised, and DataError for one ended from outside."""
    pool = ProcessPool(min(workers, max(len(todo), 1)), initializer=settle_in,
                       context=multiprocessing.get_context("spawn"))
    answers = SimpleQueue()

    def send():     # in a thread: Ctrl-C in the main one could leave a lock of the pool taken
        resource_tracker.ensure_running()                           # it unblocks what comes next
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})   # workers start deaf to Ctrl-C
        try:
            for number in todo:
                future = pool.schedule(work, (name, items[number], number, options, folder),
                                       timeout=TIME_LIMIT)
                future.add_done_callback(lambda done, number=number: answers.put((number, done)))
        except RuntimeError:        # no process can be started, or the pool was stopped meanwhile
            answers.put((None, None))

    threading.Thread(target=send, daemon=True).start()
    try:
        for _ in todo:
            number, future = answers.get()
            try:
                if future is None:
                    raise BrokenProcessPool
                yield number, future.result()
            except TimeoutError:
                yield number, plain(f"{items[number].files[0]}: is not decoded after {TIME_LIMIT} "
                                    "s, which may be for ever")
            except (ProcessExpired, BrokenProcessPool):
                raise DataError("a worker process was ended from outside (out of memory? fewer "
                                "--workers need less); what is done is kept, the same command goes "
                                "on") from None
    finally:
        pool.stop()
        pool.join()


def allocate(folder, index, fingerprint):
    """Empty arrays of the final shapes in a new folder. Raises DataError if the disk has no room for them."""
    n, sizes = len(index.items), {}
    for name, spec in index.modalities.items():
        sizes[name] = ((n, *spec["shape"]), KINDS[spec["kind"]][0])
        if spec["kind"] in PICTURES and spec.get("framed"):
            sizes[f"{name}.frame"] = ((n, 2), np.int32)
    needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in sizes.values())
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        shutil.rmtree(folder)
        raise DataError(f"no room: the arrays take {needed / 1e9:.1f} GB, {folder.parent} has "
                        f"{free / 1e9:.1f} GB free (another disk: --data-dir)")
    for name, (shape, dtype) in sizes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
    np.lib.format.open_memmap(folder / "state.npy", "w+", np.uint8, (n,)).flush()
    with store.whole_file(folder / "state.json") as file:
        file.write(json.dumps(fingerprint).encode())


def started_by(folder):
    """The fingerprint of the items that a half-done folder is for, None if there is no such folder."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lines_or_bar(iterable, total, unit):
    """A progress bar on a terminal; a plain line every half minute in a log."""
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, unit=unit, smoothing=0.05)
        return
    start = last = time.time()
    for done, value in enumerate(iterable, 1):
        yield value
        if time.time() - last > 30 or done == total:
            last, rate = time.time(), done / (time.time() - start)
            left = f"{(total - done) / rate:.0f} s left"
            print(f"{done}/{total} {unit}s, {rate:.1f} a second, {left}", file=sys.stderr, flush=True)


def prepare(name, raw, data_dir="datasets", workers=None, limit=None, skip_bad=False, **options):
    """Prepare a dataset and return its folder's Path. Raises DataError for what the user can mend."""
    module = importlib.import_module(f"data.{name}")
    raw, data_dir = Path(raw).expanduser(), Path(data_dir).expanduser()
    folder = data_dir / (f"{name}-limit{limit}" if limit else name)
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise DataError(f"{folder} is prepared already: remove it to prepare it again")
    if not raw.is_dir():
        raise DataError(f"--raw {raw} is no folder")
    index = module.index(raw, options)
    index.items.sort(key=lambda item: item.id)      # the order of files on a disk must not matter
    store.check_ids([item.id for item in index.items])
    if limit:
        keep_first(index, limit)
    else:
        check_complete(index, name, skip_bad)
        check_classes(index, name)
    for note in index.notes:
        print(f"note: {note}")

    described = [{**asdict(item), "files": [os.path.relpath(path, raw) for path in item.files]} for item in index.items]
    thresholds = {key: value for source in (media, module) for key, value in vars(source).items()
                  if key.isupper() and isinstance(value, (int, float))}
    said = json.dumps([described, index.modalities, options, thresholds])
    fingerprint = hashlib.sha256(said.encode()).hexdigest()
    begun = started_by(partial)
    if begun == fingerprint:
        print(f"going on in {partial}")
    elif begun:
        raise DataError(f"{partial} was begun with other files or options, or by another version: "
                        "remove it to start over")
    else:
        shutil.rmtree(partial, ignore_errors=True)      # not even its empty arrays were whole
        allocate(partial, index, fingerprint)
    state = np.load(partial / "state.npy", mmap_mode="r+")
    todo = np.flatnonzero(state != DONE)
    reasons, start = {}, time.time()
    answers = decode_all(name, index.items, todo, options, partial, workers or os.cpu_count())
    for i, reason in lines_or_bar(answers, len(todo), "item"):
        state[i] = BAD if reason else DONE
        if reason:
            reasons[index.items[i].id] = reason
    if reasons:
        print(f"{len(reasons)} of {len(index.items)} items cannot be used:", file=sys.stderr)
        for item, reason in sorted(reasons.items()):
            print(f"  {item}: {reason}", file=sys.stderr)
        if not skip_bad:
            raise DataError(f"{len(reasons)} items cannot be used (listed above); everything else is done and kept. Mend them "
                            "and run the same command again, or pass --skip-bad to go on without them")

        left_out = sorted(reasons)
        print(f"left out: {', '.join(left_out[:20])}"
              + (f" and {len(left_out) - 20} more, see meta.json" if len(left_out) > 20 else ""))

    if not limit:
        check_classes(index, name, left_out=reasons)
    splits = {split: np.array([UNUSED if item.id in reasons else codes.get(item.id, UNUSED) for item in index.items], np.uint8)
              for split, codes in index.splits.items()}
    modalities = {}
    for key, spec in index.modalities.items():
        kind, kept = spec["kind"], {k: v for k, v in spec.items() if k not in ("kind", "shape", "framed")}
        if (partial / f"{key}.frame.npy").exists():
            kept["frame"] = np.load(partial / f"{key}.frame.npy")
            kept["frame"][state != DONE] = spec["shape"][-2:]
        modalities[key] = store.modality(kind, np.load(partial / f"{key}.npy", mmap_mode="r"), **kept)
    labels, ids = np.array([item.label for item in index.items]), [item.id for item in index.items]
    store.check_items(modalities, labels, splits, index.classes, ids)
    group_names = sorted({item.group for item in index.items})
    groups = np.searchsorted(group_names, [item.group for item in index.items])
    notes = {"skipped": dict(sorted(reasons.items())), "notes": index.notes, "groups": group_names,
             "expected": {split: dict(zip(PARTS, n)) for split, n in index.expected.items()},
             "options": options, "thresholds": thresholds, "versions": decoder_versions(),
             "lists": {Path(path).name: store.sha256(path) for path in index.lists}}
    store.finish(partial, folder, modalities, labels, splits, index.classes, ids, groups, notes,
                 leave_out=("state.json", "state.npy"))
    seconds = time.time() - start
    print(f"{folder}: {len(ids) - len(reasons)} items in {seconds:.0f} s" + (f", {len(reasons)} left out" if reasons else ""))
    for split, codes in splits.items():
        print(f"  split {split}: " + ", ".join(f"{(codes == PARTS[part]).sum()} {part}" for part in PARTS))
    return folder


def decoder_versions():
    from importlib.metadata import PackageNotFoundError, version
    versions = {}
    for package in ("av", "torch", "torchaudio", "torchvision", "pillow", "opencv-contrib-python-headless"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def main(argv=None):
    parser = argparse.ArgumentParser("python -m data.prepare", "python -m data.prepare NAME --raw DIR ...",
                                     "Turn the official download of a dataset into prepared arrays.")
    parser.add_argument("name", choices=HOW_TO_GET)
    parser.add_argument("--raw", required=True, help="the folder with the download")
    parser.add_argument("--data-dir", default="datasets", help="where the prepared folder goes (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--limit", type=int, help="only the first N items, for a try, into NAME-limitN")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used, and record it in meta.json")
    parser.add_argument("--flow", choices=["tvl1", "dis"], help="ucf101: how flow is computed from video (default: tvl1)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        for flag in ("workers", "limit"):
            if getattr(args, flag) is not None and getattr(args, flag) < 1:
                raise DataError(f"--{flag} cannot be {getattr(args, flag)}")
        if args.flow and args.name != "ucf101":
            raise DataError(f"--flow is for ucf101 alone, not for {args.name}")
        options = {"flow": args.flow or "tvl1"} if args.name == "ucf101" else {}
        prepare(args.name, args.raw, args.data_dir, args.workers, args.limit, args.skip_bad, **options)


if __name__ == "__main__":
    main()
