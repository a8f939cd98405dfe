"""results.sets from small files in the formats of the real ones, and the embedded sets."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import raw
from conftest import ROOT
from PIL import Image
from scipy.io import loadmat, savemat

from data import DataError, claim, open_dataset
from data.synthetic import EMBEDDED, digest
from results import sets

PARTS = ("train", "val", "test")
SMALL = {"avmnist": {"full": (60, 0, 50), "small": (40, 0, 50)},
         "utdmhad": {"official": (4, 0, 4)}, "modelnet40_points": {"official": (40, 0, 40)}}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(name): the small files of a set under tmp_path/raw, whose counts are then the right
    ones; tmp_path/NAME is where `prepare` puts it."""
    def made(name):
        getattr(raw, name)(tmp_path / "raw")
        monkeypatch.setattr(sets, "COUNTS", SMALL)
        return tmp_path / name
    return made


def prepare(folder):
    """`results.sets` as typed; the folder it makes."""
    sets.main([folder.name, "--raw", str(folder.parent / "raw"), "--data-dir", str(folder.parent)])
    return folder


def test_avmnist_is_paired_by_class_and_its_sound_is_where_it_was(made, monkeypatch):
    folder = made("avmnist")
    for file in (folder.parent / "raw/MNIST/raw").iterdir():            # .gz files are unpacked
        raw.put(file.with_name(f"{file.name}.gz"), gzip.compress(file.read_bytes()))
        file.unlink()
    any_sum = [(name, None) for name, _ in sets.MNIST.resources]
    monkeypatch.setattr(sets.MNIST, "resources", any_sum)
    with claim(folder), pytest.raises(SystemExit):          # another process makes it
        prepare(folder)
    prepare(folder)
    ds, small = open_dataset(folder, val=0), open_dataset(folder, split="small", val=0)
    assert set(np.array(ds.ids)[small.indices("train")]) == {
        f"{digit}_ann_{index}" for digit in range(10) for index in range(5, 9)}
    image = ds.modalities["image"].array[:, 0, 0]
    np.testing.assert_array_equal(image[:, 5, 5], 20 * ds.labels)
    for part in ("train", "test"):          # no picture twice in a part
        assert len(set(image[ds.indices(part), 0, 0])) == len(ds.indices(part))

    audio = ds.modalities["audio"].array[:, 0].astype(float)
    loudest = audio[:, :, 4:16].mean(2).argmax(1)
    mel, top = (2595 * np.log10(1 + hertz / 700) for hertz in (200 + 100 * ds.labels, 4000))
    assert np.abs(loudest + 1 - mel / top * 33).max() <= 1      # triangles evenly spaced to 4 kHz
    assert (audio[:, :, 22:].max((1, 2)) < 0).all()             # then silence
    np.testing.assert_allclose([audio.mean((1, 2)), audio.std((1, 2)) - 1], 0, atol=2e-3)


def test_avletters_has_the_sound_and_lips_of_its_files(made):
    folder = prepare(made("avletters"))
    ds, clean = open_dataset(folder, val=0), open_dataset(folder, split="clean")
    assert ds.ids[0] == "A1_Anya" and ds.ids[-1] == "Z3_Yi" and ds.ids == sorted(ds.ids)
    assert [ds.classes[label] for label in ds.labels] == [name[0] for name in ds.ids]
    assert {ds.ids[i][1] for i in ds.indices("test")} == {"3"}
    speakers = [sorted({ds.ids[i][3:] for i in clean.indices(part)}) for part in PARTS]
    assert speakers == [raw.SPEAKERS[:6], raw.SPEAKERS[6:8], raw.SPEAKERS[8:]]

    values = ds.labels[:, None, None] + np.linspace(0, 29, 40) * np.arange(26)[:, None]
    train = values[ds.indices("train")]
    want = (values - train.mean((0, 2))[:, None]) / train.std((0, 2))[:, None]
    np.testing.assert_allclose(ds.modalities["audio"].array[:, 0].astype(float), want, atol=2e-3)
    lips = ds.modalities["lips"]
    assert (lips.size, lips.scale, lips.flip) == ((30, 40), (0.7, 1), True)
    for frame, at in enumerate((1, 3, 5, 7)):                   # the middles of quarters of 8
        assert (lips.array[:, frame, 0, :, at] == 255).all()
        assert (lips.array[np.arange(780), frame, 0, 2 * ds.labels, 70] == 100).all()
        assert (lips.array[:, frame] > 0).sum() == 780 * (60 + 79)


def slow_resample(values, length):
    """(T,) -> (length,)"""
    return np.interp(np.linspace(0, len(values) - 1, length), np.arange(len(values)), values)


def test_utdmhad_has_what_a_slow_computation_finds(made):
    folder = prepare(made("utdmhad"))
    ds, files = open_dataset(folder, val=0), folder.parent / "raw"
    assert {ds.classes[label] for label in ds.labels} == {"a1", "a27"}
    assert [f"a{label + 1}_s{group}_t1" for label, group in zip(ds.labels, ds.groups)] == ds.ids
    assert set(ds.groups[ds.indices("train")]) == {1, 3}
    inertial, skeleton, depth = [], [], []
    for name in ds.ids:
        signal = loadmat(files / f"Inertial/{name}_inertial.mat")["d_iner"]
        inertial.append([slow_resample(signal[:, axis], 128) for axis in range(6)])
        joints = loadmat(files / f"Skeleton/{name}_skeleton.mat")["d_skel"]
        for axis in range(3):
            places = np.stack([slow_resample(joints[j, axis], 64) for j in range(20)])
            skeleton.append(places - places[0].mean())
        video = loadmat(files / f"Depth/{name}_depth.mat")["d_depth"].astype(float)
        coarse = video.reshape(60, 4, 80, 4, 11).mean((1, 3))
        steps = np.abs(np.diff(coarse))                         # of eleven frames, halves 0-4, 5-10
        pictures = steps[..., :4].mean(2), steps[..., 5:].mean(2), coarse.mean(2)
        depth.append([picture / picture.max() * 255 for picture in pictures])
    train = ds.indices("train")
    for name, values in {"inertial": np.array(inertial)[:, :, None],
                         "skeleton": np.reshape(skeleton, (8, 3, 20, 64))}.items():
        channels = [(values[:, c] - values[train, c].mean()) / values[train, c].std()
                    for c in range(values.shape[1])]
        np.testing.assert_allclose(ds.modalities[name].array.astype(float),
                                   np.stack(channels, 1), atol=3e-3)
    difference = ds.modalities["depth"].array[:, 0].astype(float) - np.array(depth)
    assert np.abs(difference).max() < 0.51


def test_modelnet40_points_shows_the_nearest_point_of_each_side(made):
    folder = prepare(made("modelnet40_points"))
    ds = open_dataset(folder, val=0)
    assert ds.ids[:2] == ["kind00_0001", "kind00_0002"] and len(ds.classes) == 40
    assert [ds.ids[i][-1] for i in ds.indices("test")] == ["2"] * 40
    points = np.load(folder.parent / "raw/kind00/train/kind00_0001.npy").astype(float)
    points -= (points.max(0) + points.min(0)) / 2
    points /= np.abs(points).max()
    for name, sign in (("front", 1), ("rear", -1)):
        want = np.zeros((33, 33))
        for x, y, z in points:
            column, row = int((sign * x * 0.92 + 1) / 2 * 31), int((1 - (z * 0.92 + 1) / 2) * 31)
            bright = 255 * (0.65 - 0.35 * sign * y)
            want[row:row + 2, column:column + 2] = np.maximum(want[row:row + 2, column:column + 2],
                                                              bright)
        got = ds.modalities[name].array[0, 0, 0]
        assert np.abs(got - want[:32, :32]).max() < 1


@pytest.mark.parametrize("name,file,damage,reason", [
    ("avmnist", "recordings/3_ann_2.wav", raw.cut, "3_ann_2.wav: is cut off"),
    ("avmnist", "recordings/3_ann_2.wav", Path.unlink, "the files here make (60, 0, 49)"),
    ("avmnist", "MNIST/raw/train-images-idx3-ubyte", raw.cut, "MNIST/raw cannot be used: shape"),
    ("utdmhad", "Inertial/a1_s2_t1_inertial.mat",
     lambda path: savemat(path, {"d_iner": np.ones((9, 5))}), "of shape (5, 1, 128), unlike"),
    ("modelnet40_points", "kind07/train/kind07_0001.npy",
     lambda path: np.save(path, np.full((1024, 3), np.nan)), "not finite"),
])
def test_damaged_and_missing_files_are_said_in_one_line(made, capsys, name, file, damage, reason):
    folder = made(name)
    damage(folder.parent / "raw" / file)
    with pytest.raises(SystemExit) as stop:
        prepare(folder)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and reason in error and len(error.splitlines()) == 1
    assert not folder.exists()


@pytest.mark.parametrize("name,counts,sha256", [
    ("synthetic", [192, 96, 400],
     "5f2a0e4f660bb3d69dc0242af0c3764b7e36fa2e281f9a333551126a68ddab03"),
    ("synergy", [384, 96, 400],
     "e6fae706c98ecc05cd3360bdc91c97055e71d18dd1be0cacea1f42fe21ee7277")])
def test_the_embedded_sets_are_those_that_were_measured(name, counts, sha256, tmp_path):
    ds = open_dataset(name)
    assert digest(EMBEDDED[name]()) == ds.fingerprint[name] == sha256
    assert [len(ds.indices(part)) for part in PARTS] == counts
    assert len(open_dataset(name, val=0).indices("train")) == counts[0]     # val is not trained on
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="has the name of an embedded set"):
        open_dataset(name, tmp_path)


def test_a_table_of_files_becomes_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["sound,picture,class,recordist,part"]
    for item in range(12):
        kind, seconds, rate = item % 2, 1.5 + item / 10, (44_100, 16_000)[item % 2]
        raw.wav(Path(f"raw/birds/{item}.wav"), raw.tone(seconds, rate, (500, 3000)[kind]), rate)
        picture = Image.new("RGB", (90 + item, 70), ((200, 40, 10), (20, 60, 220))[kind])
        picture.save(f"raw/birds/{item}.jpg")
        word, part = ("owl", "jay")[kind], ("train", "train", "val", "test")[item // 3]
        rows.append(f"{item}.wav,{item}.jpg,{word},recordist {item // 3},{part}")
    Path("raw/birds/items.csv").write_text("\n".join(rows))
    page = (ROOT / "docs/your_data.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code, {})

    ds = open_dataset("birds")      # as --dataset birds does
    assert [ds.indices(part).tolist() for part in PARTS] == [[*range(6)], [6, 7, 8], [9, 10, 11]]
    assert [ds.classes[label] for label in ds.labels] == ["owl", "jay"] * 6
    assert ds.groups.tolist() == [item // 3 for item in range(12)]
    image = ds.modalities["image"].array[:, 0].astype(float)
    want = np.where(ds.labels[:, None] == 1, (200, 40, 10), (20, 60, 220))
    assert np.abs(image - want[:, :, None, None]).max() <= 3            # JPEG
    sound = ds.modalities["audio"].array.astype(float)
    assert not sound[0, 24_100:].any() and sound[9].std() > 6000        # 1.5 s of 2, and all of it
    assert np.abs(np.fft.rfft(sound[:, :16_000])).argmax(1).tolist() == [500, 3000] * 6
