"""The embedded dataset: nothing to download, made from a fixed seed, seconds to train.

Each of eight classes has a sound, a band whose height tells it, and a picture, a grating whose
angle tells it; both are noisy. In a fifth of the items the band is absent, in a fifth the grating,
independently, so neither modality is enough (96.5 % can be reached with both). The sound is learned
sooner and explains four fifths of the items, so joint training learns the picture from the rest:
modality competition (Huang, Lin, Zhou, Yang, Huang: Modality Competition, ICML 2022), whose
"insufficient" items these are.
"""

import hashlib

import numpy as np

SIZE = 24                     # both modalities are 24 x 24
CLASSES, TRAIN, TEST = 8, 192, 400
ABSENT = 0.2                  # share of the items on which a modality says nothing


def make(seed=0):
    """Arguments of `data.store.write`: modalities, labels, splits, classes and ids of 592 items."""
    rng = np.random.default_rng(seed)
    n = TRAIN + TEST
    labels = np.arange(n) % CLASSES
    row, column = np.mgrid[:SIZE, :SIZE] / SIZE

    height = 0.1 + 0.8 * (labels + 0.5) / CLASSES + rng.normal(0, 0.02, n)
    band = np.exp(-((row - height[:, None, None]) / 0.06) ** 2)
    band[rng.random(n) < ABSENT] = 0                             # nothing to hear
    audio = band + rng.normal(0, 0.5, (n, SIZE, SIZE))

    # 3 c mod 8: classes with neighbouring heights have angles far apart
    angle = np.pi / CLASSES * (3 * labels % CLASSES) + rng.normal(0, 0.05, n)
    along = np.cos(angle)[:, None, None] * column + np.sin(angle)[:, None, None] * row
    grating = 0.25 * np.sin(2 * np.pi * (4 * along + rng.uniform(0, 1, n)[:, None, None]))
    grating[rng.random(n) < ABSENT] = 0                          # nothing to see
    image = (0.5 + grating)[:, None] + rng.normal(0, 0.5, (n, 3, SIZE, SIZE))

    return {
        "modalities": {
            "audio": {"kind": "spectrogram", "array": audio[:, None].astype(np.float16)},
            "image": {"kind": "rgb", "array": (image.clip(0, 1) * 255).astype(np.uint8)[:, None],
                      "scale": (0.5, 1.0), "flip": False},     # mirrored, it would be another class
        },
        "labels": labels,
        "splits": {"official": np.where(np.arange(n) < TRAIN, 0, 2).astype(np.uint8)},
        "classes": [f"class {c}" for c in range(CLASSES)],
        "ids": [f"item{i:03d}" for i in range(n)],
    }


def digest(arrays):
    """SHA-256 over the arrays, audio then image, which says that two runs saw the same data."""
    content = b"".join(spec["array"].tobytes() for spec in arrays["modalities"].values())
    return hashlib.sha256(content).hexdigest()
