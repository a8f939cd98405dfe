"""What every command line here does: errors and interrupts, the device, the command that a result quotes."""

import argparse
import contextlib
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from data import processes
from data.checkpoint import changes
from data.errors import DataError


@contextlib.contextmanager
def exit_codes(prog):
    """What a user can mend becomes one line and exit code 2, a loss that is not finite 1, an interrupt 130."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # else cuBLAS is not deterministic
    try:
        yield
    except BrokenPipeError:         # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError, FloatingPointError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"{prog}: error: {message}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was finished is kept (a method script goes on with --resume)", file=sys.stderr)
        sys.exit(130)
    finally:
        processes.leave()


class Interrupt:
    """While it is entered, Ctrl-C only sets `asked`, so that a run can end between two steps; a second one ends it at once."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask if processes.rank() == 0 else signal.SIG_IGN)
        return self

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def parse(parser, argv):
    """The parsed arguments, with the command itself as `args.command`."""
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    return args


def commit():
    """The commit this code stands at, with "-dirty" if tracked files were changed; None where git cannot tell."""
    try:
        return subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], text=True,
                              capture_output=True, cwd=Path(__file__).parent).stdout.strip() or None
    except OSError:
        return None


def made_with(device_name, checkpoint):
    """[{commit, device, versions}] of a run, and after it those it was resumed with, where they are others: that is said."""
    here = {"commit": commit(), "device": device_name,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}}
    before = (checkpoint or {}).get("made_with", [here])
    differing = changes(before[-1], here)
    if not differing:
        return before
    print(f"warning: resumed with another {', '.join(differing)}: the bits may differ from those of a run in one piece", flush=True)
    return [*before, here]


def pick_device(gpu, amp):
    """--gpu and --amp -> device, dtype and the device's name; joins torchrun's processes. Raises DataError for no such GPU.

    auto: bfloat16 where the hardware multiplies it fast, else float16 on a GPU and float32 on a CPU. float32 is PyTorch's:
    convolutions on a newer GPU round their inputs to TF32.
    """
    local = processes.join()
    if local is not None and gpu is not None:
        raise DataError("--gpu does not go with torchrun, which gives each process a GPU: choose them by CUDA_VISIBLE_DEVICES")
    gpu = gpu if local is None or not torch.cuda.is_available() else local
    if gpu is not None and not 0 <= gpu < torch.cuda.device_count():
        raise DataError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} usable GPUs (without --gpu the CPU serves)")
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu or 0)
        torch.cuda.set_device(device)
        fast, name = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        device, fast = torch.device("cpu"), torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        name = f"CPU with {torch.get_num_threads()} threads"
    if processes.count() > 1:
        name = f"{processes.count()} x {name}"
    if processes.rank() > 0:            # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    if amp == "auto":
        amp = "bf16" if fast else "fp16" if device.type == "cuda" else "off"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp], name


def seed(text):
    if not text.isdecimal() or int(text) >= 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 .. 2^32 - 1")
    return int(text)


def common_flags(parser):
    """The flags of all three scripts; what is not given comes from the recipe."""
    add = parser.add_argument
    add("--dataset", default="synthetic", help="a name under --data-dir or the path of a prepared folder")
    add("--data-dir", default="datasets", help="where prepared datasets lie (default: %(default)s)")
    add("--split", help="which of the dataset's splits (default: its first)")
    add("--val", type=float, default=0.1, help="share of train held out if there is no val part (default: %(default)s)")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--gpu", type=int, help="GPU number (default: the first if there is one, else the CPU)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision (default: %(default)s)")
    add("--epochs", type=int, help="of the main stage; warm-up and learning-rate step scale along")
    add("--batch-size", type=int)
    add("--lr", type=float, help="of SGD")
    add("--out", default="runs", help="folder for checkpoint and result (default: %(default)s)")
    add("--resume", action="store_true", help="go on after the last checkpoint of the same run")


def settle_recipe(args, recipe):
    """The recipe with what the command line says instead. Raises DataError for a value that makes no sense."""
    recipe, scale = dict(recipe), (args.epochs or recipe["epochs"]) / recipe["epochs"]
    for key in {"warmup", "lr_step"} & set(recipe):
        recipe[key] = max(key == "lr_step", round(recipe[key] * scale))
    recipe.update({key: getattr(args, key) for key in recipe if getattr(args, key, None) is not None})
    for key, setting in recipe.items():
        for value in setting if isinstance(setting, list) else [setting]:
            may_be_0 = key.endswith(("weight", "warmup", "interaction"))
            if isinstance(value, (int, float)) and not (0 < value < math.inf or value == 0 and may_be_0):
                raise DataError(f"--{key.replace('_', '-')} cannot be {value}")
    return recipe
