"""Prepared arrays to batches: the one package that the method scripts share.

    ds = open_dataset("ave", root="datasets", split="official", val=0.1)
    for inputs, labels, index in ds.batches("train", 16, "cuda", augment=True, generator=generator):
        inputs["audio"]     # float32 (B, T, C, H, W), like every modality's
"""

import copy
from pathlib import Path

import numpy as np
import torch

from data import checkpoint, cli, processes, store, synthetic
from data.batches import Batches
from data.store import PARTS, DataError, whole_file

__all__ = ["DataError", "Dataset", "checkpoint", "cli", "open_dataset", "processes", "whole_file"]

HOW_TO_GET = {  # what a user downloads for `python -m data.prepare NAME --raw DIR`
    "cremad": "CREMA-D (github.com/CheyneyComputerScience/CREMA-D): AudioWAV/*.wav and VideoFlash/*.flv",
    "ave": "AVE (sites.google.com/view/audiovisualresearch): AVE/*.mp4, Annotations.txt and the three split lists",
    "ucf101": "UCF101 (www.crcv.ucf.edu/data/UCF101.php): UCF-101/<Class>/*.avi and ucfTrainTestlist/",
    "modelnet40": "ModelNet40 (modelnet.cs.princeton.edu): ModelNet40/<class>/{train,test}/*.off",
    "avmnist": "a clone of free-spoken-digit-dataset (github.com/Jakobovski/free-spoken-digit-dataset) and the MNIST idx files",
    "avletters": "AVLetters (Matthews et al. 2002, to be requested from its authors): Lips/*.mat "
                 "and Audio/mfcc/Clean/*.mfcc",
}


class Dataset:
    """One split of a prepared dataset. Made by `open_dataset`.

    name, split  strings;  classes  list of C names;  modalities  {name: data.store.Modality}, in stored order
    labels       (N,) int64, over all items;  ids  N strings;  fingerprint  {file: SHA-256}, says which data this is
    """

    def __init__(self, name, split, classes, modalities, labels, ids, groups, assignment, fingerprint, val):
        self.name, self.split, self.classes, self.modalities = name, split, list(classes), dict(modalities)
        self.labels, self.ids, self.groups, self.fingerprint = np.asarray(labels, dtype=np.int64), ids, groups, fingerprint
        self._parts = carve_val(np.array(assignment), self.labels, groups, val)
        self._resident = {}

    def indices(self, part):
        """Item numbers of "train", "val" or "test", ascending, (n,) int64. Raises KeyError for another part."""
        return np.flatnonzero(self._parts == PARTS[part])

    def batches(self, part, batch_size, device="cpu", augment=False, generator=None, done=0):
        """An iterator with a length over (inputs, labels, index): see `data.batches.Batches`."""
        return Batches(self, part, batch_size, device, augment, generator, done)

    def only(self, *names):
        """The same items with these modalities alone. Raises DataError for a name that is not there."""
        missing = [name for name in names if name not in self.modalities]
        if missing:
            raise DataError(f"{self.name} has no modality {', '.join(missing)}: it has {', '.join(self.modalities)}")
        chosen = copy.copy(self)
        chosen.modalities, chosen._resident = {name: self.modalities[name] for name in names}, {}
        return chosen

    def resident(self, device):
        """{name: whole array on the device} where that fits into half of a GPU's free memory, else None (memory map)."""
        if device.type != "cuda":
            return None
        if device not in self._resident:
            size = sum(mod.array.nbytes for mod in self.modalities.values())
            fits = size < torch.cuda.mem_get_info(device)[0] / 2
            self._resident[device] = fits and {name: torch.from_numpy(np.array(mod.array)).to(device)
                                               for name, mod in self.modalities.items()}
        return self._resident[device] or None


def carve_val(assignment, labels, groups, fraction):
    """Move `fraction` of each class's train items to val, if the split has no val part of its own; returns the codes.

    The same items for every seed. Where train and test share no group (actor, video), neither shall train and val:
    whole groups are moved then.
    """
    train, val, test = (assignment == PARTS[part] for part in ("train", "val", "test"))
    if fraction == 0:
        assignment[val] = store.UNUSED
        return assignment
    if val.any():
        return assignment
    by_group = groups is not None and not np.isin(groups[train], groups[test]).any()
    units = np.asarray(groups) if by_group else np.arange(len(labels))
    total = np.bincount(labels[train])
    wanted, moved = fraction * total, np.zeros(len(total))
    order = np.random.default_rng(0).permutation(np.unique(units[train]))
    members = {}
    for item in np.flatnonzero(train):
        members.setdefault(units[item], []).append(item)
    for unit in order:
        count = np.bincount(labels[members[unit]], minlength=len(wanted))
        enough = (moved < wanted) & (moved + count < total)      # a class never loses its last unit
        if enough[count > 0].all():
            assignment[members[unit]] = PARTS["val"]
            moved += count
    return assignment


def open_dataset(name_or_folder="synthetic", root="datasets", split=None, val=0.1):
    """Open a prepared dataset: "synthetic" (made in memory), a name under `root`, or the path of a prepared folder.

    split: one of its splits, None for the first.
    val: the share of the training items held out for validation where the split brings no val part; 0 for none.
    Returns a Dataset. Raises DataError when it is not there (and says how to get it), or is damaged.
    """
    if not 0 <= val < 1:
        raise DataError(f"val is {val}: the share of training items to hold out must be at least 0 and below 1")
    if name_or_folder == "synthetic":
        arrays = synthetic.make()
        name, meta = "synthetic", {"classes": arrays["classes"], "sha256": {"synthetic": synthetic.digest(arrays)}}
        modalities = {key: store.modality(**spec) for key, spec in arrays["modalities"].items()}
        labels, splits, ids, groups = arrays["labels"], arrays["splits"], arrays["ids"], None
    else:
        folder = find_prepared(name_or_folder, root)
        name = folder.resolve().name
        meta, modalities, labels, splits, ids, groups = store.read(folder)
    if len(meta["classes"]) < 2:
        raise DataError(f"{name} has one class: nothing to tell apart")
    split = split or next(iter(splits))
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}: it has {', '.join(splits)}")
    ds = Dataset(name, split, meta["classes"], modalities, labels, ids, groups, splits[split], meta["sha256"], val)
    if len(ds.indices("train")) == 0:
        raise DataError(f"val {val} leaves nothing to train on in split {split!r} of {name}")
    return ds


def find_prepared(name_or_folder, root="datasets"):
    """The prepared folder of that name under `root`, or at that path. Raises DataError that says how to get it."""
    places = [Path(root) / name_or_folder]
    if name_or_folder not in HOW_TO_GET:
        places.insert(0, Path(name_or_folder))
    for place in places:
        if place.is_dir():
            return place
    if name_or_folder in HOW_TO_GET:
        raise DataError(f"{name_or_folder} is not prepared (no folder {places[0]}). Download {HOW_TO_GET[name_or_folder]}; put it "
                        f"into a folder DIR; then run: python -m data.prepare {name_or_folder} --raw DIR --data-dir {root}")
    raise DataError(f"there is no prepared folder {str(name_or_folder)!r}, neither as a path nor under {root}. Known datasets: "
                    f"{', '.join(HOW_TO_GET)}; for your own arrays see 'Bring your own dataset' in README.md")
