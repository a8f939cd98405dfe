"""Raw files that are cut, odd or in disorder: every bad one is named with its reason, the good ones come out unharmed."""

import os
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import raw
from conftest import TRIALS
from PIL import Image

from data import DataError, ave, avmnist, cremad, media, modelnet40, open_dataset, prepare, store, ucf101
from data.media import BadFile
from data.prepare import Item


def jpeg_or_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


CUT = {
    "flv": lambda p: raw.media(p / "a.flv", 2, video="flv1", audio="mp3", frames=raw.moving(50)),
    "mp4": lambda p: raw.media(p / "a.mp4", 2, audio="aac", frames=raw.moving(50)),
    "mp4 from the web": lambda p: raw.faststart(
        raw.media(p / "a.mp4", 2, audio="aac", frames=raw.moving(50))),
    "avi": lambda p: raw.media(p / "a.avi", 2, audio="mp3", frames=raw.moving(50)),
    "wav": lambda p: raw.wav(p / "a.wav", raw.tone(0.5, 16_000), 16_000),
    "jpg": lambda p: jpeg_or_png(p / "a.jpg"),
    "png": lambda p: jpeg_or_png(p / "a.png"),
    "off": lambda p: raw.off(p / "a.off"),
}


def readers(path):
    """{what: (read it, whether what was read of a part is right, given what was read of the whole)}"""
    def begins(part, all_of_it):        # the resampler's filter sees the end 600 samples ahead at most
        missing, off = len(all_of_it) - len(part), part.astype(int) - all_of_it[:len(part)]
        return 0 <= missing < 16_000 * (media.CUT + 0.05) and np.abs(off)[:-600].max(initial=0) <= 1

    def among(part, all_of_it):
        return all((frame == all_of_it).all((1, 2, 3)).any() for frame in part)

    sound = {"sound": (lambda: media.read_audio(path), begins)}
    picture = {"picture": (lambda: media.read_frames(path, media.evenly(5), 32)[0], among)}
    if path.suffix in (".jpg", ".png"):
        return {"picture": (lambda: media.read_picture(path), np.array_equal)}
    if path.suffix == ".off":
        return {"mesh": (lambda: np.concatenate([array.ravel() for array in media.read_off(path)]), np.array_equal)}
    return sound if path.suffix == ".wav" else sound | picture


@pytest.mark.parametrize("kind", CUT)
def test_a_file_cut_anywhere_is_named_or_read_as_far_as_it_goes(kind, tmp_path):
    path = CUT[kind](tmp_path)
    data = path.read_bytes()
    whole = {what: read() for what, (read, _) in readers(path).items()}
    if "picture" in whole and whole["picture"].ndim == 4:
        whole["picture"] = media.read_frames(path, lambda times, end: range(len(times)), 32)[0]
    named = 0
    for place in np.random.default_rng(len(data)).integers(0, len(data), 50 * TRIALS):
        path.write_bytes(data[:place])
        for what, (read, right) in readers(path).items():
            try:
                assert right(read(), whole[what]), (what, place)
            except BadFile as error:
                assert str(error).startswith(f"{path}: ") and len(error.reason) > 5 and error.reason.isprintable()
                named += 1
    assert named >= 20 * TRIALS


def test_a_video_of_one_frame(tmp_path):
    path = raw.media(tmp_path / "a.mp4", frames=raw.moving(1))
    frames, size = media.read_frames(path, media.evenly(3), 32)
    assert frames.shape == (3, 3, 32, 32) and (frames == frames[0]).all() and size == (48, 64)
    pytest.importorskip("cv2", reason="flow from video needs opencv-contrib-python-headless")
    with pytest.raises(BadFile, match="has 1 frames, flow needs 11"):
        ucf101.from_video(Item("a", 0, "g", [str(path)]), "dis")


def test_a_video_of_odd_size(tmp_path):
    frames, size = media.read_frames(raw.media(tmp_path / "a.avi", 1, size=(63, 47)), media.evenly(2), 32)
    assert size == (47, 63) and np.abs(frames.mean((2, 3)) - [[62] * 3, [187] * 3]).max() < 12


def test_a_video_too_large_to_be_held_gives_the_same_frames(tmp_path, monkeypatch):
    path = raw.media(tmp_path / "a.mp4", 1)
    held, size = media.read_frames(path, media.evenly(4), 32)
    for limit in (0, 5 * 48 * 64):      # squashed from the first frame on, and from the fourth or so
        monkeypatch.setattr(media, "HELD", limit)
        frames, again = media.read_frames(path, media.evenly(4), 32)
        np.testing.assert_array_equal(frames, held)
        assert again == size


def test_a_video_turned_as_a_phone_writes_it(tmp_path):
    light_on_the_right = np.zeros((10, 48, 64, 3), np.uint8)
    light_on_the_right[:, :, 32:] = 200
    path = raw.media(tmp_path / "a.mp4", frames=light_on_the_right)
    data, quarter = bytearray(path.read_bytes()), [0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30]
    place = data.index(b"tkhd") + 4 + 40        # the track's matrix: x goes down, y to the left, a quarter clockwise
    data[place:place + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in quarter)
    path.write_bytes(data)
    frames, size = media.read_frames(path, media.evenly(1), 32)
    assert size == (64, 48) and frames[0, :, :14].max() < 40 and frames[0, :, 18:].min() > 160


def test_a_video_of_variable_rate_is_read_by_its_clock(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for i, at in enumerate([0, 1, 2, 3, 4, 5, 50, 75, 99]):         # six frames in a quarter second, then three in four
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 25 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    frames, _ = media.read_frames(tmp_path / "a.mp4", media.within(0, 4, 4), 32)      # at 0.5, 1.5, 2.5, 3.5 s
    assert np.abs(frames.mean((1, 2, 3)) - 25 * np.array([5, 6, 6, 8])).max() < 6


@pytest.mark.filterwarnings("error")
def test_meshes_of_any_extent(tmp_path):
    usual = media.render(*media.read_off(raw.off(tmp_path / "a.off")), 0)
    for scale in (1e30, 1e-30, 1e300, 1.7e308, 1e-300):
        mesh = raw.off(tmp_path / "a.off", raw.CUBE * scale)
        views, _ = modelnet40.decode(Item("a", 0, "a", [str(mesh)]), {})
        assert np.abs(views["front"][0].astype(int) - usual).mean() < 1, scale
    one_far_away = raw.CUBE.copy()
    one_far_away[3] = 1e30, 0, -1e30
    with pytest.raises(BadFile, match="a.off: shows nothing"):
        modelnet40.decode(Item("a", 0, "a", [str(raw.off(tmp_path / "a.off", one_far_away))]), {})


def prepared(name, folder, *flags):
    prepare.main([name, "--raw", str(folder), "--data-dir", str(folder.parent / "out"), "--workers", "1", *flags])
    return folder.parent / "out" / name


def state(folder):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in sorted(folder.rglob("*"))}


def test_bad_clips_are_named_and_good_ones_unharmed(tmp_path, monkeypatch, capsys):
    root = tmp_path / "Größe & Töne, zweite Fassung"
    raw.cremad(root)
    monkeypatch.setattr(cremad, "EXPECTED", {})
    wav, flv = ({emotion: root / f"{folder}/1006_IEO_{emotion}_XX.{end}" for emotion in cremad.CLASSES}
                for folder, end in (("AudioWAV", "wav"), ("VideoFlash", "flv")))
    wav["NEU"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    raw.wav(wav["HAP"], raw.tone(0, 16_000), 16_000)
    raw.wav(wav["SAD"], raw.tone(1, 48_000, 440, 2), 48_000, "pcm_s24le")                   # odd, but good
    flv["FEA"].write_bytes(flv["FEA"].read_bytes()[:2000])
    flv["DIS"].write_bytes(b"")
    raw.wav(wav["ANG"], 0 * raw.tone(1, 16_000), 16_000)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state(root)
    folder = prepared("cremad", root, "--skip-bad")
    assert state(root) == before
    reasons = {"NEU": (wav, "is a Git LFS pointer"), "HAP": (wav, "has no sound"), "FEA": (flv, "is cut off: picture"),
               "DIS": (flv, "is empty"), "ANG": (wav, "is silent throughout")}
    error = capsys.readouterr().err
    assert "5 of 24 items cannot be used" in error
    for emotion, (files, reason) in reasons.items():
        assert f"1006_IEO_{emotion}_XX: {files[emotion]}: {reason}" in error
    ds = open_dataset(folder, split="official", val=0)
    used = sorted(item for part in ("train", "test") for item in ds.indices(part))
    assert len(used) == 19
    items = {item.id: item for item in cremad.index(root, {}).items}
    for i in used:
        arrays, size = cremad.decode(items[ds.ids[i]], {})
        assert all(np.array_equal(arrays[name], ds.modalities[name].array[i]) for name in ("audio", "rgb"))
        assert tuple(ds.modalities["rgb"].frame[i]) == size == (48, 64)


class Shuffled:
    """os.scandir, in an order that no file system gives; also the context manager that pathlib makes of it."""

    def __init__(self, path=".", scandir=os.scandir):
        with scandir(path) as entries:
            self.entries = list(entries)
        random.shuffle(self.entries)

    def __iter__(self):
        return iter(self.entries)

    def __enter__(self):
        return iter(self.entries)

    def __exit__(self, *_):
        pass


@pytest.fixture
def disorder(monkeypatch):
    """Every listing of a folder comes in another order each time."""
    listdir = os.listdir

    def start():
        monkeypatch.setattr(os, "scandir", Shuffled)
        monkeypatch.setattr(os, "listdir", lambda path=".": random.sample(listdir(path), len(listdir(path))))
    random.seed(0)
    return start


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def cremad_files(root):
    ids = [f"{actor}_IEO_{emotion}_XX" for actor in range(1001, 1006) for emotion in cremad.CLASSES]
    touch(root, *(f"AudioWAV/{i}.wav" for i in ids), *(f"VideoFlash/{i}.flv" for i in ids))
    for name, rows in (("train.csv", ids[::2]), ("test.csv", ids[1::2])):
        (root / name).write_text("".join(f"{i},x\n" for i in rows))


def ave_files(root):
    touch(root, *(f"AVE/video_{i}.mp4" for i in range(8)))
    rows = [f"{('Church bell', 'Bark')[i % 2]}&video_{i}&good&0&5\n" for i in range(8)]
    for part, own in (("train", rows[:5]), ("val", rows[5:6]), ("test", rows[6:])):
        (root / f"{part}Set.txt").write_text("".join(own))


def views(root):
    touch(root, *(f"{kind}/{part}/{kind}_{i}.obj.shaded_v{view:03d}.png" for kind in ("bed", "night stand", "tür")
                  for part in ("train", "test") for i in range(4) for view in range(1, 13)))


@pytest.mark.parametrize("module,make", [(cremad, cremad_files), (ave, ave_files), (modelnet40, raw.modelnet),
                                         (modelnet40, views), (avmnist, raw.avmnist), (ucf101, raw.ucf_pictures)])
def test_the_order_of_files_on_disk_does_not_matter(module, make, tmp_path, disorder):
    def index():
        found = module.index(tmp_path, {"flow": "tvl1"})
        found.items.sort(key=lambda item: item.id)        # as `prepare` does
        return found

    make(tmp_path)
    before = index()
    frames = ucf101.from_pictures(before.items[0]) if module is ucf101 else ()
    disorder()
    assert len({tuple(path.name for path in tmp_path.rglob("*")) for _ in range(9)}) > 1, "nothing was shuffled"
    for _ in range(9):
        assert index() == before
    for array, again in zip(frames, ucf101.from_pictures(before.items[0]) if module is ucf101 else ()):
        np.testing.assert_array_equal(array, again)


def test_names_with_spaces_and_letters_of_any_alphabet_in_any_order(tmp_path, monkeypatch, disorder):
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    root = tmp_path / "drei 模型"
    for i in range(3):
        raw.off(root / f"night stand/train/night stand_{i}.off", raw.CUBE * [1, 1, i + 1])
        raw.off(root / f"стол/{('train', 'test')[i % 2]}/стол é_{i}.off", raw.CUBE * [1, i + 2, 1])
    folder = prepared("modelnet40", root)
    digests = {path.name: store.sha256(path) for path in folder.iterdir()}
    assert open_dataset(folder, val=0).ids[-1] == "стол/train/стол é_2" and len(open_dataset(folder, val=0).ids) == 6
    folder.rename(tmp_path / "before")
    disorder()
    folder = prepared("modelnet40", root)
    assert {path.name: store.sha256(path) for path in folder.iterdir()} == digests


def ucf_again(root, part, line):
    with open(root / f"ucfTrainTestlist/{part}list01.txt", "a") as file:
        file.write(line)


@pytest.mark.parametrize("name,make,again,message", [
    ("cremad", cremad_files, lambda r: (r / "test.csv").write_text("1001_IEO_NEU_XX,x\n"),
     "test.csv: '1001_IEO_NEU_XX' stands in another list too"),
    ("ave", ave_files, lambda r: (r / "testSet.txt").write_text("Bark&video_1&good&0&5\n"),
     "testSet.txt: 'video_1 0-5 Bark' stands in another list too"),
    ("ucf101", raw.ucf_pictures, lambda r: ucf_again(r, "test", "Biking/v_Biking_g02_c01.avi\n"),
     "testlist01.txt: 'v_Biking_g02_c01' stands in another list too"),
    ("ucf101", raw.ucf_pictures, lambda r: ucf_again(r, "train", "Biking/v_Biking_g02_c01.avi 1\n"),
     "5 items, 'v_Biking_g02_c01' comes more than once"),
    ("modelnet40", raw.modelnet, lambda r: raw.off(r / "ModelNet40/bed/train/two\nlines.off"),
     "must be one line of text, not 'bed/train/two"),
])
def test_an_id_that_cannot_be_is_said_before_anything_is_decoded(name, make, again, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modelnet40, "EXPECTED", {})
    make(tmp_path / "raw")
    again(tmp_path / "raw")
    with pytest.raises(SystemExit) as stop:
        prepared(name, tmp_path / "raw", "--skip-bad")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module,make,file,text", [
    (cremad, cremad_files, "train.csv", "²_IEO_NEU_XX,x\n"), (cremad, cremad_files, "train.csv", "1001_IEO_XXX_XX,x\n"),
    (cremad, cremad_files, "train.csv", b"\xff\xfe"), (ave, ave_files, "trainSet.txt", "Bark&video_1&good&²&5\n"),
    (ave, ave_files, "trainSet.txt", "Bark&video_1&good&0\n"),
    (ucf101, raw.ucf_pictures, "ucfTrainTestlist/classInd.txt", "Biking\n"),
    (ucf101, raw.ucf_pictures, "ucfTrainTestlist/trainlist01.txt", "Biking\n"),
])
def test_a_list_that_makes_no_sense_is_named(module, make, file, text, tmp_path):
    make(tmp_path)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        module.index(tmp_path, {"flow": "tvl1"})
    assert len(str(error.value).splitlines()) == 1 and (file in str(error.value) or repr(text.split(",")[0]) in str(error.value))
