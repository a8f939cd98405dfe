"""Checkpoints on disk: written whole or not at all, the one before kept, read without executing anything."""

import os
import sys

import torch

from data.store import DataError


def save(path, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to <path>.pt; what stood there becomes
    <path>.previous.pt. A kill at any moment leaves the newest of these whole that `load` will find."""
    with open(f"{path}.pt.partial", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if os.path.exists(f"{path}.pt"):
        os.replace(f"{path}.pt", f"{path}.previous.pt")
    os.replace(f"{path}.pt.partial", f"{path}.pt")


def load(path):
    """The state in <path>.pt, else in one that a kill left unnamed, else in the one before; None if there is none.

    Warns of each that cannot be read; raises DataError if none can.
    """
    unreadable = []
    for file in (f"{path}.pt", f"{path}.pt.partial", f"{path}.previous.pt"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:      # a file that is cut or changed: torch raises many kinds
            unreadable.append(file)
            print(f"warning: {file} cannot be read ({type(error).__name__}): trying the one before", file=sys.stderr)
    if f"{path}.pt" in unreadable or f"{path}.previous.pt" in unreadable:
        raise DataError(f"no checkpoint can be read: remove {', '.join(unreadable)} to start over")
    return None
