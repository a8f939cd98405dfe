"""The files of a run: claimed by one run at a time, read with suspicion."""

import contextlib
import json
import platform
import subprocess
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from data.errors import DataError
from data.store import check


@contextlib.contextmanager
def claim(path):
    """Keep every other run from the name `path` while the block lasts. Raises DataError if one has
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout:
        raise DataError(f"{path}: a run of this name is under way: wait for it, or choose another "
                        "--out") from None


def half_done(path, config, n_epochs, resume, device="cpu"):
    """The checkpoint at <path>.pt to go on from; None if there is none. Nothing in it is executed.

    Raises DataError if it is of another config, if `resume` was not asked for, or if it is damaged:
    cut, or with a bit changed, which torch alone would load.
    """
    try:
        with zipfile.ZipFile(f"{path}.pt") as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it has changed")
        state = torch.load(f"{path}.pt", map_location=device, weights_only=True)
        then, done = state["config"], len(state["log"])
    except FileNotFoundError:
        return None
    except Exception as error:      # torch and zipfile raise many kinds for a damaged file
        raise DataError(f"{path}.pt is damaged ({type(error).__name__}): remove it to start "
                        "anew") from error
    check(then == config, f"{path}.pt is of another run: {', '.join(differences(then, config))}; "
                          "choose another --out")
    check(resume, f"{path}.pt is at epoch {done} of {n_epochs}: --resume goes on, another --out "
                  "starts anew")
    return state


def differences(then, now):
    """Where two configs differ, in words: ["lr 0.003 (now 0.5)", ...]. Entries of a dict in them
    count singly."""
    words = []
    for key in {**then, **now}:
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            words += differences(a, b)
        elif a != b:
            words.append(f"{key} {a!s:.16} (now {b!s:.16})")
    return words


def finished(path, config):
    """The result that stands at <path>.json; None if there is none.

    Raises DataError if it is of another config: nothing is ever written over a result.
    """
    try:
        result = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        then = {key: result.get(key) for key in config}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        raise DataError(f"{path}.json is no result: remove it, or choose another --out") from None
    check(then == config, f"{path}.json is the result of another run: "
                          f"{', '.join(differences(then, config))}; choose another --out")
    return result


def provenance(script, device):
    """What a result says of its making: commit, device and versions.

    The commit ends in -dirty if the script or the package `data` is changed or untracked; it is
    None where git cannot tell.
    """
    def git(*words):
        command = ["git", "-C", str(script.parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    script = Path(script).resolve()
    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", script.name, "data")
        dirty = changed or not git("ls-files", script.name)     # status hides ignored files
    except OSError:         # no git here
        commit = ""
    commit = commit and commit + "-dirty" * bool(dirty)
    name = f"{platform.machine()} CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return dict(commit=commit or None, device=name, versions=dict(
        python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__))


def print_table(result, compare):
    """A result for a person: our heads, then the encoders; `compare` is printed below."""
    rows = [(head + " (the answer)" * (head == result["answer"]), rules, None)
            for head, rules in result["heads"].items()]
    rows += [(f"encoder of {m}", result["modality_heads"].get(m, {}), probe)
             for m, probe in result["probes"].items()]
    print(f"\n{'test, %':24}{'last':>8}{'best val':>10}{'best test':>11}{'macro-F1':>10}"
          f"{'probe':>8}")
    for name, rules, probe in rows:
        cells = [rules.get(rule, {}).get("accuracy") for rule in ("last", "best_val", "best_test")]
        cells += [rules.get("last", {}).get("macro_f1"), probe]
        cells = ["-" if cell is None else f"{100 * cell:.1f}" for cell in cells]
        print(f"{name:24}" + "".join(c.rjust(n) for c, n in zip(cells, (8, 10, 11, 10, 8))))
    said = ("Quote `last`; `best test` is chosen on the test set, as published code does; `probe`: "
            f"a linear classifier on the frozen encoder. {compare}")
    print(textwrap.fill(said, 98))
