"""UCF101: 13,320 clips of 101 actions; optical flow and a frame.

Raw, with ucfTrainTestlist/ (classInd.txt, trainlist01.txt, testlist01.txt) beside one of:
a) UCF-101/<Class>/v_*.avi; flow is computed here: TV-L1, as published, needs
   `pip install opencv-contrib-python-headless`; --flow dis is a hundred times faster and becomes a
   modality of its own name, `flow_dis`, so that the two never mix;
b) jpegs_256/<clip>/frame000001.jpg and tvl1_flow/{u,v}/<clip>/frame000001.jpg, as published with
   TV-L1 (also as tvl1_flow/<clip>/x_00001.jpg and y_00001.jpg, or flow_x_ and flow_y_, or these
   beside the frames in jpegs_256/<clip>).

official = clean  split 1, 9,537 / 3,783; no group of clips (gXX: one background, one actor) stands
                  in both
"""

import re
from pathlib import Path

import numpy as np

from data.media import BadFile, decode_stream, read_picture, resize, to_rgb
from data.prepare import Index, Item, assign, find_by_name, find_files, find_folder, read_list
from data.store import DataError, check

EXPECTED = {"official": (9537, 0, 3783)}       # train, val, test
FLOW_FRAMES, BOUND = 10, 20      # pixels of motion that become 0 and 255
LONGEST = 100      # seconds; the longest clip has 71
FLOW_LACKS = 2     # flow fields that a clip may have less than frames
U, V = r"(flow_)?x_", r"(flow_)?y_"      # what stands before a picture's number, where one folder
FRAME = rf"(?!({U}|{V})$).*"             # holds several kinds


def index(raw, options):
    lists = find_folder(raw, "ucfTrainTestlist")
    numbered = read_list(lists / "classInd.txt", ",; \t")
    check(all(len(row) == 2 for row in numbered),
          f"{lists / 'classInd.txt'}: each line should be a number and a class")
    classes = [kind for _, kind in numbered]
    label = {kind.lower(): i for i, kind in enumerate(classes)}    # Hand[sS]tandPushups
    places = find_clips(raw, options)

    items, official = [], {}
    for part, code in (("train", 0), ("test", 2)):
        path = lists / f"{part}list01.txt"
        for row in read_list(path, ",; \t"):                       # the test list has no label
            kind, _, file = row[0].partition("/")
            clip, kind = file.partition(".")[0], kind.lower()
            check(kind in label and re.search(r"_g\d\d_c\d\d$", clip),
                  f"{path}: {' '.join(row)!r} is not <Class>/v_<Class>_gXX_cYY.avi")
            files = [str(found.get(clip.lower(), folder / clip)) for folder, found in places]
            items.append(Item(clip, label[kind], clip[:-4], files))
            assign(official, clip, code, path)
    flow = {"kind": "flow", "shape": (FLOW_FRAMES, 2, 256, 256), "framed": True}
    modalities = {flow_name(options): flow,
                  "rgb": {"kind": "rgb", "shape": (1, 3, 256, 256), "framed": True}}
    return Index(items, classes, modalities, {"official": official, "clean": official}, EXPECTED,
                 [lists / "trainlist01.txt", lists / "testlist01.txt"])


def find_clips(raw, options):
    """[(folder, {clip in lower case: its file or folder})], of the videos or of frames and flow."""
    videos = next((path for path in sorted(raw.iterdir())
                   if path.is_dir() and path.name.lower() in ("ucf-101", "ucf101")), raw)
    if videos != raw or find_files(raw, "*/v_*.avi"):
        found = find_by_name(videos, "v_*.avi")
        if found:
            check_flow(options["flow"])
            return [(videos, found)]

    def clips(folder):
        return folder, {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}

    check(options["flow"] == "tvl1", f"--flow {options['flow']} needs the videos, UCF-101/<Class>/"
                                     f"v_*.avi, and {raw} holds none: published flow is TV-L1")
    frames = clips(find_folder(raw, "jpegs_256", "jpegs"))
    first = next(iter(frames[1].values()), raw)
    if any(re.match(f"{U}|{V}", path.name) for path in find_files(first, "*")):
        return [frames, frames]
    flow, found = clips(find_folder(raw, "tvl1_flow"))
    if "u" in found:
        return [frames, clips(flow / "u"), clips(flow / "v")]
    return [frames, (flow, found)]


def flow_name(options):
    """The modality's name: plain `flow` is TV-L1, any other method carries its own."""
    return "flow" if options["flow"] == "tvl1" else f"flow_{options['flow']}"


def check_flow(method):
    """Raise DataError where OpenCV, or its contrib build, is not installed."""
    try:
        import cv2
        cv2.optflow.DualTVL1OpticalFlow_create if method == "tvl1" else cv2.DISOpticalFlow_create
    except (ImportError, AttributeError):
        raise DataError("flow from video needs OpenCV's contrib build: "
                        "pip install opencv-contrib-python-headless") from None


def decode(item, options):
    """rgb: the middle frame; flow: from ten consecutive frames around it to the next, u and v."""
    if len(item.files) == 1:
        frame, flow, size = from_video(item, options["flow"])
    else:
        frame, flow, size = from_pictures(item)
    return {flow_name(options): flow, "rgb": frame[None]}, size


def from_video(item, method):
    import cv2
    cv2.setNumThreads(1)
    path = item.files[0]
    frames = decode_stream(path, "video", "picture", LONGEST)
    if len(frames) < FLOW_FRAMES + 1:
        raise BadFile(path, f"has {len(frames)} frames, flow needs {FLOW_FRAMES + 1}")
    middle = len(frames) // 2
    first = min(max(middle - FLOW_FRAMES // 2, 0), len(frames) - FLOW_FRAMES - 1)
    grey = [frames[i][1].to_ndarray(format="gray") for i in range(first, first + FLOW_FRAMES + 1)]
    estimate = cv2.optflow.DualTVL1OpticalFlow_create() if method == "tvl1" else \
        cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.stack([estimate.calc(a, b, None) for a, b in zip(grey, grey[1:])])
    flow = flow.transpose(0, 3, 1, 2)
    flow = 255 * (flow.clip(-BOUND, BOUND) + BOUND) / (2 * BOUND)
    flow = flow.round().astype(np.uint8)              # 127.5 = no motion
    frame = to_rgb(frames[middle][1]).transpose(2, 0, 1)
    return resize(frame), np.stack([resize(f) for f in flow]), frame.shape[1:]


def numbered_pictures(folder, prefix):
    """{number: path} of a folder's pictures named `prefix`, a regular expression, and a number:
    frame000007.jpg is 7 of "frame". Raises BadFile unless each number is there, and once."""
    if not Path(folder).is_dir():
        raise BadFile(folder, "is missing")
    kinds = {}
    for path in find_files(folder, "*"):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            kind, number = re.fullmatch(r"(.*?)(\d*)", path.stem.lower()).groups()
            if not number:
                raise BadFile(folder, f"holds a picture without a number, {path.name}")
            if re.fullmatch(prefix, kind):
                other = kinds.setdefault(kind, {}).setdefault(int(number), path)
                if other != path:
                    raise BadFile(folder, f"holds a number twice: {other.name} and {path.name}")
    if len(kinds) != 1:
        held = ", ".join(f"{len(pictures)} {kind}*" for kind, pictures in kinds.items())
        raise BadFile(folder, f"should hold pictures of one kind: it holds {held}" if kinds else
                      f"holds no pictures named {prefix} and a number")
    (kind, pictures), = kinds.items()
    last = max(pictures)
    absent = set(range(min(*pictures, 1), last)) - set(pictures)
    if absent:
        raise BadFile(folder, f"holds {len(pictures)} pictures {kind}*, the last is number {last}, "
                              f"but none with number {min(absent)}")
    return pictures


def from_pictures(item):
    frames = numbered_pictures(item.files[0], FRAME)
    if len(item.files) == 3:                                # a folder of u, one of v
        u, v = (numbered_pictures(folder, ".*") for folder in item.files[1:])
    else:
        u, v = (numbered_pictures(item.files[1], prefix) for prefix in (U, V))
    if set(u) != set(v):
        odd = min(set(u) ^ set(v))
        raise BadFile(item.files[1], f"holds {len(u)} pictures of u and {len(v)} of v: number "
                                     f"{odd} has but one of them")
    if not 0 <= len(frames) - len(u) <= FLOW_LACKS:
        raise BadFile(item.files[1], f"holds flow of {len(u)} frames, {item.files[0]} "
                                     f"{len(frames)} frames: one of them is not complete")
    if len(u) < FLOW_FRAMES:
        raise BadFile(item.files[1], f"holds flow of {len(u)} frames, {FLOW_FRAMES} are needed")
    middle = len(frames) // 2
    first = min(max(middle - FLOW_FRAMES // 2, 0), len(u) - FLOW_FRAMES)
    frame = read_picture(frames[sorted(frames)[middle]])
    flow = [np.concatenate([read_picture(a[number], "L") for a in (u, v)])
            for number in sorted(u)[first:first + FLOW_FRAMES]]
    return resize(frame), np.stack([resize(f) for f in flow]), frame.shape[1:]
