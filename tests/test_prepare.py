"""From raw files to prepared folders: each dataset in each of its layouts, its splits, and everything that goes wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import raw
from conftest import REAL

import joint_baseline
from data import DataError, ave, avmnist, cremad, info, modelnet40, open_dataset, prepare, store, ucf101
from data.media import BadFile
from data.prepare import Item

ROOT = Path(__file__).parent.parent


def run(name, folder, *flags, code=0):
    """The command as a user types it; returns what it printed."""
    with pytest.raises(SystemExit) if code else open(os.devnull) as stop:
        prepare.main([name, "--raw", str(folder / "raw"), "--data-dir", str(folder / "out"), "--workers", "1", *flags])
    assert not code or stop.value.code == code


def test_cremad(tmp_path, monkeypatch, capsys):
    ids = raw.cremad(tmp_path / "raw")
    monkeypatch.setattr(cremad, "EXPECTED", {"official": (18, 0, 6), "clean": (12, 6, 6)})
    run("cremad", tmp_path)
    ds = open_dataset("cremad", tmp_path / "out", split="clean")
    assert ds.classes == ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"] and ds.ids == sorted(ids)
    assert [ds.classes[label] for label in ds.labels] == [item.split("_")[2] for item in ds.ids]
    actors = {part: {ds.ids[i][:4] for i in ds.indices(part)} for part in ("train", "val", "test")}
    assert actors == {"train": {"1001", "1006"}, "val": {"1003"}, "test": {"1005"}}
    audio, rgb = ds.modalities["audio"], ds.modalities["rgb"]
    assert audio.array.shape == (24, 48_000) and rgb.array.shape == (24, 3, 3, 256, 256) and rgb.size == (224, 224)
    np.testing.assert_array_equal(audio.array[0, :10], audio.array[0, 19_200:19_210])       # 1.2 s, repeated
    assert (np.diff(rgb.array[0].mean((1, 2, 3))) > 60).all() and rgb.frame[0].tolist() == [48, 64]
    meta = json.loads((tmp_path / "out/cremad/meta.json").read_text())
    assert meta["lists"]["train.csv"] == store.sha256(tmp_path / "raw/train.csv") and meta["skipped"] == {}
    result = joint_baseline.main(["--dataset", "cremad", "--data-dir", str(tmp_path / "out"), "--val", "0", "--epochs", "1",
                                  "--modality", "audio", "--batch-size", "18", "--out", str(tmp_path)])
    assert (result["n_train"], result["n_test"], result["recipe"]["lr"]) == (18, 6, 1e-3)

    capsys.readouterr()
    info.main(["cremad", "--data-dir", str(tmp_path / "out"), "--sheet", str(tmp_path / "sheet.png")])
    printed = capsys.readouterr().out
    assert "split official: 18 train, 6 test" in printed and "in both train and test: 4" in printed      # actors
    assert "split clean: 12 train, 6 val, 6 test" in printed and "in both train and test: 0" in printed
    assert "  test: 1005" in printed
    from PIL import Image
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (5 * 128, 8 * 146 + 18) and len(sheet.getcolors(99_999)) > 50


def test_cremad_without_lists_makes_the_clean_split_alone_and_says_so(tmp_path, monkeypatch, capsys):
    raw.cremad(tmp_path / "raw")
    (tmp_path / "raw/train.csv").unlink()
    monkeypatch.setattr(cremad, "EXPECTED", {"clean": (12, 6, 6)})
    run("cremad", tmp_path)
    assert "only the split `clean` is made" in capsys.readouterr().out
    assert open_dataset("cremad", tmp_path / "out").split == "clean"


def test_ave(tmp_path, monkeypatch, capsys):
    raw.ave(tmp_path / "raw")
    monkeypatch.setattr(ave, "EXPECTED", {"official": (6, 1, 2)})
    monkeypatch.setitem(prepare.CLASSES, "ave", 2)
    run("ave", tmp_path)
    ds = open_dataset("ave", tmp_path / "out")
    assert ds.classes == ["Bark", "Church bell"] and [len(ds.indices(p)) for p in ("train", "val", "test")] == [6, 1, 2]
    clean = open_dataset("ave", tmp_path / "out", split="clean")
    assert len(clean.indices("train")) == 5 and not any("video_0" in clean.ids[i] for i in clean.indices("train"))
    assert ds.modalities["audio"].array.shape[1] == 160_000 and ds.modalities["audio"].standardize
    grey = ds.modalities["rgb"].array.mean((2, 3, 4))
    for item, name in enumerate(ds.ids):
        start, stop = map(int, name.split()[1].split("-"))
        middles = start + (np.arange(4) + 0.5) * (stop - start) / 4
        assert np.abs(grey[item] - middles * 25).max() < 8, name       # 25 grey levels a second
    info.describe(tmp_path / "out/ave")
    assert "in both train and test: 1 (video_0)" in capsys.readouterr().out


@pytest.mark.parametrize("change,message", [
    (lambda r: (r / "valSet.txt").unlink(), "valSet.txt is missing"),
    (lambda r: (r / "valSet.txt").write_text("Bark;video_1\n"), "is not Category&VideoID"),
    (lambda r: (r / "AVE/video_3.mp4").unlink(), "1 files of ave are missing"),
    (lambda r: shutil.rmtree(r / "AVE"), "4 files of ave are missing"),
])
def test_a_half_download_is_said_before_anything_is_decoded(change, message, tmp_path, monkeypatch, capsys):
    raw.ave(tmp_path / "raw", n=4)
    monkeypatch.setattr(ave, "EXPECTED", {})
    change(tmp_path / "raw")
    run("ave", tmp_path, code=2)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_number_of_classes_is_asserted(tmp_path, monkeypatch, capsys):
    assert prepare.CLASSES == {"cremad": 6, "ave": 28, "ucf101": 101, "modelnet40": 40, "avmnist": 10,
                               "avletters": 26}
    raw.modelnet(tmp_path / "raw")
    monkeypatch.setattr(modelnet40, "EXPECTED", {"official": (8, 0, 4)})
    run("modelnet40", tmp_path, "--skip-bad", code=2)
    assert "modelnet40 has 40 classes, here are 2: bed, lamp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--skip-bad",)])
def test_a_class_that_train_does_not_have_is_named(flags, tmp_path, monkeypatch, capsys):
    raw.ave(tmp_path / "raw", n=4)
    monkeypatch.setattr(ave, "EXPECTED", {})
    test = tmp_path / "raw/testSet.txt"
    test.write_text(test.read_text().replace("Bark", "bark"))
    run("ave", tmp_path, *flags, code=2)
    assert "split official: class 'bark' has no train items: is it miss" in capsys.readouterr().err
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    raw.modelnet(tmp_path / "raw", n=3)
    shutil.rmtree(tmp_path / "raw/ModelNet40/lamp/train")
    run("modelnet40", tmp_path, *flags, code=2)
    assert "modelnet40, split official: class 'lamp' has no train items" in capsys.readouterr().err


def test_a_class_whose_train_items_all_are_bad_is_named(tmp_path, monkeypatch, capsys):
    raw.modelnet(tmp_path / "raw", n=3)
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    for path in (tmp_path / "raw/ModelNet40/lamp/train").iterdir():
        path.write_text("nonsense")
    run("modelnet40", tmp_path, "--skip-bad", code=2)
    assert "class 'lamp' has no train items" in capsys.readouterr().err


def test_counts_are_asserted(tmp_path, capsys):
    raw.modelnet(tmp_path / "raw", n=3)
    run("modelnet40", tmp_path, code=2)
    assert "has 9843 train, 0 val and 2468 test items, here are 4, 0 and 2" in capsys.readouterr().err


def test_ucf101_from_videos(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="flow from video needs opencv-contrib-python-headless")
    raw.ucf_videos(tmp_path / "raw")
    monkeypatch.setattr(ucf101, "EXPECTED", {"official": (2, 0, 2)})
    monkeypatch.setitem(prepare.CLASSES, "ucf101", 2)
    methods = ["dis"] + ["tvl1"] * hasattr(cv2, "optflow")
    for method in methods:
        run("ucf101", tmp_path, "--flow", method)
        ds = open_dataset("ucf101", tmp_path / "out")
        name = {"tvl1": "flow", "dis": "flow_dis"}[method]
        assert list(ds.modalities) == [name, "rgb"] and ds.ids == sorted(raw.UCF)
        flow = (ds.modalities[name].array[0].astype(float) - 127.5) * 40 / 255
        u, v = np.median(flow[:, 0, 64:192, 64:192]), np.median(flow[:, 1, 64:192, 64:192])
        assert abs(u - 2) < 0.5 and abs(v) < 0.3                   # the texture moves 2 pixels to the right
        assert [ds.classes[ds.labels[i]] for i in ds.indices("train")] == ["Biking", "Skiing"]
        shutil.rmtree(tmp_path / "out/ucf101")


def test_flow_from_video_names_the_package_it_needs(tmp_path, monkeypatch, capsys):
    raw.ucf_videos(tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "cv2", None)
    run("ucf101", tmp_path, code=2)
    assert "pip install opencv-contrib-python-headless" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["u,v", "x,y", "flow_x"])
def test_ucf101_from_published_pictures(layout, tmp_path, monkeypatch, capsys):
    raw.ucf_pictures(tmp_path / "raw", layout)
    monkeypatch.setattr(ucf101, "EXPECTED", {"official": (2, 0, 2)})
    monkeypatch.setitem(prepare.CLASSES, "ucf101", 2)
    run("ucf101", tmp_path)
    ds = open_dataset("ucf101", tmp_path / "out", split="clean")
    flow, rgb = ds.modalities["flow"].array, ds.modalities["rgb"]
    assert rgb.frame[0].tolist() == [26, 34] and abs(rgb.array[0].mean() - 70) < 2             # frame 7 of 12
    assert np.abs(flow[0, :, 0].mean((1, 2)) - np.arange(102, 112)).max() < 2                   # ten from the second on
    assert np.abs(flow[0, :, 1].mean((1, 2)) - np.arange(152, 162)).max() < 2
    run("ucf101", tmp_path, "--flow", "dis", code=2)
    assert "ucf101 is prepared already" in capsys.readouterr().err


def test_modelnet40_from_meshes_and_from_pictures(tmp_path, monkeypatch):
    raw.modelnet(tmp_path / "raw")
    monkeypatch.setattr(modelnet40, "EXPECTED", {"official": (8, 0, 4)})
    monkeypatch.setitem(prepare.CLASSES, "modelnet40", 2)
    run("modelnet40", tmp_path)
    ds = open_dataset("modelnet40", tmp_path / "out")
    assert ds.classes == ["bed", "lamp"] and ds.modalities["front"].array.shape == (12, 1, 1, 256, 256)
    front = ds.modalities["front"].array
    shutil.rmtree(tmp_path / "raw")
    from PIL import Image
    for item, name in enumerate(ds.ids):
        for view in range(12):
            path = tmp_path / f"raw/{name}.obj.shaded_v{view + 1:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = {0: front[item, 0, 0], 6: ds.modalities["rear"].array[item, 0, 0]}.get(view, np.zeros((4, 4), np.uint8))
            Image.fromarray(array).save(path)
    shutil.move(tmp_path / "out/modelnet40", tmp_path / "meshes")
    run("modelnet40", tmp_path)
    again = open_dataset("modelnet40", tmp_path / "out")
    assert again.ids == ds.ids
    for view, side in (("view1", "front"), ("view7", "rear")):
        rendered = np.load(tmp_path / f"meshes/{side}.npy")
        np.testing.assert_array_equal(again.modalities[view].array, rendered)


@pytest.mark.parametrize("zipped", [True, False])
def test_avmnist(zipped, tmp_path, monkeypatch):
    raw.avmnist(tmp_path / "raw", zipped=zipped)
    monkeypatch.setattr(avmnist, "EXPECTED", {"full": (60, 0, 50), "small": (40, 0, 50)})
    run("avmnist", tmp_path)
    ds = open_dataset("avmnist", tmp_path / "out", val=0)
    assert ds.split == "full" and len(ds.indices("train")) == 60
    assert len(open_dataset("avmnist", tmp_path / "out", "small", val=0).indices("train")) == 40
    image = ds.modalities["image"].array
    np.testing.assert_array_equal(image[:, 0, 0, 5, 5], ds.labels * 20)        # paired by class
    sound = ds.modalities["audio"].array                                        # a tone of 200 + 100 * digit Hz, 0.3 s
    loudest = sound[:, 0, :, 4:16].astype(float).mean(2).argmax(1)
    assert sound.shape == (110, 1, 32, 32) and (np.diff(loudest[np.argsort(ds.labels, kind="stable")]) >= 0).all()
    mel = 2595 * np.log10(1 + (200 + 100 * ds.labels) / 700)                    # triangles evenly spaced up to 4 kHz
    assert np.abs(loudest + 1 - mel / (2595 * np.log10(1 + 4000 / 700)) * 33).max() <= 1
    assert (sound[:, 0, :, 22:].max((1, 2)) < 0).all()                          # then silence
    one = (tmp_path / "out/avmnist/meta.json").read_text()
    shutil.rmtree(tmp_path / "out")
    run("avmnist", tmp_path)
    assert (tmp_path / "out/avmnist/meta.json").read_text() == one              # the pairing is fixed


def test_bad_files_are_listed_at_the_end_and_skipped_on_demand(tmp_path, monkeypatch, capsys):
    raw.modelnet(tmp_path / "raw")
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    bed, lamp = (tmp_path / f"raw/ModelNet40/{name}" for name in ("bed/train/bed_0000.off", "lamp/test/lamp_0002.off"))
    whole = bed.read_text()
    bed.write_text("version https://git-lfs.github.com/spec/v1\n")
    lamp.write_text(lamp.read_text()[:150])
    run("modelnet40", tmp_path, code=2)
    error = capsys.readouterr().err
    assert "2 of 12 items cannot be used" in error and f"{bed}: is a Git LFS pointer" in error and f"{lamp}: is cut off" in error
    assert not (tmp_path / "out/modelnet40").exists()
    bed.write_text(whole)                                       # one is mended: everything else is not done again
    run("modelnet40", tmp_path, "--skip-bad")
    captured = capsys.readouterr()
    assert "going on in" in captured.out and "11 items" in captured.out and "2/2 items" in captured.err
    ds = open_dataset("modelnet40", tmp_path / "out", val=0)
    assert "lamp/test/lamp_0002" not in [ds.ids[i] for part in ("train", "test") for i in ds.indices(part)]
    assert len(ds.indices("train")) + len(ds.indices("test")) == 11
    meta = json.loads((tmp_path / "out/modelnet40/meta.json").read_text())
    assert list(meta["skipped"]) == ["lamp/test/lamp_0002"] and meta["splits"]["official"]["test"] == 3
    info.describe(tmp_path / "out/modelnet40")
    assert "skipped: 1 items" in capsys.readouterr().out


def test_a_missing_file_is_left_out_with_skip_bad(tmp_path, monkeypatch):
    raw.ave(tmp_path / "raw", n=7)
    monkeypatch.setattr(ave, "EXPECTED", {})
    (tmp_path / "raw/AVE/video_1.mp4").unlink()
    raw.media(tmp_path / "raw/AVE/video_2.mp4", 4, fps=5, audio="aac")
    run("ave", tmp_path, "--skip-bad")
    skipped = json.loads((tmp_path / "out/ave/meta.json").read_text())["skipped"]
    assert [reason.split(": ")[1] for reason in skipped.values()] == [
        "is missing", "has only 2.000 s of picture in the 6.000 s from 2 s on"]


def digests(folder):
    return {path.name: store.sha256(path) for path in sorted(folder.iterdir())}


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    raw.modelnet(tmp_path / "raw", n=24)
    (tmp_path / "slow.py").write_text(
        "import time, data.modelnet40 as m\nm.EXPECTED, whole = {}, m.decode\n"
        "def slow(item, options):\n    time.sleep(0.05)\n    return whole(item, options)\nm.decode = slow\n"
        "from data import prepare\nif __name__ == '__main__':\n    prepare.main()\n")
    command = [sys.executable, str(tmp_path / "slow.py"), "modelnet40", "--raw", str(tmp_path / "raw"), "--workers", "2",
               "--data-dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    state = tmp_path / "out/modelnet40.partial/state.npy"
    while not state.exists() or (np.load(state) == prepare.DONE).sum() < 8:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/modelnet40").exists() and 8 <= (np.load(state) == prepare.DONE).sum() < 48
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    run("modelnet40", tmp_path)
    killed = digests(tmp_path / "out/modelnet40")
    shutil.rmtree(tmp_path / "out")
    run("modelnet40", tmp_path)
    assert digests(tmp_path / "out/modelnet40") == killed and "state.npy" not in killed


def test_no_room_on_the_disk(tmp_path, monkeypatch, capsys):
    raw.modelnet(tmp_path / "raw", n=3)
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    run("modelnet40", tmp_path, code=2)
    assert "no room: the arrays take 0.0 GB" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_limit_makes_a_trial(tmp_path):
    raw.modelnet(tmp_path / "raw")
    run("modelnet40", tmp_path, "--limit", "6")
    ds = open_dataset("modelnet40-limit6", tmp_path / "out", val=0)
    assert ds.split == "trial" and len(ds.ids) == 6 and set(ds.labels[ds.indices("train")]) == {0, 1}      # both classes


def test_other_options_do_not_delete_what_is_begun(tmp_path, monkeypatch, capsys):
    raw.modelnet(tmp_path / "raw", n=3)
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    bad = tmp_path / "raw/ModelNet40/bed/train/bed_0000.off"
    whole = bad.read_text()
    bad.write_text("nonsense")
    run("modelnet40", tmp_path, code=2)
    bad.write_text(whole)
    os.symlink(tmp_path / "raw", tmp_path / "elsewhere")
    prepare.main(["modelnet40", "--raw", str(tmp_path / "elsewhere"), "--data-dir", str(tmp_path / "out"), "--workers", "1"])
    assert "going on in" in capsys.readouterr().out                    # the same files by another path
    shutil.move(tmp_path / "out/modelnet40", tmp_path / "done")
    bad.write_text("nonsense")
    run("modelnet40", tmp_path, code=2)
    bad.unlink()
    run("modelnet40", tmp_path, code=2)
    assert "was begun with other files or options" in capsys.readouterr().err



@pytest.mark.parametrize("flags,message", [(["--limit", "0"], "--limit cannot be 0"), (["--flow", "dis"], "--flow is for ucf101")])
def test_flags_that_make_no_sense(flags, message, tmp_path, capsys):
    run("modelnet40", tmp_path, *flags, code=2)
    assert message in capsys.readouterr().err


def clip_folder(folder, names, value=lambda n: n, suffix="jpg"):
    """Pictures of one grey each, which tells the number in their name: {format: (first, last)}."""
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for form, (first, last) in names.items():
        for n in range(first, last + 1):
            grey = value(n) + (100 if "x" in form else 0)
            Image.new("L", (34, 26), grey).save(folder / f"{form.format(n)}.{suffix}", quality=95)


def leave_system_files(folder):
    for name in ("._frame1.jpg", "._frame000001.JPG", ".DS_Store", "Thumbs.db", "desktop.ini",
                 "__MACOSX/frame2.jpg", "._1001_IEO_NEU_XX.wav", "._1001_IEO_NEU_XX.flv",
                 "._video_0.mp4", "._v_Biking_g01_c01.avi"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "png"])
def test_pictures_are_taken_by_their_numbers(suffix, tmp_path):
    frames, u, v = (tmp_path / name for name in ("frames", "u", "v"))
    clip_folder(frames, {"frame{}": (1, 120)}, suffix=suffix)
    clip_folder(u, {"frame{}": (1, 119)}, suffix=suffix)
    clip_folder(v, {"frame{}": (1, 119)}, lambda n: n + 100, suffix=suffix)
    for folder in (frames, u, v):
        leave_system_files(folder)
    rgb, flow, size = ucf101.from_pictures(Item("a", 0, "g", [str(f) for f in (frames, u, v)]))
    assert abs(rgb.mean() - 61) < 1 and size == (26, 34)
    assert np.abs(flow.mean((2, 3)) - np.arange(56, 66)[:, None] - [0, 100]).max() < 1.5


def test_frames_and_flow_in_one_folder(tmp_path):
    clip_folder(tmp_path / "a", {"img_{:05d}": (1, 40), "flow_y_{:05d}": (1, 39),
                                 "flow_x_{:05d}": (1, 39)})
    rgb, flow, _ = ucf101.from_pictures(Item("a", 0, "g", [str(tmp_path / "a")] * 2))
    assert abs(rgb.mean() - 21) < 1
    assert np.abs(flow.mean((2, 3)) - np.arange(16, 26)[:, None] - [100, 0]).max() < 1.5


@pytest.mark.parametrize("change,reason", [
    (lambda f, u, v: [(f / f"frame{n}.jpg").unlink() for n in range(31, 121)],
     "u: holds flow of 119 frames, .*frames 30 frames: one of them is not complete"),
    (lambda f, u, v: (f / "frame77.jpg").unlink(), "frames: holds 119 pictures frame.*number 77"),
    (lambda f, u, v: [(f / f"frame{n}.jpg").unlink() for n in range(1, 31)], "none with number 1"),
    (lambda f, u, v: (u / "frame119.jpg").rename(u / "frame0.jpg"),
     "119 pictures of u and 119 of v: number 0 has but one"),
    (lambda f, u, v: (u / "frame119.jpg").unlink(),
     "118 pictures of u and 119 of v: number 119 has but one"),
    (lambda f, u, v: (f / "frame0077.jpg").write_bytes(b""), "frame0077.jpg and frame77.jpg"),
    (lambda f, u, v: (f / "frame7.png").write_bytes(b""), "twice: frame7.jpg and frame7.png"),
    (lambda f, u, v: (f / "cover.jpg").write_bytes(b""), "a picture without a number, cover.jpg"),
    (lambda f, u, v: (f / "thumb1.jpg").write_bytes(b""), "it holds 120 frame.*, 1 thumb"),
    (lambda f, u, v: shutil.rmtree(v), "v: is missing"),
    (lambda f, u, v: [path.unlink() for path in f.iterdir()], "frames: holds no pictures"),
])
def test_a_clip_of_pictures_that_is_not_whole_is_named(change, reason, tmp_path):
    folders = [tmp_path / name for name in ("frames", "u", "v")]
    for folder, last in zip(folders, (120, 119, 119)):
        clip_folder(folder, {"frame{}": (1, last)})
    change(*folders)
    with pytest.raises(BadFile, match=reason):
        ucf101.from_pictures(Item("a", 0, "g", [str(folder) for folder in folders]))


def test_sound_and_picture_of_a_cremad_clip_are_compared(tmp_path):
    wav = raw.wav(tmp_path / "a.wav", raw.tone(1.2, 16_000), 16_000)
    for seconds, reason in ((1.0, None), (4.0, "lasts 4.0 s, its sound .*a.wav 1.2 s"),
                            (61, "a.flv: lasts longer than 10 s")):
        flv = raw.media(tmp_path / "a.flv", seconds, fps=10, video="flv1")
        with contextlib.nullcontext() if reason is None else pytest.raises(BadFile, match=reason):
            cremad.decode(Item("a", 0, "g", [str(wav), str(flv)]), {})
    long = raw.wav(tmp_path / "long.wav", raw.tone(61, 16_000), 16_000)
    with pytest.raises(BadFile, match="long.wav: lasts longer than 10 s"):
        cremad.decode(Item("a", 0, "g", [str(long), str(flv)]), {})


@pytest.mark.parametrize("seconds,sound,event,reason", [
    (10, 0.5, (0, 10), r"has only 0\.\d+ s of sound in the 10.000 s from 0 s on"),
    (10, 9.5, (9, 10), "s of sound in the 1.000 s from 9 s on"), (10, 9.9, (8, 10), None),
    (9.9, 10, (8, 10), None),
    (8, 10, (6, 10), "has only 2.000 s of picture in the 4.000 s from 6 s on"),
    (40, 40, (0, 10), "lasts longer than 12 s"), (11.1, 11.1, (0, 10), None),
])
def test_an_event_has_its_sound_and_its_picture(seconds, sound, event, reason, tmp_path):
    path = raw.media(tmp_path / "a.mp4", seconds, 10, audio="aac", sound=raw.tone(sound, 44_100))
    item = Item("a", 0, "a", [str(path)], {"start": event[0], "stop": event[1]})
    with contextlib.nullcontext() if reason is None else pytest.raises(BadFile, match=reason):
        ave.decode(item, {})


@pytest.mark.parametrize("module,make", [(cremad, raw.cremad), (ave, raw.ave),
                                         (ucf101, raw.ucf_pictures)])
def test_what_other_systems_leave_behind_is_no_data(module, make, tmp_path):
    make(tmp_path)
    before = module.index(tmp_path, {"flow": "tvl1"})
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()] + [tmp_path]:
        leave_system_files(folder)
    assert module.index(tmp_path, {"flow": "tvl1"}) == before


def rewrite(path, change=lambda text: text, encoding="utf-8"):
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode(encoding))


@pytest.mark.parametrize("change", [
    lambda f: rewrite(f, lambda text: "id,emotion\n" + text),
    lambda f: rewrite(f, lambda text: text.replace(",", ";").replace("\n", "\r\n")),
    lambda f: rewrite(f, lambda text: '"File"\n' + re.sub(r"(\w+),(\w+)", r'"\1", "\2"', text)),
    lambda f: rewrite(f, encoding="utf-16"), lambda f: rewrite(f, encoding="utf-8-sig"),
    lambda f: rewrite(f, lambda text: re.sub(r"(\w+),(\w+)", r"AudioWAV/\1.wav,\2", text)),
])
def test_lists_as_spreadsheets_and_other_systems_write_them(change, tmp_path):
    raw.cremad(tmp_path, actors=(1001, 1005))
    before = cremad.index(tmp_path, {}).splits
    change(tmp_path / "train.csv")
    assert cremad.index(tmp_path, {}).splits == before


def test_lists_of_ave_and_ucf101_in_other_spellings(tmp_path):
    raw.ave(tmp_path / "ave", n=4)
    raw.ucf_pictures(tmp_path / "ucf")
    before = ave.index(tmp_path / "ave", {}), ucf101.index(tmp_path / "ucf", {"flow": "tvl1"})
    rewrite(tmp_path / "ave/trainSet.txt", lambda text: text.replace("&", ";"), "utf-16")
    rewrite(tmp_path / "ave/testSet.txt", lambda text: re.sub("([^&\n]+)", r'"\1"', text))
    lists = tmp_path / "ucf/ucfTrainTestlist"
    rewrite(lists / "trainlist01.txt", lambda text: "path label\n" + text.replace(" ", ";"))
    rewrite(lists / "classInd.txt", lambda text: text.replace(" ", ","), "utf-16")
    after = ave.index(tmp_path / "ave", {}), ucf101.index(tmp_path / "ucf", {"flow": "tvl1"})
    assert after == before


def one_deeper(root, name):
    (root / name).rename(root / "moved")
    (root / name).mkdir()
    (root / "moved").rename(root / name / name)


def each(root, pattern, name):
    for path in sorted(root.glob(pattern)):
        path.rename(name(path))


@pytest.mark.parametrize("make,change", [
    (raw.cremad, lambda r: one_deeper(r, "AudioWAV")),
    (raw.cremad, lambda r: (r / "AudioWAV").rename(r / "audiowav")),
    (raw.cremad, lambda r: each(r, "AudioWAV/*", lambda p: p.with_suffix(".WAV"))),
    (raw.ave, lambda r: one_deeper(r, "AVE")),
    (raw.ave, lambda r: (r / "AVE").rename(r / "videos")),
    (raw.ave, lambda r: each(r, "AVE/*", lambda p: p.with_suffix(".MP4"))),
    (raw.ucf_videos, lambda r: one_deeper(r, "UCF-101")),
    (raw.ucf_videos, lambda r: (r / "UCF-101").rename(r / "UCF101")),
    (raw.ucf_videos, lambda r: each(r, "UCF-101/*/*", lambda p: p.with_suffix(".AVI"))),
    (raw.ucf_videos, lambda r: each(r, "UCF-101/*", lambda p: p.with_name(p.name.lower()))),
    (raw.ucf_videos, lambda r: one_deeper(r, "ucfTrainTestlist")),
    (raw.ucf_pictures, lambda r: (one_deeper(r, "jpegs_256"), one_deeper(r, "tvl1_flow"))),
])
def test_layouts_that_occur(make, change, tmp_path, monkeypatch):
    monkeypatch.setattr(ucf101, "check_flow", lambda method: None)
    module = {"cremad": cremad, "ave": ave}.get(make.__name__, ucf101)
    make(tmp_path)
    before = module.index(tmp_path, {"flow": "tvl1"})
    change(tmp_path)
    after = module.index(tmp_path, {"flow": "tvl1"})
    assert [item.id for item in after.items] == [item.id for item in before.items]
    assert all(os.path.exists(path) for item in after.items for path in item.files)
    assert after.splits == before.splits


def test_a_layout_with_two_meanings_is_said(tmp_path, capsys):
    raw.cremad(tmp_path / "raw", actors=(1001,))
    shutil.copytree(tmp_path / "raw/AudioWAV", tmp_path / "raw/AudioWAV/AudioWAV")
    run("cremad", tmp_path, code=2)
    error = capsys.readouterr().err
    assert "AudioWAV/1001_IEO_ANG_XX.wav and " in error
    assert "AudioWAV/AudioWAV/1001_IEO_ANG_XX.wav have one name" in error
    shutil.rmtree(tmp_path / "raw/AudioWAV")
    run("cremad", tmp_path, code=2)
    error = capsys.readouterr().err
    assert "holds none of the folders AudioWAV" in error and "it holds VideoFlash" in error
    shutil.copytree(tmp_path / "raw/VideoFlash", tmp_path / "raw/a/AudioWAV")
    shutil.copytree(tmp_path / "raw/VideoFlash", tmp_path / "raw/b/AudioWAV")
    run("cremad", tmp_path, code=2)
    assert "raw/a/AudioWAV and " in capsys.readouterr().err


def test_skip_bad_accounts_for_every_item(tmp_path, monkeypatch, capsys):
    ids = raw.cremad(tmp_path / "raw")
    monkeypatch.setattr(cremad, "EXPECTED", {"official": (18, 0, 6), "clean": (12, 6, 6)})
    raw.wav(tmp_path / f"raw/AudioWAV/{ids[1]}.wav", 0 * raw.tone(1, 16_000), 16_000)
    for file in (f"AudioWAV/{ids[2]}.wav", f"VideoFlash/{ids[2]}.flv"):
        (tmp_path / "raw" / file).unlink()
    run("cremad", tmp_path, "--skip-bad")
    assert f"left out: {ids[1]}, {ids[2]}\n" in capsys.readouterr().out
    meta = json.loads((tmp_path / "out/cremad/meta.json").read_text())
    assert sorted(meta["skipped"]) == ids[1:3]
    assert meta["expected"]["official"] == {"train": 18, "val": 0, "test": 6}
    assert meta["splits"]["official"] == {"train": 16, "val": 0, "test": 6}
    assert meta["thresholds"]["QUIET"] == 2e-4 and meta["thresholds"]["APART"] == 0.5
    shutil.rmtree(tmp_path / "out")
    rewrite(tmp_path / "raw/train.csv", lambda text: re.sub(rf"{ids[2]},\w+\n", "", text))
    run("cremad", tmp_path, "--skip-bad", code=2)
    assert "has 18 train, 0 val and 6 test items, here are 17, 0 and 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "raw/test.csv").unlink()
    run("cremad", tmp_path, "--skip-bad", code=2)                               # the split `clean`
    assert "here are 11, 6 and 6" in capsys.readouterr().err
    (tmp_path / "raw/SentenceFilenames.csv").write_text(
        '"Stimulus_Number","Filename"\n' + "".join(f'{n},"{name}"\n' for n, name in enumerate(ids)))
    run("cremad", tmp_path, "--skip-bad")                                       # now it is known
    assert f"left out: {ids[1]}, {ids[2]}\n" in capsys.readouterr().out


real = pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")


@real
def test_the_real_lists_have_the_counts_that_are_asserted():
    for module, folder, options in ((cremad, "cremad", {}), (ave, "ave", {}), (ucf101, "ucf101", {"flow": "dis"})):
        if module is ucf101:
            pytest.importorskip("cv2")
        index = module.index(REAL / folder, options)
        assert index.expected
        for split, expected in index.expected.items():
            codes = list(index.splits[split].values())
            assert tuple(codes.count(part) for part in range(3)) == expected, (folder, split)
        groups = {item.id: item.group for item in index.items}
        parts = [{groups[item] for item, code in index.splits["clean"].items() if code == part} for part in range(3)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2], folder


@real
def test_real_clips_and_meshes(tmp_path):
    os.symlink(REAL / "cremad", tmp_path / "raw")
    run("cremad", tmp_path, "--limit", "4")
    ds = open_dataset("cremad-limit4", tmp_path / "out")
    assert ds.modalities["rgb"].frame.tolist() == [[360, 480]] * 4
    red, green, blue = ds.modalities["rgb"].array[:, :, :, :60, :40].mean((0, 1, 3, 4))      # a corner of the green screen
    assert green > 1.5 * red and green > 1.5 * blue
    assert np.abs(ds.modalities["audio"].array).max(1).min() > 500
    os.unlink(tmp_path / "raw")
    os.symlink(REAL / "modelnet40/off", tmp_path / "raw")
    run("modelnet40", tmp_path, "--limit", "5")
    front = open_dataset("modelnet40-limit5", tmp_path / "out").modalities["front"].array
    assert ((front < 250).mean((1, 2, 3, 4)) > 0.05).all()


def test_a_decoder_that_breaks_one_that_hangs_and_a_worker_that_dies_lose_nothing(tmp_path, monkeypatch, capsys):
    raw.modelnet(tmp_path / "raw")
    (tmp_path / "odd.py").write_text(
        "import ctypes, os, data.modelnet40 as m\nm.EXPECTED, whole = {}, m.decode\n"
        "def odd(item, options):\n    if item.id.endswith('bed_0001'):\n        raise ZeroDivisionError('odd')\n"
        "    if item.id.endswith('lamp_0003') and os.environ.get('DIE'):\n        os._exit(1)\n"
        "    if item.id.endswith('lamp_0004'):      # C code that never returns, holding the interpreter's lock\n"
        "        ctypes.PyDLL(None).sleep(9999)\n"
        "    return whole(item, options)\nm.decode = odd\nfrom data import prepare\nprepare.TIME_LIMIT = 5\n"
        "if __name__ == '__main__':\n    prepare.main()\n")
    command = [sys.executable, str(tmp_path / "odd.py"), "modelnet40", "--raw", str(tmp_path / "raw"), "--workers", "1",
               "--data-dir", str(tmp_path / "out")]
    died, ended = (subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "DIE": die}, capture_output=True, text=True)
                   for die in ("yes", ""))
    assert died.returncode == 2 and "a worker process was ended from outside" in died.stderr and "Traceback" not in died.stderr
    assert ended.returncode == 2 and "going on in" in ended.stdout
    assert "2 of 12 items cannot be used" in ended.stderr and "bed_0001.off: ZeroDivisionError: odd" in ended.stderr
    assert "lamp_0004.off: is not decoded after 5 s" in ended.stderr
