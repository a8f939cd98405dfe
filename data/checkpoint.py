"""Checkpoints on disk: written whole or not at all, the one before kept, read without executing anything."""

import os
import sys

import torch

from data.store import whole_file


def save(path, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to <path>.pt; what stood there becomes
    <path>.previous.pt. A kill at any moment leaves at least one of the two whole."""
    if os.path.exists(f"{path}.pt"):
        os.replace(f"{path}.pt", f"{path}.previous.pt")
    with whole_file(f"{path}.pt") as file:
        torch.save(state, file)


def load(path):
    """The state in <path>.pt, or the one before where that cannot be read (with a warning), or None."""
    for file in (f"{path}.pt", f"{path}.previous.pt"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:      # a file that is cut or changed: torch raises many kinds
            print(f"warning: {file} cannot be read ({type(error).__name__}): trying the one before", file=sys.stderr)
    return None
