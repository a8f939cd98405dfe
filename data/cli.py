"""What every command line here does: errors and interrupts, the device, the command that a result quotes."""

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from data.store import DataError


@contextlib.contextmanager
def exit_codes(prog):
    """What a user can mend becomes one line and exit code 2, a loss that is not finite 1, an interrupt 130."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # else cuBLAS is not deterministic
    try:
        yield
    except BrokenPipeError:         # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was finished is kept (a method script goes on with --resume)", file=sys.stderr)
        sys.exit(130)


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


def pick_device(gpu, amp):
    """--gpu and --amp -> device, dtype and the device's name. Raises DataError if there is no such GPU.

    auto: bfloat16 where the hardware multiplies it fast, else float16 on a GPU and float32 on a CPU.
    """
    if gpu is not None and not 0 <= gpu < torch.cuda.device_count():
        raise DataError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} usable GPUs (without --gpu the CPU serves)")
    if torch.cuda.is_available():
        device, fast = torch.device("cuda", gpu or 0), torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
    else:
        device, fast = torch.device("cpu"), torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        name = f"CPU with {torch.get_num_threads()} threads"
    if amp == "auto":
        amp = "bf16" if fast else "fp16" if device.type == "cuda" else "off"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp], name
