"""Official downloads -> prepared arrays.

    python -m data.prepare ave --raw DIR

decodes on all cores into `datasets/ave.partial` and renames it to `datasets/ave` when whole. Killed
and started again, it goes on where it was and ends with the same bytes. A file that cannot be used,
or takes its decoder longer than TIME_LIMIT, is named at the end and fails the run, after everything
else was done; with --skip-bad its item is left out of every split and recorded in meta.json.

A dataset's module (`data.ave`, ...) says where its raw files lie, which splits there are and how
one item is decoded:

    index(raw, options) -> Index
    decode(item, options) -> {modality: array}, (height, width) of the frames or None
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
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from data import HOW_TO_GET, media, store
from data.errors import DataError
from data.run import exit_codes
from data.media import BadFile
from data.store import KINDS, PARTS, UNUSED, check, plain

CLASSES = {"cremad": 6, "ave": 28, "ucf101": 101, "modelnet40": 40}
TODO, DONE, BAD = 0, 1, 2
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir")
TIME_LIMIT = 600      # seconds for one item; the slowest, TV-L1 flow, takes a tenth on a slow core


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
    lists: list = field(default_factory=list)       # the split lists that were read
    notes: list = field(default_factory=list)       # printed, and kept in meta.json


def of_the_system(name):
    """Whether a file or folder is one that macOS, Windows or a network drive leaves behind."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def listed(folder, pattern):
    """Paths below `folder` that match, in the order of their names, without those of a system.

    pattern  names, * and / as Path.glob takes them, upper and lower case alike: clip.AVI is "*.avi"
    """
    any_case = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)
    return sorted(path for path in Path(folder).glob(any_case)
                  if not any(map(of_the_system, path.relative_to(folder).parts)))


def find_files(folder, pattern):
    return [path for path in listed(folder, pattern) if path.is_file()]


def find_by_name(folder, pattern):
    """{name without its ending, in lower case: file} of the files that match, in `folder` or up to
    two folders deeper. Raises DataError where a name is there twice."""
    found = {}
    for deeper in ("", "*/", "*/*/"):
        for path in find_files(folder, deeper + pattern):
            other = found.setdefault(path.stem.lower(), path)
            check(other == path, f"{other} and {path} have one name: remove the one that is wrong")
    return found


def find_folder(raw, *names):
    """The folder of one of these names, the first that is there, in `raw` or one folder deeper;
    upper and lower case alike. Where it holds nothing but a folder of its own name, that one.

    Raises DataError where there is none, or more than one of a name.
    """
    for deeper in ("", "*/"):
        for name in names:
            found = [path for path in listed(raw, deeper + name) if path.is_dir()]
            check(len(found) < 2, f"{name} is there more than once, as "
                                  f"{' and '.join(map(str, found))}: leave the one that is meant")
            if found:
                inner = listed(found[0], "*")
                return inner[0] if [path.name for path in inner] == [found[0].name] else found[0]
    there = [path.name for path in listed(raw, "*") if path.is_dir()]
    raise DataError(f"{raw} holds none of the folders {', '.join(names)}, nor does a folder in it; "
                    f"it holds {', '.join(there[:8]) or 'no folder'}: see docs/datasets.md for "
                    "what to put where")


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
    check(rows, f"the list {path} is empty: see docs/datasets.md for where it comes from")
    return rows


def assign(codes, item, part, path):
    """Put an item into a part of a split, {item id: code}. Raises DataError if a list put it into
    another one before."""
    check(codes.setdefault(item, part) == part,
          f"{path}: {item!r} stands in another list too, an item cannot be in two parts")


def check_complete(index, name, skip_bad):
    """Raise DataError for counts that are not those of the complete download, and for missing
    files, unless `skip_bad`: they can be left out, being known by name."""
    for split, expected in index.expected.items():
        codes = list(index.splits[split].values())
        found = tuple(codes.count(code) for code in PARTS.values())
        check(found == expected,
              f"{name}, split {split}: the complete download has {expected[0]} train, "
              f"{expected[1]} val and {expected[2]} test items, found {found[0]}, {found[1]} "
              f"and {found[2]}. Complete the download and its lists (--skip-bad leaves out only "
              "items that are named)")
    files = dict.fromkeys(path for item in index.items for path in item.files)
    missing = [path for path in files if not os.path.exists(path)]
    if missing and not skip_bad:
        raise DataError(f"{len(missing)} files of {name} are missing, the first: {missing[0]}. "
                        "Complete the download, or pass --skip-bad to go on without them")


def check_classes(index, name, left_out=()):
    """Raise DataError unless there are as many classes as the dataset has, each with train items in
    each split."""
    check(not index.expected or len(index.classes) == CLASSES[name],
          f"{name} has {CLASSES[name]} classes, found {len(index.classes)}: "
          f"{', '.join(map(plain, index.classes)):.300}")
    for split, codes in index.splits.items():
        train = {item.label for item in index.items
                 if codes.get(item.id) == PARTS["train"] and item.id not in left_out}
        for label, kind in enumerate(index.classes):
            check(label in train, f"{name}, split {split}: class {plain(kind)!r} has no train "
                                  "items: is it misspelt in a list, or is the download half there?")


def keep_first(index, limit):
    """`limit` of the items whose files are there, from the first to the last, for a try; of the
    split `trial` every fourth is test."""
    there = [item for item in index.items if all(map(os.path.exists, item.files))]
    limit = min(limit, len(there))
    check(limit > 1, f"--limit: {limit} items whose files are there, a trial needs two")
    index.items = [there[i * len(there) // limit] for i in range(limit)]
    index.splits = {"trial": {item.id: PARTS["test"] if i % 4 == 1 else PARTS["train"]
                              for i, item in enumerate(index.items)}}
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
    """In a new worker: one thread, an end at once when told to, none later than its parent's."""
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
                yield number, plain(f"{items[number].files[0]}: is still not decoded after "
                                    f"{TIME_LIMIT} s")
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
    n, sizes = len(index.items), {}
    for name, spec in index.modalities.items():
        sizes[name] = ((n, *spec["shape"]), KINDS[spec["kind"]][0])
        if spec.get("framed"):
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
            print(f"{done}/{total} {unit}s, {rate:.1f} a second, {left}", file=sys.stderr,
                  flush=True)


def prepare(name, raw, data_dir="datasets", workers=None, limit=None, skip_bad=False, **options):
    """Prepare a dataset -> its folder's Path. Raises DataError for what the user can fix."""
    module = importlib.import_module(f"data.{name}")
    raw, data_dir = Path(os.path.expanduser(raw)), Path(os.path.expanduser(data_dir))
    folder = data_dir / (f"{name}-limit{limit}" if limit else name)
    partial = folder.with_name(folder.name + ".partial")
    check(not folder.exists(), f"{folder} is prepared already: remove it to prepare it again")
    check(raw.is_dir(), f"--raw {raw} is not a folder")
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
    ids = [item.id for item in index.items]

    # what is done of a half-done folder is kept if it is of the same files, options and thresholds
    described = [{**asdict(item), "files": [os.path.relpath(path, raw) for path in item.files]}
                 for item in index.items]
    thresholds = {key: value for source in (media, module) for key, value in vars(source).items()
                  if key.isupper() and isinstance(value, (int, float))}
    said = json.dumps([described, index.modalities, options, thresholds])
    fingerprint = hashlib.sha256(said.encode()).hexdigest()
    try:
        begun = json.loads((partial / "state.json").read_text(encoding="utf-8"))   # written last
    except (OSError, ValueError):
        begun = None
    if begun:
        check(begun == fingerprint, f"{partial} was begun with other files or options, or by "
                                    "another version: remove it to start over")
        print(f"going on in {partial}")
    else:
        shutil.rmtree(partial, ignore_errors=True)
        allocate(partial, index, fingerprint)

    state = np.load(partial / "state.npy", mmap_mode="r+")
    todo = np.flatnonzero(state != DONE)
    reasons, start = {}, time.time()
    answers = decode_all(name, index.items, todo, options, partial, workers or os.cpu_count())
    for i, reason in lines_or_bar(answers, len(todo), "item"):
        state[i] = BAD if reason else DONE
        if reason:
            reasons[ids[i]] = reason
    reasons = dict(sorted(reasons.items()))
    if reasons:
        print(f"{len(reasons)} of {len(ids)} items cannot be used:", file=sys.stderr)
        for item, reason in reasons.items():
            print(f"  {item}: {reason}", file=sys.stderr)
        check(skip_bad, f"{len(reasons)} items cannot be used (listed above); everything else is "
                        "done and kept. Replace them and run the same command again, or pass "
                        "--skip-bad to go on without them")
        print(f"left out: {', '.join(list(reasons)[:20])}"
              + f" and {len(reasons) - 20} more, see meta.json" * (len(reasons) > 20))

    if not limit:
        check_classes(index, name, left_out=reasons)
    splits = {split: np.array([UNUSED if i in reasons else codes.get(i, UNUSED) for i in ids],
                              np.uint8) for split, codes in index.splits.items()}
    specs = {}
    for key, spec in index.modalities.items():
        specs[key] = {k: v for k, v in spec.items() if k not in ("shape", "framed")}
        specs[key]["array"] = np.load(partial / f"{key}.npy", mmap_mode="r")
        if spec.get("framed"):
            specs[key]["frame"] = np.load(partial / f"{key}.frame.npy")
            specs[key]["frame"][state != DONE] = spec["shape"][-2:]
    modalities = store.modalities_of(specs)
    labels = np.array([item.label for item in index.items])
    group_names, groups = np.unique([item.group for item in index.items], return_inverse=True)
    store.check_items(modalities, labels, splits, index.classes, ids, groups)
    notes = {"skipped": reasons, "notes": index.notes, "groups": group_names.tolist(),
             "expected": {split: dict(zip(PARTS, n)) for split, n in index.expected.items()},
             "options": options, "thresholds": thresholds, "versions": decoder_versions(),
             "lists": {Path(path).name: store.sha256(path) for path in index.lists}}
    store.finish(partial, folder, modalities, labels, splits, index.classes, ids, groups, notes,
                 leave_out=("state.json", "state.npy"))
    print(f"{folder}: {len(ids) - len(reasons)} items in {time.time() - start:.0f} s"
          + f", {len(reasons)} left out" * bool(reasons))
    for split, codes in splits.items():
        print(f"  split {split}: "
              + ", ".join(f"{n} {part}" for part, n in store.counts(codes).items()))
    return folder


def decoder_versions():
    versions = {}
    for package in ("av", "torch", "torchaudio", "torchvision", "pillow",
                    "opencv-contrib-python-headless"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m data.prepare", "python -m data.prepare NAME --raw DIR ...",
        "Turn the official download of a dataset into prepared arrays.")
    add = parser.add_argument
    add("name", choices=HOW_TO_GET)
    add("--raw", required=True, help="the folder with the download")
    add("--data-dir", default="datasets", help="where the prepared folder goes (%(default)s)")
    add("--workers", type=int, help="processes (default: one a core)")
    add("--limit", type=int, help="only N items, for a try, into NAME-limitN")
    add("--skip-bad", action="store_true",
        help="leave out what cannot be used, and record it in meta.json")
    add("--flow", choices=["tvl1", "dis"],
        help="ucf101: how flow is computed from video (default: tvl1)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        for flag in ("workers", "limit"):
            value = getattr(args, flag)
            check(value is None or value > 0, f"--{flag} cannot be {value}")
        ucf101 = args.name == "ucf101"
        check(ucf101 or not args.flow, f"--flow is for ucf101 alone, not for {args.name}")
        options = {"flow": args.flow or "tvl1"} if ucf101 else {}
        prepare(args.name, args.raw, args.data_dir, args.workers, args.limit, args.skip_bad,
                **options)


if __name__ == "__main__":
    main()
