"""The embedded dataset: nothing to download, made from a fixed seed in memory, seconds to train.

Eight classes. The audio modality, a small spectrogram, shows a band whose height tells the class; the image, a noisy
grating, tells it by its orientation. Heights and orientations of neighbouring classes overlap, so neither modality is
enough by itself, but classes that sound alike do not look alike: given the class, the two are independent.
"""

import hashlib

import numpy as np

SIZE = 24                     # both modalities are 24 x 24
CLASSES, TRAIN, TEST = 8, 192, 200


def make(seed=0):
    """Arguments of `data.store.write`: modalities, labels, splits, classes and ids of 392 items."""
    rng = np.random.default_rng(seed)
    n = TRAIN + TEST
    labels = np.arange(n) % CLASSES
    row, column = np.mgrid[:SIZE, :SIZE] / SIZE

    height = 0.15 + 0.1 * labels + rng.normal(0, 0.05, n)                    # neighbours are two deviations apart
    band = np.exp(-((row - height[:, None, None]) / 0.06) ** 2)
    audio = band + rng.normal(0, 0.5, (n, SIZE, SIZE))

    angle = np.pi / CLASSES * (3 * labels % CLASSES) + rng.normal(0, 0.15, n)    # 3 l mod 8: neighbours go apart
    along = np.cos(angle)[:, None, None] * column + np.sin(angle)[:, None, None] * row
    grating = 0.5 + 0.25 * np.sin(2 * np.pi * (4 * along + rng.uniform(0, 1, n)[:, None, None]))
    image = grating[:, None] + rng.normal(0, 0.2, (n, 3, SIZE, SIZE))

    return {
        "modalities": {
            "audio": {"kind": "spectrogram", "array": audio[:, None].astype(np.float16)},
            "image": {"kind": "rgb", "array": (image.clip(0, 1) * 255).astype(np.uint8)[:, None],
                      "scale": (0.5, 1.0), "flip": False},     # a mirrored grating would be another class
        },
        "labels": labels,
        "splits": {"official": np.where(np.arange(n) < TRAIN, 0, 2).astype(np.uint8)},
        "classes": [f"class {c}" for c in range(CLASSES)],
        "ids": [f"item{i:03d}" for i in range(n)],
    }


def digest(arrays):
    """SHA-256 over the arrays, which says that two runs saw the same data."""
    return hashlib.sha256(b"".join(spec["array"].tobytes() for spec in arrays["modalities"].values())).hexdigest()
