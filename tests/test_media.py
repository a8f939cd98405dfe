"""Decoding: what comes out of real files, and what is said about files that cannot be used."""

import numpy as np
import pytest
import raw
from PIL import Image

from data import ave, media, modelnet40
from data.media import BadFile
from data.prepare import Item


def parts(n):
    """What `media.read_frames` takes for the middles of n parts of the whole clip."""
    return lambda begin, end: media.middles(begin, end, n)


def test_sound_becomes_16_khz_mono_and_resampling_keeps_speech_and_folds_nothing_back(tmp_path):
    for hertz, least, most in ((5000, -0.1, 0.1), (7000, -0.1, 0.1), (8100, -200, -60),
                               (9000, -200, -60)):
        tones = raw.tone(1, 44_100, hertz, 2) + raw.tone(1, 44_100, 1000, 2)    # always there
        sound = media.read_audio(raw.wav(tmp_path / "a.wav", tones, 44_100, np.float32))
        assert sound.dtype == np.int16 and len(sound) == 16_000
        spectrum = np.abs(np.fft.rfft(sound[2000:10_000] * np.hanning(8000)))
        loudest = spectrum[2000:].max() / (0.3 * 32768 * 8000 / 4)              # from 4 kHz on
        assert least < 20 * np.log10(loudest) < most, hertz                     # in dB


def three_seconds_later(packet):
    packet.pts += round(3 / packet.time_base)
    packet.dts = packet.pts
    return True


CONTAINERS = [("a.mp4", "mpeg4", "aac"), ("a.flv", "flv1", "mp3"), ("a.mkv", "mpeg4", "aac")]


@pytest.mark.parametrize("name,video,audio", CONTAINERS)
def test_the_event_is_what_is_read(name, video, audio, tmp_path):
    tones = (4, 300), (2, 900), (4, 300)
    sound = np.concatenate([raw.tone(seconds, 44_100, hertz) for seconds, hertz in tones], 1)
    path = raw.media(tmp_path / name, 10, 10, (80, 48), video, audio, sound=sound)
    later = raw.muxed(path, "later", three_seconds_later)            # streams need not begin at 0
    for file, start, stop in ((path, 4, 6), (later, 7, 9)):
        event = media.read_audio(file, start, stop)
        spectrum = np.abs(np.fft.rfft(event * np.hanning(len(event))))      # in steps of 0.5 Hz
        assert len(event) == 32_000 and abs(spectrum.argmax() / 2 - 900) < 2
        frames, size = media.read_frames(file, lambda *_: media.middles(start, stop, 4), size=32)
        assert frames.shape == (4, 3, 32, 32) and size == (48, 80)
        greys = 250 * np.array([4.25, 4.75, 5.25, 5.75]) / 9.9
        assert np.abs(frames.mean((1, 2, 3)) - greys).max() < 6


def test_colours_of_a_video(tmp_path):
    frames = np.ones((3, 48, 64, 3), np.uint8) * np.uint8([60, 90, 220])
    path = raw.media(tmp_path / "a.mkv", fps=3, frames=frames, video="ffv1")
    pictures, _ = media.read_frames(path, parts(1), 32)
    assert np.abs(pictures.mean((0, 2, 3)) - [60, 90, 220]).max() < 2


@pytest.mark.parametrize("name,video,audio", CONTAINERS[:2])
def test_sound_stands_at_its_time_behind_packets_that_are_missing(name, video, audio, tmp_path):
    rng = np.random.default_rng(0)

    def shaken(packet):
        if packet.stream.type == "audio" and packet.pts > 0:
            packet.pts += round(rng.uniform(-0.011, 0.011) / packet.time_base)
            packet.dts = packet.pts
        return True

    sound = np.concatenate([raw.tone(3, 44_100, 400), 0.2 * raw.tone(3, 44_100, 400)], 1)
    path = raw.media(tmp_path / name, 6, video=video, audio=audio, sound=sound)
    whole = media.read_audio(path).astype(int)
    holed = media.read_audio(raw.without_packets(path, 1.0, 1.8)).astype(int)
    assert abs(len(holed) - len(whole)) <= 16 and not holed[18_000:28_000].any()
    loud = np.sqrt((holed[30_000:80_000].reshape(-1, 200) ** 2).mean(1)) > 3000
    assert abs((loud.sum() * 200 + 30_000) / 16_000 - 3) < 0.05         # where it falls, at 3 s
    with pytest.raises(BadFile, match=r"has only 4\.\d+ s of sound in the (5\.9|6\.0)"):
        media.read_audio(raw.without_packets(path, 1.0, 2.1))
    # time stamps that are not quite right make no holes
    np.testing.assert_array_equal(media.read_audio(raw.muxed(path, "shaken", shaken)), whole)


def test_a_sound_without_sound_is_named(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, (1, 32_000)).astype(np.float32)
    opposite = raw.wav(tmp_path / "a.wav", 0.2 + noise * np.float32([[1], [-1]]), 16_000)
    with pytest.raises(BadFile, match="is silent from 0 s on, its channels averaged"):
        media.read_audio(opposite)
    noise[:, 16_000:] = 0
    half = raw.wav(tmp_path / "b.wav", noise, 16_000)
    with pytest.raises(BadFile, match="is silent from 1 s on"):
        media.read_audio(half, 1, 2)


def test_a_picture_with_a_hole_is_named(tmp_path):
    path = raw.media(tmp_path / "a.mkv", 10, fps=10, video="ffv1", audio="mp3")
    event = Item("a", 0, "g", [str(path)], dict(start=0, stop=10))
    greys = ave.decode(event)[0]["rgb"].mean((1, 2, 3))
    event.files = [str(raw.without_packets(path, 4, 5, kind="video"))]      # each keeps its quarter
    assert np.abs(ave.decode(event)[0]["rgb"].mean((1, 2, 3)) - greys).max() < 10
    event.files = [str(raw.without_packets(path, 1, 9, kind="video"))]
    with pytest.raises(BadFile, match="has a hole: its frame nearest to [36].* s stands at"):
        ave.decode(event)


READ = {"a.wav": media.read_audio,
        "a.avi": lambda path: media.read_frames(path, parts(4))[0]}


@pytest.mark.parametrize("length", [None, 0, 0xFFFFFFFF])       # the last two: nobody knew it
@pytest.mark.parametrize("name", READ)
def test_a_riff_is_judged_by_what_is_there(length, name, tmp_path):
    if name == "a.wav":
        path, chunk, place = raw.wav(tmp_path / name, raw.tone(2, 16_000), 16_000), b"data", 4
    else:
        path, chunk, place = raw.media(tmp_path / name, 3), b"movi", -4
    whole, right = bytearray(path.read_bytes()), READ[name](path)
    whole[4:8] = (len(whole) if length is None else length).to_bytes(4, "little")
    if length is not None:
        place += whole.index(chunk)
        whole[place:place + 4] = length.to_bytes(4, "little")
    path.write_bytes(whole)
    np.testing.assert_array_equal(READ[name](path), right)
    for share in (0.5, 0.9, 0.001) if length is None else ():       # cut, its end is still known
        path.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(BadFile, match="is cut off"):
            READ[name](path)


@pytest.mark.parametrize("name,video,audio", CONTAINERS)
def test_a_file_that_lacks_its_last_tenth_is_named(name, video, audio, tmp_path):
    path = raw.media(tmp_path / name, 5, video=video, audio=audio, frames=raw.moving(125, step=1))
    if name == "a.mp4":
        path = raw.muxed(path, "fast", movflags="faststart")        # as it comes from the web
    raw.cut(path, 0.9)
    for read in (media.read_audio, lambda path: media.read_frames(path, parts(3))):
        with pytest.raises(BadFile, match="is cut off"):
            read(path)


@pytest.mark.parametrize("make,read,reason", [
    (lambda p: p / "no.wav", media.read_audio, "is missing"),
    (lambda p: raw.put(p / "a.wav"), media.read_audio, "is empty"),
    (lambda p: raw.media(p / "a.mp4"), media.read_audio, "has no sound"),
    (lambda p: raw.wav(p / "a.wav", raw.tone(0.01, 16_000), 16_000), media.read_audio,
     "has only 0.010 s of sound"),
    (lambda p: raw.cut(raw.media(p / "a.mp4", 4, audio="aac"), 0.5), media.read_audio,
     "cannot be decoded"),
    (lambda p: raw.put(p / "a.jpg", b"no picture"), media.read_picture, "cannot be decoded"),
    (lambda p: Image.fromarray(np.full((4, 4), 9999, np.uint16)).save(p / "a.png") or p / "a.png",
     media.read_picture, "more than 8 bits a channel")])
def test_bad_media_are_named_with_a_reason(make, read, reason, tmp_path):
    path = make(tmp_path)
    with pytest.raises(BadFile, match=reason) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_webp_is_a_riff_without_sound(tmp_path):
    Image.new("RGB", (30, 20), (90, 90, 90)).save(tmp_path / "a.webp")
    assert np.abs(media.read_picture(tmp_path / "a.webp") - 90.0).max() < 2


XYZ = "0 0 0\n1 0 0\n0 1 0\n"      # three vertices


def test_off_with_a_glued_header_polygons_colours_and_degenerate_faces(tmp_path):
    faces = "3 0 1 2 255 0 0\n2 0 1\n4 0 1 2 3\n"
    (tmp_path / "a.off").write_text(f"# it\noff4 3 0 # counts\n\n{XYZ}0 0 1\n{faces}")
    vertices, triangles = media.read_off(tmp_path / "a.off")
    assert vertices.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert triangles.tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize("text,reason", [
    ("ply\n", "no OFF mesh"), ("OFF\n3 1 0\n0 0 0\n1 0 0\n", "is cut off"),
    ("OFF\n3 1 0\n0 0 nan\n1 0 0\n0 1 0\n3 0 1 2\n", "that is not x y z"),
    (f"OFF\n3 1 0\n{XYZ}3 0 1 -1\n", "corner beyond its 3 vertices"),
    # counts that are not those of the lines: a vertex among the faces, more lines
    (f"OFF\n3 2 0\n{XYZ}0 0 1\n3 0 1 2\n", "that is not a face"),
    (f"OFF\n3 1 0\n{XYZ}3 0 1 2\n3 0 2 1\n", "does not count its lines")])
def test_bad_meshes_are_named_with_a_reason(text, reason, tmp_path):
    (tmp_path / "a.off").write_text(text)
    with pytest.raises(BadFile, match=reason):
        media.read_off(tmp_path / "a.off")


def slow_render(vertices, triangles, azimuth, elevation, size):
    """One ray a pixel against every triangle: the shade of the nearest face, 1 without one."""
    a, e = np.radians(azimuth), np.radians(elevation)
    towards = np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])
    right = np.array([np.cos(a), np.sin(a), 0])
    points = vertices - (vertices.max(0) + vertices.min(0)) / 2
    points = points / np.sqrt((points ** 2).sum(1).max())
    points = points @ np.stack([right, np.cross(towards, right), towards], 1)
    picture = np.ones((size, size))
    for row in range(size):
        for column in range(size):
            x, y = ((column + 0.5) / size * 2 - 1) / 0.95, -((row + 0.5) / size * 2 - 1) / 0.95
            best = -9.0
            for p, q, r in points[triangles]:
                basis = np.array([q - p, r - p])[:, :2].T
                if abs(np.linalg.det(basis)) < 1e-12:
                    continue
                s, t = np.linalg.solve(basis, np.array([x, y]) - p[:2])
                depth = p[2] + s * (q - p)[2] + t * (r - p)[2]
                if min(s, t, 1 - s - t) >= 0 and depth > best:
                    normal = np.cross(q - p, r - p)
                    normal *= np.sign(normal[2]) / np.linalg.norm(normal)
                    shade = 0.25 + 0.65 * max(0, normal @ [-0.35, 0.65, 0.67])
                    best, picture[row, column] = depth, shade
    return picture


@pytest.mark.parametrize("azimuth", [0, 180, 40])
def test_render_is_a_ray_casters_picture(azimuth):
    rng = np.random.default_rng(azimuth)
    triangles = rng.integers(0, 12, (9, 3))
    triangles = triangles[[len(set(t)) == 3 for t in triangles]]
    used, triangles = np.unique(triangles, return_inverse=True)
    vertices, triangles = rng.normal(size=(len(used), 3)), triangles.reshape(-1, 3)
    expected = slow_render(vertices, triangles, azimuth, 30, 64)
    expected = expected.reshape(32, 2, 32, 2).mean((1, 3)) * 255
    # what cannot be seen does not shrink the picture: a face without extent, a corner of no face
    vertices, far = np.concatenate([vertices, np.full((3, 3), 9)]), len(used)
    got = media.render(vertices, np.concatenate([triangles, [[far, far + 1, 0]]]), azimuth, size=32)
    assert got.shape == (1, 32, 32) and got.dtype == np.uint8
    assert (np.abs(got[0] - expected) > 2).mean() < 0.01        # a rim may round the other way
    assert (got != 255).mean() > 0.1


def test_front_is_the_side_of_negative_y_and_rear_the_other(tmp_path):
    path = raw.off(tmp_path / "wedge.off", raw.WEDGE)
    views, _ = modelnet40.decode(Item("a", 0, "a", [str(path)]))
    front, rear = ((views[name] < 255).mean() for name in ("front", "rear"))
    assert rear > 1.3 * front       # from behind one sees the slope, in front the wall hides it
