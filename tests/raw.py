"""Small raw files in the formats that the downloads have, made with the real codecs."""

import string
from fractions import Fraction

import av
import numpy as np
from PIL import Image
from scipy.io import savemat, wavfile


def put(path, content=b""):
    """A file in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cut(path, share=0.6):
    """The first part of a file, in its place."""
    return put(path, path.read_bytes()[:int(path.stat().st_size * share)])


def tone(seconds, rate, hertz=440.0, channels=1):
    """(channels, L) float32 sine."""
    sine = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return np.tile(sine, (channels, 1)).astype(np.float32)


def wav(path, samples, rate, dtype=np.int16):
    """(channels, L) float32 as WAV of 16 bits, or of float32."""
    full_scale = 32768 if dtype == np.int16 else 1
    wavfile.write(put(path), rate, (samples.T * full_scale).astype(dtype))
    return path


def media(path, seconds=1.0, fps=25, size=(64, 48), video="mpeg4", audio=None, rate=44_100,
          frames=None, sound=None):
    """A file with moving pictures (`frames`: uint8 (T, H, W, 3); default: grey that rises from 0 to
    250 over the clip) and, if `audio` names a codec, sound."""
    with av.open(str(put(path)), "w") as out:
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
            sound = tone(seconds, rate) if sound is None else sound
            block = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            block.rate, block.pts = rate, 0
            out.mux(a.encode(block))
            out.mux(a.encode(None))
    return path


def muxed(path, stem, keep=lambda packet: True, **options):
    """The same packets in another file: those that `keep` is true for, which may change them."""
    out = path.with_stem(stem)
    with av.open(str(path)) as old, av.open(str(out), "w", options=options) as new:
        streams = {stream: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None and keep(packet):
                packet.stream = streams[packet.stream]
                new.mux(packet)
    return out


def without_packets(path, start, stop, kind="audio"):
    """The same file without the packets of one `kind` from `start` to `stop` seconds."""
    return muxed(path, "thin", lambda packet: packet.stream.type != kind
                 or not start <= packet.pts * packet.time_base < stop)


def cremad(root):
    """Five actors with all six emotions; a list that puts every fourth clip into test."""
    ids = [f"{actor}_IEO_{emotion}_XX" for actor in range(1001, 1006)
           for emotion in ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")]
    for name in ids:
        wav(root / f"AudioWAV/{name}.wav", tone(1.2, 16_000), 16_000)
        media(root / f"VideoFlash/{name}.flv", video="flv1", audio="mp3")
    for file, rows in (("train", [i for n, i in enumerate(ids) if n % 4]), ("test", ids[::4])):
        (root / f"{file}.csv").write_text("".join(f"{i},{i.split('_')[2]}\n" for i in rows))
    return ids


def ave(root):
    """Eight videos of ten seconds with one event each; the first also in test, that of val also in
    train, as another category."""
    rows = []
    for i in range(8):
        media(root / f"AVE/video_{i}.mp4", 10, fps=5, audio="aac")
        rows.append(f"{('Church bell', 'Bark')[i % 2]}&video_{i}&good&{i % 3}&{10 - i % 4}")
    header = "Category&VideoID&Quality&StartTime&EndTime"
    (root / "trainSet.txt").write_text("\n".join(
        [header, *rows[:-2], "Bark&video_1&good&0&0", "Bark&video_6&good&0&10"]))
    (root / "valSet.txt").write_text(rows[-2] + "\n")
    (root / "testSet.txt").write_text(rows[-1] + "\nBark&video_0&good&0&10\n")


UCF = ["v_Biking_g01_c01", "v_Biking_g02_c01", "v_Skiing_g01_c01", "v_Skiing_g02_c01"]


def ucf_lists(root):
    lists = root / "ucfTrainTestlist"
    put(lists / "classInd.txt", b"1 Biking\n2 Skiing\n")
    put(lists / "trainlist01.txt",
        b"Biking/v_Biking_g02_c01.avi 1\nSkiing/v_Skiing_g02_c01.avi 2\n")
    put(lists / "testlist01.txt", b"Biking/v_Biking_g01_c01.avi\nSkiing/v_Skiing_g01_c01.avi\n")


def moving(n=20, step=2):
    """A soft random texture that moves `step` pixels to the right a frame: uint8 (n, 48, 64, 3)."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(40, 215, (6, 40)), np.ones((8, 8)))
    frames = [texture[:, 160 - step * i:224 - step * i] for i in range(n)]
    return np.stack(frames).astype(np.uint8)[..., None].repeat(3, -1)


def ucf_videos(root):
    ucf_lists(root)
    for clip in UCF:
        media(root / f"UCF-101/{clip.split('_')[1]}/{clip}.avi", frames=moving())


def ucf_pictures(root):
    """Clips of 12 frames, of grey 10 to 120, with flow u of 101 to 112 and v of 151 to 162."""
    ucf_lists(root)
    for clip in UCF:
        for i in range(1, 13):
            for folder, grey in (("jpegs_256", 10 * i), ("tvl1_flow/u", 100 + i),
                                 ("tvl1_flow/v", 150 + i)):
                picture = Image.new("L", (34, 26), grey)
                picture.save(put(root / f"{folder}/{clip}/frame{i:06d}.jpg"), quality=95)


CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
CUBE_FACES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
WEDGE = CUBE * [1, 1, 1 / 3]
WEDGE[CUBE[:, 1] == 0, 2] *= 3         # tall in front, low behind: its two sides tell them apart


def off(path, vertices):
    """A mesh with the faces of a cube."""
    rows = [*vertices, *([4, *face] for face in CUBE_FACES)]
    lines = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    return put(path, f"OFF\n{len(vertices)} 6 0\n{lines}".encode())


def modelnet(root, n=6):
    for kind, height in (("bed", 0.4), ("lamp", 2.0)):
        for i in range(n):
            part = "test" if i % 3 == 2 else "train"
            path = root / f"ModelNet40/{kind}/{part}/{kind}_{i:04d}.off"
            off(path, CUBE * [1, 1 + i / 10, height])


# ---- of results.sets -----------------------------------------------------------------------------
SPEAKERS = "Anya Bill Faye John Kate Nicola Stephen Steve Verity Yi".split()


def idx(array):
    start = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return start + array.astype(np.uint8).tobytes()


def avmnist(root):
    """Tones of 200 + 100 * digit Hz for 0.3 s, pictures of grey 20 * digit, each with its number in
    the corner."""
    for digit in range(10):
        for index in range(11):
            wav(root / f"recordings/{digit}_ann_{index}.wav",
                tone(0.3, 8_000, 200 + 100 * digit), 8_000)
    labels = np.arange(200) % 10
    images = np.full((200, 28, 28), 20 * labels[:, None, None])
    images[:, 0, 0] = np.arange(200)
    for stem in ("train", "t10k"):
        put(root / f"MNIST/raw/{stem}-images-idx3-ubyte", idx(images))
        put(root / f"MNIST/raw/{stem}-labels-idx1-ubyte", idx(labels))


def avletters(root):
    """Sound: coefficient k rises by k a step, from the letter's number on. Picture: a bright column
    tells the frame, a bright row the letter."""
    for label, letter in enumerate(string.ascii_uppercase):
        sound = label + np.arange(30)[:, None] * np.arange(26)
        header = np.array([(30, 200_000, 104, 326)], ">i4, >i4, >i2, >i2").tobytes()
        video = np.zeros((60, 80, 8), np.uint8)
        video[2 * label] = 100
        video[:, np.arange(8), np.arange(8)] = 255
        for name in (f"{letter}{n}_{speaker}" for n in "123" for speaker in SPEAKERS):
            put(root / f"Audio/mfcc/Clean/{name}.mfcc", header + sound.astype(">f4").tobytes())
            savemat(put(root / f"Lips/{name}-lips.mat"),
                    {"vid": video.reshape(-1, 8, order="F"), "siz": [[60.0, 80.0, 8.0]]})


def utdmhad(root):
    """Two actions of four subjects, signals of eleven steps."""
    rng = np.random.default_rng(0)
    for name in (f"a{action}_s{subject}_t1" for action in (1, 27) for subject in (1, 2, 3, 4)):
        for folder, key, shape in (("Inertial", "d_iner", (11, 6)),
                                   ("Skeleton", "d_skel", (20, 3, 11)),
                                   ("Depth", "d_depth", (240, 320, 11))):
            values = rng.integers(0, 4000, shape).astype("u2" if folder == "Depth" else float)
            savemat(put(root / f"{folder}/{name}_{folder.lower()}.mat"), {key: values})


def modelnet40_points(root):
    """High in front (small y), flat behind."""
    rng = np.random.default_rng(0)
    for kind in (f"kind{k:02d}" for k in range(40)):
        for number, part in ((1, "train"), (2, "test")):
            points = rng.uniform(-1, 1, (1024, 3)).astype(np.float32)
            points[:, 2] = np.where(points[:, 1] < 0, points[:, 2], -0.9)
            np.save(put(root / f"{kind}/{part}/{kind}_{number:04d}.npy"), points)
