"""Small raw files in the formats that the downloads have, made with the real codecs."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


def tone(seconds, rate, hertz=440.0, channels=1):
    """(channels, L) float32 sine."""
    sine = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return np.tile(sine, (channels, 1)).astype(np.float32)


def encode(out, stream, samples, rate, **options):
    """(channels, L) float32 into a stream of an open file."""
    layout = stream.layout.name
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.rate, frame.pts = rate, 0
    for block in av.AudioResampler(stream.format, layout, rate, **options).resample(frame):
        out.mux(stream.encode(block))
    out.mux(stream.encode(None))


def media(path, seconds=1.0, fps=25, size=(64, 48), video="mpeg4", audio=None, rate=44_100,
          frames=None, sound=None):
    """A file with moving pictures (`frames`: uint8 (T, H, W, 3); default: grey that rises from 0 to
    250 over the clip) and, if `audio` names a codec, sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        v = out.add_stream(video, rate=fps)
        v.width, v.height = size
        v.pix_fmt, v.bit_rate = "yuv420p", 2_000_000
        if audio:
            a = out.add_stream(audio, rate=rate, layout="mono")
        n = round(seconds * fps)
        if frames is None:
            greys = (np.arange(n) * 250 // max(n - 1, 1)).astype(np.uint8)
            frames = greys[:, None, None, None] * np.ones((1, *size[::-1], 3), np.uint8)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            out.mux(v.encode(frame))
        out.mux(v.encode(None))
        if audio:
            encode(out, a, tone(seconds, rate) if sound is None else sound, rate,
                   frame_size=a.frame_size or 1024)
    return path


def muxed(path, stem, change=lambda packet: packet, **options):
    """The same packets in another file, each as `change` gives it back (None: left out)."""
    out = path.with_stem(stem)
    with av.open(str(path)) as old, av.open(str(out), "w", options=options) as new:
        streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None and change(packet):
                packet.stream = streams[packet.stream]
                new.mux(packet)
    return out


def without_packets(path, start, stop, jitter=0.0, kind="audio"):
    """The same file without the packets of one `kind` from `start` to `stop` seconds; the time
    stamps of the others, but the first, are moved by up to `jitter` seconds."""
    rng = np.random.default_rng(0)

    def change(packet):
        chosen = packet.stream.type == kind
        if chosen and start <= packet.pts * packet.time_base < stop:
            return None
        if chosen and packet.pts > 0:
            packet.pts += round(rng.uniform(-jitter, jitter) / packet.time_base)
            packet.dts = packet.pts
        return packet

    return muxed(path, "thin", change)


def wav(path, samples, rate, codec="pcm_s16le"):
    """(channels, L) float32 as WAV; codec pcm_s16le, pcm_s24le, pcm_f32le."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(str(path), "w", format="wav") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        encode(out, stream, samples, rate)
    return path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def cremad(root, actors=range(1001, 1006), empty=False):
    """Each actor with all six emotions; a list that puts every fourth clip into test."""
    ids = [f"{actor}_IEO_{emotion}_XX" for actor in actors
           for emotion in ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")]
    for name in ids:
        sound, picture = root / f"AudioWAV/{name}.wav", root / f"VideoFlash/{name}.flv"
        if empty:
            touch(sound), touch(picture)
        else:
            wav(sound, tone(1.2, 16_000), 16_000)
            media(picture, video="flv1", audio="mp3")
    for file, rows in (("train", [i for n, i in enumerate(ids) if n % 4]), ("test", ids[::4])):
        (root / f"{file}.csv").write_text("".join(f"{i},{i.split('_')[2]}\n" for i in rows))
    return ids


def ave(root, n=8, empty=False):
    """n videos of ten seconds with one event each; the first also in test, that of val also in
    train, as another category."""
    for i in range(n):
        path = root / f"AVE/video_{i}.mp4"
        touch(path) if empty else media(path, 10, fps=5, audio="aac")
    rows = [f"{('Church bell', 'Bark')[i % 2]}&video_{i}&good&{i % 3}&{10 - i % 4}"
            for i in range(n)]
    header = "Category&VideoID&Quality&StartTime&EndTime"
    (root / "trainSet.txt").write_text("\n".join(
        [header, *rows[:-2], "Bark&video_1&good&0&0", f"Bark&video_{n - 2}&good&0&10"]))
    (root / "valSet.txt").write_text(rows[-2] + "\n")
    (root / "testSet.txt").write_text(rows[-1] + "\nBark&video_0&good&0&10\n")


UCF = ["v_Biking_g01_c01", "v_Biking_g02_c01", "v_Skiing_g01_c01", "v_Skiing_g02_c01"]


def ucf_lists(root):
    folder = root / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    (folder / "classInd.txt").write_text("1 Biking\n2 Skiing\n")
    for part, group in (("train", "g02"), ("test", "g01")):
        label = {"Biking": " 1", "Skiing": " 2"} if part == "train" else {}
        rows = [(clip.split("_")[1], clip) for clip in UCF if group in clip]
        (folder / f"{part}list01.txt").write_text(
            "".join(f"{kind}/{clip}.avi{label.get(kind, '')}\n" for kind, clip in rows))


def moving(n=20, size=(64, 48), step=2):
    """A soft random texture that moves `step` pixels to the right a frame: uint8 (n, H, W, 3)."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(40, 215, (size[1] // 8, 40)), np.ones((8, 8)))
    frames = [texture[:, 160 - step * i:160 - step * i + size[0]] for i in range(n)]
    return np.stack(frames).astype(np.uint8)[..., None].repeat(3, -1)


def ucf_videos(root, empty=False):
    ucf_lists(root)
    for clip in UCF:
        path = root / f"UCF-101/{clip.split('_')[1]}/{clip}.avi"
        touch(path) if empty else media(path, frames=moving())


def grey(path, value, size=(34, 26), mode="L"):
    """A picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(path, quality=95)


def ucf_pictures(root):
    """Clips of 12 frames, of grey 10 to 120, with flow u of 101 to 112 and v of 151 to 162."""
    ucf_lists(root)
    for clip in UCF:
        for i in range(1, 13):
            grey(root / f"jpegs_256/{clip}/frame{i:06d}.jpg", 10 * i, mode="RGB")
            grey(root / f"tvl1_flow/u/{clip}/frame{i:06d}.jpg", 100 + i)
            grey(root / f"tvl1_flow/v/{clip}/frame{i:06d}.jpg", 150 + i)


CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
CUBE_FACES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]


WEDGE = CUBE * [1, 1, 1 / 3]
WEDGE[CUBE[:, 1] == 0, 2] *= 3         # tall in front, low behind: its two sides tell them apart


def off(path, vertices=CUBE, faces=CUBE_FACES):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [*vertices, *([len(face), *face] for face in faces)]
    path.write_text(f"OFF\n{len(vertices)} {len(faces)} 0\n"
                    + "".join(" ".join(map(str, row)) + "\n" for row in rows))
    return path


def modelnet(root, n=6):
    for kind, height in (("bed", 0.4), ("lamp", 2.0)):
        for i in range(n):
            part = "test" if i % 3 == 2 else "train"
            path = root / f"ModelNet40/{kind}/{part}/{kind}_{i:04d}.off"
            off(path, CUBE * [1, 1 + i / 10, height])
