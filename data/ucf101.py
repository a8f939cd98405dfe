"""UCF101: 13,320 clips of 101 actions; optical flow and a frame.

Raw, with ucfTrainTestlist/ (classInd.txt, trainlist01.txt, testlist01.txt) and one of:
a) UCF-101/<Class>/v_*.avi; flow is computed here: TV-L1, as published, needs
   `pip install opencv-contrib-python-headless`;
b) jpegs_256/<clip>/frame000001.jpg and tvl1_flow/{u,v}/<clip>/frame000001.jpg, as published.

official = clean  split 1, 9,537 / 3,783; no group of clips (gXX: one background, one actor) stands
                  in both
"""

import re

import numpy as np

from data.media import FRAME_OFF, BadFile, decode_stream, read_picture, resize, to_rgb
from data.prepare import Index, Item, assign, find_files, find_folder, read_list
from data.store import PARTS, DataError, check

EXPECTED = {"official": (9537, 0, 3783)}       # train, val, test
N_CLASSES = 101
FLOW_FRAMES, BOUND = 10, 20      # pixels of motion that become 0 and 255
LONGEST = 100      # seconds; the longest clip has 71
FLOW_LACKS = 2     # flow fields that a clip may have less than frames


def index(raw):
    lists = find_folder(raw, "ucfTrainTestlist")
    classes, places = [row[-1] for row in read_list(lists / "classInd.txt", " ")], find_clips(raw)
    label = {kind.lower(): i for i, kind in enumerate(classes)}    # Hand[sS]tandPushups
    items, official = [], {}
    for part in ("train", "test"):
        path = lists / f"{part}list01.txt"
        for row in read_list(path, " "):                           # the test list has no label
            kind, _, file = row[0].partition("/")
            clip, kind = file.partition(".")[0], kind.lower()
            check(kind in label and re.search(r"_g\d\d_c\d\d$", clip),
                  f"{path}: {' '.join(row)!r} is not <Class>/v_<Class>_gXX_cYY.avi")
            files = [found.get(clip.lower(), f"{raw}/{row[0]}") for found in places]
            items.append(Item(clip, label[kind], clip[:-4], files))
            assign(official, clip, PARTS[part], path)
    modalities = {"flow": {"kind": "flow", "shape": (FLOW_FRAMES, 2, 256, 256), "framed": True},
                  "rgb": {"kind": "rgb", "shape": (1, 3, 256, 256), "framed": True}}
    return Index(items, classes, modalities, {"official": official, "clean": official}, EXPECTED)


def find_clips(raw):
    """[{clip in lower case: its file or folder}] of the videos, or of frames, u and v."""
    folder = find_folder(raw, "UCF-101", "jpegs_256")
    if folder.name == "UCF-101":
        check_opencv()
        places = [find_files(folder, "*/v_*.avi")]
    else:
        flow = find_folder(raw, "tvl1_flow")
        places = [find_files(place, "v_*") for place in (folder, flow / "u", flow / "v")]
    return [{path.stem.lower(): str(path) for path in found} for found in places]


def check_opencv():
    """Raise DataError where OpenCV, or its contrib build, is not installed."""
    try:
        import cv2
        cv2.optflow.DualTVL1OpticalFlow_create
    except (ImportError, AttributeError):
        raise DataError("flow from video needs OpenCV's contrib build: "
                        "pip install opencv-contrib-python-headless") from None


def decode(item):
    """rgb: the middle frame; flow: from ten consecutive frames around it to the next, u and v."""
    frame, flow = (from_video if len(item.files) == 1 else from_pictures)(*item.files)
    arrays = {"flow": np.stack([resize(uv) for uv in flow]), "rgb": resize(frame)[None]}
    return arrays, frame.shape[1:]


def from_video(path):
    """A frame (3, H, W) and flow (10, 2, H, W) of a clip, uint8."""
    import cv2
    cv2.setNumThreads(1)
    frames = decode_stream(path, "video", LONGEST)
    if len(frames) < FLOW_FRAMES + 1:
        raise BadFile(path, f"has {len(frames)} frames, flow needs {FLOW_FRAMES + 1}")
    middle = len(frames) // 2
    first = min(max(middle - FLOW_FRAMES // 2, 0), len(frames) - FLOW_FRAMES - 1)
    times, used = zip(*frames[first:first + FLOW_FRAMES + 1])
    for before, after in zip(times, times[1:]):
        if None not in (before, after) and after - before > FRAME_OFF:
            raise BadFile(path, f"has a hole: no frames from {before:.2f} to {after:.2f} s")
    grey = [frame.to_ndarray(format="gray") for frame in used]
    estimate = cv2.optflow.DualTVL1OpticalFlow_create()
    flow = np.stack([estimate.calc(a, b, None) for a, b in zip(grey, grey[1:])])
    flow = flow.transpose(0, 3, 1, 2)
    flow = 255 * (flow.clip(-BOUND, BOUND) + BOUND) / (2 * BOUND)       # 127.5 = no motion
    return to_rgb(frames[middle][1]).transpose(2, 0, 1), flow.round().astype(np.uint8)


def from_pictures(frames_folder, u_folder, v_folder):
    """As `from_video`, of the published pictures."""
    frames, u, v = (numbered(folder) for folder in (frames_folder, u_folder, v_folder))
    if len(u) != len(v) or not 0 <= len(frames) - len(u) <= FLOW_LACKS or len(u) < FLOW_FRAMES:
        raise BadFile(u_folder, f"holds flow of {len(u)} frames, {v_folder} of {len(v)}, and there "
                                f"are {len(frames)} frames: they are not of one clip, or too few")
    middle = len(frames) // 2
    first = min(max(middle - FLOW_FRAMES // 2, 0), len(u) - FLOW_FRAMES)
    flow = []
    for i in range(first, first + FLOW_FRAMES):
        flow.append(np.concatenate([read_picture(u[i], "L"), read_picture(v[i], "L")]))
    return read_picture(frames[middle]), np.stack(flow)


def numbered(folder):
    """A folder's pictures by number. Raises BadFile unless these are 1, 2, ..., each once."""
    pictures = []
    for path in find_files(folder, "*.jpg"):
        number = re.search(r"\d+$", path.stem)
        pictures.append((int(number[0]) if number else 0, path))
    pictures.sort()
    for expected, (number, path) in enumerate(pictures, 1):
        if number != expected:
            raise BadFile(folder, f"holds {path.name} where picture {expected} should be")
    return [path for _, path in pictures]
