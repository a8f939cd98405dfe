"""CREMA-D: 7,442 clips of 91 actors speaking one of twelve sentences in one of six emotions; sound
and face.

Raw: AudioWAV/<id>.wav and VideoFlash/<id>.flv, id = actor_sentence_emotion_level; for the official
split also train.csv and test.csv (lines `id,EMOTION`) of the OGM-GE or DI-MML repositories, in the
same folder.

official  the lists' 6,698 / 744; every actor stands in both parts
clean     no actor in two parts: test are the actors whose number divides by 5 (18 of 91), val those
          that end in 3 (9)
"""

from data.media import RATE, BadFile, evenly, fit_length, read_audio, read_frames
from data.prepare import Index, Item, assign, find_by_name, find_folder, read_list
from data.store import check

CLASSES = ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]
SECONDS, FRAMES = 3, 3
LONGEST = 10      # seconds; the longest good clip has 5
APART = 0.5       # seconds by which sound and picture of a clip may differ in length
EXPECTED = {"official": (6698, 0, 744), "clean": (5228, 738, 1476)}      # train, val, test


def index(raw, options):
    sound, picture = find_folder(raw, "AudioWAV"), find_folder(raw, "VideoFlash")
    wavs, flvs = find_by_name(sound, "*.wav"), find_by_name(picture, "*.flv")

    def named(file):
        homes = dict.fromkeys((raw, sound.parent))
        return [home / file for home in homes if (home / file).exists()]

    ids = {path.stem.upper() for path in (*wavs.values(), *flvs.values())}
    for path in named("SentenceFilenames.csv"):
        ids.update(row[-1] for row in read_list(path, ",;\t"))
    lists, official, notes = [*named("train.csv"), *named("test.csv")], {}, []
    for path in lists:
        for row in read_list(path, ",;\t"):
            clip = row[0].rpartition("/")[2].partition(".")[0]
            assign(official, clip, 0 if path.name == "train.csv" else 2, path)
    if len({path.name for path in lists}) < 2:
        official = {}
        notes.append("no train.csv and test.csv in the raw folder: only the split `clean` is made. "
                     "The official lists stand in the repositories of OGM-GE "
                     "(GeWu-Lab/OGM-GE_CVPR2022, data/CREMAD) and DI-MML")
    items = []
    for name in sorted(ids | set(official)):
        parts = name.split("_")
        check(len(parts) == 4 and parts[2] in CLASSES and parts[0].isdecimal(),
              f"{name!r} is not a CREMA-D clip: actor_sentence_emotion_level expected")
        files = [wavs.get(name.lower(), sound / f"{name}.wav"),
                 flvs.get(name.lower(), picture / f"{name}.flv")]
        items.append(Item(name, CLASSES.index(parts[2]), parts[0], [str(path) for path in files]))
    clean = {item.id: 2 if int(item.group) % 5 == 0 else 1 if int(item.group) % 10 == 3 else 0
             for item in items}
    modalities = {"audio": {"kind": "audio", "shape": (SECONDS * RATE,)},
                  "rgb": {"kind": "rgb", "shape": (FRAMES, 3, 256, 256), "framed": True}}
    splits = {"official": official, "clean": clean} if official else {"clean": clean}
    expected = {split: EXPECTED[split] for split in splits if split in EXPECTED}
    return Index(items, CLASSES, modalities, splits, expected, lists if official else [], notes)


def decode(item, options):
    """audio: the first 3 s, a shorter clip repeated; rgb: the middle frame of each third."""
    wav, flv = item.files
    sound = read_audio(wav, longest=LONGEST)
    seconds = len(sound) / RATE

    def of_the_clip(times, end):
        if abs(end - times[0] - seconds) > APART:
            raise BadFile(flv, f"lasts {end - times[0]:.1f} s, its sound {wav} {seconds:.1f} s: "
                               "one of them is not this clip's")
        return evenly(FRAMES)(times, end)

    frames, size = read_frames(flv, of_the_clip, longest=LONGEST)
    return {"audio": fit_length(sound, SECONDS * RATE), "rgb": frames}, size
