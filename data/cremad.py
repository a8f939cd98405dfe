"""CREMA-D: 7,442 clips of 91 actors speaking one of twelve sentences in one of six emotions; sound and face.

Raw: AudioWAV/<id>.wav and VideoFlash/<id>.flv, id = actor_sentence_emotion_level; for the official split also train.csv
and test.csv (lines `id,EMOTION`) of the OGM-GE or DI-MML repositories, in the same folder.

official  the lists' 6,698 / 744; every actor stands in both parts
clean     no actor in two parts: test are the actors whose number divides by 5 (18 of 91), val those that end in 3 (9)
"""

from data.media import BadFile, evenly, fit_length, read_audio, read_frames
from data.prepare import Index, Item, assign, find_folder, read_list
from data.store import DataError

CLASSES = ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]
SECONDS, FRAMES = 3, 3
EXPECTED = {"official": (6698, 0, 744), "clean": (5228, 738, 1476)}      # train, val, test


def index(raw, options):
    sound = find_folder(raw, "AudioWAV", "CREMA-D/AudioWAV")
    root = sound.parent
    ids = {path.stem for folder, end in (("AudioWAV", "wav"), ("VideoFlash", "flv")) for path in (root / folder).glob(f"*.{end}")}
    lists = [path for path in (folder / name for name in ("train.csv", "test.csv") for folder in (raw, root)) if path.exists()]
    official = {}
    for path in dict.fromkeys(lists):
        for line in read_list(path):
            assign(official, line.split(",")[0], 0 if path.name == "train.csv" else 2, path)
    notes = []
    if len({path.name for path in lists}) < 2:
        official = {}
        notes.append("no train.csv and test.csv in the raw folder: only the split `clean` is made. The official lists stand in "
                     "the repositories of OGM-GE (GeWu-Lab/OGM-GE_CVPR2022, data/CREMAD) and DI-MML")
    items = []
    for name in sorted(ids | set(official)):
        parts = name.split("_")
        if len(parts) != 4 or parts[2] not in CLASSES or not parts[0].isdecimal():
            raise DataError(f"{name!r} is no CREMA-D clip: actor_sentence_emotion_level expected")
        items.append(Item(name, CLASSES.index(parts[2]), parts[0],
                          [str(root / f"AudioWAV/{name}.wav"), str(root / f"VideoFlash/{name}.flv")]))
    clean = {item.id: 2 if int(item.group) % 5 == 0 else 1 if int(item.group) % 10 == 3 else 0 for item in items}
    modalities = {"audio": {"kind": "audio", "shape": (SECONDS * 16_000,)},
                  "rgb": {"kind": "rgb", "shape": (FRAMES, 3, 256, 256), "framed": True}}
    splits = {"official": official, "clean": clean} if official else {"clean": clean}
    expected = {split: EXPECTED[split] for split in splits if split in EXPECTED}
    return Index(items, CLASSES, modalities, splits, expected, sorted(set(lists)) if official else [], notes)


def decode(item, options):
    """audio: the first 3 s, a shorter clip repeated; rgb: the middle frame of each third of the clip."""
    wav, flv = item.files
    sound = fit_length(read_audio(wav), SECONDS * 16_000)
    if not sound.any():
        raise BadFile(wav, "is silent throughout")
    frames, size = read_frames(flv, evenly(FRAMES))
    return {"audio": sound, "rgb": frames}, size
