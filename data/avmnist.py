"""avmnist: spoken digits (free-spoken-digit-dataset) with written ones (MNIST), paired by class. 35 MB to download.

Raw, one folder with both: recordings/{digit}_{speaker}_{index}.wav (8 kHz, a clone of free-spoken-digit-dataset) and
the four MNIST idx files, gzipped or not, there or in a folder MNIST or mnist.

full   2,700 / 300: the recordings of index 0 to 4 are the test part, as their authors say
small  240 / 300: of the others only index 5 to 8, where joint training falls behind
Both modalities carry the digit; given the digit they are independent. All six speakers stand in both parts. The sound is
kept as a log-mel spectrogram about as large as the image, so that a run takes a minute or two of one CPU core.
"""

import functools
import gzip
import re

import numpy as np

from data.media import RATE, BadFile, read_audio
from data.prepare import Index, Item, find_folder
from data.store import DataError

EXPECTED = {"full": (2700, 0, 300), "small": (240, 0, 300)}      # train, val, test
SAMPLES = 8_000                                                 # half a second at 16 kHz: 70 % of the recordings are shorter
MEL = dict(n_fft=512, hop_length=256, f_max=4_000, n_mels=32)   # windows of 32 ms, steps of 16 ms, up to 8 kHz sound's end


def index(raw, options):
    recordings = find_folder(raw, "recordings", "free-spoken-digit-dataset/recordings")
    idx = {(part, what): find_idx(raw, f"{stem}-{what}-idx{3 if what == 'images' else 1}-ubyte")
           for part, stem in (("train", "train"), ("test", "t10k")) for what in ("images", "labels")}
    items, full, small = [], {}, {}
    for path in sorted(recordings.glob("*.wav")):
        match = re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem)
        if not match:
            raise DataError(f"{path} is not named {{digit}}_{{speaker}}_{{index}}.wav")
        digit, speaker, number = int(match[1]), match[2], int(match[3])
        full[path.stem] = 2 if number < 5 else 0
        if number < 9:
            small[path.stem] = full[path.stem]
        images = idx["test" if number < 5 else "train", "images"]
        items.append(Item(path.stem, digit, speaker, [str(path), str(images)]))
    rng = np.random.default_rng(0)      # of each part and digit, other images for other recordings
    for part in ("train", "test"):
        digits = read_idx(idx[part, "labels"], 1)
        for digit in range(10):
            of_part = [item for item in items if item.label == digit and (full[item.id] == 2) == (part == "test")]
            images = rng.permutation(np.flatnonzero(digits == digit))
            for item, image in zip(of_part, images):
                item.detail["image"] = int(image)
    modalities = {"audio": {"kind": "spectrogram", "shape": (1, MEL["n_mels"], 1 + SAMPLES // MEL["hop_length"])},
                  "image": {"kind": "rgb", "shape": (1, 1, 28, 28), "scale": (0.6, 1.0), "flip": False}}
    return Index(items, [str(d) for d in range(10)], modalities, {"full": full, "small": small},
                 EXPECTED)


def find_idx(raw, name):
    for folder in (raw, raw / "MNIST", raw / "mnist", raw / "MNIST/raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    raise DataError(f"{raw} has no {name}(.gz): put the four MNIST files there")


@functools.lru_cache(maxsize=4)
def read_idx(path, dimensions):
    """An MNIST file: uint8 array. Raises DataError."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            data = file.read()
        shape = np.frombuffer(data, ">i4", dimensions, 4)
        return np.frombuffer(data, np.uint8, int(np.prod(shape)), 4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is no whole MNIST file: {error}") from None


def decode(item, options):
    """audio: log-mel spectrogram of the first half second, mean 0 and variance 1, a shorter one padded with silence;
    image: 28 x 28."""
    import torch
    from torchaudio.transforms import MelSpectrogram
    wav, images = item.files
    sound = read_audio(wav)[:SAMPLES]
    if "image" not in item.detail:
        raise BadFile(images, f"has no image left for {item.id}")
    picture = read_idx(images, 3)[item.detail["image"]]
    sound = np.pad(sound, (0, SAMPLES - len(sound))).astype(np.float32) / 32768
    spectrogram = np.log(MelSpectrogram(RATE, **MEL)(torch.from_numpy(sound)).numpy() + 1e-7)
    spectrogram = (spectrogram - spectrogram.mean()) / (spectrogram.std() + 1e-9)
    return {"audio": spectrogram[None].astype(np.float16), "image": picture[None, None]}, None
