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
from data.batches import Batches
from data.errors import DataError
from data.run import (claim, exit_codes, finished, half_done, parse, parser, pick_device,
                      print_epoch, print_table, provenance, restore, run_once, save, write_result)
from data.store import PARTS, check, whole_file
from data.synthetic import EMBEDDED, digest

__all__ = ["DataError", "Dataset", "claim", "exit_codes", "finished", "half_done", "open_dataset",
           "parse", "parser", "pick_device", "print_epoch", "print_table", "provenance",
           "restore", "run_once", "save", "whole_file", "write_result"]

HOW_TO_GET = {  # what a user downloads for `python -m data.prepare NAME --raw DIR`
    "cremad": "CREMA-D (github.com/CheyneyComputerScience/CREMA-D): AudioWAV/*.wav, "
              "VideoFlash/*.flv, and for the official split train.csv and test.csv",
    "ave": "AVE (sites.google.com/view/audiovisualresearch): AVE/*.mp4, trainSet.txt, valSet.txt "
           "and testSet.txt",
    "ucf101": "UCF101 (www.crcv.ucf.edu/data/UCF101.php): UCF-101/<Class>/*.avi and "
              "ucfTrainTestlist/",
    "modelnet40": "ModelNet40 (modelnet.cs.princeton.edu): ModelNet40/<class>/{train,test}/*.off",
}


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
        return {m: mod.in_channels for m, mod in self.modalities.items()}

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
        check(batch_size <= len(train),
              f"--batch-size {batch_size} is larger than the {len(train)} train items")
        check(batch_size > 1, "--batch-size must be at least 2: BatchNorm needs more than one item")
        check(len(np.unique(train)) > 1, f"all {len(train)} train items of {self.name} are of one "
                                         "class: nothing to tell apart")
        for m, mod in self.modalities.items():
            if mod.kind == "spectrogram" and (bad := store.not_finite(mod.array)):
                raise DataError(f"{m} of item {self.ids[bad[0]]!r} of {self.name} is not finite: "
                                "prepare the dataset again")
        missing = [name for c, name in enumerate(self.classes) if c not in train]
        if missing:
            print(f"warning: no train items of {len(missing)} classes: {', '.join(missing):.200}",
                  file=sys.stderr)
        share = len(val) / (len(val) + len(train))
        if self.carved and not 0.5 * self.val < share < 2 * self.val:
            print(f"warning: {share:.0%} of the training items are held out, not {self.val:.0%}: "
                  "classes or groups (speakers, videos) cannot be split more finely",
                  file=sys.stderr)

    @property
    def why_no_val(self):
        """Why there are no validation items, in words."""
        if not self.val:
            return "--val 0 holds none out"
        return ("each class has but one group (speaker, video) or item to train on, and that is "
                "not held out")

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
            self._resident[device, name] = torch.from_numpy(np.array(array)).to(device)
        return {name: self._resident[device, name] for name in self.modalities}


def carve_val(assignment, labels, groups, fraction):
    """Move `fraction` of each class's train items to val, if the split has no val part of its own;
    returns the codes. With fraction 0 a val part of the split's own is left unused.

    The same items for every seed. Where train and test share no group (actor, video), neither shall
    train and val: whole groups are moved then.
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
    check(0 <= val < 1, f"val is {val}: the share of training items to hold out must be at least 0 "
                        "and below 1")
    if name_or_folder in EMBEDDED:
        made, name, groups = EMBEDDED[name_or_folder](), name_or_folder, None
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
    ds = Dataset(name, split, classes, modalities, labels, ids, groups, splits[split], sha256, val)
    check(len(ds.indices("train")), f"val {val} leaves nothing to train on in split {split!r} of "
                                    f"{name}")
    return ds


def find_prepared(name_or_folder, root="datasets"):
    """The prepared folder of that name under `root`, or at that path. Raises DataError that says
    how to get it."""
    name, places = name_or_folder, [Path(os.path.expanduser(root)) / name_or_folder]
    if name not in HOW_TO_GET:
        places.insert(0, Path(os.path.expanduser(name)))
    for place in places:
        if place.is_dir():
            return place
    if name in HOW_TO_GET:
        raise DataError(f"{name} is not prepared (no folder {places[0]}). Download "
                        f"{HOW_TO_GET[name]}; put it into a folder DIR; then run: "
                        f"python -m data.prepare {name} --raw DIR --data-dir {root}")
    raise DataError(f"there is no prepared folder {str(name)!r}, neither as a path nor under "
                    f"{root}. Known datasets: {', '.join([*EMBEDDED, *HOW_TO_GET])}; small ones: "
                    "docs/small_sets.md; your own arrays: docs/your_data.md")
