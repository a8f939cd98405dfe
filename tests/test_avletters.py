"""avletters from small files in the formats of the real ones: MATLAB 5 and HTK."""

import numpy as np
import pytest
from conftest import REAL, prepared, real
from scipy.io import savemat

from data import avletters, open_dataset

SPEAKERS = ["Anya", "Stephen", "Yi"]


def write_htk(path, values, frames=None):
    """(n, 26) -> an HTK file; `frames` is what its header says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.array([(frames or len(values), 200_000, 104, 326)], ">i4, >i4, >i2, >i2")
    path.write_bytes(header.tobytes() + values.astype(">f4").tobytes())


def write_lips(path, video):
    """uint8 (T, 60, 80) -> the MATLAB file that holds it column by column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = video.transpose(1, 2, 0).reshape(-1, len(video), order="F")
    savemat(path, {"vid": pixels, "siz": np.array([[60.0, 80.0, len(video)]])})


def files(root, name):
    return root / f"Audio/mfcc/Clean/{name}.mfcc", root / f"Lips/{name}-lips.mat"


@pytest.fixture
def letters(tmp_path, monkeypatch, expect):
    """Three speakers. Sound: coefficient k rises by k a step, from the letter's number on.
    Picture: a bright column tells the frame, a bright row the letter."""
    monkeypatch.setattr(avletters, "SPEAKERS", SPEAKERS)
    expect(avletters, official=(156, 0, 78), clean=(78, 78, 78))
    for label in range(26):
        for name in (f"{chr(65 + label)}{n}_{speaker}" for n in "123" for speaker in SPEAKERS):
            sound, lips = files(tmp_path / "raw", name)
            write_htk(sound, label + np.arange(30)[:, None] * np.arange(26))
            video = np.zeros((20, 60, 80), np.uint8)
            video[:, 2 * label] = 100
            video[np.arange(20), :, np.arange(20)] = 255
            write_lips(lips, video)
    (tmp_path / "raw/Lips/._A1_Anya-lips.mat").write_bytes(b"AppleDouble")
    return tmp_path / "raw"


def test_sound_and_lips_are_those_of_the_files(letters):
    folder = prepared("avletters", letters.parent)
    ds = open_dataset(folder, val=0)
    assert list(ds.modalities) == ["audio", "lips"] and ds.ids[:2] == ["A1_Anya", "A1_Stephen"]
    assert [ds.classes[label] for label in ds.labels] == [name[0] for name in ds.ids]
    assert {ds.ids[i][1] for i in ds.indices("train")} == {"1", "2"}
    assert {ds.ids[i][1] for i in ds.indices("test")} == {"3"}

    audio = ds.modalities["audio"].array[:, 0].astype(float)
    assert audio.shape == (234, 26, 40)
    values = ds.labels[:, None, None] + np.linspace(0, 29, 40) * np.arange(26)[:, None]
    train = values[ds.indices("train")]
    want = (values - train.mean((0, 2))[:, None]) / train.std((0, 2))[:, None]
    np.testing.assert_allclose(audio, want, atol=2e-3)

    lips = ds.modalities["lips"]
    assert lips.array.shape == (234, 4, 1, 60, 80)
    assert (lips.size, lips.scale, lips.flip) == ((30, 40), (0.7, 1), True)
    for item, label in enumerate(ds.labels):
        for picture, frame in zip(lips.array[item, :, 0], (2, 7, 12, 17)):      # quarters of 20
            want = np.zeros((60, 80))
            want[2 * label] = 100
            want[:, frame] = 255
            np.testing.assert_array_equal(picture, want)

    clean = open_dataset(folder, split="clean")
    speakers = {part: {clean.ids[i][3:] for i in clean.indices(part)}
                for part in ("train", "val", "test")}
    assert speakers == {"train": {"Anya"}, "val": {"Stephen"}, "test": {"Yi"}}


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


@pytest.mark.parametrize("damage,reason", [
    (lambda sound, lips: cut(lips), "cannot be read, it is cut off or no MATLAB file"),
    (lambda sound, lips: lips.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
     "Git LFS pointer"),
    (lambda sound, lips: savemat(lips, {"vid": np.zeros((4800, 20), np.uint8)}), "KeyError: 'siz'"),
    (lambda sound, lips: write_lips(lips, np.zeros((3, 60, 80), np.uint8)),
     "has no lips of 60 x 80: size [60, 80, 3]"),
    (lambda sound, lips: savemat(lips, {"vid": np.zeros((4800, 20)), "siz": [[60, 80, 20]]}),
     "values of float64"),
    (lambda sound, lips: cut(sound), "bytes, its header says 3132 (30 frames)"),
    (lambda sound, lips: write_htk(sound, np.zeros((30, 26)), 29),
     "has 3132 bytes, its header says 3028 (29 frames)"),
    (lambda sound, lips: sound.write_bytes(b"text"), "is no HTK file of 26 coefficients"),
    (lambda sound, lips: write_htk(sound, np.full((30, 26), np.nan)),
     "has coefficients that are not finite"),
])
def test_a_damaged_file_is_named(letters, damage, reason, capsys):
    sound, lips = files(letters, "C2_Stephen")
    damage(sound, lips)
    prepared("avletters", letters.parent, code=2)
    error = capsys.readouterr().err
    assert "1 of 234 items cannot be used" in error and reason in error and "C2_Stephen" in error
    assert "Traceback" not in error and not (letters.parent / "out/avletters").exists()


@pytest.mark.parametrize("pattern,missing,first", [
    ("Lips/D*", 9, "Lips/D1_Anya-lips.mat"), ("*/mfcc/Clean/?3_*", 78, "Clean/A3_Anya.mfcc"),
    ("*/*/Clean/*", 234, "A1_Anya.mfcc"),
])
def test_an_incomplete_download_is_said_at_once(letters, pattern, missing, first, capsys):
    for path in letters.glob(pattern):
        path.unlink()
    prepared("avletters", letters.parent, code=2)
    error = capsys.readouterr().err
    assert f"{missing} files of avletters are missing, the first: " in error and first in error
    assert len(error.splitlines()) == 1 and not (letters.parent / "out").exists()


def test_a_file_that_is_none_of_the_letters_is_named(letters, capsys):
    (letters / "Lips/A4_Anya-lips.mat").touch()
    prepared("avletters", letters.parent, code=2)
    assert "A4_Anya-lips.mat is not one of the 234 clips" in capsys.readouterr().err


@real
def test_the_real_set(tmp_path):
    (tmp_path / "raw").symlink_to(REAL / "avletters")
    ds = open_dataset(prepared("avletters", tmp_path), val=0)
    audio = ds.modalities["audio"].array[ds.indices("train")].astype(float)
    np.testing.assert_allclose(audio.mean((0, 1, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(audio.std((0, 1, 3)), 1, atol=1e-3)
    lips = ds.modalities["lips"].array.astype(int)      # smooth both ways; in C order 19 one way
    assert np.abs(np.diff(lips, axis=3)).mean() < 8 and np.abs(np.diff(lips, axis=4)).mean() < 8
