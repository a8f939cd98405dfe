"""The small sets of the evidence, from raw files to prepared folders: worked examples to copy.

    python -m results.sets avletters --raw DIR      # writes datasets/avletters

Each of the four functions takes the folder with the raw files and returns the arguments of
`data.store.write`. docs/small_sets.md says where the files come from and what DIR holds. Signals
are computed in float64 and stored in float16, so that every processor makes the same bytes.

avmnist            spoken and written digits, paired by class
avletters          ten speakers say A to Z: sound and lips
utdmhad            27 actions: depth camera, inertial sensor, skeleton
modelnet40_points  40 kinds of object: depth views of 1,024 points, from the front and from the rear
"""

import argparse
import os
import re
import string
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from torchaudio.transforms import MelSpectrogram
from torchvision.datasets import MNIST

from data import store
from data.media import RATE, BadFile, check_file, read_audio
from data.run import claim, exit_codes, first_line
from data.store import UNUSED, DataError, check

TRAIN, VAL, TEST = 0, 1, 2
COUNTS = {      # train, val and test items of the complete sets; utdmhad's val is carved from train
    "avmnist": {"full": (2700, 0, 300), "small": (240, 0, 300)},
    "utdmhad": {"official": (431, 0, 430)},
    "modelnet40_points": {"official": (9843, 0, 2468)},
}


def avmnist(raw):
    """recordings/{digit}_{speaker}_{index}.wav and MNIST's four files in MNIST/raw; torchvision
    unpacks those that lie there as .gz, and downloads what is missing.

    audio  (N, 1, 32, 32) log-mel spectrogram
    image  (N, 1, 1, 28, 28), another picture of the digit for each recording of it
    """
    ids, digit, speaker, index = names(raw / "recordings", r"((\d)_(\w+)_(\d+))\.wav")
    digit, index = digit.astype(int), index.astype(int)
    # the recordings' authors test on index 0 to 4; `small` is cut so that joint training falls back
    full = np.where(index < 5, TEST, TRAIN)
    splits = {"full": full, "small": np.where(index < 9, full, UNUSED)}
    check_counts("avmnist", splits)

    audio = read(log_mel, [raw / f"recordings/{name}.wav" for name in ids])
    image = np.zeros((len(ids), 1, 1, 28, 28), np.uint8)
    rng = np.random.default_rng(0)
    for part in (TRAIN, TEST):
        try:
            mnist = MNIST(raw, train=part == TRAIN, download=True)
        except Exception as error:      # without a network, or for damage it raises many kinds
            raise DataError(f"{raw}/MNIST/raw cannot be used: {first_line(error)}") from None
        pictures, written = mnist.data.numpy(), mnist.targets.numpy()
        for c in range(10):
            spoken = np.flatnonzero((full == part) & (digit == c))
            chosen = rng.permutation(np.flatnonzero(written == c))[:len(spoken)]
            image[spoken, 0, 0] = pictures[chosen]
    return dict(
        modalities={"audio": dict(kind="spectrogram", array=audio),
                    "image": dict(kind="rgb", array=image, scale=(0.6, 1.0), flip=False)},
        labels=digit, classes=list(string.digits), ids=ids, splits=splits,
        groups=np.unique(speaker, return_inverse=True)[1])


def log_mel(path, samples=8_000):
    """A sound file's first half second, padded with silence: (1, 32, 32), mean 0, variance 1."""
    sound = read_audio(path)[:samples]
    sound = np.pad(sound, (0, samples - len(sound))) / 32768
    # windows of 32 ms, steps of 16 ms, up to 4 kHz, where recordings at 8 kHz end
    mel = MelSpectrogram(RATE, n_fft=512, hop_length=256, f_max=4_000, n_mels=32).double()
    spectrogram = np.log(mel(torch.from_numpy(sound)).numpy() + 1e-7)
    spectrogram = (spectrogram - spectrogram.mean()) / (spectrogram.std() + 1e-9)
    return spectrogram[None].astype(np.float16)


SPEAKERS = ["Anya", "Bill", "Faye", "John", "Kate", "Nicola", "Stephen", "Steve", "Verity", "Yi"]
CLEAN = np.array([TRAIN] * 6 + [VAL] * 2 + [TEST] * 2)      # the part of each speaker


def avletters(raw):
    """Audio/mfcc/Clean/<Letter><repetition>_<Speaker>.mfcc and Lips/<the same>-lips.mat.

    audio  (N, 1, 26, 40) cepstral coefficients, mean 0 and variance 1 over official's train part
    lips   (N, 4, 1, 60, 80), given to the encoder at 30 x 40
    """
    ids = ["".join(parts) for parts in product(string.ascii_uppercase, "123", "_", SPEAKERS)]
    letter, repetition, speaker = np.indices((26, 3, 10)).reshape(3, -1)
    train = repetition < 2
    audio = read(read_htk, [raw / f"Audio/mfcc/Clean/{name}.mfcc" for name in ids])
    lips = read(read_lips, [raw / f"Lips/{name}-lips.mat" for name in ids])
    return dict(
        modalities={
            "audio": dict(kind="spectrogram", array=standardize(audio, train)[:, None]),
            "lips": dict(kind="rgb", array=lips, size=(30, 40), scale=(0.7, 1.0))},
        labels=letter, classes=list(string.ascii_uppercase), ids=ids, groups=speaker,
        splits={"official": np.where(train, TRAIN, TEST), "clean": CLEAN[speaker]})


def read_htk(path):
    """An HTK file of 26 coefficients every 20 ms, resampled in time: (26, 40)."""
    data = path.read_bytes()
    frames = int.from_bytes(data[:4], "big")
    values = np.frombuffer(data, ">f4", offset=12).reshape(frames, 26)
    return resample(values.T, 40)


def read_lips(path, frames=4):
    """The middle frame of each quarter of a video: uint8 (frames, 1, 60, 80)."""
    content = loadmat(path)
    video = content["vid"].reshape(content["siz"].ravel().astype(int), order="F")
    middles = ((np.arange(frames) + 0.5) * video.shape[2] / frames).astype(int)
    return video[..., middles].transpose(2, 0, 1)[:, None]


def utdmhad(raw):
    """{Depth,Inertial,Skeleton}/a<action>_s<subject>_t<trial>_{depth,inertial,skeleton}.mat.

    depth     (N, 1, 3, 60, 80) motion in the first half, motion in the second half, mean depth
    inertial  (N, 6, 1, 128) three axes of acceleration and three of rotation
    skeleton  (N, 3, 20, 64) places of twenty joints
    The signals have mean 0 and variance 1 over the train part.
    """
    ids, action, subject = names(raw / "Inertial", r"(a(\d+)_s(\d+)_t\d+)_inertial\.mat")
    action, subject = action.astype(int), subject.astype(int)
    train = subject % 2 == 1
    splits = {"official": np.where(train, TRAIN, TEST)}
    check_counts("utdmhad", splits)

    inertial = read(read_inertial, [raw / f"Inertial/{name}_inertial.mat" for name in ids])
    skeleton = read(read_skeleton, [raw / f"Skeleton/{name}_skeleton.mat" for name in ids])
    depth = read(read_depth, [raw / f"Depth/{name}_depth.mat" for name in ids])
    depth = depth.round().astype(np.uint8)      # what is not finite was refused
    return dict(
        modalities={
            "depth": dict(kind="rgb", array=depth, size=(60, 80), scale=(0.6, 1.0), flip=False),
            "inertial": dict(kind="spectrogram", array=standardize(inertial, train)),
            "skeleton": dict(kind="spectrogram", array=standardize(skeleton, train))},
        labels=action - 1, classes=[f"a{c + 1}" for c in range(27)], ids=ids, splits=splits,
        groups=subject)


def read_inertial(path):
    return resample(loadmat(path)["d_iner"].T[:, None], 128)


def read_skeleton(path):
    places = resample(loadmat(path)["d_skel"].transpose(1, 0, 2), 64)
    return places - places[:, :1].mean(-1, keepdims=True)      # from joint 0's mean place


def read_depth(path):
    """A depth video as one picture of three channels, each divided by its own maximum."""
    video = loadmat(path)["d_depth"].astype(float)
    frames = video.reshape(60, 4, 80, 4, -1).mean((1, 3))
    motion, half = np.abs(np.diff(frames)), frames.shape[-1] // 2
    maps = [motion[..., :half - 1].mean(-1), motion[..., half:].mean(-1), frames.mean(-1)]
    return np.stack([picture / picture.max() * 255 for picture in maps])[None]


def resample(signal, length):
    """(..., T) -> (..., length), linearly, from the first value to the last."""
    steps = np.arange(signal.shape[-1])
    at = np.linspace(0, steps[-1], length)
    return np.apply_along_axis(lambda values: np.interp(at, steps, values), -1, signal)


def modelnet40_points(raw):
    """<class>/{train,test}/<object>.npy, 1,024 points each; files beside them are no objects.

    front, rear  (N, 1, 1, 32, 32) depth views: not the pictures that papers use
    """
    paths = sorted(raw.glob("[!.]*/train/[!.]*.npy")) + sorted(raw.glob("[!.]*/test/[!.]*.npy"))
    paths.sort(key=lambda path: path.parts[-3])     # stable: of a class train before test
    classes, labels = np.unique([path.parts[-3] for path in paths], return_inverse=True)
    test = np.array([path.parts[-2] == "test" for path in paths], bool)
    splits = {"official": np.where(test, TEST, TRAIN)}
    check_counts("modelnet40_points", splits)

    points = read(np.load, paths)
    views = {"front": np.stack([depth_view(cloud, 1) for cloud in points]),
             "rear": np.stack([depth_view(cloud, -1) for cloud in points])}
    return dict(
        modalities={name: dict(kind="rgb", array=array[:, None, None], scale=(0.7, 1.0))
                    for name, array in views.items()},
        labels=labels, classes=classes.tolist(), ids=[path.stem for path in paths], splits=splits)


def depth_view(points, sign, size=32):
    """Points, z up, seen along +y (sign 1) or -y (-1), without perspective: uint8 (size, size).

    Empty is 0, far is 77 and near is 255.
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
    return (picture * 255).round().astype(np.uint8)


def check_counts(name, splits):
    """Raise DataError unless each split has as many items as that of the complete set."""
    for split, expected in COUNTS[name].items():
        found = tuple(store.counts(splits[split]).values())
        check(found == expected, f"{name}, split {split}: the complete set has {expected} items to "
                                 f"train, validate and test on, the files here make {found}")


def names(folder, pattern):
    """What the groups of a pattern match in the names of a folder's files: for each group an array
    of strings. Files whose names have another form are left out."""
    found = [re.fullmatch(pattern, path.name) for path in sorted(folder.glob("*"))]
    rows = [match.groups() for match in found if match]
    return np.array(rows).reshape(len(rows), re.compile(pattern).groups).T


def read(reader, paths):
    """The stacked arrays that a reader makes of files. Raises DataError, which names the file,
    whatever is wrong with one: missing, damaged, not finite, of another shape than the first."""
    arrays = []
    for path in paths:
        try:
            check_file(path)
            array = np.asarray(reader(path))
            check(np.isfinite(array).all(), "it makes values that are not finite")
            check(array.shape == (arrays or [array])[0].shape,
                  f"it makes an array of shape {array.shape}, unlike the first file")
        except BadFile as error:
            raise DataError(str(error)) from None
        except Exception as error:      # SciPy, NumPy and torchvision raise many kinds for damage
            raise DataError(f"{path}: cannot be used: {type(error).__name__}: {error}") from None
        arrays.append(array)
    return np.stack(arrays)


def standardize(signals, train):
    """(N, C, ...) -> float16, each channel with mean 0 and variance 1 over the train items."""
    axes = (0, *range(2, signals.ndim))
    mean = signals[train].mean(axes, keepdims=True)
    std = signals[train].std(axes, keepdims=True)
    return ((signals - mean) / std).astype(np.float16)


SETS = {make.__name__: make for make in (avmnist, avletters, utdmhad, modelnet40_points)}


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
        with claim(folder):
            check(not os.path.lexists(folder),
                  f"{folder} is there already: remove it to make it anew")
            arrays = SETS[args.name](raw)
            store.write(folder, **arrays)
        for split, codes in arrays["splits"].items():
            counts = ", ".join(f"{n} {part}" for part, n in store.counts(codes).items())
            print(f"{folder}, split {split}: {counts}")


if __name__ == "__main__":
    main()
