"""Raw files that are cut, odd or in disorder: every bad one is named with its reason, the good ones
come out unharmed."""

import os
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import raw
from conftest import TRIALS, prepared
from PIL import Image

from data import ave, avmnist, cremad, media, modelnet40, open_dataset, store, ucf101
from data.media import BadFile
from data.prepare import Item


def coloured(path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def video(path, **options):
    return raw.media(path, 2, frames=raw.moving(50), **options)


CUT = {
    "a.flv": lambda path: video(path, video="flv1", audio="mp3"),
    "a.mp4": lambda path: video(path, audio="aac"),
    "web.mp4": lambda path: raw.faststart(video(path, audio="aac")),
    "a.avi": lambda path: video(path, audio="mp3"),
    "a.wav": lambda path: raw.wav(path, raw.tone(0.5, 16_000), 16_000),
    "a.jpg": coloured, "a.png": coloured, "a.off": raw.off,
}


def begins(part, whole):        # the resampler's filter sees the end 600 samples ahead at most
    missing, off = len(whole) - len(part), part.astype(int) - whole[:len(part)]
    return (0 <= missing < 16_000 * (media.CUT + 0.05)
            and np.abs(off)[:-600].max(initial=0) <= 1)


def among(part, whole):
    return all((frame == whole).all((1, 2, 3)).any() for frame in part)


def readers(path, choose=media.evenly(5)):
    """[(read it, whether what was read of a part is right, given what was read of the whole)]"""
    sound = lambda: media.read_audio(path), begins                              # noqa: E731
    picture = lambda: media.read_frames(path, choose, 32)[0], among             # noqa: E731
    return {".jpg": [(lambda: media.read_picture(path), np.array_equal)],
            ".png": [(lambda: media.read_picture(path), np.array_equal)],
            ".off": [(lambda: np.concatenate([x.ravel() for x in media.read_off(path)]),
                      np.array_equal)],
            ".wav": [sound]}.get(path.suffix, [sound, picture])


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_anywhere_is_named_or_read_as_far_as_it_goes(name, tmp_path):
    path = CUT[name](tmp_path / name)
    data = path.read_bytes()
    whole = [read() for read, _ in readers(path, choose=lambda times, end: range(len(times)))]
    named = 0
    for place in np.random.default_rng(len(data)).integers(0, len(data), 50 * TRIALS):
        path.write_bytes(data[:place])
        for (read, right), all_of_it in zip(readers(path), whole, strict=True):
            try:
                assert right(read(), all_of_it), place
            except BadFile as error:
                assert str(error).startswith(f"{path}: ")
                assert len(error.reason) > 5 and error.reason.isprintable()
                named += 1
    assert named >= 20 * TRIALS


# ---- odd, but good -------------------------------------------------------------------------------
def test_a_video_of_one_frame(tmp_path):
    path = raw.media(tmp_path / "a.mp4", frames=raw.moving(1))
    frames, size = media.read_frames(path, media.evenly(3), 32)
    assert frames.shape == (3, 3, 32, 32) and (frames == frames[0]).all() and size == (48, 64)
    pytest.importorskip("cv2", reason="flow needs opencv-contrib-python-headless")
    with pytest.raises(BadFile, match="has 1 frames, flow needs 11"):
        ucf101.from_video(Item("a", 0, "g", [str(path)]), "dis")


def test_a_video_of_odd_size(tmp_path):
    path = raw.media(tmp_path / "a.avi", 1, size=(63, 47))
    frames, size = media.read_frames(path, media.evenly(2), 32)
    assert size == (47, 63) and np.abs(frames.mean((2, 3)) - [[62] * 3, [187] * 3]).max() < 12


def test_a_video_too_large_to_be_held_gives_the_same_frames(tmp_path, monkeypatch):
    path = raw.media(tmp_path / "a.mp4", 1)
    held, size = media.read_frames(path, media.evenly(4), 32)
    for limit in (0, 5 * 48 * 64):      # squashed from the first frame on, from the fourth or so
        monkeypatch.setattr(media, "HELD", limit)
        frames, again = media.read_frames(path, media.evenly(4), 32)
        np.testing.assert_array_equal(frames, held)
        assert again == size


def test_a_video_turned_as_a_phone_writes_it(tmp_path):
    light_on_the_right = np.zeros((10, 48, 64, 3), np.uint8)
    light_on_the_right[:, :, 32:] = 200
    path = raw.media(tmp_path / "a.mp4", frames=light_on_the_right)
    # the track's matrix: x goes down, y to the left, a quarter clockwise
    data, quarter = path.read_bytes(), [0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30]
    place = data.index(b"tkhd") + 4 + 40
    matrix = b"".join(number.to_bytes(4, "big", signed=True) for number in quarter)
    path.write_bytes(data[:place] + matrix + data[place + 36:])
    frames, size = media.read_frames(path, media.evenly(1), 32)
    assert size == (64, 48) and frames[0, :, :14].max() < 40 and frames[0, :, 18:].min() > 160


def test_a_video_of_variable_rate_is_read_by_its_clock(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for i, at in enumerate([0, 1, 2, 3, 4, 5, 50, 75, 99]):     # six in a quarter second
            grey = np.full((48, 64, 3), 25 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    frames, _ = media.read_frames(tmp_path / "a.mp4", media.within(0, 4, 4), 32)    # 0.5, 1.5, ...
    assert np.abs(frames.mean((1, 2, 3)) - 25 * np.array([5, 6, 6, 8])).max() < 6


@pytest.mark.filterwarnings("error")
def test_meshes_of_any_extent(tmp_path):
    def front(vertices):
        path = raw.off(tmp_path / "a.off", vertices)
        return modelnet40.decode(Item("a", 0, "a", [str(path)]), {})[0]["front"][0].astype(int)

    usual = front(raw.CUBE)
    for scale in (1e30, 1e-30, 1e300, 1.7e308, 1e-300):
        assert np.abs(front(raw.CUBE * scale) - usual).mean() < 1, scale
    one_far_away = raw.CUBE.copy()
    one_far_away[3] = 1e30, 0, -1e30
    with pytest.raises(BadFile, match="a.off: shows nothing"):
        front(one_far_away)


def state(folder):
    return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
            for path in folder.rglob("*")}


def test_bad_clips_are_named_and_good_ones_unharmed(tmp_path, expect, capsys):
    root = tmp_path / "Größe & Töne, zweite Fassung/raw"
    raw.cremad(root)
    expect(cremad)
    wav, flv = ({emotion: root / f"{folder}/1006_IEO_{emotion}_XX.{end}"
                 for emotion in cremad.CLASSES}
                for folder, end in (("AudioWAV", "wav"), ("VideoFlash", "flv")))
    wav["NEU"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    raw.wav(wav["HAP"], raw.tone(0, 16_000), 16_000)
    raw.wav(wav["SAD"], raw.tone(1, 48_000, 440, 2), 48_000, "pcm_s24le")       # odd, but good
    flv["FEA"].write_bytes(flv["FEA"].read_bytes()[:2000])
    flv["DIS"].write_bytes(b"")
    raw.wav(wav["ANG"], 0 * raw.tone(1, 16_000), 16_000)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state(root)
    folder = prepared("cremad", root.parent, "--skip-bad")
    assert state(root) == before
    error = capsys.readouterr().err
    assert "5 of 24 items cannot be used" in error
    for emotion, files, reason in (
            ("NEU", wav, "is a Git LFS pointer"), ("HAP", wav, "has no sound"),
            ("FEA", flv, "is cut off: picture"), ("DIS", flv, "is empty"),
            ("ANG", wav, "is silent throughout")):
        assert f"1006_IEO_{emotion}_XX: {files[emotion]}: {reason}" in error
    ds = open_dataset(folder, split="official", val=0)
    used = [item for part in ("train", "test") for item in ds.indices(part)]
    assert len(used) == 19
    items = {item.id: item for item in cremad.index(root, {}).items}
    for i in used:
        arrays, size = cremad.decode(items[ds.ids[i]], {})
        for name in ("audio", "rgb"):
            np.testing.assert_array_equal(arrays[name], ds.modalities[name].array[i])
        assert tuple(ds.modalities["rgb"].frame[i]) == size == (48, 64)


# ---- disorder ------------------------------------------------------------------------------------
class Shuffled:
    """os.scandir in an order that no file system gives, a context manager too for pathlib."""

    def __init__(self, path=".", scandir=os.scandir):
        with scandir(path) as entries:
            self.entries = list(entries)
        random.shuffle(self.entries)

    def __iter__(self):
        return iter(self.entries)

    __enter__ = __iter__

    def __exit__(self, *_):
        pass


@pytest.fixture
def disorder(monkeypatch):
    """Once called, every listing of a folder comes in another order each time."""
    def start(listdir=os.listdir):
        monkeypatch.setattr(os, "scandir", Shuffled)
        monkeypatch.setattr(os, "listdir", lambda path=".": random.sample(
            entries := listdir(path), len(entries)))
    random.seed(0)
    return start


def views(root):
    for kind in ("bed", "night stand", "tür"):
        for i in range(8):
            raw.views(root, name=f"{kind}_{i}", part=("train", "test")[i % 2])


@pytest.mark.parametrize("module,make", [
    (cremad, lambda root: raw.cremad(root, empty=True)),
    (ave, lambda root: raw.ave(root, empty=True)), (modelnet40, raw.modelnet),
    (modelnet40, views), (avmnist, raw.avmnist), (ucf101, raw.ucf_pictures)])
def test_the_order_of_files_on_disk_does_not_matter(module, make, tmp_path, disorder):
    def found():
        index = module.index(tmp_path, {"flow": "tvl1"})
        index.items.sort(key=lambda item: item.id)        # as `prepare` does
        frames = ucf101.from_pictures(index.items[0])[:2] if module is ucf101 else ()
        return index, [array.tobytes() for array in frames]

    make(tmp_path)
    before = found()
    disorder()
    orders = {tuple(path.name for path in tmp_path.rglob("*")) for _ in range(9)}
    assert len(orders) > 1, "nothing was shuffled"
    for _ in range(9):
        assert found() == before


def test_names_with_spaces_and_letters_of_any_alphabet_in_any_order(tmp_path, expect, disorder):
    expect(modelnet40)
    root = tmp_path / "drei 模型"
    for i in range(3):
        raw.off(root / f"raw/night stand/train/night stand_{i}.off", raw.CUBE * [1, 1, i + 1])
        raw.off(root / f"raw/стол/{('train', 'test')[i % 2]}/стол é_{i}.off",
                raw.CUBE * [1, i + 2, 1])

    def digests():
        folder = prepared("modelnet40", root)
        ids = open_dataset(folder, val=0).ids
        assert ids[-1] == "стол/train/стол é_2" and len(ids) == 6
        return {path.name: store.sha256(path) for path in folder.iterdir()}

    before = digests()
    (root / "out/modelnet40").rename(tmp_path / "before")
    disorder()
    assert digests() == before
