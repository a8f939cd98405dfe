"""The small sets of the evidence, from raw files to prepared folders: worked examples to copy.

    python -m results.sets avletters --raw DIR      # writes datasets/avletters

Each of the four functions takes the folder with the raw files and returns the arguments of
`data.store.write`. docs/small_sets.md says where the files come from and what DIR holds.

avmnist            spoken and written digits, paired by class
avletters          ten speakers say A to Z: sound and lips
utdmhad            27 actions: depth camera, inertial sensor, skeleton
modelnet40_points  40 kinds of object: depth views of 1,024 points, from the front and from the rear
"""

import argparse
import re
import string
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat
from torchaudio.transforms import MelSpectrogram
from torchvision.datasets.mnist import read_image_file, read_label_file

from data import store
from data.errors import DataError, exit_codes
from data.media import RATE, BadFile, check_file, read_audio
from data.store import UNUSED, check

TRAIN, VAL, TEST = 0, 1, 2
COUNTS = {      # train, val and test items of the complete sets; utdmhad's val is carved from train
    "avmnist": {"full": (2700, 0, 300), "small": (240, 0, 300)},
    "avletters": {"official": (520, 0, 260), "clean": (468, 156, 156)},
    "utdmhad": {"official": (431, 0, 430)},
    "modelnet40_points": {"official": (9843, 0, 2468)},
}


def check_counts(name, splits):
    """Raise DataError unless each split has as many items as that of the complete set."""
    for split, expected in COUNTS[name].items():
        found = tuple(store.counts(splits[split]).values())
        check(found == expected, f"{name}, split {split}: the complete set has {expected} items to "
                                 f"train, validate and test on, the files here make {found}")


def read(reader, path):
    """reader(path). Raises DataError that names the file, whatever is wrong with it."""
    try:
        check_file(path)
        return reader(path)
    except BadFile as error:
        reason = error.reason
    except DataError as error:
        reason = str(error)
    except Exception as error:      # SciPy, NumPy and torchvision raise many kinds for damage
        reason = f"cannot be read: {type(error).__name__}: {error}"
    raise DataError(f"{path} {reason}")


# avmnist: sound files and pictures, paired by class

def avmnist(raw):
    """recordings/{digit}_{speaker}_{index}.wav and the four MNIST files in MNIST/raw.

    audio  (N, 1, 32, 32) log-mel spectrogram
    image  (N, 1, 1, 28, 28), another picture of the digit for each recording of it
    """
    ids, digits, speakers, numbers = [], [], [], []
    paths = sorted((raw / "recordings").glob("[0-9]*.wav"))
    for path in paths:
        match = re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem, re.ASCII)
        check(match, f"{path} is not named {{digit}}_{{speaker}}_{{index}}.wav")
        ids.append(path.stem)
        digits.append(int(match[1]))
        speakers.append(match[2])
        numbers.append(int(match[3]))

    # the recordings' authors test on index 0 to 4; `small` is cut so that joint training suffers
    digits, numbers = np.array(digits), np.array(numbers)
    full = np.where(numbers < 5, TEST, TRAIN)
    splits = {"full": full, "small": np.where(numbers < 9, full, UNUSED)}
    check_counts("avmnist", splits)

    image = np.zeros((len(ids), 1, 1, 28, 28), np.uint8)
    rng = np.random.default_rng(0)
    for part, stem in ((TRAIN, "train"), (TEST, "t10k")):
        file = raw / f"MNIST/raw/{stem}-images-idx3-ubyte"
        pictures = read(read_image_file, file).numpy()
        written = read(read_label_file, raw / f"MNIST/raw/{stem}-labels-idx1-ubyte").numpy()
        check(pictures.shape == (len(written), 28, 28),
              f"{file} holds pictures {pictures.shape} for {len(written)} labels")
        for digit in range(10):
            spoken = np.flatnonzero((full == part) & (digits == digit))
            chosen = rng.permutation(np.flatnonzero(written == digit))[:len(spoken)]
            check(len(chosen) == len(spoken), f"{file} has {len(chosen)} pictures of a {digit}, "
                                              f"there are {len(spoken)} recordings of it")
            image[spoken, 0, 0] = pictures[chosen]

    audio = np.stack([read(log_mel, path) for path in paths])
    return dict(
        modalities={"audio": dict(kind="spectrogram", array=audio),
                    "image": dict(kind="rgb", array=image, scale=(0.6, 1.0), flip=False)},
        labels=digits, classes=list(string.digits), ids=ids, splits=splits,
        groups=np.unique(speakers, return_inverse=True)[1])


def log_mel(path, samples=8_000):
    """A sound file's first half second, padded with silence: (1, 32, 32), mean 0, variance 1."""
    sound = read_audio(path)[:samples]
    sound = np.pad(sound, (0, samples - len(sound))).astype(np.float32) / 32768
    # windows of 32 ms, steps of 16 ms, up to 4 kHz, where a recording at 8 kHz ends
    mel = MelSpectrogram(RATE, n_fft=512, hop_length=256, f_max=4_000, n_mels=32)
    spectrogram = np.log(mel(torch.from_numpy(sound)).numpy() + 1e-7)
    spectrogram = (spectrogram - spectrogram.mean()) / (spectrogram.std() + 1e-9)
    return spectrogram[None].astype(np.float16)


# avletters: sound features and short grey videos of the same moment

SPEAKERS = ["Anya", "Bill", "Faye", "John", "Kate", "Nicola", "Stephen", "Steve", "Verity", "Yi"]
CLEAN = [TRAIN] * 6 + [VAL] * 2 + [TEST] * 2        # of each speaker


def avletters(raw):
    """Audio/mfcc/Clean/<Letter><repetition>_<Speaker>.mfcc and Lips/<the same>-lips.mat.

    audio  (N, 1, 26, 40) cepstral coefficients, mean 0 and variance 1 over official's train part
    lips   (N, 4, 1, 60, 80), given to the encoder at 30 x 40
    """
    ids = ["".join(parts) for parts in product(string.ascii_uppercase, "123", "_", SPEAKERS)]
    labels, repetition, speaker = np.indices((26, 3, len(SPEAKERS))).reshape(3, -1)
    splits = {"official": np.where(repetition == 2, TEST, TRAIN), "clean": np.array(CLEAN)[speaker]}
    check_counts("avletters", splits)

    audio = np.stack([read(read_htk, raw / f"Audio/mfcc/Clean/{name}.mfcc") for name in ids])
    lips = np.stack([read(read_lips, raw / f"Lips/{name}-lips.mat") for name in ids])
    train = audio[splits["official"] == TRAIN]
    audio = (audio - train.mean((0, 2))[:, None]) / train.std((0, 2))[:, None]
    return dict(
        modalities={"audio": dict(kind="spectrogram", array=audio[:, None].astype(np.float16)),
                    "lips": dict(kind="rgb", array=lips, size=(30, 40), scale=(0.7, 1.0))},
        labels=labels, classes=list(string.ascii_uppercase), ids=ids, splits=splits, groups=speaker)


def read_htk(path, steps=40):
    """An HTK file of 26 coefficients every 20 ms, linearly resampled in time: (26, steps)."""
    data = path.read_bytes()
    frames, width = int.from_bytes(data[:4], "big"), int.from_bytes(data[8:10], "big")
    check(frames > 0 and width == 4 * 26 and len(data) == 12 + frames * width,
          f"has {len(data)} bytes, its header says {frames} frames of {width} bytes (104 expected)")
    values = np.frombuffer(data, ">f4", offset=12).reshape(frames, 26)
    check(np.isfinite(values).all(), "has values that are not finite")
    at = np.linspace(0, frames - 1, steps)
    return np.stack([np.interp(at, np.arange(frames), column) for column in values.T])


def read_lips(path, frames=4):
    """The middle frame of each quarter of a video: uint8 (frames, 1, 60, 80)."""
    content = loadmat(path)
    height, width, length = content["siz"].ravel().astype(int)
    video = content["vid"].reshape(height, width, length, order="F").transpose(2, 0, 1)
    check((height, width) == (60, 80) and length >= frames and video.dtype == np.uint8,
          f"has {length} frames of {height} x {width}, {video.dtype}: expected are 60 x 80, uint8")
    middles = ((np.arange(frames) + 0.5) * length / frames).astype(int)
    return video[middles, None]


# utdmhad: three sensors, subjects apart

def utdmhad(raw):
    """{Depth,Inertial,Skeleton}/a<action>_s<subject>_t<trial>_{depth,inertial,skeleton}.mat.

    depth     (N, 1, 3, 60, 80) motion in the first half, motion in the second half, mean depth
    inertial  (N, 6, 1, 128) three axes of acceleration and three of rotation
    skeleton  (N, 3, 20, 64) places of twenty joints
    The signals have mean 0 and variance 1 over the train part.
    """
    suffix = "_inertial.mat"
    ids = sorted(path.name.removesuffix(suffix) for path in (raw / "Inertial").glob(f"a*{suffix}"))
    numbers = [re.fullmatch(r"a(\d+)_s(\d+)_t(\d+)", name, re.ASCII) for name in ids]
    check(all(numbers), f"{raw}/Inertial has files not named a<action>_s<subject>_t<trial>{suffix}")
    action = np.array([int(match[1]) for match in numbers])
    subject = np.array([int(match[2]) for match in numbers])
    train = subject % 2 == 1
    splits = {"official": np.where(train, TRAIN, TEST)}
    check_counts("utdmhad", splits)

    inertial = np.stack([read(read_inertial, raw / f"Inertial/{name}{suffix}") for name in ids])
    skeleton = np.stack([read(read_skeleton, raw / f"Skeleton/{name}_skeleton.mat")
                         for name in ids])
    depth = np.stack([read(read_depth, raw / f"Depth/{name}_depth.mat") for name in ids])
    return dict(
        modalities={
            "depth": dict(kind="rgb", array=depth, size=(60, 80), scale=(0.6, 1.0), flip=False),
            "inertial": dict(kind="spectrogram", array=standardize(inertial, train)),
            "skeleton": dict(kind="spectrogram", array=standardize(skeleton, train))},
        labels=action - 1, classes=[f"a{c + 1}" for c in range(27)], ids=ids, splits=splits,
        groups=subject)


def standardize(signals, train):
    """(N, C, F, L) less the mean of each channel over the train items, over its deviation."""
    mean = signals[train].mean((0, 2, 3))[:, None, None]
    std = signals[train].std((0, 2, 3))[:, None, None]
    return ((signals - mean) / std).astype(np.float16)


def resample(signal, length):
    """(..., T) -> (..., length) float32, linearly, from the first value to the last."""
    signal = torch.tensor(np.ascontiguousarray(signal), dtype=torch.float32)
    flat = signal.reshape(1, -1, signal.shape[-1])
    flat = F.interpolate(flat, length, mode="linear", align_corners=True)
    return flat.reshape(*signal.shape[:-1], length).numpy()


def read_inertial(path):
    signal = loadmat(path)["d_iner"]
    check(signal.ndim == 2 and signal.shape[1] == 6 and np.isfinite(signal).all(),
          f"has a signal of shape {signal.shape}, expected are T x 6 finite numbers")
    return resample(signal.T[:, None], 128)


def read_skeleton(path):
    joints = loadmat(path)["d_skel"]
    check(joints.ndim == 3 and joints.shape[:2] == (20, 3) and np.isfinite(joints).all(),
          f"has joints of shape {joints.shape}, expected are 20 x 3 x T finite numbers")
    places = resample(joints.transpose(1, 0, 2), 64)
    return places - places[:, :1].mean(-1, keepdims=True)      # from joint 0's mean place


def read_depth(path):
    """A depth video as one picture of three channels, each divided by its own maximum."""
    video = loadmat(path)["d_depth"]
    check(video.ndim == 3 and video.shape[:2] == (240, 320) and video.shape[2] >= 4,
          f"has a video of shape {video.shape}, expected is 240 x 320 x T")
    frames = torch.tensor(video.astype(np.float32)).permute(2, 0, 1)
    frames = F.avg_pool2d(frames[None], 4)[0]
    half = len(frames) // 2
    motion = (frames[1:] - frames[:-1]).abs()
    maps = [motion[:half - 1].mean(0), motion[half:].mean(0), frames.mean(0)]
    check(all(picture.max() > 0 for picture in maps), "has no motion in one of its halves")
    return torch.stack([picture / picture.max() * 255 for picture in maps]).round().byte().numpy()[None]


# modelnet40_points: pictures computed from points

def modelnet40_points(raw):
    """<class>/{train,test}/<object>.npy, 1,024 points each; files beside them are no objects.

    front, rear  (N, 1, 1, 32, 32) depth views: not the pictures that papers use
    """
    classes = sorted(folder.parent.name for folder in raw.glob("[!.]*/train"))
    paths, labels, official = [], [], []
    for label, name in enumerate(classes):
        for part, code in (("train", TRAIN), ("test", TEST)):
            objects = sorted((raw / name / part).glob("[!.]*.npy"))
            paths += objects
            labels += [label] * len(objects)
            official += [code] * len(objects)
    splits = {"official": np.array(official)}
    check_counts("modelnet40_points", splits)
    check(len(classes) == 40, f"modelnet40_points has 40 classes, {raw} has {len(classes)}")

    views = np.stack([read(read_views, path) for path in paths])
    return dict(
        modalities={"front": dict(kind="rgb", array=views[:, 0], scale=(0.7, 1.0)),
                    "rear": dict(kind="rgb", array=views[:, 1], scale=(0.7, 1.0))},
        labels=np.array(labels), classes=classes, ids=[path.stem for path in paths], splits=splits)


def read_views(path):
    """A cloud of points, z up: its front and rear views, uint8 (2, 1, 1, 32, 32)."""
    points = np.load(path)
    check(points.shape == (1024, 3) and np.isfinite(points).all(),
          f"has an array of shape {points.shape}, expected are 1024 x 3 finite numbers")
    views = np.stack([depth_view(points, 1), depth_view(points, -1)])
    return (views * 255).round().astype(np.uint8)[:, None, None]


def depth_view(points, sign, size=32):
    """(1024, 3) seen along +y (sign 1) or -y (sign -1), without perspective: (size, size) float32.

    0 is empty, 0.3 far, 1 near.
    """
    points = points - (points.max(0) + points.min(0)) / 2
    points = points / np.abs(points).max()
    column = ((points[:, 0] * sign * 0.92 + 1) / 2 * (size - 1)).astype(int)
    row = ((1 - (points[:, 2] * 0.92 + 1) / 2) * (size - 1)).astype(int)
    brightness = 0.3 + 0.7 * (-points[:, 1] * sign + 1) / 2
    picture = np.zeros((size, size), np.float32)
    # each point covers 2 x 2 pixels, the nearest one wins
    for down, right in product((0, 1), (0, 1)):
        pixels = np.clip(row + down, 0, size - 1), np.clip(column + right, 0, size - 1)
        np.maximum.at(picture, pixels, brightness)
    return picture


SETS = {"avmnist": avmnist, "avletters": avletters, "utdmhad": utdmhad,
        "modelnet40_points": modelnet40_points}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m results.sets",
                                     description="Prepare one of the small sets.")
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--raw", required=True, help="the folder with the raw files")
    parser.add_argument("--data-dir", default="datasets",
                        help="where the prepared folder goes (%(default)s)")
    args = parser.parse_args(argv)
    with exit_codes(parser.prog):
        raw, folder = Path(args.raw).expanduser(), Path(args.data_dir).expanduser() / args.name
        check(raw.is_dir(), f"--raw {raw} is not a folder")
        check(not folder.exists(), f"{folder} is prepared already: remove it to prepare it again")
        arrays = SETS[args.name](raw)
        store.write(folder, **arrays)
        for split, codes in arrays["splits"].items():
            counts = ", ".join(f"{n} {part}" for part, n in store.counts(codes).items())
            print(f"{folder}, split {split}: {counts}")


if __name__ == "__main__":
    main()
