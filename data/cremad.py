"""CREMA-D: 7,442 clips of 91 actors speaking one of twelve sentences in one of six emotions; sound
and face.

Raw: AudioWAV/<id>.wav and VideoFlash/<id>.flv, id = actor_sentence_emotion_level; beside these
folders train.csv and test.csv (lines `id,EMOTION`) of the OGM-GE or DI-MML repositories for the
official split, and SentenceFilenames.csv of CREMA-D, which names every clip.

official        the lists' 6,698 / 744 less three clips known to be bad; every actor stands in both
                parts
fold0 .. fold4  no actor in two parts: in fold k test are the actors whose number leaves k divided
                by 5 (18, in fold1 19 of 91), val those that end in (k + 3) mod 10 (9)
"""

import numpy as np

from data.media import RATE, BadFile, middles, read_audio, read_frames
from data.prepare import Index, Item, assign, find_files, find_folder, read_list
from data.store import PARTS, check

CLASSES = ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]
ACTORS = [str(number) for number in range(1001, 1092)]
# no sound, a picture of a minute beside a sound of a second, reported as damaged: left out whatever
# the copy holds, so that everybody trains on the same clips
BAD = ("1076_MTI_SAD_XX", "1064_IEO_DIS_MD", "1064_TIE_SAD_XX")
N_CLASSES = len(CLASSES)
SECONDS, FRAMES = 3, 3
LONGEST = 10      # seconds; the longest good clip has 5
APART = 0.5       # seconds by which sound and picture of a clip may differ in length
EXPECTED = {      # train, val, test
    "official": (6695, 0, 744), "fold0": (5225, 738, 1476), "fold1": (5147, 736, 1556),
    "fold2": (5226, 738, 1475), "fold3": (5233, 736, 1470), "fold4": (5239, 738, 1462)}


def index(raw):
    sound, picture = find_folder(raw, "AudioWAV"), find_folder(raw, "VideoFlash")
    wavs = {path.stem: path for path in find_files(sound, "*.wav")}
    flvs = {path.stem: path for path in find_files(picture, "*.flv")}
    every, train, test = (sound.parent / f"{name}.csv"
                          for name in ("SentenceFilenames", "train", "test"))
    ids, official = {*wavs, *flvs}, {}
    if every.exists():
        ids.update(row[-1] for row in read_list(every, ","))
    notes = [f"left out, as they are known to be bad: {', '.join(BAD)}"]
    if train.exists() and test.exists():
        for path in (train, test):
            for row in read_list(path, ","):
                assign(official, row[0], PARTS[path.stem], path)
    else:
        notes.append(f"no train.csv and test.csv in {sound.parent}: only the folds are made (see "
                     "docs/datasets.md for these lists)")
    items = []
    for name in sorted({*ids, *official} - set(BAD)):
        parts = name.split("_")
        check(len(parts) == 4 and parts[2] in CLASSES and parts[0].isdecimal(),
              f"{name!r} is not a CREMA-D clip: actor_sentence_emotion_level expected")
        files = [wavs.get(name, sound / f"{name}.wav"), flvs.get(name, picture / f"{name}.flv")]
        items.append(Item(name, CLASSES.index(parts[2]), parts[0], list(map(str, files))))

    splits, groups = {}, {}
    if official:
        splits["official"] = {name: part for name, part in official.items() if name not in BAD}
    for k in range(5):
        splits[f"fold{k}"] = {item.id: fold_part(item.group, k) for item in items}
        groups[f"fold{k}"] = {actor: fold_part(actor, k) for actor in ACTORS}
    modalities = {"audio": {"kind": "audio", "shape": (SECONDS * RATE,)},
                  "rgb": {"kind": "rgb", "shape": (FRAMES, 3, 256, 256), "framed": True}}
    expected = {split: EXPECTED[split] for split in splits if split in EXPECTED}
    return Index(items, CLASSES, modalities, splits, expected, groups, notes)


def fold_part(actor, k):
    """The part of an actor in fold k."""
    number = int(actor)
    if number % 5 == k:
        return PARTS["test"]
    return PARTS["val"] if number % 10 == (k + 3) % 10 else PARTS["train"]


def decode(item):
    """audio: the first 3 s, a shorter clip repeated, as in OGM-GE; rgb: the middle frame of each
    third."""
    wav, flv = item.files
    sound = read_audio(wav, longest=LONGEST)
    seconds = len(sound) / RATE

    def of_the_clip(begin, end):
        if abs(end - begin - seconds) > APART:
            raise BadFile(flv, f"lasts {end - begin:.1f} s, its sound {wav} {seconds:.1f} s: one "
                               "of them is not this clip's")
        return middles(begin, end, FRAMES)

    frames, size = read_frames(flv, of_the_clip, longest=LONGEST)
    return {"audio": np.resize(sound, SECONDS * RATE), "rgb": frames}, size
