"""Checkpoints on disk: written whole or not at all, the one before kept, read without executing anything."""

import fcntl
import io
import os
import shutil
import sys
import zipfile
from contextlib import contextmanager, suppress

import torch

from data import processes
from data.store import DataError


@contextmanager
def lock(path):
    """Keeps every other run from the name `path`. Raises DataError if one has it."""
    if processes.rank() > 0:
        yield
        return
    with open(f"{path}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:         # its last holder has removed it since it was opened
                raise BlockingIOError
        except BlockingIOError:
            raise DataError(f"{path}: a run of this name is under way: wait for it, or give this one its own --out") from None
        try:
            yield
        finally:
            os.remove(file.name)


def save(path, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to <path>.pt; what stood there becomes
    <path>.previous.pt. A kill at any moment leaves a whole <path>.pt."""
    whole = io.BytesIO()
    torch.save(state, whole)
    try:
        with open(f"{path}.pt.partial", "wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:            # a full disk, which does not say which file
        with suppress(FileNotFoundError):
            os.remove(f"{path}.pt.partial")
        raise OSError(error.errno, error.strerror, f"{path}.pt") from error
    if os.path.exists(f"{path}.pt"):
        with suppress(FileNotFoundError):
            os.remove(f"{path}.previous.pt")
        try:
            os.link(f"{path}.pt", f"{path}.previous.pt")
        except OSError:                 # a file system without hard links
            shutil.copyfile(f"{path}.pt", f"{path}.previous.pt")
    os.replace(f"{path}.pt.partial", f"{path}.pt")


def load(path):
    """The state in <path>.pt, else in a newer one that a kill left unnamed, else in the one before; None if there is none.

    Warns of each that cannot be read or whose checksums do not fit; raises DataError if none can.
    """
    unreadable = []
    for file in (f"{path}.pt", f"{path}.pt.partial", f"{path}.previous.pt"):
        try:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
            return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:      # a file that is cut or changed: torch raises many kinds
            unreadable.append(file)
            print(f"warning: {file} cannot be read ({type(error).__name__}): trying the one before", file=sys.stderr)
    if f"{path}.pt" in unreadable or f"{path}.previous.pt" in unreadable:
        raise DataError(f"no checkpoint can be read: remove {', '.join(unreadable)} to start over")
    return None


def changes(then, now):
    """Where two dicts, and the dicts in them, differ, as words: ["lr 0.003 (now 0.5)", ...]."""
    words = []
    for key in {**then, **now}:
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            words += changes(a, b)
        elif a != b:
            words.append(f"{key} {a} (now {b})")
    return words


def matching(path, config, resume):
    """The checkpoint to go on from, or None. Raises DataError if there is one of another run, with or without `resume`:
    a run under the same name would write over it. Makes the folder, so that one which cannot be is known before training."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    found = load(path)
    if not found:
        return None
    then, now = ({**c, "data": {f"data {k}": v for k, v in c["data"].items()}} for c in (found["config"], config))
    if differing := changes(then, now):
        raise DataError(f"{path}.pt was made with another {', '.join(differing)}: give this run its own --out")
    return found if resume else None
