"""Raw files that are cut, odd or in disorder: every bad one is named with its reason, the good ones
come out unharmed."""

import os
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import raw
from conftest import TRIALS
from PIL import Image

from data import ave, cremad, media, modelnet40, ucf101
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
    "a.jpg": coloured, "a.off": raw.off,
}


def begins(part, whole):        # the resampler's filter sees the end 600 samples ahead at most
    missing, off = len(whole) - len(part), part.astype(int) - whole[:len(part)]
    return (0 <= missing < 16_000 * (media.CUT + 0.05)
            and np.abs(off)[:-600].max(initial=0) <= 1)


def among(part, whole):
    return all((frame == whole).all((1, 2, 3)).any() for frame in part)


def readers(path, every=False):
    """[(read it, whether what was read of a part is right, given what was read of the whole)]"""
    sound = lambda: media.read_audio(path), begins                              # noqa: E731
    wanted = (lambda *_: np.arange(50) / 25) if every else lambda *_: media.middles(*_, 5)
    picture = lambda: media.read_frames(path, wanted, 32)[0], among             # noqa: E731
    return {".jpg": [(lambda: media.read_picture(path), np.array_equal)],
            ".off": [(lambda: np.concatenate([x.ravel() for x in media.read_off(path)]),
                      np.array_equal)],
            ".wav": [sound]}.get(path.suffix, [sound, picture])


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_anywhere_is_named_or_read_as_far_as_it_goes(name, tmp_path):
    path = CUT[name](tmp_path / name)
    data = path.read_bytes()
    whole = [read() for read, _ in readers(path, every=True)]
    named = 0
    for place in np.random.default_rng(len(data)).integers(0, len(data), 50 * TRIALS):
        path.write_bytes(data[:place])
        for (read, right), all_of_it in zip(readers(path), whole, strict=True):
            try:
                assert right(read(), all_of_it), place
            except BadFile as error:
                assert str(error).startswith(f"{path}: ")
                assert len(error.args[1]) > 5 and error.args[1].isprintable()
                named += 1
    assert named >= 20 * TRIALS


# ---- odd, but good -------------------------------------------------------------------------------
def test_a_video_of_one_frame_and_of_odd_size(tmp_path):
    path = raw.media(tmp_path / "a.mp4", frames=raw.moving(1, (63, 47)), size=(63, 47))
    frames, size = media.read_frames(path, lambda *_: media.middles(*_, 3), 32)
    assert frames.shape == (3, 3, 32, 32) and (frames == frames[0]).all() and size == (47, 63)
    pytest.importorskip("cv2", reason="flow needs opencv-contrib-python-headless")
    with pytest.raises(BadFile, match="has 1 frames, flow needs 11"):
        ucf101.from_video(path)


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
    frames, _ = media.read_frames(tmp_path / "a.mp4", lambda *_: media.middles(0, 4, 4), 32)
    assert np.abs(frames.mean((1, 2, 3)) - 25 * np.array([5, 6, 6, 8])).max() < 6   # 0.5, 1.5, ...


@pytest.mark.filterwarnings("error")
def test_meshes_of_any_extent(tmp_path):
    def front(vertices):
        path = raw.off(tmp_path / "a.off", vertices)
        return modelnet40.decode(Item("a", 0, "a", [str(path)]))[0]["front"][0].astype(int)

    usual = front(raw.CUBE)
    for scale in (1e30, 1.7e308, 1e-300):
        assert np.abs(front(raw.CUBE * scale) - usual).mean() < 1, scale
    one_far_away = raw.CUBE.copy()
    one_far_away[3] = 1e30, 0, -1e30
    with pytest.raises(BadFile, match="a.off: shows nothing"):
        front(one_far_away)


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


@pytest.mark.parametrize("module,make", [
    (cremad, lambda root: raw.cremad(root, empty=True)),
    (ave, lambda root: raw.ave(root, empty=True)), (modelnet40, raw.modelnet),
    (ucf101, raw.ucf_pictures)])
def test_the_order_of_files_on_disk_and_what_macos_leaves_do_not_matter(module, make, tmp_path,
                                                                        monkeypatch):
    def found():
        index = module.index(tmp_path)
        index.items.sort(key=lambda item: item.id)        # as `prepare` does
        flow = ucf101.from_pictures(*index.items[0].files)[1] if module is ucf101 else np.array(0)
        return index, flow.tobytes()

    make(tmp_path)
    before, files = found(), [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:                      # Finder's and an archive's
        path.with_name(f"._{path.name}").write_bytes(b"AppleDouble")
        raw.touch(tmp_path / "__MACOSX" / path.relative_to(tmp_path))
    random.seed(0)
    listed = os.listdir
    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", lambda path=".": random.sample(
        entries := listed(path), len(entries)))
    assert len({tuple(path.name for path in tmp_path.rglob("*")) for _ in range(9)}) > 1
    for _ in range(5):
        assert found() == before
