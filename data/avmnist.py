"""avmnist: spoken digits (free-spoken-digit-dataset) with written ones (MNIST), paired by class.

35 MB to download. Raw, one folder with both: recordings/{digit}_{speaker}_{index}.wav (8 kHz, a
clone of free-spoken-digit-dataset) and the four MNIST idx files, gzipped or not, there or in a
folder MNIST or mnist.

full   2,700 / 300: the recordings of index 0 to 4 are the test part, as their authors say
small  240 / 300: of the others only index 5 to 8, where joint training falls behind
Both modalities carry the digit; given the digit they are independent. All six speakers stand in
both parts. The sound is kept as a log-mel spectrogram about as large as the image, so that a run
takes a minute or two of one CPU core.
"""

import functools
import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from data.media import RATE, read_audio
from data.prepare import Index, Item, find_files, find_folder
from data.store import DataError, check

EXPECTED = {"full": (2700, 0, 300), "small": (240, 0, 300)}      # train, val, test
SAMPLES = 8_000     # half a second at 16 kHz: 70 % of the recordings are shorter
# windows of 32 ms, steps of 16 ms, up to where sound of 8 kHz ends
MEL = dict(n_fft=512, hop_length=256, f_max=4_000, n_mels=32)


def index(raw, options):
    recordings = find_folder(raw, "recordings", "free-spoken-digit-dataset/recordings")
    items, full, small = [], {}, {}
    for path in find_files(recordings, "*.wav"):
        match = re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem, re.ASCII)
        check(match, f"{path} is not named {{digit}}_{{speaker}}_{{index}}.wav")
        digit, speaker, number = int(match[1]), match[2], int(match[3])
        items.append(Item(path.stem, digit, speaker, [str(path)]))
        full[path.stem] = 2 if number < 5 else 0
        if number < 9:
            small[path.stem] = full[path.stem]
    rng = np.random.default_rng(0)      # of each part and digit, other images for other recordings
    for part, stem in ((0, "train"), (2, "t10k")):
        images, labels = find_idx(raw, f"{stem}-images", 3), find_idx(raw, f"{stem}-labels", 1)
        digits, pictures = read_idx(labels, 1), read_idx(images, 3)
        check(pictures.shape == (len(digits), 28, 28) and digits.max() < 10,
              f"{images} and {labels} do not go together: images {pictures.shape}, {len(digits)} "
              f"labels from {digits.min()} to {digits.max()}")
        for digit in range(10):
            of_part = [item for item in items if item.label == digit and full[item.id] == part]
            chosen = rng.permutation(np.flatnonzero(digits == digit))
            check(len(chosen) >= len(of_part), f"{labels} has {len(chosen)} images of a {digit}, "
                                               f"there are {len(of_part)} recordings of it")
            for item, image in zip(of_part, chosen):
                item.files.append(str(images))
                item.detail = {"image": int(image)}
    modalities = {"audio": {"kind": "spectrogram",
                            "shape": (1, MEL["n_mels"], 1 + SAMPLES // MEL["hop_length"])},
                  "image": {"kind": "rgb", "shape": (1, 1, 28, 28), "scale": (0.6, 1.0),
                            "flip": False}}
    splits = {"full": full, "small": small}
    return Index(items, [str(digit) for digit in range(10)], modalities, splits, EXPECTED)


def find_idx(raw, stem, dimensions):
    """The idx file of that many dimensions, under one of its names. Raises DataError."""
    name = f"{stem}[-.]idx{dimensions}-ubyte"
    for folder in ("", "MNIST", "mnist", "MNIST/raw"):
        for path in find_files(raw / folder, f"{name}*"):
            return path
    raise DataError(f"{raw} has no {name}(.gz): put the four MNIST files there")


@functools.lru_cache(maxsize=4)
def read_idx(path, dimensions):
    """An MNIST file, gzipped or not, whatever its name says: uint8 array. Raises DataError.

    It begins with the bytes 0, 0, 8 (uint8), the number of dimensions, and each size as a
    big-endian int32.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole MNIST file: {error}") from None
    start = 4 + 4 * dimensions
    check(data[:4] == bytes([0, 0, 8, dimensions]) and len(data) >= start,
          f"{path} is not an MNIST file of {dimensions} dimensions: it begins with "
          f"{data[:4].hex(' ')}")
    shape = np.frombuffer(data, ">i4", dimensions, 4).astype(int)
    check(shape.min() > 0 and math.prod(shape.tolist()) == len(data) - start,
          f"{path} is not a whole MNIST file: {len(data) - start} bytes for "
          f"{' x '.join(map(str, shape))}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def decode(item, options):
    """audio: log-mel spectrogram of the first half second, mean 0 and variance 1, a shorter one
    padded with silence; image: 28 x 28."""
    import torch
    from torchaudio.transforms import MelSpectrogram
    wav, images = item.files
    sound = read_audio(wav)[:SAMPLES]
    picture = read_idx(images, 3)[item.detail["image"]]
    sound = np.pad(sound, (0, SAMPLES - len(sound))).astype(np.float32) / 32768
    spectrogram = np.log(MelSpectrogram(RATE, **MEL)(torch.from_numpy(sound)).numpy() + 1e-7)
    spectrogram = (spectrogram - spectrogram.mean()) / (spectrogram.std() + 1e-9)
    return {"audio": spectrogram[None].astype(np.float16), "image": picture[None, None]}, None
