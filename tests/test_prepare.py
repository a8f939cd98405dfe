"""From raw files to prepared folders: each dataset in each of its layouts, its splits, and everything that goes wrong."""

import json
import os
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
    assert [reason.split(": ")[1] for reason in skipped.values()] == ["is missing", "ends after 4.0 s, its event lasts from 2 to 8 s"]


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


def test_ucf101_with_either_spelling_of_handstand_pushups(tmp_path):
    for there, asked in (("HandStandPushups", "HandstandPushups"), ("HandstandPushups", "HandStandPushups")):
        (tmp_path / f"v_{there}_g01_c01.avi").touch()
        assert ucf101.spelled(tmp_path / f"v_{asked}_g01_c01.avi") == str(tmp_path / f"v_{there}_g01_c01.avi")
        (tmp_path / f"v_{there}_g01_c01.avi").unlink()


@pytest.mark.parametrize("flags,message", [(["--limit", "0"], "--limit cannot be 0"), (["--flow", "dis"], "--flow is for ucf101")])
def test_flags_that_make_no_sense(flags, message, tmp_path, capsys):
    run("modelnet40", tmp_path, *flags, code=2)
    assert message in capsys.readouterr().err


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
