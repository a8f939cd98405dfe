"""Prepared arrays to batches: the one package that the method scripts share.

    ds = open_dataset("ave", root="datasets", split="official", val=0.1)
    for inputs, labels, index in ds.batches("train", 16, "cuda", augment=True, generator=generator):
        inputs["audio"]     # float32 (B, T, C, H, W), like every modality's
"""

import copy
import hashlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from data import store
from data.batches import Batches, send
from data.run import (claim, exit_codes, finished, half_done, parse, parser, pick_device,
                      print_epoch, print_table, provenance, restore, run_once, save, write_result)
from data.store import PARTS, DataError, check, whole_file
from data.synthetic import EMBEDDED, digest

NAMES = ("cremad", "ave", "ucf101", "modelnet40")                           # of data.prepare
SMALL_SETS = ("avmnist", "avletters", "utdmhad", "modelnet40_points")       # of results.sets


class Dataset:
    """One split of a prepared dataset. Made by `open_dataset`.

    classes      list of C names
    modalities   {name: data.store.Modality}, in stored order
    labels, ids  of all N items: (N,) int64, N strings
    groups       (N,) int64, the speaker, video or object of each item; None if there are none
    fingerprint  {file: SHA-256}, and that of the description: says which data this is
    """

    def __init__(self, name, split, classes, modalities, labels, ids, groups, assignment,
                 fingerprint, val):
        self.name, self.split = name, split
        self.classes, self.modalities = list(classes), dict(modalities)
        self.labels, self.ids, self.groups = np.asarray(labels, dtype=np.int64), ids, groups
        # options (crops, means) change the data but stand in no array's file: their own digest
        options = json.dumps(self.description, sort_keys=True).encode()
        self.fingerprint = {**fingerprint, "description": hashlib.sha256(options).hexdigest()}
        self.val, self.carved = val, val > 0 and PARTS["val"] not in assignment
        self._parts = carve_val(np.array(assignment), self.labels, groups, val)
        self._resident = {}

    def indices(self, part):
        """Item numbers of "train", "val" or "test", ascending: (n,) int64."""
        return np.flatnonzero(self._parts == PARTS[part])

    def batches(self, part, batch_size, device="cpu", augment=False, generator=None):
        """An iterator with a length over (inputs, labels, index): see `data.batches.Batches`."""
        return Batches(self, part, batch_size, device, augment, generator)

    @property
    def in_channels(self):
        """{modality: channels of its encoder's first convolution}."""
        return {name: mod.in_channels for name, mod in self.modalities.items()}

    @property
    def description(self):
        """What a checkpoint says of its dataset, so that it can predict without it."""
        return dict(classes=self.classes, modalities={
            m: dict(kind=mod.kind, in_channels=mod.in_channels, **mod.options)
            for m, mod in self.modalities.items()})

    def check(self, batch_size):
        """Before the first step: raises DataError where training cannot go well, warns of what is
        odd."""
        train, val = (self.labels[self.indices(part)] for part in ("train", "val"))
        check(batch_size > 1, "--batch-size must be at least 2: BatchNorm needs more than one item")
        check(len(np.unique(train)) > 1, f"all train items of {self.name} are of one class")
        if self.split == "trial":       # of data.prepare --limit: too few items to ask more of them
            return
        if missing := [name for c, name in enumerate(self.classes) if c not in train]:
            print(f"warning: no train items of {len(missing)} classes: {', '.join(missing):.200}",
                  file=sys.stderr)
        share = len(val) / (len(val) + len(train))
        if self.carved and not 0.5 * self.val < share < 2 * self.val:
            print(f"warning: {share:.0%} of the training items are held out, not {self.val:.0%}: "
                  "whole groups (speakers, videos) where there are any, of each class at least one "
                  "and never all", file=sys.stderr)

    def only(self, *names):
        """The same items with these modalities alone. Raises DataError for a name not there."""
        for name in names:
            check(name in self.modalities, f"{self.name} has no modality {name}: it has "
                                           f"{', '.join(self.modalities)}")
        chosen = copy.copy(self)
        chosen.modalities = {name: self.modalities[name] for name in names}
        return chosen

    def resident(self, device):
        """{name: whole array on the device} where they fit into half of a GPU's free memory, else
        None. A dataset and its copies by `only` share what has been sent."""
        if device.type != "cuda":
            return None
        new = {name: mod.array for name, mod in self.modalities.items()
               if (device, name) not in self._resident}
        if sum(array.nbytes for array in new.values()) > torch.cuda.mem_get_info(device)[0] / 2:
            return None
        for name, array in new.items():
            self._resident[device, name] = send(array, device)
        return {name: self._resident[device, name] for name in self.modalities}


def by_group(assignment, groups):
    """Whether train and test share no group (actor, video), so that train and val shall not."""
    if groups is None:
        return False
    train, test = (groups[assignment == PARTS[part]] for part in ("train", "test"))
    return not np.isin(train, test).any()


def carve_val(assignment, labels, groups, fraction):
    """Move `fraction` of each class's train items to val, if the split has no val part of its own;
    returns the codes. With fraction 0 a val part of the split's own is left unused.

    The same items for every seed. Whole groups are moved where `by_group` says so.
    """
    train, val = (assignment == PARTS[part] for part in ("train", "val"))
    if fraction == 0:
        assignment[val] = store.UNUSED
        return assignment
    if val.any():
        return assignment
    units = groups if by_group(assignment, groups) else np.arange(len(labels))
    total = np.bincount(labels[train])
    wanted, moved = fraction * total, np.zeros(len(total))
    members = defaultdict(list)
    for item in np.flatnonzero(train):
        members[units[item]].append(item)
    for unit in np.random.default_rng(0).permutation(sorted(members)):
        count = np.bincount(labels[members[unit]], minlength=len(wanted))
        enough = (moved < wanted) & (moved + count < total)      # a class never loses its last unit
        if enough[count > 0].all():
            assignment[members[unit]] = PARTS["val"]
            moved += count
    return assignment


def open_dataset(name_or_folder="synthetic", root="datasets", split=None, val=0.1):
    """Open a prepared dataset: "synthetic" or "synergy" (made in memory), a name under `root`, or
    the path of a prepared folder.

    split  one of its splits, None for the first
    val    the share of the training items held out for validation where the split brings no val
           part; 0: no validation at all, a val part of the split's own is left unused
    Raises DataError when it is not there (and says how to get it), or is damaged.
    """
    check(0 <= val < 1, f"val is {val}: it is a share, at least 0 and below 1")
    if name_or_folder in EMBEDDED:
        made, name, groups = EMBEDDED[name_or_folder](), name_or_folder, None
        there = Path(root).expanduser() / name
        check(not there.exists(), f"{there} has the name of an embedded set: rename it, or give "
                                  "its path")
        modalities = store.modalities_of(made["modalities"])
        labels, splits, classes, ids = (made[k] for k in ("labels", "splits", "classes", "ids"))
        sha256 = {name: digest(made)}
    else:
        folder = find_prepared(name_or_folder, root)
        # a link gives the dataset its own name, not that of the folder it leads to
        name = Path(os.path.abspath(os.path.expanduser(name_or_folder))).name
        meta, modalities, labels, splits, ids, groups = store.read(folder)
        classes, sha256 = meta["classes"], meta["sha256"]
    split = split or next(iter(splits))
    check(split in splits, f"{name} has no split {split!r}: it has {', '.join(splits)}")
    return Dataset(name, split, classes, modalities, labels, ids, groups, splits[split], sha256,
                   val)


def find_prepared(name_or_folder, root="datasets"):
    """The prepared folder of that name under `root`, or at that path. Raises DataError that says
    how to get it."""
    name, there = str(name_or_folder), Path(root).expanduser() / name_or_folder
    known = name in (*NAMES, *SMALL_SETS)           # of these a folder here may be the raw one
    for place in [there] if known else [there, Path(name).expanduser()]:
        if place.is_dir():
            return place
    check(name not in EMBEDDED, f"{name} is made in memory: there is no folder of it")
    maker = "data.prepare" if name in NAMES else "results.sets"
    check(not known, f"{name} is not prepared (no folder {there}): download it into a folder DIR "
                     f"(see docs/datasets.md), then run python -m {maker} {name} --raw DIR")
    raise DataError(f"there is no prepared folder {name!r}, neither as a path nor under {root}. "
                    f"Known: {', '.join([*EMBEDDED, *NAMES, *SMALL_SETS])}; for your own arrays "
                    "see docs/your_data.md")
