"""UCF101: 13,320 clips of 101 actions; optical flow and a frame.

Raw, with ucfTrainTestlist/ (classInd.txt, trainlist01.txt, testlist01.txt) beside one of:
a) UCF-101/<Class>/v_*.avi; flow is computed here: TV-L1, as published, needs `pip install opencv-contrib-python-headless`;
   --flow dis is a hundred times faster and becomes a modality of its own name, `flow_dis`, so that the two never mix;
b) jpegs_256/<clip>/frame000001.jpg and tvl1_flow/{u,v}/<clip>/frame000001.jpg, as published with TV-L1 (also as
   tvl1_flow/<clip>/x_00001.jpg and y_00001.jpg, or flow_x_ and flow_y_).

official = clean  split 1, 9,537 / 3,783; no group of clips (gXX: one background, one actor) stands in both
"""

import re
from pathlib import Path

import numpy as np

from data.media import BadFile, decode_stream, read_picture, resize
from data.prepare import Index, Item, assign, find_folder, read_list
from data.store import DataError

EXPECTED = {"official": (9537, 0, 3783)}       # train, val, test
FLOW_FRAMES, BOUND = 10, 20      # pixels of motion that become 0 and 255


def index(raw, options):
    lists = find_folder(raw, "ucfTrainTestlist", "UCF-101/ucfTrainTestlist")
    numbered = [line.split() for line in read_list(lists / "classInd.txt")]
    if any(len(row) != 2 for row in numbered):
        raise DataError(f"{lists / 'classInd.txt'}: each line should be a number and a class")
    classes = [kind for _, kind in numbered]
    avi = (raw / "UCF-101").is_dir() or any(raw.glob("*/v_*.avi"))
    if avi:
        videos = raw / "UCF-101" if (raw / "UCF-101").is_dir() else raw
        check_flow(options["flow"])
    else:
        pictures, flow = find_folder(raw, "jpegs_256", "jpegs"), find_folder(raw, "tvl1_flow")
        if options["flow"] != "tvl1":
            raise DataError(f"--flow {options['flow']}: the flow in {flow} is TV-L1")
    items, official = [], {}
    for part, code in (("train", 0), ("test", 2)):
        for line in read_list(lists / f"{part}list01.txt"):
            kind, _, file = line.split()[0].partition("/")               # the test list has no label behind it
            clip = file.removesuffix(".avi")
            if kind not in classes or not re.search(r"_g\d\d_c\d\d$", clip):
                raise DataError(f"{lists / f'{part}list01.txt'}: {line!r} is not <Class>/v_<Class>_gXX_cYY.avi")
            if avi:
                files = [videos / kind / file]
            elif (flow / "u").is_dir():
                files = [pictures / clip, flow / "u" / clip, flow / "v" / clip]
            else:
                files = [pictures / clip, flow / clip]
            items.append(Item(clip, classes.index(kind), clip[:-4], [spelled(path) for path in files]))
            assign(official, clip, code, lists / f"{part}list01.txt")
    modalities = {flow_name(options): {"kind": "flow", "shape": (FLOW_FRAMES, 2, 256, 256), "framed": True},
                  "rgb": {"kind": "rgb", "shape": (1, 3, 256, 256), "framed": True}}
    return Index(items, classes, modalities, {"official": official, "clean": official}, EXPECTED,
                 [lists / "trainlist01.txt", lists / "testlist01.txt"])


def flow_name(options):
    """The modality's name: plain `flow` is TV-L1, any other method carries its own."""
    return "flow" if options["flow"] == "tvl1" else f"flow_{options['flow']}"


def spelled(path):
    """The path as a string; the downloads do not agree on HandstandPushups or HandStandPushups, nor do the lists."""
    other = path.with_name(path.name.replace("HandstandPushups", "HandStandPushups") if "HandstandPushups" in path.name
                           else path.name.replace("HandStandPushups", "HandstandPushups"))
    return str(other if not path.exists() and other.exists() else path)


def check_flow(method):
    """Raise DataError where OpenCV, or its contrib build, is not installed."""
    try:
        import cv2
        cv2.optflow.DualTVL1OpticalFlow_create if method == "tvl1" else cv2.DISOpticalFlow_create
    except (ImportError, AttributeError):
        raise DataError("flow from video needs OpenCV's contrib build: pip install opencv-contrib-python-headless") from None


def decode(item, options):
    """rgb: the middle frame; flow: from ten consecutive frames around it to the next, u and v."""
    frame, flow, size = from_video(item, options["flow"]) if item.files[0].endswith(".avi") else from_pictures(item)
    return {flow_name(options): flow, "rgb": frame[None]}, size


def from_video(item, method):
    import cv2
    cv2.setNumThreads(1)
    path = item.files[0]
    frames, _ = decode_stream(path, "video", "picture")
    if len(frames) < FLOW_FRAMES + 1:
        raise BadFile(path, f"has {len(frames)} frames, flow needs {FLOW_FRAMES + 1}")
    middle = len(frames) // 2
    first = min(max(middle - FLOW_FRAMES // 2, 0), len(frames) - FLOW_FRAMES - 1)
    grey = [frames[i][1].to_ndarray(format="gray") for i in range(first, first + FLOW_FRAMES + 1)]
    estimate = cv2.optflow.DualTVL1OpticalFlow_create() if method == "tvl1" else \
        cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.stack([estimate.calc(a, b, None) for a, b in zip(grey, grey[1:])]).transpose(0, 3, 1, 2)
    flow = (255 * (flow.clip(-BOUND, BOUND) + BOUND) / (2 * BOUND)).round().astype(np.uint8)      # 127.5 = no motion
    frame = frames[middle][1].to_ndarray(format="rgb24").transpose(2, 0, 1)
    return resize(frame), np.stack([resize(f) for f in flow]), frame.shape[1:]


def from_pictures(item):
    def listing(folder, start):
        return sorted(path for path in Path(folder).iterdir() if path.suffix in (".jpg", ".png") and path.name.startswith(start))

    try:
        frames = listing(item.files[0], "")
        if len(item.files) == 3:
            u, v = (listing(folder, "") for folder in item.files[1:])
        else:
            u, v = (listing(item.files[1], start) or listing(item.files[1], f"flow_{start}") for start in ("x_", "y_"))
    except OSError as error:
        raise BadFile(error.filename, "is missing" if isinstance(error, FileNotFoundError) else error.strerror) from None
    if not frames:
        raise BadFile(item.files[0], "holds no frames")
    if len(u) != len(v) or len(u) < FLOW_FRAMES:
        raise BadFile(item.files[1], f"holds {len(u)} pictures of u and {len(v)} of v, {FLOW_FRAMES} of each are needed")
    middle = len(frames) // 2
    first = min(max(middle - FLOW_FRAMES // 2, 0), len(u) - FLOW_FRAMES)
    frame = read_picture(frames[middle])
    flow = [np.concatenate([read_picture(a[i], "L") for a in (u, v)]) for i in range(first, first + FLOW_FRAMES)]
    return resize(frame), np.stack([resize(f) for f in flow]), frame.shape[1:]
