"""results.sets from small files in the formats of the real ones, and the embedded sets."""

import re
import string
import wave
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.io import loadmat, savemat

from data import open_dataset
from data.synthetic import EMBEDDED, digest
from results import sets

SPEAKERS = "Anya Bill Faye John Kate Nicola Stephen Steve Verity Yi".split()
PARTS = ("train", "val", "test")


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_wav(path, seconds, hertz, rate=8_000):
    samples = 9830 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    with wave.open(str(put(path)), "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(samples.astype("<i2").tobytes())


def idx(array):
    start = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return start + array.astype(np.uint8).tobytes()


def avmnist(root):
    """Tones of 200 + 100 * digit Hz for 0.3 s, pictures of grey 20 * digit, each with its number in
    the corner."""
    for digit in range(10):
        for index in range(11):
            write_wav(root / f"recordings/{digit}_ann_{index}.wav", 0.3, 200 + 100 * digit)
    labels = np.arange(200) % 10
    images = np.full((200, 28, 28), 20 * labels[:, None, None])
    images[:, 0, 0] = np.arange(200)
    for stem in ("train", "t10k"):
        put(root / f"MNIST/raw/{stem}-images-idx3-ubyte", idx(images))
        put(root / f"MNIST/raw/{stem}-labels-idx1-ubyte", idx(labels))


def avletters(root):
    """Sound: coefficient k rises by k a step, from the letter's number on. Picture: a bright column
    tells the frame, a bright row the letter."""
    for label, letter in enumerate(string.ascii_uppercase):
        sound = label + np.arange(30)[:, None] * np.arange(26)
        header = np.array([(30, 200_000, 104, 326)], ">i4, >i4, >i2, >i2").tobytes()
        video = np.zeros((60, 80, 8), np.uint8)
        video[2 * label] = 100
        video[:, np.arange(8), np.arange(8)] = 255
        for name in (f"{letter}{n}_{speaker}" for n in "123" for speaker in SPEAKERS):
            put(root / f"Audio/mfcc/Clean/{name}.mfcc", header + sound.astype(">f4").tobytes())
            savemat(put(root / f"Lips/{name}-lips.mat"),
                    {"vid": video.reshape(-1, 8, order="F"), "siz": [[60.0, 80.0, 8.0]]})


def utdmhad(root):
    """Two actions of four subjects, signals of eleven steps."""
    rng = np.random.default_rng(0)
    for name in (f"a{action}_s{subject}_t1" for action in (1, 27) for subject in (1, 2, 3, 4)):
        for folder, key, shape in (("Inertial", "d_iner", (11, 6)),
                                   ("Skeleton", "d_skel", (20, 3, 11)),
                                   ("Depth", "d_depth", (240, 320, 11))):
            values = rng.integers(0, 4000, shape).astype("u2" if folder == "Depth" else float)
            savemat(put(root / f"{folder}/{name}_{folder.lower()}.mat"), {key: values})


def modelnet40_points(root):
    """High in front (small y), flat behind."""
    rng = np.random.default_rng(0)
    for kind in (f"kind{k:02d}" for k in range(40)):
        for number, part in ((1, "train"), (2, "test")):
            points = rng.uniform(-1, 1, (1024, 3)).astype(np.float32)
            points[:, 2] = np.where(points[:, 1] < 0, points[:, 2], -0.9)
            np.save(put(root / f"{kind}/{part}/{kind}_{number:04d}.npy"), points)


SMALL = {"avmnist": {"full": (60, 0, 50), "small": (40, 0, 50)},
         "utdmhad": {"official": (4, 0, 4)}, "modelnet40_points": {"official": (40, 0, 40)}}


def prepare(name, root, code=0):
    argv = [name, "--raw", str(root / "raw"), "--data-dir", str(root / "out")]
    if code:
        with pytest.raises(SystemExit) as stop:
            sets.main(argv)
        assert stop.value.code == code and not (root / "out").exists()
    else:
        sets.main(argv)
    return root / "out" / name


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(name): the small files of a set under tmp_path/raw, whose counts are then the right
    ones."""
    def made(name):
        globals()[name](tmp_path / "raw")
        monkeypatch.setattr(sets, "COUNTS", SMALL)
        return tmp_path
    return made


def test_avmnist_is_paired_by_class_and_its_sound_is_where_it_was(made):
    root = made("avmnist")
    folder = prepare("avmnist", root)
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
    root = made("avletters")
    folder = prepare("avletters", root)
    ds, clean = open_dataset(folder, val=0), open_dataset(folder, split="clean")
    assert ds.ids[0] == "A1_Anya" and ds.ids[-1] == "Z3_Yi" and ds.ids == sorted(ds.ids)
    assert [ds.classes[label] for label in ds.labels] == [name[0] for name in ds.ids]
    assert {ds.ids[i][1] for i in ds.indices("test")} == {"3"}
    speakers = [sorted({ds.ids[i][3:] for i in clean.indices(part)}) for part in PARTS]
    assert speakers == [SPEAKERS[:6], SPEAKERS[6:8], SPEAKERS[8:]]

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
    root = made("utdmhad")
    ds = open_dataset(prepare("utdmhad", root), val=0)
    assert {ds.classes[label] for label in ds.labels} == {"a1", "a27"}
    assert [f"a{label + 1}_s{group}_t1" for label, group in zip(ds.labels, ds.groups)] == ds.ids
    assert set(ds.groups[ds.indices("train")]) == {1, 3}
    inertial, skeleton, depth = [], [], []
    for name in ds.ids:
        signal = loadmat(root / f"raw/Inertial/{name}_inertial.mat")["d_iner"]
        inertial.append([slow_resample(signal[:, axis], 128) for axis in range(6)])
        joints = loadmat(root / f"raw/Skeleton/{name}_skeleton.mat")["d_skel"]
        for axis in range(3):
            places = np.stack([slow_resample(joints[j, axis], 64) for j in range(20)])
            skeleton.append(places - places[0].mean())
        video = loadmat(root / f"raw/Depth/{name}_depth.mat")["d_depth"].astype(float)
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
    root = made("modelnet40_points")
    ds = open_dataset(prepare("modelnet40_points", root), val=0)
    assert ds.ids[:2] == ["kind00_0001", "kind00_0002"] and len(ds.classes) == 40
    assert [ds.ids[i][-1] for i in ds.indices("test")] == ["2"] * 40
    points = np.load(root / "raw/kind00/train/kind00_0001.npy").astype(float)
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
    # high in front, flat behind
    front, rear = (ds.modalities[name].array[0, 0, 0] for name in ("front", "rear"))
    assert front[:24].max() > 250 and rear[:24].max() < 170 and rear[28:].max() > 240


def cut(path):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * 0.6)])


def lfs(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("name,file,damage,reason", [
    ("avmnist", "recordings/3_ann_2.wav", cut, "is cut off"),
    ("avmnist", "recordings/3_ann_2.wav", Path.unlink, "the files here make (60, 0, 49)"),
    ("avmnist", "MNIST/raw/train-images-idx3-ubyte", cut, "cannot be used: RuntimeError"),
    ("avletters", "Lips/C2_Faye-lips.mat", lfs, "is a Git LFS pointer"),
    ("avletters", "Audio/mfcc/Clean/C2_Faye.mfcc", cut, "cannot be used"),
    ("utdmhad", "Skeleton/a27_s2_t1_skeleton.mat", Path.unlink, "is missing"),
    ("utdmhad", "Inertial/a1_s2_t1_inertial.mat",
     lambda path: savemat(path, {"d_iner": np.ones((9, 5))}), "of shape (5, 1, 128), unlike"),
    ("modelnet40_points", "kind07/train/kind07_0001.npy",
     lambda path: np.save(path, np.full((1024, 3), np.nan)), "not finite"),
])
def test_damaged_and_missing_files_are_said_in_one_line(made, capsys, name, file, damage, reason):
    root = made(name)
    damage(root / "raw" / file)
    prepare(name, root, code=2)
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1
    assert file in error or "the complete set has" in error


@pytest.mark.parametrize("name,counts,sha256", [
    ("synthetic", [192, 96, 400],
     "5f2a0e4f660bb3d69dc0242af0c3764b7e36fa2e281f9a333551126a68ddab03"),
    ("synergy", [384, 96, 400],
     "e6fae706c98ecc05cd3360bdc91c97055e71d18dd1be0cacea1f42fe21ee7277")])
def test_the_embedded_sets_are_those_that_were_measured(name, counts, sha256):
    ds = open_dataset(name)
    assert digest(EMBEDDED[name]()) == ds.fingerprint[name] == sha256
    assert [len(ds.indices(part)) for part in PARTS] == counts
    assert len(open_dataset(name, val=0).indices("train")) == counts[0]     # val is not trained on


def test_the_class_of_synergy_is_the_xor_of_height_and_angle():
    ds = open_dataset("synergy")
    rows = ds.modalities["audio"].array[:, 0].astype(float).mean(2)
    high = rows[:, 14:20].mean(1) > rows[:, 4:10].mean(1)                   # 0.7 or 0.3 of 24
    picture = ds.modalities["image"].array[:, 0].astype(float).mean(1)
    upright = picture.mean(2).var(1) > picture.mean(1).var(1)               # stripes lie, or stand
    assert (ds.labels == (high ^ upright)).mean() > 0.99
    for alone in (high, upright):                                           # neither says anything
        assert abs((ds.labels == alone).mean() - 0.5) < 0.05


def test_a_table_of_files_becomes_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["sound,picture,class,recordist,part"]
    for item in range(12):
        kind, seconds, rate = item % 2, 1.5 + item / 10, (44_100, 16_000)[item % 2]
        write_wav(Path(f"raw/birds/{item}.wav"), seconds, (500, 3000)[kind], rate)
        picture = Image.new("RGB", (90 + item, 70), ((200, 40, 10), (20, 60, 220))[kind])
        picture.save(f"raw/birds/{item}.jpg")
        word, part = ("owl", "jay")[kind], ("train", "train", "val", "test")[item // 3]
        rows.append(f"{item}.wav,{item}.jpg,{word},recordist {item // 3},{part}")
    put(Path("raw/birds/items.csv"), "\n".join(rows).encode())
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
    inputs, _, _ = next(iter(ds.batches("train", 6, augment=True)))
    assert {m: tuple(x.shape) for m, x in inputs.items()} == {"audio": (6, 1, 1, 257, 199),
                                                              "image": (6, 1, 3, 64, 64)}
