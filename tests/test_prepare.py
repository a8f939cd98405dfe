"""From raw files to prepared folders: each dataset, its splits, what is said where a download is
not as it must be, and runs that end early."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import raw
from conftest import REAL, odd_decoder, prepared, real
from PIL import Image

from data import ave, cremad, info, modelnet40, open_dataset, prepare, store, ucf101
from data.media import BadFile
from data.prepare import Item


# ---- what comes out ------------------------------------------------------------------------------
def test_cremad(tmp_path, expect, capsys, monkeypatch):
    ids = raw.cremad(tmp_path / "raw")
    with open(tmp_path / "raw/train.csv", "a") as file:         # of which there are no files
        file.write("1076_MTI_SAD_XX,SAD\n1064_IEO_DIS_MD,DIS\n1064_TIE_SAD_XX,SAD\n")
    monkeypatch.setattr(cremad, "ACTORS", ["1001", "1002", "1003", "1004", "1005"])
    expect(cremad, official=(22, 0, 8), fold0=(18, 6, 6))
    folder = prepared("cremad", tmp_path)
    assert "note: left out, as they are known to be bad: 1076" in capsys.readouterr().out
    ds = open_dataset("cremad", tmp_path / "out", split="fold0")
    assert ds.classes == ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"] and ds.ids == sorted(ids)
    assert [ds.classes[label] for label in ds.labels] == [item.split("_")[2] for item in ds.ids]
    actors = {part: {ds.ids[i][:4] for i in ds.indices(part)} for part in ("train", "val", "test")}
    assert actors == {"train": {"1001", "1002", "1004"}, "val": {"1003"}, "test": {"1005"}}
    audio, rgb = ds.modalities["audio"], ds.modalities["rgb"]
    assert audio.array.shape == (30, 48_000) and rgb.array.shape == (30, 3, 3, 256, 256)
    np.testing.assert_array_equal(audio.array[0, :10], audio.array[0, 19_200:19_210])     # repeated
    assert (np.diff(rgb.array[0].mean((1, 2, 3))) > 60).all() and rgb.size == (224, 224)
    assert rgb.frame[0].tolist() == [48, 64]
    monkeypatch.chdir(tmp_path)
    info.main([str(folder)])
    printed = capsys.readouterr().out
    for line in ("split official: 22 train, 8 test", "in both train and test: 5 (1001, 1002,",
                 "split fold0: 18 train, 6 val, 6 test", "in both train and test: 0"):
        assert line in printed
    with Image.open(tmp_path / "cremad-contact-sheet.png") as sheet:
        assert sheet.format == "PNG" and len(sheet.getcolors(99_999)) > 50

    shutil.rmtree(folder)
    (tmp_path / "raw/train.csv").unlink()           # without lists there are folds alone
    cremad.ACTORS.append("1006")
    prepared("cremad", tmp_path, code=2)
    assert "split fold0: missing, or not in the part where they belong: 1006" in (
        capsys.readouterr().err)


def test_ave(tmp_path, expect):
    raw.ave(tmp_path / "raw")
    expect(ave, 2, official=(7, 1, 2))
    folder = prepared("ave", tmp_path)
    ds, clean = (open_dataset(folder, split=split) for split in ("official", "clean"))
    assert ds.classes == ["Bark", "Church bell"]
    train = {clean.ids[i].split()[0] for i in clean.indices("train")}
    assert train == {f"video_{i}" for i in range(1, 6)}         # 0 is in test too, 6 in val
    audio, grey = ds.modalities["audio"], ds.modalities["rgb"].array.mean((2, 3, 4))
    assert audio.array.shape[1] == 160_000 and audio.standardize
    for item, name in enumerate(ds.ids):
        start, stop = map(int, name.split()[1].split("-"))
        middles = start + (np.arange(4) + 0.5) * (stop - start) / 4
        assert np.abs(grey[item] - middles * 25).max() < 8, name       # 25 grey levels a second


def test_ucf101_from_videos(tmp_path, expect):
    pytest.importorskip("cv2.optflow", reason="flow needs opencv-contrib-python-headless")
    raw.ucf_videos(tmp_path / "raw")
    expect(ucf101, 2, official=(2, 0, 2))
    ds = open_dataset(prepared("ucf101", tmp_path))
    flow = (ds.modalities["flow"].array[0].astype(float) - 127.5) * 40 / 255
    u, v = np.median(flow[:, :, 64:192, 64:192], (0, 2, 3))
    assert abs(u - 2) < 0.5 and abs(v) < 0.3        # the texture moves 2 pixels to the right
    holed = raw.without_packets(raw.media(tmp_path / "a.avi", frames=raw.moving(75), video="ffv1"),
                                1, 1.8, kind="video")
    with pytest.raises(BadFile, match="has a hole: no frames from 0.96 to 1.8. s"):
        ucf101.from_video(holed)


def test_ucf101_from_published_pictures_which_are_paired_by_their_numbers(tmp_path, expect):
    raw.ucf_pictures(tmp_path / "raw")
    expect(ucf101, 2, official=(2, 0, 2))
    ds = open_dataset(prepared("ucf101", tmp_path), split="clean")
    assert [ds.classes[ds.labels[i]] for i in ds.indices("train")] == ["Biking", "Skiing"]
    flow, rgb = ds.modalities["flow"].array, ds.modalities["rgb"]
    assert rgb.frame[0].tolist() == [26, 34] and abs(rgb.array[0].mean() - 70) < 2     # frame 7
    ten = np.arange(102, 112)[:, None] + [0, 50]                        # from the second on
    assert np.abs(flow[0].mean((2, 3)) - ten).max() < 2
    shown = info.picture(ds.modalities["flow"], 0)[0, 0]                # u red, v green
    assert np.abs(shown - [102.0, 152, 127]).max() < 2
    folders = [tmp_path / "raw" / name / raw.UCF[0]
               for name in ("jpegs_256", "tvl1_flow/u", "tvl1_flow/v")]
    (folders[1] / "frame000012.jpg").unlink()
    with pytest.raises(BadFile, match="holds flow of 11 frames, .* of 12"):
        ucf101.from_pictures(*folders)
    (folders[0] / "frame000007.jpg").unlink()
    with pytest.raises(BadFile, match="frame000008.jpg where picture 7 should be"):
        ucf101.from_pictures(*folders)


def test_modelnet40_its_counts_and_a_trial(tmp_path, expect, capsys):
    raw.modelnet(tmp_path / "raw/deeper")
    for left in ("ModelNet40/bed/train/._bed_0000.off", "__MACOSX/ModelNet40/bed/train/a.off"):
        raw.put(tmp_path / "raw/deeper" / left)             # by macOS
    prepared("modelnet40", tmp_path, "--skip-bad", code=2)
    assert "(9843, 0, 2468) train, val and test items, found (8, 0, 4)" in capsys.readouterr().err
    expect(modelnet40, 40, official=(8, 0, 4))
    prepared("modelnet40", tmp_path, "--skip-bad", code=2)
    assert "there are 40 classes, found 2: bed, lamp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    expect(modelnet40, 2, official=(8, 0, 4))
    ds = open_dataset(prepared("modelnet40", tmp_path))
    assert ds.classes == ["bed", "lamp"] and list(ds.modalities) == ["front", "rear"]
    assert ds.ids == sorted(ds.ids)
    assert {mod.array.shape for mod in ds.modalities.values()} == {(12, 1, 1, 256, 256)}
    prepared("modelnet40", tmp_path, "--limit", "6")
    ds = open_dataset("modelnet40-limit6", tmp_path / "out", val=0)
    assert ds.split == "trial" and len(ds.ids) == 6
    assert set(ds.labels[ds.indices("train")]) == {0, 1}


@real
def test_the_real_lists_have_the_counts_and_actors_that_are_asserted(monkeypatch):
    monkeypatch.setattr(ucf101, "check_opencv", lambda: None)
    monkeypatch.setattr(ave, "find_folder", lambda raw, name: raw / name)      # no videos there
    for module in (cremad, ave, ucf101):
        index = module.index(REAL / module.__name__.removeprefix("data."))
        prepare.check_complete(index, module.N_CLASSES, skip_bad=True)
        groups = {item.id: item.group for item in index.items}
        assert index.expected
        for split in index.splits:
            parts = [{groups[item] for item, code in index.splits[split].items() if code == part}
                     for part in range(3)]
            if split != "official":
                assert len(set.union(*parts)) == sum(map(len, parts)), "a group in two parts"


# ---- what is wrong is said before anything is decoded --------------------------------------------
def test_what_is_wrong_is_said_in_a_line(tmp_path, expect, capsys):
    raw.ave(tmp_path / "raw")
    expect(ave)
    for change, said in (       # each is seen before those above it
            (lambda r: (r / "AVE/video_3.mp4").unlink(), "1 files are missing"),
            (lambda r: (r / "testSet.txt").write_text("Bark&video_1&good&1&9\n"),
             "testSet.txt: 'video_1 1-9 Bark' stands in another list too"),
            (lambda r: (r / "valSet.txt").write_text("Bark;video_1\n"), "is not Category&VideoID"),
            (lambda r: shutil.rmtree(r / "AVE"), "no folder AVE")):
        change(tmp_path / "raw")
        prepared("ave", tmp_path, code=2)
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ---- items that cannot be used -------------------------------------------------------------------
@pytest.mark.parametrize("seconds,sound,event,reason", [
    (10, 0.5, (0, 10), r"has only 0\.\d+ s of sound in the 10.000 s from 0 s on"),
    (8, 10, (6, 10), "has only 2.000 s of picture in the 4.000 s from 6 s on"),
    (40, 40, (0, 10), "lasts longer than 12 s")])
def test_an_event_has_its_sound_and_its_picture(seconds, sound, event, reason, tmp_path):
    path = raw.media(tmp_path / "a.mp4", seconds, 10, audio="aac", sound=raw.tone(sound, 44_100))
    with pytest.raises(BadFile, match=reason):
        ave.decode(Item("a", 0, "g", [str(path)], dict(start=event[0], stop=event[1])))


def test_skip_bad_accounts_for_every_item_and_what_was_replaced_is_decoded_again(
        tmp_path, expect, capsys, monkeypatch):
    ids = raw.cremad(tmp_path / "raw")
    expect(cremad, official=(22, 0, 8))
    sound, picture = (lambda i: tmp_path / f"raw/AudioWAV/{ids[i]}.wav",
                      lambda i: tmp_path / f"raw/VideoFlash/{ids[i]}.flv")
    raw.wav(sound(1), 0 * raw.tone(1, 16_000), 16_000)
    picture(3).write_text("version https://git-lfs.github.com/spec/v1\n")
    picture(5).write_bytes(picture(5).read_bytes()[:2000])
    raw.media(picture(6), 4.0, fps=10, video="flv1")
    prepared("cremad", tmp_path, code=2)
    said = capsys.readouterr().err
    for number, reason in ((1, "is silent"), (3, "is a Git LFS pointer"), (5, "is cut off"),
                           (6, "lasts 4.0 s, its sound")):
        line, = [line for line in said.splitlines() if line.startswith(f"  {ids[number]}: ")]
        assert reason in line
    assert not (tmp_path / "out/cremad").exists()
    with monkeypatch.context() as other:
        other.setattr(cremad, "APART", 0.6)
        prepared("cremad", tmp_path, code=2)
    assert "was begun with other files or other versions" in capsys.readouterr().err
    with monkeypatch.context() as other:                                    # a disk is unplugged
        other.setattr(prepare, "decode_all", lambda *_: picture(5).rename(tmp_path / "away") and ())
        prepared("cremad", tmp_path, "--skip-bad", code=2)
    assert f"1 items, the first {ids[5]}, went or changed" in capsys.readouterr().err
    raw.media(picture(5), video="flv1", audio="mp3")                        # mended
    raw.media(picture(0), video="flv1", frames=np.full((25, 48, 64, 3), 200, np.uint8))
    ds = open_dataset(prepared("cremad", tmp_path, "--skip-bad"), val=0)
    assert "5/5" in capsys.readouterr().err                 # all else is not done again
    rgb = ds.modalities["rgb"].array
    assert np.abs(rgb[ds.ids.index(ids[0])] - 200.0).max() < 9
    meta = store.read(tmp_path / "out/cremad")[0]
    assert sorted(meta["skipped"]) == sorted([ids[1], ids[3], ids[6]])
    assert meta["expected"]["official"] == {"train": 22, "val": 0, "test": 8}
    assert meta["splits"]["official"] == {"train": 19, "val": 0, "test": 8}
    assert meta["thresholds"]["QUIET"] == 2e-4 and meta["thresholds"]["APART"] == 0.5


# ---- a run that ends early -----------------------------------------------------------------------
def started(tmp_path, body, n_done):
    """A run of two workers whose decoder begins with `body`, once some items are done."""
    process = subprocess.Popen(**odd_decoder(tmp_path, body, 2), stderr=subprocess.PIPE,
                               start_new_session=True)
    state = tmp_path / "out/modelnet40.partial/state"
    while not (state / "begun").exists() or np.count_nonzero(np.load(state / "done.npy")) < n_done:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def test_killed_and_interrupted_it_goes_on_and_ends_with_the_same_bytes(tmp_path, expect, capsys):
    raw.modelnet(tmp_path / "raw", n=12)
    expect(modelnet40)
    process = started(tmp_path, "time.sleep(1)", 0)
    time.sleep(1)                               # its workers are starting
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error
    process = started(tmp_path, "time.sleep(0.05)", 8)
    process.kill()
    process.communicate(timeout=30)             # ends when no worker holds its stderr any more
    assert not (tmp_path / "out/modelnet40").exists()
    done = np.load(tmp_path / "out/modelnet40.partial/state/done.npy")
    assert 8 <= np.count_nonzero(done) < 24

    hangs = "if item.id.endswith(('lamp_0009', 'lamp_0010')): ctypes.PyDLL(None).sleep(9999)"
    process = started(tmp_path, hangs, 22)              # both workers hang, and keep Python's lock
    prepared("modelnet40", tmp_path, code=2)            # a second one at the same time
    assert "is under way in another process: wait for it" in capsys.readouterr().err
    os.killpg(process.pid, signal.SIGINT)               # Ctrl-C reaches all
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error
    assert "interrupted; what was finished is kept" in error

    (tmp_path / "out/modelnet40.partial/SHA256SUMS").write_text("of a kill at the very end")
    killed = (prepared("modelnet40", tmp_path) / "SHA256SUMS").read_text()
    assert "2/2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["modelnet40"]
    shutil.rmtree(tmp_path / "out")
    assert (prepared("modelnet40", tmp_path) / "SHA256SUMS").read_text() == killed


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
                 "lamp_0004.off: is not decoded after 5 s"):
        assert line in ended[1].stderr
