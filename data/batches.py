"""Arrays to augmented float batches on the device.

Every modality leaves here as float32 (B, T, C, H, W). All random numbers of an epoch (order, crops,
flips) are drawn at its start from the generator that is passed in, so a run can be repeated bit for
bit, and no step waits for them.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from data.store import PICTURES, WINDOW, check

HOP, RATE = WINDOW - 353, 16_000            # samples, Hz
IMAGENET = {1: ([0.449], [0.226]),          # channels: mean, std
            3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}
FLOW_STD = 0.226                            # the scale TSN gives to flow pictures in [0, 1]


def pick_device(gpu=None, amp="auto"):
    """--gpu and --amp -> the device, and the precision of the networks there.

    gpu  its number; None: the first GPU, or the CPU where there is none
    amp  bf16, fp16, off (float32), or auto: bfloat16 on a GPU (float16 before Ampere), float32 on a
         CPU
    Raises DataError for a GPU that is not there.
    """
    check(gpu is None or 0 <= gpu < torch.cuda.device_count(),
          f"--gpu {gpu}: this machine has {torch.cuda.device_count()} GPUs")
    if not torch.cuda.is_available():
        device, best = torch.device("cpu"), "off"
    else:
        device = torch.device("cuda", gpu or 0)
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precisions = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)
    return device, precisions[best if amp == "auto" else amp]


@functools.cache          # constants are sent to the device once: a step must not wait for them
def imagenet(channels, device):
    """ImageNet's mean and std for pictures in [0, 255]: (2, channels, 1, 1)."""
    return torch.tensor(IMAGENET[channels], device=device).mul(255)[..., None, None]


@functools.cache
def tukey(device):
    """The window of `log_spectrogram`, Tukey's (0.25), scaled to unit power a Hz: (512,)."""
    ramp = 0.5 * (1 - torch.cos(torch.pi * torch.arange(64, device=device) / 64))
    # scipy asks for the periodic window: 513 points, the last one cut; each ramp is an eighth
    window = torch.cat([ramp, torch.ones(385, device=device), ramp[1:].flip(0)])
    return window / (RATE * window.square().sum()).sqrt()


def log_spectrogram(waveform, standardize=False):
    """(B, L) int16 at 16 kHz -> (B, 1, 1, 257, F) float, F = (L - 353) // 159.

    log(power + 1e-7) with the power spectral density of `scipy.signal.spectrogram(x, 16000,
    nperseg=512, noverlap=353)`: Tukey window (0.25), each window's mean removed, one-sided density.
    `standardize` brings each clip to mean 0 and standard deviation 1, as the published code does
    for AVE.
    """
    frames = (waveform.float() / 32768).unfold(-1, WINDOW, HOP)         # (B, F, 512)
    frames = frames - frames.mean(-1, keepdim=True)                     # a copy, in place from here
    spectrum = torch.fft.rfft(frames.mul_(tukey(frames.device)))
    power = spectrum.real.square() + spectrum.imag.square()
    power[..., 1:-1] *= 2                           # one-sided: all but 0 Hz and Nyquist
    spectrogram = power.add_(1e-7).log_()
    if standardize:
        mean = spectrogram.mean((1, 2), keepdim=True)
        std = spectrogram.std((1, 2), keepdim=True, correction=0)
        spectrogram = spectrogram.sub_(mean).div_(std + 1e-9)
    return rearrange(spectrogram, "b t f -> b 1 1 f t")


def draw_boxes(frame, scale, generator, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes for N frames at once, in pixels of the original frame: (N, 2)
    heights and widths -> (N, 4) top, left, height, width.

    As in torchvision: ten tries of an area in `scale` and an aspect in `ratio` (log-uniform), the
    first that fits; else the largest central box whose aspect is within `ratio`.
    """
    height, width = frame.double().unsqueeze(-1).unbind(1)              # (N, 1) each
    n = len(frame)
    area = height * width * torch.empty(n, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(n, 10).uniform_(*np.log(ratio), generator=generator).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, some = fits.int().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    inside = (width / height).clamp(*ratio)                             # the fallback's aspect
    w = torch.where(some, w.gather(1, first), (height * inside).round().minimum(width))
    h = torch.where(some, h.gather(1, first), (width / inside).round().minimum(height))
    top = (torch.rand(n, 1, generator=generator) * (height - h + 1)).floor()
    left = (torch.rand(n, 1, generator=generator) * (width - w + 1)).floor()
    top = torch.where(some, top, (height - h) // 2)
    left = torch.where(some, left, (width - w) // 2)
    return torch.cat([top, left, h, w], 1)


def affine(box):
    """(N, 4) boxes as shares of the frame (top, left, height, width) -> `crop`'s (N, 2, 3).
    A negative width mirrors."""
    top, left, h, w = box.unbind(1)
    zero = torch.zeros_like(top)
    # grid_sample's frame is [-1, 1]: a box is scaled by its share and moved to its centre
    return torch.stack([torch.stack([w, zero, 2 * left + w.abs() - 1], 1),
                        torch.stack([zero, h, 2 * top + h - 1], 1)], 1)


def crop(pictures, theta, size):
    """(B, C, H, W) and (B, 2, 3) from `affine` -> (B, C, *size) float32, bilinear."""
    grid = F.affine_grid(theta, [*pictures.shape[:2], *size], align_corners=False)
    return F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)


def normalize(pictures, kind):
    """(B, T, C, H, W) float in [0, 255], in place: pictures by ImageNet's mean and std, flow so
    that no motion is 0."""
    if kind == "flow":
        return pictures.sub_(127.5).div_(255 * FLOW_STD)
    mean, std = imagenet(pictures.shape[2], pictures.device)
    return pictures.sub_(mean).div_(std)


def to_input(mod, stored, theta=None):
    """A stored batch (B, ...) -> float32 (B, T, C, H, W), the encoder's input. `theta` (B, 2, 3):
    what `crop` takes, None for whole pictures."""
    if mod.kind == "audio":
        return log_spectrogram(stored, mod.standardize)
    if mod.kind == "spectrogram":
        return ((stored.float() - mod.mean) / mod.std).unsqueeze(1)
    t = stored.shape[1]
    if theta is None and tuple(stored.shape[-2:]) == mod.size:
        pictures = stored.float()
    else:
        if theta is None:
            theta = torch.eye(2, 3, device=stored.device).expand(len(stored), 2, 3)
        pictures = rearrange(crop(rearrange(stored, "b t c h w -> b (t c) h w"), theta, mod.size),
                             "b (t c) h w -> b t c h w", t=t)
        if mod.kind == "flow":              # mirrored, motion to the right is motion to the left
            mirrored = (theta[:, 0, 0] < 0)[:, None, None, None]
            pictures[:, :, 0] = torch.where(mirrored, 255 - pictures[:, :, 0], pictures[:, :, 0])
    return normalize(pictures, mod.kind)


class Batches:
    """One pass over a part: iterates (inputs, labels, index), inputs[name] float32 (B, T, C, H, W).

    With `augment`, items come shuffled, pictures cropped and flipped, all drawn from `generator`;
    what does not fill a last batch is left out (other items each time), since BatchNorm's
    statistics of two items wreck a small training run. Without, every item comes once, in order.
    Raises DataError for a batch that the part cannot fill.
    """

    def __init__(self, ds, part, batch_size, device, augment=False, generator=None):
        self.ds, self.batch_size, self.device = ds, batch_size, torch.device(device)
        self.order = ds.indices(part)
        self.boxes = {}
        if augment:
            self.order = self.order[torch.randperm(len(self.order), generator=generator).numpy()]
            check(batch_size <= len(self.order),
                  f"batch size {batch_size} is larger than the {len(self.order)} {part} items")
            self.order = self.order[:len(self.order) // batch_size * batch_size]
            for name, mod in ds.modalities.items():
                if mod.kind in PICTURES:
                    self.boxes[name] = self._draw(name, mod, generator)

    def _draw(self, name, mod, generator):
        """Boxes of this pass as shares of the frame, mirrored ones with negative width: (n, 4)."""
        for other, boxes in self.boxes.items():             # flow and rgb see the same crop
            if {mod.kind, self.ds.modalities[other].kind} == {"rgb", "flow"}:
                return boxes
        if mod.frame is None:
            frame = torch.tensor(mod.array.shape[-2:]).expand(len(self.order), 2)
        else:
            frame = torch.from_numpy(mod.frame[self.order])
        boxes = draw_boxes(frame, mod.scale, generator) / torch.cat([frame, frame], 1)
        if mod.flip:
            mirrored = torch.rand(len(self.order), generator=generator) < 0.5
            boxes[:, 3] = torch.where(mirrored, -boxes[:, 3], boxes[:, 3])
        return boxes.float()

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __iter__(self):
        resident = self.ds.resident(self.device)
        labels = torch.from_numpy(self.ds.labels[self.order]).to(self.device)
        index = torch.from_numpy(self.order).to(self.device)
        theta = {name: affine(boxes.to(self.device)) for name, boxes in self.boxes.items()}

        def fetch(rows):
            """The stored items on the device: gathered there, or read and sent over."""
            if resident:
                return {name: array[index[rows]] for name, array in resident.items()}
            stored = {name: torch.from_numpy(mod.array[self.order[rows]])
                      for name, mod in self.ds.modalities.items()}
            if self.device.type == "cuda":
                stored = {name: array.pin_memory().to(self.device, non_blocking=True)
                          for name, array in stored.items()}
            return stored

        batches = [slice(start, start + self.batch_size)
                   for start in range(0, len(self.order), self.batch_size)]
        with ThreadPoolExecutor(1) as reader:               # reads one batch ahead
            ahead = reader.submit(fetch, batches[0]) if batches else None
            for number, rows in enumerate(batches):
                stored = ahead.result()
                if number + 1 < len(batches):
                    ahead = reader.submit(fetch, batches[number + 1])
                inputs = {}
                for name, mod in self.ds.modalities.items():
                    boxes = theta[name][rows] if name in theta else None
                    inputs[name] = to_input(mod, stored[name], boxes)
                yield inputs, labels[rows], index[rows]
