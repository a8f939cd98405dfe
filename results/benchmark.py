"""What the data path, the losses and the training steps cost, as ratios within one run: machines are shared and noisy, so
seconds elsewhere will differ.

    python results/benchmark.py [--gpu N] [--only SECTION ...] [--raw cremad=DIR ave=DIR ...]
    python results/benchmark.py --readme          # write README's table from the files that stand

Figures are medians of five repetitions and go to results/benchmark-<device>.json, a section at a time. Arrays are random
bytes in the shapes of the datasets: good for throughput, not for accuracy. --raw times the preparation of real files.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import multiprocessing
import operator
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms as transforms
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).parent.parent))
import dimml  # noqa: E402
import joint_baseline  # noqa: E402
import udi  # noqa: E402
from data import cli, media, open_dataset, store  # noqa: E402

HERE = Path(__file__).parent
BEGIN, END = "<!-- results.benchmark begins -->", "<!-- results.benchmark ends -->"
REPEATS = 5
PICTURES = {"kind": "rgb", "shape": (1, 3, 256, 256)}
SHAPES = {    # modalities as prepared; items in train and test
    "cremad": ({"audio": {"kind": "audio", "shape": (48_000,)}, "rgb": {"kind": "rgb", "shape": (3, 3, 256, 256)}}, 6698, 744),
    "ave": ({"audio": {"kind": "audio", "shape": (160_000,), "standardize": True},
             "rgb": {"kind": "rgb", "shape": (4, 3, 256, 256)}}, 3338, 402),
    "ucf101": ({"flow": {"kind": "flow", "shape": (10, 2, 256, 256)}, "rgb": PICTURES}, 9537, 3783),
    "modelnet40": ({view: {"kind": "view", "shape": (1, 1, 256, 256)} for view in ("front", "rear")}, 9843, 2468),
}


def seconds_in_turns(functions, clock=time.perf_counter, device=None, turns=REPEATS):
    """Time of each of {name: function} in each turn, after one to warm up: {name: [seconds]}.

    They take turns, so that a machine that slows down slows all of them.
    """
    spent = {name: [] for name in functions}
    for _ in range(turns + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            spent[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in spent.items()}


def median_seconds(function, clock=time.perf_counter, device=None):
    """Median time of `function()` over REPEATS calls, after one to warm up."""
    return statistics.median(seconds_in_turns({"": function}, clock, device)[""])


def cpu_seconds(function):
    return median_seconds(function, time.process_time)


def random_folder(folder, modalities, n, frame=None, n_test=8):
    """A prepared folder of random bytes, `n` items for train and `n_test` for test."""
    rng, specs = np.random.default_rng(0), {}
    for name, spec in modalities.items():
        options = {key: value for key, value in spec.items() if key != "shape"}
        shape = (n + n_test, *spec["shape"])
        array = (rng.integers(-3000, 3000, shape, dtype=np.int16) if spec["kind"] == "audio" else
                 rng.integers(0, 256, shape, dtype=np.uint8))
        specs[name] = {**options, "array": array}
        if frame and spec["kind"] == "rgb":
            specs[name]["frame"] = np.tile(frame, (n + n_test, 1))
    labels = np.arange(n + n_test) % 4
    return str(store.write(folder, specs, labels, {"official": np.where(np.arange(n + n_test) < n, 0, 2)}, list("abcd"),
                           [str(i) for i in range(n + n_test)]))


def quiet_run(script, name, argv):
    """A script's Run on a folder, its output thrown away, entered and ready to train."""
    parser = argparse.ArgumentParser(script.__name__)
    cli.common_flags(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        return script.Run(cli.parse(parser, [*argv, "--val", "0"]), script.RECIPES, name)


class OneBatch:
    """A pass of as many steps as `batches` has, each on its first batch, which is on the device already."""

    def __init__(self, batches):
        self.batch_size, self.steps, self.batch = batches.batch_size, len(batches), next(iter(batches))

    def __len__(self):
        return self.steps

    def __iter__(self):
        return iter([self.batch] * self.steps)


def gpu_flag(device):
    return ["--gpu", str(device.index)] if device.type == "cuda" else []


@contextlib.contextmanager
def first_stage(device, name, batch, steps):
    """DI-MML's first stage with DUC on a dataset's shapes: its Run, its model, and a function that makes a pass over batches."""
    with tempfile.TemporaryDirectory() as scratch:
        n_test = 64 if device.type == "cuda" else 8
        dataset = random_folder(f"{scratch}/{name}", SHAPES[name][0], batch * steps, n_test=n_test) if name in SHAPES else name
        flags = ["--dataset", dataset, "--batch-size", str(batch), "--out", scratch, *gpu_flag(device)]
        with quiet_run(dimml, "dimml", flags) as run:
            in_channels = {m: mod.in_channels for m, mod in run.ds.modalities.items()}
            model = run.restore(dimml.DIMML(in_channels, len(run.ds.classes))).train()
            for m in in_channels:
                getattr(model, f"effective_{m}").copy_(torch.rand(512) < 0.5)

            def losses(inputs, labels, _):
                z = model.features(inputs)
                logits = [*model.own_logits(z).values(), *map(model.shared_head, z.values())]
                return {"all": sum(F.cross_entropy(o, labels) for o in logits) + dimml.duc_loss(z, model.effective(), 50.0)}

            own_batches = run.ds.batches

            def one_pass(batches=own_batches):
                torch.use_deterministic_algorithms(True)     # the usual way, between the turns, switches it off
                run.ds.batches, run.history = batches, []
                run.train_epoch(losses, optimizer)
                run.ds.batches = own_batches

            optimizer, run.stage, run.record = run.optimizer(model.parameters()), "measured", {}
            yield run, model, one_pass


def epochs_of(device, name, batch, steps):
    """A real training epoch of DI-MML's first stage against the same steps on one batch on the device: the limit."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with first_stage(device, name, batch, steps) as (run, model, one_pass):
        still = OneBatch(run.ds.batches("train", batch, run.device, True, run.generator))
        passes = {"real": one_pass, "limit": lambda: one_pass(lambda *_: still)}
        if device.type == "cuda":          # there the arrays may lie on the device
            mapped = copy.copy(run.ds)
            mapped.resident = lambda device: None
            passes["memory map"] = lambda: one_pass(mapped.batches)
        seconds = seconds_in_turns(passes, device=device)
        rates = {source: batch * len(still) / statistics.median(turns) for source, turns in seconds.items()}
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        test = median_seconds(lambda: run.collect(model.features, "test"), device=device) / run.sizes["test"]
        _, n_train, n_test = SHAPES.get(name) or (None, run.sizes["train"], run.sizes["test"])
        epoch = n_train / rates["real"] + n_test * test
        return {"batch": batch, "precision": run.config["amp"], "items_a_second": rates["real"], "limit": rates["limit"],
                "share_of_limit": statistics.median(map(operator.truediv, seconds["limit"], seconds["real"])),
                "from_memory_map": rates.get("memory map"), "seconds_an_epoch": epoch,
                "minutes_a_full_run": epoch * (run.recipe["epochs"] + run.recipe["fusion_epochs"]) / 60,
                "peak_device_bytes": peak}


def epochs(device):
    """All datasets' shapes; on a CPU small batches and few steps, which take long enough."""
    batch, steps = (16, 100) if device.type == "cuda" else (4, 3)
    figures = {name: epochs_of(device, name, batch, steps) for name in SHAPES}
    return {"synthetic": epochs_of(device, "synthetic", 16, 16), **figures}


# -------------------------------------------------------------------------------------------- the usual way
class UsualDataset(TorchDataset):
    """As most repositories of the field load an item: JPEG frames through PIL and torchvision's transforms, one by one,
    and an unpickled float32 spectrogram. The files are held in memory, so that no disk is timed."""

    def __init__(self, n, frames, height, width, spectrogram):
        rng = np.random.default_rng(0)
        self.n, self.frames, self.jpegs = n, frames, []
        self.augment = transforms.Compose([
            transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
        for _ in range(n * frames):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            jpeg = io.BytesIO()
            coarse.resize((width, height), Image.BICUBIC).save(jpeg, "JPEG", quality=90)
            self.jpegs.append(jpeg.getvalue())
        self.pickled = pickle.dumps(rng.normal(size=spectrogram).astype(np.float32))

    def __len__(self):
        return self.n

    def __getitem__(self, item):
        jpegs = self.jpegs[item * self.frames:(item + 1) * self.frames]
        frames = torch.stack([self.augment(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])
        return torch.from_numpy(pickle.loads(self.pickled))[None], frames, item % 4


def usual_contrast(z_s, z_t, dimensions, tau):
    """DUC for one pair as a Python loop over the batch."""
    loss = 0
    for i in range(len(z_s)):
        numerator = torch.exp((z_s[i][dimensions] * z_t[i][dimensions]).sum() / tau)
        denominator = sum(torch.exp((z_s[i][dimensions] * z_t[j][dimensions]).sum() / tau) for j in range(len(z_t)))
        loss = loss - torch.log(numerator / denominator)
    return loss / len(z_s)


def usual_epoch(dataset, batch, device, dimensions):
    """One epoch as usual: DataLoader with workers, float32, contiguous, loops in Python."""
    def encoder(channels):
        net = resnet18(weights=None)
        net.conv1, net.fc = nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.Identity()
        return net.to(device)

    audio, rgb = encoder(1), encoder(3)
    heads = [nn.Linear(512, 4).to(device) for _ in range(3)]
    parameters = [p for module in (audio, rgb, *heads) for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(dataset, batch, shuffle=True, num_workers=max(1, len(os.sched_getaffinity(0)) // 2), persistent_workers=True)

    def one_pass():
        torch.use_deterministic_algorithms(False)
        right = [0] * 4
        for spectrogram, frames, labels in loader:
            spectrogram, frames, labels = spectrogram.to(device), frames.to(device), labels.to(device)
            z = audio(spectrogram), rgb(frames.flatten(0, 1)).view(len(labels), -1, 512).mean(1)
            own = [heads[m](z[m]) for m in (0, 1)]
            loss = sum(F.cross_entropy(logits, labels) for logits in (*own, heads[2](z[0]), heads[2](z[1])))
            for student in (0, 1):
                loss = loss + usual_contrast(z[student], z[1 - student].detach(), dimensions[student], 50.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for i in range(len(labels)):
                right[labels[i].item()] += int(own[0][i].argmax().item() == labels[i].item())

    return one_pass


def usual_way(device):
    """DI-MML's first stage on CREMA-D's shapes, end to end: items a second as usual and here."""
    batch, steps = (16, 50) if device.type == "cuda" else (8, 2)
    dimensions = [torch.rand(512, device=device) < 0.5 for _ in range(2)]
    usual = usual_epoch(UsualDataset(batch * steps, 3, 360, 480, (257, 299)), batch, device, dimensions)
    with first_stage(device, "cremad", batch, steps) as (_, _, ours):
        seconds = seconds_in_turns({"usual": usual, "ours": ours}, device=device)
    rates = {f"{way}_items_a_second": batch * steps / statistics.median(turns) for way, turns in seconds.items()}
    return {"batch": batch, **rates, "ratio": statistics.median(map(operator.truediv, seconds["usual"], seconds["ours"]))}


# ------------------------------------------------------------------------------------------------ the loader
def loader(device):
    """CPU time an item on one core, in milliseconds: as usual; here, augmented by `device`; and here if another device
    augments: the random numbers, the rows and the call of every kernel, but not its arithmetic. The calls are those of a
    pass over items of a few pixels, so a GPU need not be there; what its driver adds to a launch is not counted.
    """
    figures, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)          # waiting threads would be counted
    for name, height, width, spectrogram in (("ave", 360, 640, (257, 1004)), ("cremad", 360, 480, (257, 299))):
        modalities, n = SHAPES[name][0], 256
        frames = modalities["rgb"]["shape"][0]
        usual = UsualDataset(16, frames, height, width, spectrogram)
        tiny = {"audio": {**modalities["audio"], "shape": (600,)},
                "rgb": {**modalities["rgb"], "shape": (frames, 3, 9, 9), "size": (8, 8)}}
        with tempfile.TemporaryDirectory() as scratch:
            ds, few_pixels = (open_dataset(random_folder(f"{scratch}/{size}", spec, n, (height, width)), val=0)
                              for size, spec in (("whole", modalities), ("tiny", tiny)))

            def augmented(ds, device):
                for _ in ds.batches("train", 16, device, True, torch.Generator().manual_seed(0)):
                    pass

            def rows(ds):
                batches = ds.batches("train", 16, "cpu", True, torch.Generator().manual_seed(0))
                for step in range(len(batches)):
                    for mod in ds.modalities.values():
                        torch.from_numpy(mod.array[batches.items(step)])

            turns = seconds_in_turns({
                "usual": lambda: [usual[item] for item in range(16)], "here": lambda: augmented(ds, device),
                "read": lambda: rows(ds), "draws": lambda: rows(few_pixels), "calls": lambda: augmented(few_pixels, "cpu"),
            }, time.process_time)
            ms = {what: 1e3 * statistics.median(seconds) / (16 if what == "usual" else n) for what, seconds in turns.items()}
        elsewhere = ms["read"] - ms["draws"] + ms["calls"]
        figures[name] = {"usual_ms": ms["usual"], "ours_augmented_ms": ms["here"], "ours_augmented_elsewhere_ms": elsewhere,
                         "ratio_augmented": ms["usual"] / ms["here"], "ratio_augmented_elsewhere": ms["usual"] / elsewhere}
    torch.set_num_threads(threads)
    return figures


# --------------------------------------------------------------------------------- losses and single steps
def losses(device):
    """`duc_loss` at batch 64 against the loop; `effective_dimensions` at UCF101's size, its time and its memory."""
    z = [torch.randn(64, 512, device=device, requires_grad=True) for _ in range(2)]
    effective = {m: torch.rand(512, device=device) < 0.5 for m in "ab"}
    transferred = [effective["b"] & ~effective["a"], effective["a"] & ~effective["b"]]

    def fast():
        dimml.duc_loss(dict(zip("ab", z)), effective, 50.0).backward()

    def loop():
        sum(usual_contrast(z[s], z[1 - s].detach(), transferred[s], 50.0) for s in (0, 1)).backward()

    features, labels = torch.randn(9537, 512, device=device), torch.randint(0, 101, (9537,), device=device)
    seconds = median_seconds(lambda: dimml.effective_dimensions(features, labels, 101), device=device)
    quick, slow = (median_seconds(function, device=device) for function in (fast, loop))
    return {"duc_loss_ms": 1e3 * quick, "loop_ms": 1e3 * slow, "duc_ratio": slow / quick,
            "effective_dimensions_seconds": seconds, "effective_dimensions_bytes_beyond_input": dimensions_memory(9537, 101)}


def dimensions_memory(n, n_classes):
    """Growth of a fresh process's peak memory over one `effective_dimensions` of (n, 512) features, on the CPU, in bytes."""
    code = (f"import torch, dimml; x, y = torch.randn({n}, 512), torch.randint(0, {n_classes}, ({n},))\n"
            "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
            f"dimml.effective_dimensions(x[:{n_classes}], torch.arange({n_classes}), {n_classes})\n"
            "open('/proc/self/clear_refs', 'w').write('5')          # the peak counts from here\n"
            f"before = peak(); dimml.effective_dimensions(x, y, {n_classes}); print(1024 * (peak() - before))")
    return int(subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True).stdout)


def udi_step(device):
    """A step of UDI's stage 2 against a plain step of its follower plus the anchor's forward pass, on 112 x 112 pictures.

    Three times as often as elsewhere: the difference is small.
    """
    steps = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_folder(f"{scratch}/views", {view: {"kind": "view", "shape": (1, 3, 112, 112)} for view in "af"}, 16)
        with quiet_run(udi, "udi", ["--dataset", folder, "--epochs", "1", "--out", scratch, *gpu_flag(device)]) as run:
            model = run.restore(udi.UDI({view: 3 for view in "af"}, 4))
            inputs, labels, index = next(iter(run.ds.batches("train", 16, run.device, True, run.generator)))

            def take(losses, optimizer):          # in place of an epoch: what its steps would do
                def step():
                    with run.autocast():
                        terms = losses(inputs, labels, index)
                    optimizer.zero_grad(set_to_none=True)
                    sum(terms.values()).backward()
                    optimizer.step()
                steps[run.stage] = step
                run.record |= {"loss": {}, "items_per_second": 0}

            def forward():
                with torch.no_grad(), run.autocast():
                    model.encoders["a"](inputs["a"])

            run.train_epoch, run.evaluate, run.save = take, lambda *_: run.record.update(val={}), lambda: None
            with contextlib.redirect_stdout(io.StringIO()):
                udi.train_alone(run, model, "f")
                udi.guide(run, model, "a", "f")
            model.train_only("f")
            together = {"plain_step": steps["alone f"], "anchor_forward": forward, "guided_step": steps["guided f"]}
            seconds = seconds_in_turns(together, device=device, turns=3 * REPEATS)
    figures = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    plain, anchor, guided = figures.values()
    return figures | {"ratio": guided / (plain + anchor)}


def options(device):
    """What each setting brings by itself: seconds of a training step of one encoder on 16 pictures of 224 x 224.

    The base is float32, contiguous, not fused, with deterministic algorithms and no filling, as the scripts have them.
    """
    x, y = torch.randn(16, 1, 3, 224, 224, device=device), torch.randint(0, 4, (16,), device=device)

    def step(dtype=torch.float32, channels_last=False, compiled=False, fused=False, deterministic=True, filled=False):
        model = nn.Sequential(dimml.Encoder(3), nn.Linear(512, 4)).to(device)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4, fused=fused)
        forward = torch.compile(model) if compiled else model

        def one():
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = filled
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return one

    steps = {"float32": step(), "fused optimiser": step(fused=True), "channels_last": step(channels_last=True),
             "torch.compile": step(compiled=True), "bfloat16": step(torch.bfloat16),
             "bfloat16 + channels_last": step(torch.bfloat16, True), "non-deterministic algorithms allowed": step(deterministic=False),
             "new tensors filled first (PyTorch's default)": step(filled=True)}
    if device.type == "cuda":
        steps |= {"float16 + channels_last": step(torch.float16, True),
                  "bfloat16 + channels_last + torch.compile": step(torch.bfloat16, True, True)}
    turns = seconds_in_turns(steps, device=device, turns=3 * REPEATS)
    return {name: {"seconds": statistics.median(seconds),
                   "times_faster": statistics.median(map(operator.truediv, turns["float32"], seconds))} for name, seconds in turns.items()}


# --------------------------------------------------------------------------------------- memory and growth
def reading_memory(n):
    """Growth of this process's memory that is not page cache while it reads n items of UCF101's shapes, in bytes."""
    def anonymous():
        return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

    with tempfile.TemporaryDirectory() as scratch:
        folder = random_folder(f"{scratch}/ucf101", SHAPES["ucf101"][0], n)
        before, peak = anonymous(), 0
        for _ in open_dataset(folder, val=0).batches("train", 16, "cpu", True, torch.Generator().manual_seed(0)):
            peak = max(peak, anonymous())
    return peak - before


def memory(device):
    """The same for 256 and 1024 items, each in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {str(n): pool.apply(reading_memory, (n,)) for n in (256, 1024)}


def growth(device):
    """Seconds for 1, 2 and 4 times the work, and for the same work with 1, 2 and 4 processes of one thread."""
    figures = {"items": {}, "classes": {}}
    for times in (1, 2, 4):
        with tempfile.TemporaryDirectory() as scratch:
            spec = {"image": {"kind": "rgb", "shape": (1, 3, 32, 32), "flip": False}}
            folder = random_folder(f"{scratch}/items", spec, 64 * times)
            with quiet_run(joint_baseline, "joint", ["--dataset", folder, "--out", scratch, *gpu_flag(device)]) as run:
                model = run.restore(joint_baseline.Alone({"image": 3}, 4)).train()
                optimizer = run.optimizer(model.parameters())
                run.stage, run.record = "measured", {}

                def one_pass():
                    run.history = []
                    run.train_epoch(model.losses, optimizer)

                figures["items"][f"{times}x"] = median_seconds(one_pass, device=device)
        x, y = torch.randn(8000, 512, device=device), torch.arange(8000, device=device) % (25 * times)
        figures["classes"][f"{times}x"] = median_seconds(lambda: dimml.effective_dimensions(x, y, 25 * times), device=device)
    for count in (1, 2, 4) if device.type == "cpu" else ():
        with tempfile.TemporaryDirectory() as scratch:
            folder = random_folder(f"{scratch}/views", {"view": {"kind": "view", "shape": (1, 3, 112, 112)}}, 64)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                       "joint_baseline.py", "--modality", "view", "--dataset", folder, "--val", "0", "--epochs", str(REPEATS),
                       "--out", scratch]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True, env=environment)
            (path,) = Path(scratch).glob("*.json")
            figures.setdefault("processes", {})[f"{count}x"] = 64 / json.loads(path.read_text())["items_per_second"]
    return figures


# ---------------------------------------------------------------------------------------------- preparation
def rendering(device):
    """CPU seconds for one view of a ball of about 10,000 faces."""
    n = 72
    around, down = np.meshgrid(np.linspace(0, 2 * np.pi, n), np.linspace(0, np.pi, n))
    vertices = np.stack([np.cos(around) * np.sin(down), np.sin(around) * np.sin(down), np.cos(down)], -1).reshape(-1, 3)
    corner = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.stack([corner, corner + 1, corner + n], 1), np.stack([corner + 1, corner + n + 1, corner + n], 1)])
    return {"faces": len(faces), "seconds_a_view": cpu_seconds(lambda: media.render(vertices, faces, 0))}


def preparing(name, raw, most=4):
    """Items a second on one core for the first raw items that are there, and the share of it inside FFmpeg's decoders."""
    module, flow = importlib.import_module(f"data.{name}"), {"flow": "tvl1"} if name == "ucf101" else {}
    items = [item for item in module.index(Path(raw), flow).items if all(map(os.path.exists, item.files))][:most]
    decoding = [0.0]

    def timed(*arguments):
        start = time.process_time()
        frames = plain(*arguments)
        decoding[0] += time.process_time() - start
        return frames

    plain, media.decode_stream = media.decode_stream, timed
    try:
        whole = cpu_seconds(lambda: [module.decode(item, flow) for item in items])
    finally:
        media.decode_stream = plain
    return {"items": len(items), "seconds_an_item": whole / len(items), "share_in_decoder": decoding[0] / (REPEATS + 1) / whole}


# --------------------------------------------------------------------------------------------------- the table
SECTIONS = {"loader": loader, "losses": losses, "udi_step": udi_step, "options": options, "memory": memory, "growth": growth,
            "rendering": rendering, "usual_way": usual_way, "epochs": epochs}


def markdown(result):
    """The table of one benchmark file; a section that it lacks is left out."""
    rows = []
    for name, figure in result.get("epochs", {}).items():
        rows.append((f"a training epoch on {name}'s shapes, of the limit (one batch, already there)",
                     f"{figure['share_of_limit']:.0%}; {figure['items_a_second']:.3g} items/s in {figure['precision']}, batch "
                     f"{figure['batch']}; about {figure['minutes_a_full_run']:.0f} min a full run"
                     + (f"; {figure['peak_device_bytes'] / 2 ** 30:.1f} GiB of the device" if figure["peak_device_bytes"] else "")))
        if figure["from_memory_map"]:
            rows.append((f"{name}'s arrays on the device, against reading the memory map",
                         f"{figure['items_a_second'] / figure['from_memory_map']:.2f} times the speed"))
    if figure := result.get("usual_way"):
        rows.append(("DI-MML's first stage end to end, against the usual way", f"{figure['ratio']:.1f} times the items/s"))
    for name, figure in result.get("loader", {}).items():
        rows.append((f"CPU time to load an item of {name}'s shapes, against the usual way",
                     f"{figure['ratio_augmented_elsewhere']:.0f} times less where a GPU augments (its kernels are called, "
                     f"not computed), {figure['ratio_augmented']:.1f} times less where this device does"))
    if figure := result.get("losses"):
        rows.append(("`duc_loss`, forward and backward, batch 64, against the loop", f"{figure['duc_ratio']:.0f} times faster"))
        rows.append(("`effective_dimensions`, 9,537 x 512 features, 101 classes",
                     f"{figure['effective_dimensions_seconds']:.2f} s, "
                     f"{figure['effective_dimensions_bytes_beyond_input'] / 1e6:.0f} MB beyond its input"))
    if figure := result.get("udi_step"):
        rows.append(("a guided step of UDI, against a plain step and the anchor's forward pass",
                     f"{figure['ratio']:.2f} times as long"))
    for name, figure in result.get("options", {}).items():
        if name != "float32":
            rows.append((f"{name}, by itself, against float32", f"{figure['times_faster']:.2f} times the speed"))
    for items, size in result.get("memory", {}).items():
        rows.append((f"memory to read {items} items of UCF101's shapes, page cache aside", f"{size / 1e6:.0f} MB"))
    for what, figure in result.get("growth", {}).items():
        same = ", with one thread each, for the same work" if what == "processes" else ""
        rows.append((f"seconds for {', '.join(figure)} the {what}{same}", ", ".join(f"{seconds:.3g}" for seconds in figure.values())))
    if figure := result.get("rendering"):
        rows.append((f"a view of a mesh of {figure['faces']:,} faces", f"{figure['seconds_a_view']:.3f} core-s"))
    for name, figure in result.get("preparing", {}).items():
        rows.append((f"preparing an item of {name}", f"{figure['seconds_an_item']:.2f} core-s, "
                     f"{figure['share_in_decoder']:.0%} of it in FFmpeg"))
    return "\n".join([f"**{result['device']}**, torch {result['versions']['torch']}", "", "| what | measured |", "|---|---|",
                      *(f"| {what} | {measured} |" for what, measured in rows)]) + "\n"


def tables():
    """README's tables, from the files that stand."""
    return "\n".join(markdown(json.loads(path.read_text())) for path in sorted(HERE.glob("benchmark-*.json")))


def write_readme():
    readme = HERE.parent / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{tables()}{END}{rest.split(END)[1]}")


def main():
    parser = argparse.ArgumentParser(description="Measure the data path, the losses and the steps; medians of five repetitions.")
    parser.add_argument("--gpu", type=int, help="GPU number (default: the CPU)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections (default: all)")
    parser.add_argument("--raw", nargs="*", default=[], metavar="NAME=DIR", help="raw datasets to time the preparation of")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the JSON (default: results)")
    parser.add_argument("--readme", action="store_true", help="measure nothing, write README's table")
    args = parser.parse_args()
    if args.readme:
        return write_readme()
    if args.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""          # else the scripts would take the first one
    device = torch.device("cpu") if args.gpu is None else torch.device("cuda", args.gpu)
    name = f"{torch.get_num_threads()} CPU threads" if args.gpu is None else torch.cuda.get_device_name(device)
    path = args.out / f"benchmark-{device.type}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"device": name, "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    for section in args.only:
        result[section] = SECTIONS[section](device)
        print(json.dumps({section: result[section]}, indent=1), flush=True)
        with store.whole_file(path) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    torch.set_num_threads(1)          # as in a worker of data.prepare
    for raw in args.raw:
        name, _, folder = raw.partition("=")
        result.setdefault("preparing", {})[name] = preparing(name, folder)
        with store.whole_file(path) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    print(markdown(result))


if __name__ == "__main__":
    with cli.exit_codes("benchmark.py"):
        main()
