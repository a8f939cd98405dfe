"""From raw files to prepared folders: each dataset in each of its layouts, its splits, and what is
said where a download or a list is not as it must be."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import raw
from conftest import REAL, odd_decoder, prepared, real
from PIL import Image

import joint_baseline
from data import ave, avmnist, cremad, info, modelnet40, open_dataset, prepare, store, ucf101
from data.media import BadFile
from data.prepare import Item

CREMAD = {"official": (18, 0, 6), "clean": (12, 6, 6)}
MODULES = {"cremad": cremad, "ave": ave, "ucf101": ucf101, "modelnet40": modelnet40}
FLOW = {"flow": "tvl1"}


def digests(folder):
    return {path.name: store.sha256(path) for path in folder.iterdir()}


def rewrite(path, change=lambda text: text, encoding="utf-8"):
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode(encoding))


# ---- what comes out ------------------------------------------------------------------------------
def test_cremad(tmp_path, expect, capsys):
    ids = raw.cremad(tmp_path / "raw")
    expect(cremad, **CREMAD)
    meta = store.read_meta(prepared("cremad", tmp_path))
    ds = open_dataset("cremad", tmp_path / "out", split="clean")
    assert ds.classes == ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"] and ds.ids == sorted(ids)
    assert [ds.classes[label] for label in ds.labels] == [item.split("_")[2] for item in ds.ids]
    actors = {part: {ds.ids[i][:4] for i in ds.indices(part)} for part in ("train", "val", "test")}
    assert actors == {"train": {"1001", "1006"}, "val": {"1003"}, "test": {"1005"}}
    audio, rgb = ds.modalities["audio"], ds.modalities["rgb"]
    assert audio.array.shape == (24, 48_000) and rgb.array.shape == (24, 3, 3, 256, 256)
    np.testing.assert_array_equal(audio.array[0, :10], audio.array[0, 19_200:19_210])     # repeated
    assert (np.diff(rgb.array[0].mean((1, 2, 3))) > 60).all() and rgb.size == (224, 224)
    assert rgb.frame[0].tolist() == [48, 64]
    assert meta["lists"]["train.csv"] == store.sha256(tmp_path / "raw/train.csv")
    assert meta["skipped"] == {}
    result = joint_baseline.main([
        "--dataset", "cremad", "--data-dir", str(tmp_path / "out"), "--val", "0", "--epochs", "1",
        "--modality", "audio", "--batch-size", "18", "--out", str(tmp_path)])
    assert (result["n_train"], result["n_test"], result["recipe"]["lr"]) == (18, 6, 1e-3)

    capsys.readouterr()
    info.main(["cremad", "--data-dir", str(tmp_path / "out"), "--sheet", str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    for line in ("split official: 18 train, 6 test", "in both train and test: 4",
                 "split clean: 12 train, 6 val, 6 test", "in both train and test: 0",
                 "  test: 1005"):
        assert line in printed
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (5 * 128, 8 * 146 + 18) and len(sheet.getcolors(99_999)) > 50


def test_cremad_without_lists_makes_the_clean_split_alone_and_says_so(tmp_path, expect, capsys):
    raw.cremad(tmp_path / "raw")
    (tmp_path / "raw/train.csv").unlink()
    expect(cremad, clean=CREMAD["clean"])
    prepared("cremad", tmp_path)
    assert "only the split `clean` is made" in capsys.readouterr().out
    assert open_dataset("cremad", tmp_path / "out").split == "clean"


def test_ave(tmp_path, expect, capsys):
    raw.ave(tmp_path / "raw")
    expect(ave, 2, official=(6, 1, 2))
    folder = prepared("ave", tmp_path)
    ds, clean = (open_dataset(folder, split=split) for split in ("official", "clean"))
    assert ds.classes == ["Bark", "Church bell"]
    assert [len(ds.indices(part)) for part in ("train", "val", "test")] == [6, 1, 2]
    train = [clean.ids[i] for i in clean.indices("train")]
    assert len(train) == 5 and "video_0" not in " ".join(train)
    audio, grey = ds.modalities["audio"], ds.modalities["rgb"].array.mean((2, 3, 4))
    assert audio.array.shape[1] == 160_000 and audio.standardize
    for item, name in enumerate(ds.ids):
        start, stop = map(int, name.split()[1].split("-"))
        middles = start + (np.arange(4) + 0.5) * (stop - start) / 4
        assert np.abs(grey[item] - middles * 25).max() < 8, name       # 25 grey levels a second
    info.describe(folder)
    assert "in both train and test: 1 (video_0)" in capsys.readouterr().out


def test_ucf101_from_videos(tmp_path, expect, monkeypatch, capsys):
    cv2 = pytest.importorskip("cv2", reason="flow needs opencv-contrib-python-headless")
    raw.ucf_videos(tmp_path / "raw")
    expect(ucf101, 2, official=(2, 0, 2))
    for method in ["dis"] + ["tvl1"] * hasattr(cv2, "optflow"):
        ds = open_dataset(prepared("ucf101", tmp_path, "--flow", method))
        name = {"tvl1": "flow", "dis": "flow_dis"}[method]
        assert list(ds.modalities) == [name, "rgb"] and ds.ids == sorted(raw.UCF)
        flow = (ds.modalities[name].array[0].astype(float) - 127.5) * 40 / 255
        u, v = np.median(flow[:, :, 64:192, 64:192], (0, 2, 3))
        assert abs(u - 2) < 0.5 and abs(v) < 0.3        # the texture moves 2 pixels to the right
        assert [ds.classes[ds.labels[i]] for i in ds.indices("train")] == ["Biking", "Skiing"]
        shutil.rmtree(tmp_path / "out/ucf101")
    monkeypatch.setitem(sys.modules, "cv2", None)
    prepared("ucf101", tmp_path, code=2)
    assert "pip install opencv-contrib-python-headless" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["u,v", "x,y", "flow_x"])
def test_ucf101_from_published_pictures(layout, tmp_path, expect, capsys):
    raw.ucf_pictures(tmp_path / "raw", layout)
    expect(ucf101, 2, official=(2, 0, 2))
    ds = open_dataset(prepared("ucf101", tmp_path), split="clean")
    flow, rgb = ds.modalities["flow"].array, ds.modalities["rgb"]
    assert rgb.frame[0].tolist() == [26, 34] and abs(rgb.array[0].mean() - 70) < 2     # frame 7
    ten = np.arange(102, 112)[:, None] + [0, 50]                        # from the second on
    assert np.abs(flow[0].mean((2, 3)) - ten).max() < 2
    prepared("ucf101", tmp_path, "--flow", "dis", code=2)
    assert "ucf101 is prepared already" in capsys.readouterr().err


def test_modelnet40_from_meshes_and_from_pictures(tmp_path, expect):
    raw.modelnet(tmp_path / "raw")
    expect(modelnet40, 2, official=(8, 0, 4))
    meshes = prepared("modelnet40", tmp_path).rename(tmp_path / "meshes")
    ds = open_dataset(meshes)
    assert ds.classes == ["bed", "lamp"]
    rendered = {view: ds.modalities[side].array for view, side in ((1, "front"), (7, "rear"))}
    assert rendered[1].shape == (12, 1, 1, 256, 256)
    shutil.rmtree(tmp_path / "raw")
    for item, name in enumerate(ds.ids):
        (tmp_path / f"raw/{name}").parent.mkdir(parents=True, exist_ok=True)
        for view in range(1, 13):
            picture = rendered[view][item, 0, 0] if view in (1, 7) else np.zeros((4, 4), np.uint8)
            Image.fromarray(picture).save(tmp_path / f"raw/{name}.obj.shaded_v{view:03d}.png")
    again = open_dataset(prepared("modelnet40", tmp_path))
    assert again.ids == ds.ids
    for view, array in rendered.items():
        np.testing.assert_array_equal(again.modalities[f"view{view}"].array, array)


@pytest.mark.parametrize("zipped", [True, False])
def test_avmnist(zipped, tmp_path, expect):
    raw.avmnist(tmp_path / "raw", zipped=zipped)
    expect(avmnist, full=(60, 0, 50), small=(40, 0, 50))
    folder = prepared("avmnist", tmp_path)
    ds = open_dataset(folder, val=0)
    assert ds.split == "full" and len(ds.indices("train")) == 60
    assert len(open_dataset(folder, split="small", val=0).indices("train")) == 40
    image = ds.modalities["image"].array
    np.testing.assert_array_equal(image[:, 0, 0, 5, 5], ds.labels * 20)         # paired by class
    sound = ds.modalities["audio"].array                # a tone of 200 + 100 * digit Hz, 0.3 s
    loudest = sound[:, 0, :, 4:16].astype(float).mean(2).argmax(1)
    assert sound.shape == (110, 1, 32, 32)
    assert (np.diff(loudest[np.argsort(ds.labels, kind="stable")]) >= 0).all()
    mel, top = (2595 * np.log10(1 + hertz / 700) for hertz in (200 + 100 * ds.labels, 4000))
    assert np.abs(loudest + 1 - mel / top * 33).max() <= 1      # triangles evenly spaced to 4 kHz
    assert (sound[:, 0, :, 22:].max((1, 2)) < 0).all()          # then silence
    one = digests(folder)
    shutil.rmtree(folder)
    assert digests(prepared("avmnist", tmp_path)) == one        # the pairing is fixed


def test_limit_makes_a_trial(tmp_path):
    raw.modelnet(tmp_path / "raw")
    prepared("modelnet40", tmp_path, "--limit", "6")
    ds = open_dataset("modelnet40-limit6", tmp_path / "out", val=0)
    assert ds.split == "trial" and len(ds.ids) == 6
    assert set(ds.labels[ds.indices("train")]) == {0, 1}


@real
def test_the_real_lists_have_the_counts_that_are_asserted():
    for module, options in ((cremad, {}), (ave, {}), (ucf101, {"flow": "dis"})):
        if module is ucf101:
            pytest.importorskip("cv2")
        index = module.index(REAL / module.__name__.split(".")[-1], options)
        assert index.expected
        for split, expected in index.expected.items():
            codes = list(index.splits[split].values())
            assert tuple(codes.count(part) for part in range(3)) == expected, split
        groups = {item.id: item.group for item in index.items}
        train, val, test = ({groups[item] for item, code in index.splits["clean"].items()
                             if code == part} for part in range(3))
        assert not train & val and not train & test and not val & test


@real
def test_real_clips_and_meshes(tmp_path):
    os.symlink(REAL / "cremad", tmp_path / "raw")
    prepared("cremad", tmp_path, "--limit", "4")
    ds = open_dataset("cremad-limit4", tmp_path / "out")
    rgb = ds.modalities["rgb"]
    assert rgb.frame.tolist() == [[360, 480]] * 4
    red, green, blue = rgb.array[:, :, :, :60, :40].mean((0, 1, 3, 4))      # of the green screen
    assert green > 1.5 * red and green > 1.5 * blue
    assert np.abs(ds.modalities["audio"].array).max(1).min() > 500
    os.unlink(tmp_path / "raw")
    os.symlink(REAL / "modelnet40/off", tmp_path / "raw")
    prepared("modelnet40", tmp_path, "--limit", "5")
    front = open_dataset("modelnet40-limit5", tmp_path / "out").modalities["front"].array
    assert ((front < 250).mean((1, 2, 3, 4)) > 0.05).all()


# ---- lists and folders as they occur -------------------------------------------------------------
def leave_system_files(folder):
    for name in ("._frame1.jpg", "._frame000001.JPG", ".DS_Store", "Thumbs.db", "desktop.ini",
                 "__MACOSX/frame2.jpg", "._1001_IEO_NEU_XX.wav", "._1001_IEO_NEU_XX.flv",
                 "._video_0.mp4", "._v_Biking_g01_c01.avi"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")


def cremad_files(root):
    raw.cremad(root, actors=(1001, 1003, 1005), empty=True)


def ave_files(root):
    raw.ave(root, empty=True)


def ucf_files(root):
    raw.ucf_videos(root, empty=True)


@pytest.mark.parametrize("module,make", [(cremad, cremad_files), (ave, ave_files),
                                         (ucf101, raw.ucf_pictures)])
def test_what_other_systems_leave_behind_is_no_data(module, make, tmp_path):
    make(tmp_path)
    before = module.index(tmp_path, FLOW)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()] + [tmp_path]:
        leave_system_files(folder)
    assert module.index(tmp_path, FLOW) == before


@pytest.mark.parametrize("change", [
    {"change": lambda text: "id,emotion\n" + text},
    {"change": lambda text: text.replace(",", ";").replace("\n", "\r\n")},
    {"change": lambda text: '"File"\n' + re.sub(r"(\w+),(\w+)", r'"\1", "\2"', text)},
    {"change": lambda text: re.sub(r"(\w+),(\w+)", r"AudioWAV/\1.wav,\2", text)},
    {"encoding": "utf-16"}, {"encoding": "utf-8-sig"}])
def test_lists_as_spreadsheets_and_other_systems_write_them(change, tmp_path):
    cremad_files(tmp_path)
    before = cremad.index(tmp_path, {}).splits
    rewrite(tmp_path / "train.csv", **change)
    assert cremad.index(tmp_path, {}).splits == before


def test_lists_of_ave_and_ucf101_in_other_spellings(tmp_path):
    ave_files(tmp_path / "ave")
    raw.ucf_pictures(tmp_path / "ucf")
    before = ave.index(tmp_path / "ave", {}), ucf101.index(tmp_path / "ucf", FLOW)
    rewrite(tmp_path / "ave/trainSet.txt", lambda text: text.replace("&", ";"), "utf-16")
    rewrite(tmp_path / "ave/testSet.txt", lambda text: re.sub("([^&\n]+)", r'"\1"', text))
    lists = tmp_path / "ucf/ucfTrainTestlist"
    rewrite(lists / "trainlist01.txt", lambda text: "path label\n" + text.replace(" ", ";"))
    rewrite(lists / "classInd.txt", lambda text: text.replace(" ", ","), "utf-16")
    assert (ave.index(tmp_path / "ave", {}), ucf101.index(tmp_path / "ucf", FLOW)) == before


def deeper(name):
    def change(root):
        (root / name).rename(root / "moved")
        (root / name).mkdir()
        (root / "moved").rename(root / name / name)
    return change


def renamed(pattern, name):
    def change(root):
        for path in sorted(root.glob(pattern)):
            path.rename(path.with_name(name(path)))
    return change


def upper(path):
    return path.stem + path.suffix.upper()


@pytest.mark.parametrize("module,make,changes", [
    (cremad, cremad_files, [deeper("AudioWAV")]),
    (cremad, cremad_files, [renamed("AudioWAV", lambda path: "audiowav")]),
    (cremad, cremad_files, [renamed("AudioWAV/*", upper)]),
    (ave, ave_files, [deeper("AVE")]),
    (ave, ave_files, [renamed("AVE", lambda path: "videos")]),
    (ave, ave_files, [renamed("AVE/*", upper)]),
    (ucf101, ucf_files, [deeper("UCF-101")]),
    (ucf101, ucf_files, [renamed("UCF-101", lambda path: "UCF101")]),
    (ucf101, ucf_files, [renamed("UCF-101/*/*", upper)]),
    (ucf101, ucf_files, [renamed("UCF-101/*", lambda path: path.name.lower())]),
    (ucf101, ucf_files, [deeper("ucfTrainTestlist")]),
    (ucf101, raw.ucf_pictures, [deeper("jpegs_256"), deeper("tvl1_flow")]),
])
def test_layouts_that_occur(module, make, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(ucf101, "check_flow", lambda method: None)
    make(tmp_path)
    before = module.index(tmp_path, FLOW)
    for change in changes:
        change(tmp_path)
    after = module.index(tmp_path, FLOW)
    assert [item.id for item in after.items] == [item.id for item in before.items]
    assert all(os.path.exists(path) for item in after.items for path in item.files)
    assert after.splits == before.splits


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "png"])
def test_pictures_are_taken_by_their_numbers(suffix, tmp_path):
    folders = [tmp_path / name for name in ("frames", "u", "v")]
    for folder, last, more in zip(folders, (120, 119, 119), (0, 0, 100)):
        for n in range(1, last + 1):
            raw.grey(folder / f"frame{n}.{suffix}", n + more)
        leave_system_files(folder)
    rgb, flow, size = ucf101.from_pictures(Item("a", 0, "g", [str(f) for f in folders]))
    assert abs(rgb.mean() - 61) < 1 and size == (26, 34)
    assert np.abs(flow.mean((2, 3)) - np.arange(56, 66)[:, None] - [0, 100]).max() < 1.5


def test_frames_and_flow_in_one_folder(tmp_path):
    for name, last, more in (("img", 40, 0), ("flow_y", 39, 0), ("flow_x", 39, 100)):
        for n in range(1, last + 1):
            raw.grey(tmp_path / f"a/{name}_{n:05d}.jpg", n + more)
    rgb, flow, _ = ucf101.from_pictures(Item("a", 0, "g", [str(tmp_path / "a")] * 2))
    assert abs(rgb.mean() - 21) < 1
    assert np.abs(flow.mean((2, 3)) - np.arange(16, 26)[:, None] - [100, 0]).max() < 1.5


# ---- what is wrong is said before anything is decoded --------------------------------------------
def text(name, content):
    def change(root):
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def again(name, line):
    def change(root):
        with open(root / f"ucfTrainTestlist/{name}list01.txt", "a") as file:
            file.write(line)
    return change


def sound_in_a_and_b(root):
    shutil.copytree(root / "AudioWAV", root / "a/AudioWAV")
    (root / "b").mkdir()
    (root / "AudioWAV").rename(root / "b/AudioWAV")


SKIP, BIKE = ["--skip-bad"], "Biking/v_Biking_g02_c01.avi"
LAMP = "modelnet40, split official: class 'lamp' has no train items"
BARK = "split official: class 'bark' has no train items: is it miss"
TWICE = "stands in another list too"


def no_lamp(root):
    shutil.rmtree(root / "ModelNet40/lamp/train")


def small_bark(root):
    rewrite(root / "testSet.txt", lambda text: text.replace("Bark", "bark"))


WRONG = [       # dataset, how it is made, what is changed, flags, what is said
    ("ave", ave_files, lambda r: (r / "valSet.txt").unlink(), [], "valSet.txt is missing"),
    ("ave", ave_files, text("valSet.txt", "Bark;video_1\n"), [], "is not Category&VideoID"),
    ("ave", ave_files, lambda r: (r / "AVE/video_3.mp4").unlink(), [],
     "1 files of ave are missing"),
    ("ave", ave_files, lambda r: shutil.rmtree(r / "AVE"), [], "8 files of ave are missing"),
    *(("ave", ave_files, small_bark, flags, BARK) for flags in ([], SKIP)),
    *(("modelnet40", raw.modelnet, no_lamp, flags, LAMP) for flags in ([], SKIP)),
    ("modelnet40", raw.modelnet, str, ["--limit", "0"], "--limit cannot be 0"),
    ("modelnet40", raw.modelnet, str, ["--flow", "dis"], "--flow is for ucf101"),
    ("cremad", cremad_files, text("test.csv", "1001_IEO_HAP_XX,x\n"), SKIP,
     f"test.csv: '1001_IEO_HAP_XX' {TWICE}"),
    ("ave", ave_files, text("testSet.txt", "Bark&video_1&good&1&9\n"), SKIP,
     f"testSet.txt: 'video_1 1-9 Bark' {TWICE}"),
    ("ucf101", raw.ucf_pictures, again("test", f"{BIKE}\n"), SKIP,
     f"testlist01.txt: 'v_Biking_g02_c01' {TWICE}"),
    ("ucf101", raw.ucf_pictures, again("train", f"{BIKE} 1\n"), SKIP,
     "5 items, 'v_Biking_g02_c01' comes more than once"),
    ("modelnet40", raw.modelnet, lambda r: raw.off(r / "ModelNet40/bed/train/two\nlines.off"), SKIP,
     "must be one line of text, not 'bed/train/two"),
    ("cremad", cremad_files, text("train.csv", "1001_IEO_NEU_XX,NEU\n²_IEO_NEU_XX,x\n"), [],
     "_IEO_NEU_XX"),
    ("cremad", cremad_files, text("train.csv", "1001_IEO_XXX_XX,x\n"), [], "1001_IEO_XXX_XX"),
    ("cremad", cremad_files, text("train.csv", b"\xff\xfe"), [], "train.csv"),
    ("ave", ave_files, text("trainSet.txt", "Bark&video_1&good&²&5\n"), [], "trainSet.txt"),
    ("ave", ave_files, text("trainSet.txt", "Bark&video_1&good&0\n"), [], "trainSet.txt"),
    ("ucf101", raw.ucf_pictures, text("ucfTrainTestlist/classInd.txt", "Biking\n"), [], "classInd"),
    ("ucf101", raw.ucf_pictures, text("ucfTrainTestlist/trainlist01.txt", "Biking\n"), [],
     "trainlist01.txt"),
    ("cremad", cremad_files, lambda r: shutil.copytree(r / "AudioWAV", r / "AudioWAV/AudioWAV"), [],
     "AudioWAV/AudioWAV/1001_IEO_ANG_XX.wav have one name"),
    ("cremad", cremad_files, lambda r: shutil.rmtree(r / "AudioWAV"), [],
     "holds none of the folders AudioWAV"),
    ("cremad", cremad_files, sound_in_a_and_b, [], "raw/a/AudioWAV and "),
    ("modelnet40", lambda r: raw.views(r, range(1, 25)), str, [],
     "has views 1 to 24, not 1 to 12"),
    ("modelnet40", lambda r: raw.views(r, range(20)), str, [],
     "has views 0 to 19, not 0 to 11: only of 12"),
    *(("modelnet40", raw.views, lambda r, more=numbers: raw.views(r, more, "bed_0002"), [], message)
      for numbers, message in ((range(1, 21), "bed/train/bed_0002 has views 1 to 20"),
                               (range(12), "bed_0001 has views 1 to 12, not 0 to 11"))),
    ("modelnet40", raw.views, lambda r: raw.views(r, style="whiteshaded"), [],
     "are the same of one object"),
    ("modelnet40", raw.views, lambda r: raw.off(r / "bed/train/bed_0002.off"), [],
     "holds 1 meshes and the rendered views of 1 objects"),
    ("modelnet40", raw.modelnet, lambda r: raw.off(r / "ModelNet40/bed/train/bed_0000.OFF"), [],
     "are the same of one object"),
]


@pytest.mark.parametrize("name,make,change,flags,message", WRONG)
def test_what_is_wrong_is_said_in_a_line(name, make, change, flags, message, tmp_path, expect,
                                         capsys):
    expect(MODULES[name])
    make(tmp_path / "raw")
    change(tmp_path / "raw")
    prepared(name, tmp_path, *flags, code=2)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_counts_and_classes_are_asserted(tmp_path, expect, capsys):
    assert prepare.CLASSES == {"cremad": 6, "ave": 28, "ucf101": 101, "modelnet40": 40,
                               "avmnist": 10, "avletters": 26}
    raw.modelnet(tmp_path / "raw", n=3)
    prepared("modelnet40", tmp_path, code=2)
    assert "9843 train, 0 val and 2468 test items, found 4, 0 and 2" in capsys.readouterr().err
    expect(modelnet40, official=(4, 0, 2))
    prepared("modelnet40", tmp_path, "--skip-bad", code=2)
    assert "modelnet40 has 40 classes, found 2: bed, lamp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_room_on_the_disk(tmp_path, expect, monkeypatch, capsys):
    raw.modelnet(tmp_path / "raw", n=3)
    expect(modelnet40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    prepared("modelnet40", tmp_path, code=2)
    assert "no room: the arrays take 0.0 GB" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


# ---- items that cannot be used -------------------------------------------------------------------
@pytest.mark.parametrize("change,reason", [
    (lambda f, u, v: [(f / f"frame{n}.jpg").unlink() for n in range(31, 121)],
     "u: holds flow of 119 frames, .*frames 30 frames: one of them is not complete"),
    (lambda f, u, v: (f / "frame77.jpg").unlink(), "frames: holds 119 pictures frame.*number 77"),
    (lambda f, u, v: [(f / f"frame{n}.jpg").unlink() for n in range(1, 31)], "none with number 1"),
    (lambda f, u, v: (u / "frame119.jpg").rename(u / "frame0.jpg"),
     "119 pictures of u and 119 of v: number 0 has but one"),
    (lambda f, u, v: (u / "frame119.jpg").unlink(),
     "118 pictures of u and 119 of v: number 119 has but one"),
    (lambda f, u, v: (f / "frame0077.jpg").touch(), "frame0077.jpg and frame77.jpg"),
    (lambda f, u, v: (f / "frame7.png").touch(), "twice: frame7.jpg and frame7.png"),
    (lambda f, u, v: (f / "cover.jpg").touch(), "a picture without a number, cover.jpg"),
    (lambda f, u, v: (f / "thumb1.jpg").touch(), "it holds 120 frame.*, 1 thumb"),
    (lambda f, u, v: shutil.rmtree(v), "v: is missing"),
    (lambda f, u, v: [path.unlink() for path in f.iterdir()], "frames: holds no pictures"),
])
def test_a_clip_of_pictures_that_is_not_whole_is_named(change, reason, tmp_path):
    folders = [tmp_path / name for name in ("frames", "u", "v")]
    for folder, last in zip(folders, (120, 119, 119)):
        for n in range(1, last + 1):
            raw.touch(folder / f"frame{n}.jpg")
    change(*folders)
    with pytest.raises(BadFile, match=reason):
        ucf101.from_pictures(Item("a", 0, "g", [str(folder) for folder in folders]))


def decoded(module, files, reason, **detail):
    """Named with the reason, if there is one."""
    with contextlib.nullcontext() if reason is None else pytest.raises(BadFile, match=reason):
        module.decode(Item("a", 0, "g", [str(path) for path in files], detail), {})


def test_sound_and_picture_of_a_cremad_clip_are_compared(tmp_path):
    wav, long = (raw.wav(tmp_path / f"{seconds}.wav", raw.tone(seconds, 16_000), 16_000)
                 for seconds in (1.2, 61))
    for seconds, reason in ((1.0, None), (4.0, "lasts 4.0 s, its sound .*1.2.wav 1.2 s"),
                            (61, "a.flv: lasts longer than 10 s")):
        flv = raw.media(tmp_path / "a.flv", seconds, fps=10, video="flv1")
        decoded(cremad, [wav, flv], reason)
    decoded(cremad, [long, flv], "61.wav: lasts longer than 10 s")


@pytest.mark.parametrize("seconds,sound,event,reason", [
    (10, 0.5, (0, 10), r"has only 0\.\d+ s of sound in the 10.000 s from 0 s on"),
    (10, 9.5, (9, 10), "s of sound in the 1.000 s from 9 s on"), (10, 9.9, (8, 10), None),
    (9.9, 10, (8, 10), None),
    (8, 10, (6, 10), "has only 2.000 s of picture in the 4.000 s from 6 s on"),
    (40, 40, (0, 10), "lasts longer than 12 s"), (11.1, 11.1, (0, 10), None),
])
def test_an_event_has_its_sound_and_its_picture(seconds, sound, event, reason, tmp_path):
    path = raw.media(tmp_path / "a.mp4", seconds, 10, audio="aac", sound=raw.tone(sound, 44_100))
    decoded(ave, [path], reason, start=event[0], stop=event[1])


def test_bad_files_are_listed_at_the_end_and_skipped_on_demand(tmp_path, expect, capsys):
    raw.modelnet(tmp_path / "raw")
    expect(modelnet40)
    bed, lamp = (tmp_path / f"raw/ModelNet40/{name}.off"
                 for name in ("bed/train/bed_0000", "lamp/test/lamp_0002"))
    whole = bed.read_text()
    bed.write_text("version https://git-lfs.github.com/spec/v1\n")
    lamp.write_text(lamp.read_text()[:150])
    prepared("modelnet40", tmp_path, code=2)
    error = capsys.readouterr().err
    assert "2 of 12 items cannot be used" in error
    assert f"{bed}: is a Git LFS pointer" in error and f"{lamp}: is cut off" in error
    assert not (tmp_path / "out/modelnet40").exists()
    bed.write_text(whole)                       # mended: everything else is not done again
    folder = prepared("modelnet40", tmp_path, "--skip-bad")
    captured = capsys.readouterr()
    assert "going on in" in captured.out and "11 items" in captured.out
    assert "2/2 items" in captured.err
    ds, meta = open_dataset(folder, val=0), store.read_meta(folder)
    used = [ds.ids[i] for part in ("train", "test") for i in ds.indices(part)]
    assert len(used) == 11 and "lamp/test/lamp_0002" not in used
    assert list(meta["skipped"]) == ["lamp/test/lamp_0002"]
    assert meta["splits"]["official"]["test"] == 3
    info.describe(folder)
    assert "skipped: 1 items" in capsys.readouterr().out

    for path in (tmp_path / "raw/ModelNet40/lamp/train").iterdir():
        path.write_text("nonsense")             # a class loses all its train items
    shutil.rmtree(tmp_path / "out")
    prepared("modelnet40", tmp_path, "--skip-bad", code=2)
    assert "class 'lamp' has no train items" in capsys.readouterr().err


def test_a_missing_file_is_left_out_with_skip_bad(tmp_path, expect):
    raw.ave(tmp_path / "raw", n=7)
    expect(ave)
    (tmp_path / "raw/AVE/video_1.mp4").unlink()
    raw.media(tmp_path / "raw/AVE/video_2.mp4", 4, fps=5, audio="aac")
    skipped = store.read_meta(prepared("ave", tmp_path, "--skip-bad"))["skipped"]
    assert [reason.split(": ")[1] for reason in skipped.values()] == [
        "is missing", "has only 2.000 s of picture in the 6.000 s from 2 s on"]


def test_skip_bad_accounts_for_every_item(tmp_path, expect, capsys):
    ids = raw.cremad(tmp_path / "raw")
    expect(cremad, **CREMAD)
    raw.wav(tmp_path / f"raw/AudioWAV/{ids[1]}.wav", 0 * raw.tone(1, 16_000), 16_000)
    for file in (f"AudioWAV/{ids[2]}.wav", f"VideoFlash/{ids[2]}.flv"):
        (tmp_path / "raw" / file).unlink()
    left_out = f"left out: {ids[1]}, {ids[2]}\n"
    meta = store.read_meta(prepared("cremad", tmp_path, "--skip-bad"))
    assert left_out in capsys.readouterr().out and sorted(meta["skipped"]) == ids[1:3]
    assert meta["expected"]["official"] == {"train": 18, "val": 0, "test": 6}
    assert meta["splits"]["official"] == {"train": 16, "val": 0, "test": 6}
    assert meta["thresholds"]["QUIET"] == 2e-4 and meta["thresholds"]["APART"] == 0.5
    shutil.rmtree(tmp_path / "out")
    rewrite(tmp_path / "raw/train.csv", lambda text: re.sub(rf"{ids[2]},\w+\n", "", text))
    prepared("cremad", tmp_path, "--skip-bad", code=2)
    assert "18 train, 0 val and 6 test items, found 17, 0 and 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "raw/test.csv").unlink()
    prepared("cremad", tmp_path, "--skip-bad", code=2)                          # the split `clean`
    assert "found 11, 6 and 6" in capsys.readouterr().err
    (tmp_path / "raw/SentenceFilenames.csv").write_text('"Stimulus_Number","Filename"\n' + "".join(
        f'{n},"{name}"\n' for n, name in enumerate(ids)))
    prepared("cremad", tmp_path, "--skip-bad")                                  # now it is known
    assert left_out in capsys.readouterr().out


# ---- a run that ends early -----------------------------------------------------------------------
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, expect):
    raw.modelnet(tmp_path / "raw", n=24)
    process = subprocess.Popen(**odd_decoder(tmp_path, "time.sleep(0.05)", 2),
                               stderr=subprocess.DEVNULL)
    state = tmp_path / "out/modelnet40.partial/state.npy"
    while not state.exists() or (np.load(state) == prepare.DONE).sum() < 8:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/modelnet40").exists()
    assert 8 <= (np.load(state) == prepare.DONE).sum() < 48
    expect(modelnet40)
    killed = digests(prepared("modelnet40", tmp_path))
    shutil.rmtree(tmp_path / "out")
    assert digests(prepared("modelnet40", tmp_path)) == killed and "state.npy" not in killed


def test_other_options_do_not_delete_what_is_begun(tmp_path, expect, capsys):
    raw.modelnet(tmp_path / "raw", n=3)
    expect(modelnet40)
    bad = tmp_path / "raw/ModelNet40/bed/train/bed_0000.off"
    whole = bad.read_text()
    bad.write_text("nonsense")
    prepared("modelnet40", tmp_path, code=2)
    bad.write_text(whole)
    os.symlink(tmp_path / "raw", tmp_path / "elsewhere")        # the same files by another path
    prepared("modelnet40", tmp_path, "--raw", str(tmp_path / "elsewhere")).rename(tmp_path / "done")
    assert "going on in" in capsys.readouterr().out
    bad.write_text("nonsense")
    prepared("modelnet40", tmp_path, code=2)
    bad.unlink()
    prepared("modelnet40", tmp_path, code=2)
    assert "was begun with other files or options" in capsys.readouterr().err


def test_a_decoder_that_breaks_one_that_hangs_and_a_worker_that_dies_lose_nothing(tmp_path):
    raw.modelnet(tmp_path / "raw")
    breaks = "if item.id.endswith('bed_0001'): raise ZeroDivisionError('odd')"
    hangs = ("if item.id.endswith('lamp_0004'): ctypes.PyDLL(None).sleep(9999)",
             "if item.id.endswith('lamp_0003'): os._exit(1)")
    ended = [subprocess.run(**odd_decoder(tmp_path, f"{breaks}\n    {last}", 1, limit=5),
                            capture_output=True) for last in reversed(hangs)]
    assert all(run.returncode == 2 and "Traceback" not in run.stderr for run in ended)
    assert "a worker process was ended from outside" in ended[0].stderr
    assert "going on in" in ended[1].stdout
    for line in ("2 of 12 items cannot be used", "bed_0001.off: ZeroDivisionError: odd",
                 "lamp_0004.off: is still not decoded after 5 s"):
        assert line in ended[1].stderr
