"""AVE: 4,142 events of 28 kinds in YouTube clips of ten seconds; sound and picture of the event.

Raw: AVE/<video>.mp4 and beside the folder trainSet.txt, valSet.txt, testSet.txt (lines
Category&VideoID&Quality&StartTime&EndTime).

official  the three lists, 3,338 / 402 / 402 (Annotations.txt has one row more, without length)
clean     official without the train rows whose video also stands in val or test. 45 events are
          listed twice, under two categories (a man's and a woman's speech, say); 18 of them with a
          train row and another in val or test
"""

import numpy as np

from data.media import RATE, check_there, middles, read_audio, read_frames
from data.prepare import Index, Item, assign, find_files, find_folder, read_list
from data.store import PARTS, check

SECONDS, FRAMES = 10, 4
LONGEST = 12      # seconds; the clips were cut to 10
N_CLASSES = 28
EXPECTED = {"official": (3338, 402, 402)}      # train, val, test


def index(raw):
    folder = find_folder(raw, "AVE")
    videos, rows, official = {path.stem: path for path in find_files(folder, "*.mp4")}, {}, {}
    for part, code in PARTS.items():
        path = folder.parent / f"{part}Set.txt"
        for row in read_list(path, "&"):
            check(len(row) == 5 and row[3].isdecimal() and row[4].isdecimal(),
                  f"{path}: {'&'.join(row)!r} is not Category&VideoID&Quality&StartTime&EndTime")
            category, video, _, start, stop = row
            if int(stop) > int(start):
                name = f"{video} {start}-{stop} {category}"
                rows[name] = (category, video, int(start), int(stop))
                assign(official, name, code, path)
    classes = sorted({row[0] for row in rows.values()})          # not the order of a file
    items = []
    for name, (category, video, start, stop) in rows.items():
        path = videos.get(video, folder / f"{video}.mp4")
        detail = {"start": start, "stop": stop}
        items.append(Item(name, classes.index(category), video, [str(path)], detail))
    held_out = {rows[name][1] for name, code in official.items() if code != PARTS["train"]}
    clean = {name: code for name, code in official.items()
             if code != PARTS["train"] or rows[name][1] not in held_out}
    modalities = {"audio": {"kind": "audio", "shape": (SECONDS * RATE,), "standardize": True},
                  "rgb": {"kind": "rgb", "shape": (FRAMES, 3, 256, 256), "framed": True}}
    return Index(items, classes, modalities, {"official": official, "clean": clean}, EXPECTED)


def decode(item):
    """audio: the event, repeated to 10 s; rgb: the middle frame of each quarter of the event."""
    path, start, stop = item.files[0], item.detail["start"], item.detail["stop"]

    def of_the_event(begin, end):
        there = max(0, min(stop, end) - max(start, begin))
        check_there(path, "picture", there, stop - start, start)
        return middles(start, stop, FRAMES)

    frames, size = read_frames(path, of_the_event, longest=LONGEST)
    sound = read_audio(path, start, stop, longest=LONGEST)
    return {"audio": np.resize(sound, SECONDS * RATE), "rgb": frames}, size
