"""avmnist's idx files: every fault is named before anything is decoded."""

import gzip

import numpy as np
import pytest
import raw
from conftest import prepared

from data import DataError, avmnist


@pytest.fixture
def digits(tmp_path, expect):
    expect(avmnist)
    raw.avmnist(tmp_path / "raw", per_digit=6, zipped=False)
    return tmp_path / "raw"


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEN = np.arange(300) % 10


@pytest.mark.parametrize("name,change,message", [
    (IMAGES, lambda whole: whole[:-1], "is not a whole MNIST file: 235199 bytes for 300 x 28 x 28"),
    (IMAGES, lambda whole: whole + b"x", "is not a whole MNIST file: 235201 bytes"),
    (IMAGES, lambda whole: whole[:9], "of 3 dimensions: it begins with 00 00 08 03"),
    (IMAGES, lambda whole: gzip.compress(whole)[:-20], "is not a whole MNIST file"),
    (IMAGES, lambda whole: raw.idx(TEN), "of 3 dimensions: it begins with 00 00 08 01"),
    (IMAGES, lambda whole: raw.idx(np.zeros((300, 28, 28)), kind=13), "begins with 00 00 0d 03"),
    (IMAGES, lambda whole: b"version https://git-lfs", "begins with 76 65 72 73"),
    (IMAGES, lambda whole: b"", "is not an MNIST file"),
    (IMAGES, lambda whole: raw.idx(np.zeros((299, 28, 28))), "images (299, 28, 28), 300 labels"),
    (IMAGES, lambda whole: raw.idx(np.zeros((300, 28, 27))), "together: images (300, 28, 27)"),
    (LABELS, lambda whole: raw.idx(TEN + 1), "300 labels from 1 to 10"),
    (LABELS, lambda whole: raw.idx(np.arange(300) % 9), "has 0 images of a 9, there are 1 rec"),
    (LABELS, lambda whole: raw.idx(TEN[:, None, None]), "is not an MNIST file of 1 dimensions"),
])
def test_a_bad_idx_file_is_named_before_anything_is_decoded(digits, name, change, message, capsys):
    path = digits / name
    path.write_bytes(change(path.read_bytes()))
    avmnist.read_idx.cache_clear()
    prepared("avmnist", digits.parent, "--skip-bad", code=2)
    error = capsys.readouterr().err
    assert message in error and name in error and len(error.splitlines()) == 1
    assert not (digits.parent / "out").exists()


def test_zipped_or_not_is_seen_by_content_and_both_spellings_are_found(digits):
    avmnist.read_idx.cache_clear()
    before = avmnist.index(digits, {})
    (digits / IMAGES).rename(digits / "train-images.idx3-ubyte")
    labels = digits / LABELS
    labels.write_bytes(gzip.compress(labels.read_bytes()))      # its name says it is unpacked
    (digits / "recordings/._0_ann_0.wav").write_bytes(b"AppleDouble")
    avmnist.read_idx.cache_clear()
    after = avmnist.index(digits, {})
    assert [item.detail for item in after.items] == [item.detail for item in before.items]


def test_a_recording_with_another_name_is_named(digits):
    (digits / "recordings/ten_ann_0.wav").touch()
    with pytest.raises(DataError, match="ten_ann_0.wav is not named"):
        avmnist.index(digits, {})
