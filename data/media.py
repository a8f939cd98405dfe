"""Raw files to arrays: sound and video through PyAV (whose wheel brings FFmpeg), pictures, and
meshes seen from a side.

Used by `python -m data.prepare` alone; training never imports this module. Everything here raises
BadFile, with a reason a person can act on, for a file that cannot be used. The numbers that decide
what can stand below; `data.prepare` records them in meta.json.
"""

import os
import re
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import store

RATE = 16_000
CUT = 0.25                # seconds that may be missing of the length that a file claims
MISSING = 1.0             # seconds that may be missing of what is asked for,
MISSING_SHARE = 0.25      # and the share of it, whichever is less
HOLE = 0.1                # seconds: a larger step between the time stamps of a sound is a hole
FRAME_OFF = 0.5           # seconds: a frame may be so far from the time wanted, or half the way to
                          # the next time wanted, whichever is more; beyond that is a hole
QUIET = 2e-4              # standard deviation of a sound, full scale is 1 (-74 dB); less is silence
RIFF_SLACK = 8            # bytes by which writers get the size of a chunk wrong
RIFF_UNKNOWN = 0x7FFF0000     # bytes; such sizes are written where nobody knows the length
SQUASH = 0x20 | 0x40000 | 0x2000      # libswscale: AREA | ACCURATE_RND | FULL_CHR_H_INT


class BadFile(Exception):
    """BadFile(path, reason): a file that cannot be used."""

    def __str__(self):
        return f"{self.args[0]}: {self.args[1]}"


def check_file(path):
    """Raise BadFile for a file that is missing, empty, the Git LFS pointer to a file, or a RIFF
    (WAV, AVI) cut short."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
            if not start:
                raise BadFile(path, "is empty")
            if start.startswith(b"version https://git-lfs"):
                raise BadFile(path, "is a Git LFS pointer, not the file itself: run `git lfs "
                                    "pull`, or use a mirror (see docs/datasets.md)")
            riff = start.startswith(b"RIFF") and start[8:12] in (b"WAVE", b"AVI ")
            if riff and size < (whole := riff_size(file, size)):
                raise BadFile(path, f"is cut off: {size} of {whole} bytes")
    except FileNotFoundError:
        raise BadFile(path, "is missing") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadFile(path, error.strerror) from None       # other kinds are the disk's fault


def riff_size(file, size):
    """Bytes that a RIFF has up to the end of its sound or pictures (FFmpeg reports a cut one as
    whole), by its chunk `data` or `movi`: into its header recorders write what they please."""
    place = 12
    while place + 8 <= size:
        file.seek(place)
        name, length, kind = struct.unpack("<4sI4s", file.read(12).ljust(12))
        if name == b"data" or kind == b"movi":
            return place + 8 + (length - RIFF_SLACK if length < RIFF_UNKNOWN else 0)
        if not name.strip().isalnum():
            return 0               # no chunk: let the decoder say what it makes of it
        place += 8 + length + length % 2
    return place + 8


def decode_stream(path, kind, longest=None):
    """[(seconds or None, frame)] of the first stream of a kind, "audio" or "video".

    Raises BadFile where there is none, where it lasts longer than `longest` seconds, and where it
    ends before the file says that it does. The first frame that cannot be decoded ends it, as what
    comes after hangs on it.
    """
    import av
    av.logging.set_level(av.logging.PANIC)
    check_file(path)
    what = {"audio": "sound", "video": "picture"}[kind]
    frames, failure, claimed = [], None, 0.0
    stamps = defaultdict(list)               # {stream: [(seconds, duration) of its packets]}
    try:
        # "file:", or a colon in a relative path would make a protocol of what stands before it
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            stream = next(iter(getattr(container.streams, kind)), None)
            if stream is None or stream.codec_context is None:
                raise BadFile(path, f"has no {what} that can be decoded")
            chosen = stream.index            # a closed container does not tell it any more
            stream.thread_type = "NONE"      # the pool has every core already
            pcm = stream.codec_context.name.startswith("pcm_")     # of which any part is good
            own = float((stream.duration or 0) * (stream.time_base or 0))
            claimed = own or (container.duration or 0) / 1e6       # the longest stream's
            for packet in container.demux():
                if packet.pts is not None:
                    times = packet.pts, packet.duration or 0
                    stamps[packet.stream.index].append([t * packet.time_base for t in times])
                if packet.stream.index != chosen or failure:
                    continue
                try:
                    if packet.is_corrupt and not pcm:              # only a part of it is there
                        raise av.error.InvalidDataError(0, "a packet is damaged")
                    frames += [(frame.time, frame) for frame in packet.decode()]
                except av.error.FFmpegError as error:
                    failure = error.strerror
                if longest and frames and (frames[-1][0] or 0) - (frames[0][0] or 0) > longest:
                    raise BadFile(path, f"lasts longer than {longest} s, unlike any clip of this "
                                        "dataset: is it another one?")
    except av.error.FFmpegError as error:      # it cannot be opened, or no packet more can be read
        failure = failure or error.strerror
    except IndexError:      # PyAV's, after the last packet, over a stream that came on the way
        pass

    if not frames:
        raise BadFile(path, f"cannot be decoded: {failure}" if failure else f"has no {what}")
    spans = {index: span(packets) for index, packets in stamps.items()}
    begin, end = spans.get(chosen, (0, claimed))
    there = end - begin if own else max((end for _, end in spans.values()), default=claimed)
    if there < claimed - CUT:
        raise BadFile(path, f"is cut off: {what} for {there:.1f} of {claimed:.1f} s")
    last = frames[-1][0] or 0
    if failure and last < end - CUT:
        raise BadFile(path, f"cannot be decoded from {last:.1f} s on: {failure}")
    return frames


def span(stamps):
    """When a stream begins and ends, of its packets' (seconds, duration); some containers leave the
    duration out, then the last packet lasts as long as the others do on average."""
    times, lengths = np.array(stamps, float).T
    usual = (times.max() - times.min()) / max(len(times) - 1, 1)
    return times.min(), max((times + lengths).max(), times.max() + usual)


def check_there(path, what, there, wanted, start):
    """Raise BadFile where clearly less than the `wanted` seconds from `start` on are there."""
    if wanted - there > min(MISSING, MISSING_SHARE * wanted):
        raise BadFile(path, f"has only {there:.3f} s of {what} in the {wanted:.3f} s "
                            f"from {start:g} s on")


def read_audio(path, start=0.0, stop=None, longest=None):
    """The sound of a file from `start` to `stop` seconds: (L,) int16, mono, 16 kHz.

    Every block stands at the time that the file gives it, what is missing between them is silence.
    Channels are averaged. Resampled with a windowed sinc (Kaiser, 64 zero crossings a side, its
    edge at 94.8 % of the lower Nyquist frequency: resampy's `kaiser_best`), by torchaudio.

    Raises BadFile for a file that lasts longer than `longest` seconds, and for a sound that is
    missing in part, silent, or shorter than one window (512 samples).
    """
    import av
    import torch
    import torchaudio
    frames = decode_stream(path, "audio", longest)
    begin, rate = frames[0][0] or 0.0, frames[0][1].sample_rate
    to_float = av.AudioResampler("fltp", frames[0][1].layout, rate)

    def missing(samples):
        return np.full(max(samples, 0), np.nan, np.float32)

    parts, here = [], 0                                 # samples since `begin`
    for time, frame in frames:
        block = np.concatenate([part.to_ndarray() for part in to_float.resample(frame)], 1).mean(0)
        step = 0 if time is None else round((time - begin) * rate) - here
        if step < -HOLE * rate:
            raise BadFile(path, f"has a sound whose time stamps go back by {-step / rate:.1f} s")
        hole = step if step > HOLE * rate else 0
        parts += [missing(hole), block]
        here += hole + len(block)
    offset = round((start - begin) * rate)               # streams need not begin at 0
    sound = np.concatenate([missing(-offset), np.concatenate(parts)[max(0, offset):]])
    wanted = len(sound) / rate
    if stop is not None:
        wanted, sound = stop - start, sound[:round((stop - start) * rate)]
    there = np.isfinite(sound).sum() / rate
    check_there(path, "sound", there, wanted, start)
    if there * RATE < store.WINDOW:
        raise BadFile(path, f"has only {there:.3f} s of sound from {start:g} s on")
    sound = np.nan_to_num(sound)
    if sound.std() < QUIET:
        raise BadFile(path, f"is silent from {start:g} s on, its channels averaged")
    sound = torchaudio.functional.resample(
        torch.from_numpy(sound).double(), rate, RATE, lowpass_filter_width=64,
        rolloff=0.9475937167399596, resampling_method="sinc_interp_kaiser", beta=14.769656459379492)
    return (sound * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()


def to_rgb(frame, size=None):
    """A frame as uint8 (size, size, 3), or of its own size; greys are exact."""
    return frame.reformat(size, size, "rgb24", interpolation=SQUASH).to_ndarray()


def middles(start, stop, n):
    """The middle of each of n equal parts of [start, stop]: (n,)."""
    return start + (np.arange(n) + 0.5) * (stop - start) / n


def read_frames(path, choose, size=256, longest=None):
    """Frames of a video, squashed to size x size: uint8 (T, 3, size, size), and the (height, width)
    they came from.

    choose(begin, end)  the seconds at which the first frame begins and the last one ends -> the T
                        times wanted; of each, the nearest frame is taken
    Raises BadFile, also for a video that has no frame near a time wanted, or lasts longer than
    `longest` seconds.
    """
    frames = decode_stream(path, "video", longest)
    times = np.array([i / 25 if time is None else time for i, (time, _) in enumerate(frames)])
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.04
    wanted = choose(times.min(), times.max() + gap)
    off = np.abs(times[:, None] - wanted)
    nearest, far = off.argmin(0), off.min(0).argmax()
    if off.min(0)[far] > max(FRAME_OFF, np.diff(wanted).max(initial=0) / 2):
        raise BadFile(path, f"has a hole: its frame nearest to {wanted[far]:.2f} s stands at "
                            f"{times[nearest[far]]:.2f} s")
    pictures = np.stack([to_rgb(frames[i][1], size) for i in nearest]).transpose(0, 3, 1, 2)
    first = frames[nearest[0]][1]
    return np.ascontiguousarray(pictures), (first.height, first.width)


def read_picture(path, mode="RGB"):
    """A JPEG or PNG: uint8 (C, H, W); mode "RGB" or "L" (grey)."""
    from PIL import Image
    check_file(path)
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise BadFile(path, "has more than 8 bits a channel: scale it to 8 bits first")
            array = np.asarray(picture.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadFile(path, f"cannot be decoded: {error}") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def resize(picture, size=256):
    """uint8 (C, H, W) -> uint8 (C, size, size), bilinear with antialiasing."""
    import torch
    from torchvision.transforms.v2.functional import resize as tv_resize
    return tv_resize(torch.from_numpy(picture.copy()), [size, size], antialias=True).numpy()


def read_off(path):
    """A mesh in OFF: vertices (V, 3) float64 and triangles (F, 3) int; polygons become fans.

    Reads what ModelNet40 holds: a header glued to the counts (`OFF490 518 0`), comments, faces with
    more than three corners or with a colour behind them. Faces that are lines or points go. Raises
    BadFile, also where the header's counts are not those of the lines.
    """
    check_file(path)
    text = re.sub("#.*", "", Path(path).read_text(encoding="ascii", errors="replace")).lstrip()
    rows = [line.split() for line in text[3:].splitlines() if line.strip()]
    try:
        n_vertices, n_faces = int(rows[0][0]), int(rows[0][1])
        corners, faces = rows[1:1 + n_vertices], rows[1 + n_vertices:]
        if text[:3].upper() != "OFF" or len(faces) != n_faces:
            raise ValueError
        vertices = np.array(corners, np.float64)
        triangles = [(row[1], row[i], row[i + 1]) for row in faces for i in range(2, int(row[0]))]
        triangles = np.array(triangles, np.int64).reshape(-1, 3)
    except (ValueError, IndexError):
        raise BadFile(path, "is cut off, or no OFF mesh: its header does not count its lines, or a "
                            "coordinate or a face is not as it should be") from None
    if vertices.shape != (n_vertices, 3) or not np.isfinite(vertices).all():
        raise BadFile(path, "has a vertex that is not x y z: its header may count wrongly")
    if any(int(row[0]) < 1 for row in faces):
        raise BadFile(path, "has a line that is not a face: its header may count wrongly")
    if not len(triangles) or triangles.min() < 0 or triangles.max() >= n_vertices:
        raise BadFile(path, f"has no faces, or a corner beyond its {n_vertices} vertices")
    return vertices, triangles


def render(vertices, triangles, azimuth, elevation=30, size=256):
    """A shaded grey picture of a mesh on white, from `azimuth` and `elevation` in degrees: uint8
    (1, size, size). Raises ValueError for a mesh without extent.

    z is up; azimuth 0 looks from the side of negative y, 180 from the opposite one. Orthographic;
    the sphere around all that can be seen fills the picture: neither vertices that no face uses
    count, nor faces with two corners at one place. Flat shading on both sides of a face (ModelNet's
    faces do not agree on which is out), twice supersampled. Scan lines of all triangles are
    rasterised at once, the nearest fragment wins its pixel.
    """
    p, q, r = vertices[triangles].swapaxes(0, 1)
    apart = (p != q).any(1) & (q != r).any(1) & (r != p).any(1)
    if not apart.any():
        raise ValueError("has no extent")
    used, triangles = np.unique(triangles[apart], return_inverse=True)
    vertices, triangles = vertices[used], triangles.reshape(-1, 3)      # NumPy 2.0 returns it flat
    points = vertices - (vertices.max(0) / 2 + vertices.min(0) / 2)
    points /= max(np.abs(points).max(), 1e-300)         # first to 1: squares stay finite
    radius = np.sqrt((points ** 2).sum(1).max())
    if not radius > 0 or not np.isfinite(points).all():
        raise ValueError("has no extent")
    a, e = np.radians(azimuth), np.radians(elevation)
    towards = np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])    # the camera
    right = np.array([np.cos(a), np.sin(a), 0.0])
    points = points @ np.stack([right, np.cross(towards, right), towards], 1) / radius
    wide = 2 * size
    corners = (points * [1, -1, 1] * 0.95 + [1, 1, 0]) * [wide / 2, wide / 2, 1]
    corners = corners[triangles]                        # (F, 3, xyz), pixels and depth

    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = np.cross(edge1 * [1, -1, wide / 2], edge2 * [1, -1, wide / 2])
    length = np.sqrt((normal ** 2).sum(1))
    # neither degenerate nor edge-on
    seen = (length > 0) & (np.abs(normal[:, 2]) > 1e-9 * length)
    corners, normal, length = corners[seen], normal[seen], length[seen]
    normal *= (np.sign(normal[:, 2]) / length)[:, None]
    light = np.array([-0.35, 0.65, 0.67])               # from the upper left
    shade = 0.25 + 0.65 * np.clip(normal @ light, 0, 1)
    slope = -normal[:, :2] * [1, -1] / normal[:, 2:] / (wide / 2)     # of the depth, along x and y

    x, y, depth = corners[..., 0], corners[..., 1], corners[..., 2]
    nearest = np.full(wide * wide, np.iinfo(np.uint64).max, dtype=np.uint64)
    top, bottom = np.ceil(y.min(1) - 0.5).astype(int), np.ceil(y.max(1) - 0.5).astype(int)
    chunk = np.cumsum((bottom - top) * (x.max(1) - x.min(1) + 1)) // 4e6    # bounds the memory
    for part in (np.flatnonzero(chunk == c) for c in np.unique(chunk)):
        face, row = _expand(part, top[part], bottom[part])
        crossing = np.full((2, len(face)), np.inf)      # where the scan line enters, leaves (minus)
        for i, j in ((0, 1), (1, 2), (2, 0)):
            yi, yj = y[face, i] - 0.5, y[face, j] - 0.5
            crosses = (yi <= row) != (yj <= row)
            with np.errstate(divide="ignore", invalid="ignore"):
                at = x[face, i] + (row - yi) / (yj - yi) * (x[face, j] - x[face, i])
            crossing[0] = np.where(crosses, np.minimum(crossing[0], at), crossing[0])
            crossing[1] = np.where(crosses, np.minimum(crossing[1], -at), crossing[1])
        first, last = np.ceil(crossing[0] - 0.5), np.ceil(-crossing[1] - 0.5)
        line, column = _expand(np.arange(len(face)), first.astype(int), last.astype(int))
        face, row = face[line], row[line]
        z = (depth[face, 0] + slope[face, 0] * (column + 0.5 - x[face, 0])
             + slope[face, 1] * (row + 0.5 - y[face, 0]))
        far = (np.clip((1 - z) / 2, 0, 1) * 0x7FFFFFFF).astype(np.uint64)
        np.minimum.at(nearest, row * wide + column, far << np.uint64(32) | face.astype(np.uint64))
    picture = np.ones(wide * wide)
    hit = nearest != np.iinfo(np.uint64).max
    picture[hit] = shade[(nearest[hit] & np.uint64(0xFFFFFFFF)).astype(int)]
    picture = picture.reshape(size, 2, size, 2).mean((1, 3))
    return (picture * 255).round().astype(np.uint8)[None]


def _expand(owners, first, last):
    """Every whole number in [first, last) of each owner: (owners repeated, the numbers)."""
    counts = np.maximum(last - first, 0)
    starts = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return np.repeat(owners, counts), starts + np.arange(counts.sum())
