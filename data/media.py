"""Raw files to arrays: sound and video through PyAV (whose wheel brings FFmpeg), pictures, and meshes seen from a side.

Used by `python -m data.prepare` alone; training never imports this module. Everything here raises BadFile, with a
reason a person can act on, for a file that cannot be used.
"""

import os
from pathlib import Path

import numpy as np

RATE = 16_000
COLOURS = (0, 1, 3, 4)    # numbers behind a face's corners in OFF: none, an index, RGB, RGBA
HELD = 256 * 2 ** 20      # bytes of decoded frames that are kept until it is known which are wanted


class BadFile(Exception):
    """A file that cannot be used: `path` and the reason."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self):      # crosses a process boundary
        return BadFile, (self.path, self.reason)


def check_file(path):
    """Raise BadFile for a file that is missing, empty, the Git LFS pointer to a file, or a RIFF (WAV, AVI) cut short."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadFile(path, "is missing" if isinstance(error, FileNotFoundError) else error.strerror) from None
    if not start:
        raise BadFile(path, "is empty")
    if start.startswith(b"version https://git-lfs"):
        raise BadFile(path, "is a Git LFS pointer, not the file itself: run `git lfs pull`, or use a mirror (see README)")
    declared = int.from_bytes(start[4:8], "little") + 8
    if start.startswith(b"RIFF") and size < declared < 2 ** 32 - 1:     # that much is written where nobody knows
        raise BadFile(path, f"is cut off: {size} of {declared} bytes")


def decode_stream(path, kind, what, keep=lambda frame: frame):
    """[(seconds, keep(frame))] of the first stream of a kind, and the length in seconds that the container claims."""
    import av
    av.logging.set_level(av.logging.PANIC)
    check_file(path)
    frames = []
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = next(iter(getattr(container.streams, kind)), None)
            if stream is None:
                raise BadFile(path, f"has no {what}")
            stream.thread_type = "NONE"      # the pool has every core already
            claimed = float((stream.duration or 0) * (stream.time_base or 0)) or (container.duration or 0) / 1e6
            try:
                for frame in container.decode(stream):
                    frames.append((frame.time if frame.time is not None else len(frames) / 25, keep(frame)))
            except av.error.FFmpegError:
                if not frames:
                    raise
            except IndexError:      # PyAV's, after the last frame, over a stream that appeared on the way
                pass
    except av.error.FFmpegError as error:
        raise BadFile(path, f"cannot be decoded: {error.strerror}") from None
    if not frames:
        raise BadFile(path, f"has no {what}")
    return frames, claimed


def _check_length(path, what, seconds, claimed):
    if seconds < 0.8 * claimed - 0.5:
        raise BadFile(path, f"is cut off: {what} for {seconds:.1f} of {claimed:.1f} s")


def read_audio(path, start=0.0, stop=None):
    """The sound of a file from `start` to `stop` seconds: (L,) int16, mono, 16 kHz.

    Channels are averaged; torchaudio resamples. Raises BadFile also where that leaves less than one window (512 samples).
    """
    import av
    import torch
    import torchaudio
    frames, claimed = decode_stream(path, "audio", "sound")
    rate = frames[0][1].sample_rate
    to_float = av.AudioResampler("fltp", frames[0][1].layout, rate)
    blocks = [block for frame in (*(frame for _, frame in frames), None) for block in to_float.resample(frame)]
    sound = np.concatenate([block.to_ndarray() for block in blocks], 1).mean(0)
    _check_length(path, "sound", len(sound) / rate, claimed)
    offset = round((start - frames[0][0]) * rate)       # streams need not begin at 0
    sound = np.concatenate([np.zeros(max(0, -offset), np.float32), sound[max(0, offset):]])
    if stop is not None:
        sound = sound[:round((stop - start) * rate)]
    if len(sound) * RATE < 512 * rate:
        raise BadFile(path, f"has only {len(sound) / rate:.3f} s of sound from {start:g} s on")
    sound = torchaudio.functional.resample(torch.from_numpy(sound), rate, RATE)
    if not sound.isfinite().all():
        raise BadFile(path, "has samples that are not finite")
    return (sound * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()


def fit_length(sound, samples):
    """A sound of exactly `samples`: its beginning, repeated if it is too short, as the OGM-GE code does."""
    return np.tile(sound, -(-samples // len(sound)))[:samples]


def read_frames(path, choose, size=256):
    """Frames of a video, squashed to size x size: uint8 (T, 3, size, size), and the (height, width) they came from.

    choose(times, end)  times of all frames in seconds and the time the last one ends -> the T indices wanted.
    """
    held = 0

    def squashed(frame):                 # the area filter uses every source pixel
        small = frame.reformat(size, size, "rgb24", interpolation="AREA").to_ndarray()
        return small, frame.height, frame.width, round(getattr(frame, "rotation", 0) / 90) % 4

    def keep(frame):                     # few frames are wanted, but a long clip of large ones would not fit into memory
        nonlocal held
        held += sum(plane.buffer_size for plane in frame.planes)
        return frame if held < HELD else squashed(frame)

    frames, claimed = decode_stream(path, "video", "picture", keep)
    times = np.array([time for time, _ in frames])
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.04
    end = times[-1] + gap
    _check_length(path, "picture", end, claimed)
    wanted = [frame if isinstance(frame, tuple) else squashed(frame) for frame in (frames[i][1] for i in choose(times, end))]
    _, height, width, turn = wanted[0]                               # turn: a phone held upright
    pictures = np.rot90(np.stack([small for small, *_ in wanted]), turn, axes=(1, 2)).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pictures), ((width, height) if turn % 2 else (height, width))


def evenly(n):
    """`choose` for `read_frames`: the middle of each of n equal parts of the clip."""
    return lambda times, end: within(times[0], end, n)(times, end)


def within(start, stop, n):
    """`choose` for `read_frames`: the frame nearest to the middle of each of n equal parts of [start, stop]."""
    middles = start + (np.arange(n) + 0.5) * (stop - start) / n
    return lambda times, end: np.abs(times[:, None] - middles).argmin(0)


def read_picture(path, mode="RGB"):
    """A JPEG or PNG: uint8 (C, H, W); mode "RGB" or "L" (grey)."""
    from PIL import Image
    check_file(path)
    try:
        with Image.open(path) as picture:
            if picture.mode in ("RGBA", "LA", "P"):      # on white, as these renders are meant to be seen
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
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
    text = Path(path).read_text(encoding="ascii", errors="replace")
    lines = [line for line in (raw.split("#", 1)[0].strip() for raw in text.splitlines()) if line]
    if not lines or not lines[0].upper().startswith("OFF"):
        raise BadFile(path, "is no OFF mesh: it does not begin with OFF")
    rows = [row for row in (lines[0][3:].split(), *map(str.split, lines[1:])) if row]
    try:
        n_vertices, n_faces = (int(count) for count in rows[0][:2])
        corners, faces = rows[1:1 + n_vertices], rows[1 + n_vertices:]
        counted = f"{len(rows) - 1} lines for {n_vertices} vertices and {n_faces} faces"
        if min(n_vertices, n_faces) < 0 or len(faces) < n_faces:
            raise BadFile(path, f"is cut off: {counted}")
        if len(faces) > n_faces:
            raise BadFile(path, f"has more than its header says: {counted}")
        if any(len(row) != 3 for row in corners):
            raise BadFile(path, f"has a line among its {n_vertices} vertices that is not x y z: "
                                "its header may count wrongly")
        if faces and len(faces[-1]) <= int(faces[-1][0]):
            raise BadFile(path, "is cut off: its last face lacks corners")
        if not all(int(row[0]) > 0 and len(row) - 1 - int(row[0]) in COLOURS for row in faces):
            raise BadFile(path, f"has a line among its {n_faces} faces that is none: its header "
                                "may count wrongly")
        vertices = np.array(corners, dtype=np.float64).reshape(-1, 3)
        triangles = np.array([(row[1], row[i], row[i + 1])
                              for row in faces for i in range(2, int(row[0]))],
                             dtype=np.int64).reshape(-1, 3)
    except (ValueError, IndexError):
        raise BadFile(path, "is no OFF mesh: a count, a coordinate or a face is not what it should "
                            "be") from None
    if len(triangles) == 0:
        raise BadFile(path, "has no faces")
    if triangles.min() < 0 or triangles.max() >= n_vertices:
        raise BadFile(path, f"has a face with a corner that is none of its {n_vertices} vertices")
    if not np.isfinite(vertices).all():
        raise BadFile(path, "has vertices that are not finite")
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
    centre = vertices.max(0) / 2 + vertices.min(0) / 2
    points = (vertices - centre) / max(np.abs(vertices - centre).max(), 1e-300)     # first to 1: squares stay finite
    radius = np.sqrt((points ** 2).sum(1).max())
    if not radius > 0 or not np.isfinite(points).all():
        raise ValueError("has no extent")
    a, e = np.radians(azimuth), np.radians(elevation)
    towards = np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])  # from the mesh to the camera
    right = np.array([np.cos(a), np.sin(a), 0.0])
    points = points @ np.stack([right, np.cross(towards, right), towards], 1) / radius      # right, up, towards us
    wide = 2 * size
    corners = (points * [1, -1, 1] * 0.95 + [1, 1, 0]) * [wide / 2, wide / 2, 1]
    corners = corners[triangles]                                                    # (F, 3, xyz), pixels and depth

    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = np.cross(edge1 * [1, -1, wide / 2], edge2 * [1, -1, wide / 2])
    length = np.sqrt((normal ** 2).sum(1))
    seen = (length > 0) & (np.abs(normal[:, 2]) > 1e-9 * length)                    # neither degenerate nor edge-on
    corners, normal, length = corners[seen], normal[seen], length[seen]
    normal *= (np.sign(normal[:, 2]) / length)[:, None]
    light = np.array([-0.35, 0.65, 0.67])                                           # from the upper left
    shade = 0.25 + 0.65 * np.clip(normal @ light, 0, 1)
    slope = -normal[:, :2] * [1, -1] / normal[:, 2:] / (wide / 2)                   # d depth / d x, d depth / d y

    x, y, depth = corners[..., 0], corners[..., 1], corners[..., 2]
    nearest = np.full(wide * wide, np.iinfo(np.uint64).max, dtype=np.uint64)
    top, bottom = np.ceil(y.min(1) - 0.5).astype(int), np.ceil(y.max(1) - 0.5).astype(int)
    chunk = np.cumsum((bottom - top) * (x.max(1) - x.min(1) + 1)) // 4e6            # bounds the memory
    for part in (np.flatnonzero(chunk == c) for c in np.unique(chunk)):
        face, row = _expand(part, top[part], bottom[part])
        crossing = np.full((2, len(face)), np.inf)                                  # where the scan line enters, leaves
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
        z = depth[face, 0] + slope[face, 0] * (column + 0.5 - x[face, 0]) + slope[face, 1] * (row + 0.5 - y[face, 0])
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
