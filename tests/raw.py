"""Small raw files in the formats that the downloads have, made with the real codecs."""

import gzip
import wave
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def tone(seconds, rate, hertz=440.0, channels=1):
    """(channels, L) float32 sine."""
    return np.tile(0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate), (channels, 1)).astype(np.float32)


def media(path, seconds=1.0, fps=25, size=(64, 48), video="mpeg4", audio=None, rate=44_100, frames=None, sound=None):
    """A file with moving pictures (`frames`: uint8 (T, H, W, 3); default: grey that rises from 0 to 250 over the clip)
    and, if `audio` names a codec, sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        if video:
            v = out.add_stream(video, rate=fps)
            v.width, v.height = size
            v.pix_fmt, v.bit_rate = "yuv420p", 2_000_000
        if audio:
            a = out.add_stream(audio, rate=rate, layout="mono")
        if video:
            n = round(seconds * fps)
            if frames is None:
                frames = (np.arange(n) * 250 // max(n - 1, 1)).astype(np.uint8)[:, None, None, None] * np.ones((1, *size[::-1], 3), np.uint8)
            for i, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, fps)
                out.mux(v.encode(frame))
            out.mux(v.encode(None))
        if audio:
            samples = tone(seconds, rate) if sound is None else sound
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout="mono")
            frame.rate, frame.pts = rate, 0
            for block in av.AudioResampler(a.format, a.layout, a.rate, frame_size=a.frame_size or 1024).resample(frame):
                out.mux(a.encode(block))
            out.mux(a.encode(None))
    return path


def without_packets(path, start, stop, jitter=0.0):
    """The same file without the sound's packets from `start` to `stop` seconds; the time stamps of
    the others, but the first, are moved by up to `jitter` seconds."""
    rng, out = np.random.default_rng(0), path.with_stem(f"{path.stem} thin")
    with av.open(str(path)) as old, av.open(str(out), "w") as new:
        streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is None or (packet.stream.type == "audio"
                                      and start <= packet.pts * packet.time_base < stop):
                continue
            if packet.pts > 0 and packet.stream.type == "audio":
                packet.pts += round(rng.uniform(-jitter, jitter) / packet.time_base)
                packet.dts = packet.pts
            packet.stream = streams[packet.stream]
            new.mux(packet)
    return out


def faststart(path):
    """The same MP4 with its index in front of the pictures, as it comes from the web."""
    fast = av.open(str(path.with_stem("fast")), "w", options={"movflags": "faststart"})
    with av.open(str(path)) as old, fast as new:
        streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                new.mux(packet)
    return path.with_stem("fast")


def wav(path, samples, rate, codec="pcm_s16le"):
    """(channels, L) float32 as WAV; codec pcm_s16le, pcm_s24le, pcm_f32le."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples.shape[1] == 0:
        with wave.open(str(path), "wb") as out:
            out.setparams((1, 2, rate, 0, "NONE", ""))
        return path
    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(str(path), "w", format="wav") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.rate, frame.pts = rate, 0
        for block in av.AudioResampler(stream.format, layout, rate).resample(frame):
            out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    return path


def cremad(root, actors=(1001, 1003, 1005, 1006)):
    """Each actor with all six emotions; a list that puts every fourth clip into test."""
    ids = [f"{actor}_IEO_{emotion}_XX" for actor in actors for emotion in ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")]
    for name in ids:
        wav(root / f"AudioWAV/{name}.wav", tone(1.2, 16_000), 16_000)
        media(root / f"VideoFlash/{name}.flv", video="flv1", audio="mp3")
    for file, rows in (("train.csv", [i for n, i in enumerate(ids) if n % 4]), ("test.csv", ids[::4])):
        (root / file).write_text("".join(f"{i},{i.split('_')[2]}\n" for i in rows))
    return ids


def ave(root, n=8):
    """n videos of ten seconds with one event each; the first also stands in test, under another category."""
    for i in range(n):
        media(root / f"AVE/video_{i}.mp4", 10, fps=5, audio="aac")
    rows = [f"{('Church bell', 'Bark')[i % 2]}&video_{i}&good&{i % 3}&{10 - i % 4}" for i in range(n)]
    header = "Category&VideoID&Quality&StartTime&EndTime"
    (root / "trainSet.txt").write_text("\n".join([header, *rows[:-2], "Bark&video_1&good&0&0"]))
    (root / "valSet.txt").write_text(rows[-2] + "\n")
    (root / "testSet.txt").write_text(rows[-1] + "\nBark&video_0&good&0&10\n")


UCF = ["v_Biking_g01_c01", "v_Biking_g02_c01", "v_Skiing_g01_c01", "v_Skiing_g02_c01"]


def ucf_lists(root):
    folder = root / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    (folder / "classInd.txt").write_text("1 Biking\n2 Skiing\n")
    (folder / "trainlist01.txt").write_text("".join(f"{c.split('_')[1]}/{c}.avi {1 + ('Ski' in c)}\n" for c in UCF if "g02" in c))
    (folder / "testlist01.txt").write_text("".join(f"{c.split('_')[1]}/{c}.avi\n" for c in UCF if "g01" in c))


def moving(n=20, size=(64, 48), step=2):
    """A soft random texture that moves `step` pixels to the right each frame: uint8 (n, H, W, 3)."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(40, 215, (size[1] // 8, 40)), np.ones((8, 8)))
    frames = [texture[:, 160 - step * i:160 - step * i + size[0]] for i in range(n)]
    return np.stack(frames).astype(np.uint8)[..., None].repeat(3, -1)


def ucf_videos(root):
    ucf_lists(root)
    for clip in UCF:
        media(root / f"UCF-101/{clip.split('_')[1]}/{clip}.avi", frames=moving())


def ucf_pictures(root, layout="u,v"):
    ucf_lists(root)
    for clip in UCF:
        for i in range(1, 13):
            rgb, u, v = {"u,v": (f"frame{i:06d}",) * 3, "x,y": (f"frame{i:06d}", f"x_{i:05d}", f"y_{i:05d}"),
                         "flow_x": (f"frame{i:06d}", f"flow_x_{i:05d}", f"flow_y_{i:05d}")}[layout]
            folders = (f"tvl1_flow/u/{clip}", f"tvl1_flow/v/{clip}") if layout == "u,v" else (f"tvl1_flow/{clip}",) * 2
            for folder, name, value in ((f"jpegs_256/{clip}", rgb, 10 * i), (folders[0], u, 100 + i), (folders[1], v, 150 + i)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.new("L" if "flow" in folder else "RGB", (34, 26), value if "flow" in folder else (value,) * 3).save(
                    root / folder / f"{name}.jpg", quality=95)


CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
CUBE_FACES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]


def off(path, vertices=CUBE, faces=CUBE_FACES, header="OFF\n{} {} 0\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header.format(len(vertices), len(faces)) + "".join(f"{a} {b} {c}\n" for a, b, c in vertices)
                    + "".join(" ".join(map(str, [len(face), *face])) + "\n" for face in faces))
    return path


def modelnet(root, n=6):
    for kind, height in (("bed", 0.4), ("lamp", 2.0)):
        for i in range(n):
            part = "test" if i % 3 == 2 else "train"
            off(root / f"ModelNet40/{kind}/{part}/{kind}_{i:04d}.off", CUBE * [1, 1 + i / 10, height])


def avmnist(root, per_digit=11, zipped=True):
    """Recordings of one speaker and MNIST files whose images are all of their digit's grey."""
    for digit in range(10):
        for index in range(per_digit):
            wav(root / f"recordings/{digit}_ann_{index}.wav", tone(0.3, 8_000, 200 + 100 * digit), 8_000)
    labels = np.arange(300) % 10
    for stem in ("train", "t10k"):
        for what, array in (("images-idx3", (labels * 20)[:, None, None] * np.ones((1, 28, 28))), ("labels-idx1", labels)):
            array = array.astype(np.uint8)
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            path = root / f"{stem}-{what}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
