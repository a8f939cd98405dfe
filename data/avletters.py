"""AVLetters: ten speakers say the letters A to Z three times each; sound and lips, truly paired.

To be requested from its authors (Matthews, Cootes, Bangham, Cox, Harvey: Extraction of visual
features for lipreading, PAMI 2002). Raw: Lips/<Letter><repetition>_<Speaker>-lips.mat (MATLAB 5;
the mouth, 60 x 80 grey, 25 frames a second), Audio/mfcc/Clean/<Letter><repetition>_<Speaker>.mfcc
(HTK; 26 coefficients every 20 ms: 12 cepstra, energy, and their deltas).

official  520 / 260: repetitions 1 and 2 train, 3 test; every speaker stands in both parts
clean     468 / 156 / 156, no speaker in two parts: in alphabetical order the first six train (Anya,
          Bill, Faye, John, Kate, Nicola), two are val (Stephen, Steve), two test (Verity, Yi)
"""

import io
import itertools
import string
from pathlib import Path

import numpy as np

from data.media import BadFile, check_file
from data.prepare import Index, Item, find_files, find_folder
from data.store import check

SPEAKERS = ["Anya", "Bill", "Faye", "John", "Kate", "Nicola", "Stephen", "Steve", "Verity", "Yi"]
CLEAN = dict.fromkeys(SPEAKERS, 0) | {"Stephen": 1, "Steve": 1, "Verity": 2, "Yi": 2}
EXPECTED = {"official": (520, 0, 260), "clean": (468, 156, 156)}      # train, val, test
COEFFICIENTS, STEPS = 26, 40      # a letter takes 23 to 79 steps of 20 ms: each becomes 40
FRAMES, HEIGHT, WIDTH = 4, 60, 80


def index(raw, options):
    lips = find_folder(raw, "Lips", "avletters/Lips")
    sound = find_folder(lips.parent, "Audio/mfcc/Clean")
    items = []
    for label, letter in enumerate(string.ascii_uppercase):
        for repetition, speaker in itertools.product("123", SPEAKERS):
            name = f"{letter}{repetition}_{speaker}"
            files = [str(sound / f"{name}.mfcc"), str(lips / f"{name}-lips.mat")]
            items.append(Item(name, label, speaker, files))
    known = {path for item in items for path in item.files}
    for path in [*find_files(sound, "*.mfcc"), *find_files(lips, "*.mat")]:
        check(str(path) in known, f"{path} is not one of the {len(items)} clips: A to Z, repetition "
                                  f"1 to 3, speaker {', '.join(SPEAKERS)}")
    official = {item.id: 2 if item.id[1] == "3" else 0 for item in items}
    clean = {item.id: CLEAN[item.group] for item in items}

    train = []
    for item in items:
        try:
            if official[item.id] == 0:
                train.append(stretch(read_htk(item.files[0])))
        except BadFile:      # `decode` meets it again, and names it with all others
            pass
    if train:      # else all files are missing or bad, and that is said
        mean, std = np.mean(train, (0, 2)), np.std(train, (0, 2))
        for item in items:
            item.detail = {"mean": mean.tolist(), "std": std.tolist()}
    modalities = {"audio": {"kind": "spectrogram", "shape": (1, COEFFICIENTS, STEPS)},
                  "lips": {"kind": "rgb", "shape": (FRAMES, 1, HEIGHT, WIDTH),
                           "size": (HEIGHT // 2, WIDTH // 2), "scale": (0.7, 1.0), "flip": True}}
    splits = {"official": official, "clean": clean}
    return Index(items, list(string.ascii_uppercase), modalities, splits, EXPECTED)


def read_htk(path):
    """The coefficients of an HTK file: (frames, 26) float32. Raises BadFile."""
    check_file(path)
    data = Path(path).read_bytes()
    frames, _, width, _ = np.frombuffer(data[:12].ljust(12, b"\0"), ">i4, >i4, >i2, >i2")[0].item()
    if width != 4 * COEFFICIENTS or frames < 1:
        raise BadFile(path, f"is no HTK file of {COEFFICIENTS} coefficients: {frames} frames of "
                            f"{width} bytes")
    if len(data) != 12 + frames * width:
        raise BadFile(path, f"has {len(data)} bytes, its header says {12 + frames * width} "
                            f"({frames} frames)")
    values = np.frombuffer(data, ">f4", offset=12).reshape(frames, COEFFICIENTS).astype(np.float32)
    if not np.isfinite(values).all():
        raise BadFile(path, "has coefficients that are not finite")
    return values


def stretch(values):
    """(frames, 26) -> (26, 40): each coefficient linearly interpolated, first frame to last."""
    at = np.linspace(0, len(values) - 1, STEPS)
    return np.stack([np.interp(at, np.arange(len(values)), column) for column in values.T])


def read_lips(path):
    """All frames of a lip video: (T, 60, 80) uint8. Raises BadFile."""
    from scipy.io import loadmat
    check_file(path)
    data = Path(path).read_bytes()
    try:
        content = loadmat(io.BytesIO(data))
        video, size = content["vid"], [int(side) for side in content["siz"].ravel()]
    except Exception as error:      # of any kind: scipy has none of its own for a damaged file
        raise BadFile(path, "cannot be read, it is cut off or no MATLAB file: "
                            f"{type(error).__name__}: {error}") from None
    right = len(size) == 3 and size[:2] == [HEIGHT, WIDTH] and size[2] >= FRAMES
    if not right or video.size != np.prod(size) or video.dtype != np.uint8:
        raise BadFile(path, f"has no lips of {HEIGHT} x {WIDTH}: size {size}, {video.size} values "
                            f"of {video.dtype}")
    return video.reshape(size, order="F").transpose(2, 0, 1)


def decode(item, options):
    """audio: 26 coefficients at 40 times, each with mean 0 and variance 1 over official train;
    lips: the middle frame of each quarter."""
    sound, lips = item.files
    values, video = stretch(read_htk(sound)), read_lips(lips)
    mean, std = (np.array(item.detail[key])[:, None] for key in ("mean", "std"))
    middles = ((np.arange(FRAMES) + 0.5) * len(video) / FRAMES).astype(int)
    audio = (values - mean) / np.maximum(std, 1e-9)
    return {"audio": audio[None].astype(np.float16), "lips": video[middles, None]}, None
