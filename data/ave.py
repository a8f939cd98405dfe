"""AVE: 4,142 events of 28 kinds in YouTube clips of ten seconds; sound and picture of the event.

Raw: AVE/<video>.mp4 and trainSet.txt, valSet.txt, testSet.txt (lines
Category&VideoID&Quality&StartTime&EndTime).

official  the three lists, 3,338 / 402 / 402 (Annotations.txt has one row more, without length)
clean     official without the train rows whose video also stands in val or test. 45 events are
          listed twice, under two categories (a man's and a woman's speech, say); 18 of them with a
          train row and another in val or test
"""

from data.media import RATE, check_there, fit_length, read_audio, read_frames, within
from data.prepare import Index, Item, assign, find_by_name, read_list
from data.store import PARTS, check

SECONDS, FRAMES = 10, 4
LONGEST = 12      # seconds; the clips were cut to 10
EXPECTED = {"official": (3338, 402, 402)}      # train, val, test


def index(raw, options):
    videos = find_by_name(raw, "*.mp4")
    folder = next(iter(videos.values())).parent if videos else raw / "AVE"
    homes = (raw, folder.parent, folder)
    home = next((home for home in homes if (home / "trainSet.txt").exists()), raw)
    rows, official, lists = {}, {}, []
    for part in PARTS:
        lists.append(home / f"{part}Set.txt")
        for row in read_list(lists[-1], "&;\t"):
            check(len(row) == 5 and row[3].isdecimal() and row[4].isdecimal(),
                  f"{lists[-1]}: {'&'.join(row)!r} is not "
                  "Category&VideoID&Quality&StartTime&EndTime")
            category, video, _, start, stop = row
            if int(stop) > int(start):
                name = f"{video} {start}-{stop} {category}"
                rows[name] = (category, video, int(start), int(stop))
                assign(official, name, PARTS[part], lists[-1])
    classes = sorted({row[0] for row in rows.values()})          # not the order of a file
    items = []
    for name, (category, video, start, stop) in rows.items():
        path = videos.get(video.lower(), folder / f"{video}.mp4")
        detail = {"start": start, "stop": stop}
        items.append(Item(name, classes.index(category), video, [str(path)], detail))
    held_out = {rows[name][1] for name, code in official.items() if code != PARTS["train"]}
    clean = {name: code for name, code in official.items()
             if code != PARTS["train"] or rows[name][1] not in held_out}
    modalities = {"audio": {"kind": "audio", "shape": (SECONDS * RATE,), "standardize": True},
                  "rgb": {"kind": "rgb", "shape": (FRAMES, 3, 256, 256), "framed": True}}
    splits = {"official": official, "clean": clean}
    return Index(items, classes, modalities, splits, EXPECTED, lists)


def decode(item, options):
    """audio: the event, repeated to 10 s; rgb: the middle frame of each quarter of the event."""
    path, start, stop = item.files[0], item.detail["start"], item.detail["stop"]

    def of_the_event(times, end):
        there = max(0, min(stop, end) - max(start, times.min()))
        check_there(path, "picture", there, stop - start, start)
        return within(start, stop, FRAMES)(times, end)

    frames, size = read_frames(path, of_the_event, longest=LONGEST)
    sound = read_audio(path, start, stop, longest=LONGEST)
    return {"audio": fit_length(sound, SECONDS * RATE), "rgb": frames}, size
