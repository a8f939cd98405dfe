"""What every script does alike and what is no method: a run's flags, name, device, checkpoint,
result, table and exit codes."""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from data.store import DataError, check, whole_file

PRECISIONS = {"bf16": torch.bfloat16, "off": torch.float32}
# entries of a recipe that all methods share: how long and how fast, not what
SETTINGS = ("epochs", "fusion_epochs", "warmup", "batch_size", "lr", "lr_step")


# ---- the command line ----------------------------------------------------------------------------
def parser(doc, recipe, choices={}):
    """The flags of a script: those that all scripts have, and one for each entry of its recipe.

    recipe   {entry: default, a number, bool or word}; choices {entry: what a word may be}
    Flags that one script alone has, it adds to this parser itself.
    """
    flags = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    add = flags.add_argument
    add("--dataset", default="synthetic", help="a name under --data-dir, or a prepared folder")
    add("--data-dir", default="datasets")
    add("--split", help="one of the dataset's splits (default: its first)")
    add("--val", type=float, default=0.1, help="share of train to hold out if there is no val part")
    add("--seed", type=int, default=0)
    add("--gpu", type=int, help="GPU number (default: the first GPU; without any, the CPU)")
    add("--amp", choices=["auto", "bf16", "off"], default="auto", help="the encoders' precision")
    add("--out", default="runs", help="folder of checkpoint and result")
    add("--resume", action="store_true", help="go on after the last whole epoch")
    for entry, value in recipe.items():
        check(isinstance(value, (int, float, str)),
              f"RECIPE: {entry} is {value}: only numbers, bools and words become flags")
        said = f"(default: {value}, or what the recipe says for the dataset)".replace("%", "%%")
        if isinstance(value, bool):             # --entry and --no-entry
            add(flag(entry), action=argparse.BooleanOptionalAction, help=said)
        else:
            add(flag(entry), type=type(value), choices=choices.get(entry), help=said)
    return flags


def flag(entry):
    """The flag of an entry: "lr_step" -> "--lr-step"."""
    return "--" + entry.replace("_", "-")


def parse(script, argv, args, recipe, changes, small, scaled=("lr_step",), may_be_0=(), words={},
          variant=(), least=2):
    """What was typed -> the dataset, the recipe, the run's path and its config.

    script    its path: its name is the method's, so a copied file is a method of its own
    argv      what was typed, None for sys.argv; args, the same parsed
    changes   {dataset: {entry: value}} on top of `recipe`; `small`, for all other datasets
    scaled    entries that shrink or grow with --epochs
    may_be_0  entries that may be 0; none may be negative
    words     {entry: the word for it in the run's name}, where that is not the entry itself
    variant   what the script's own flags add to the name, first; None and "" add nothing
    least     how many modalities the method needs

    Two runs of one config are one run. What was typed, differs from the dataset's recipe and is no
    setting that all methods share stands in the name: "dimml.duc0". Raises DataError for what
    cannot be.
    """
    from data import open_dataset
    args.command = [Path(script).name, *(sys.argv[1:] if argv is None else argv)]
    check(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 .. 2^32 - 1")
    ds = open_dataset(args.dataset, args.data_dir, args.split, args.val)
    check(len(ds.modalities) >= least, f"{ds.name} has one modality, {least} are needed: "
                                       "joint_baseline.py --modality trains it")

    default = {**recipe, **changes.get(ds.name, small)}
    typed = {entry: getattr(args, entry) for entry in recipe if getattr(args, entry) is not None}
    r = {**default, **typed}
    for entry, value in r.items():
        if isinstance(value, str):      # it may stand in the name of a file
            check(re.fullmatch(r"[\w.+-]+", value), f"{flag(entry)} cannot be {value!r}: a word of "
                                                    "letters, digits and . + - is needed")
        elif not isinstance(value, bool):
            zero = value == 0 and entry in may_be_0
            check(zero or 0 < value < math.inf,
                  f"{flag(entry)} cannot be {value}: it must be above 0 (where 0 has a sense, "
                  "may_be_0 names it)")
    for entry in scaled:
        if entry in default and entry not in typed:
            scaled_to = round(default[entry] * r["epochs"] / default["epochs"])
            r[entry] = max(scaled_to, int(entry not in may_be_0))

    named = [word for word in variant if word]
    for entry, value in typed.items():
        if value != default[entry] and entry not in SETTINGS:
            named.append(value if isinstance(value, str) else f"{words.get(entry, entry)}{value:g}")
    method, variant = Path(script).stem, ".".join(named)
    check("." not in method, f"{script}: a dot in the name of a script would begin a row's variant")
    name = ".".join([method, *named])
    path = Path(args.out).expanduser() / f"{name}-{ds.name}-{ds.split}-seed{args.seed}"
    config = dict(method=method, variant=variant, dataset=ds.name, split=ds.split, seed=args.seed,
                  val=args.val, recipe=r, data=ds.fingerprint)
    return ds, argparse.Namespace(**r), path, config


# ---- device and precision ------------------------------------------------------------------------
def pick_device(gpu=None, amp="auto", checkpoint=None):
    """--gpu and --amp -> the device, and the precision of the encoders there; from here on torch
    takes deterministic algorithms alone, and float32 is float32 (no TF32).

    gpu  its number; None: the first GPU, or the CPU where there is none that works
    amp  bf16, off (float32), or auto: what the checkpoint was trained in; without one bfloat16 on a
         GPU of compute capability 8 or more, else float32
    Raises DataError for a GPU that is not there, or that this build of PyTorch cannot use.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # saves time, changes no bit
    torch.backends.cudnn.allow_tf32 = False

    count = torch.cuda.device_count()
    check(gpu is None or 0 <= gpu < count,
          f"--gpu {gpu}: GPUs count from 0, and PyTorch sees {count} of them here")
    device = torch.device("cuda", gpu or 0) if count else torch.device("cpu")
    if count:
        try:        # one small kernel: the driver may be too old, the build may lack the card's
            torch.cuda.set_device(device)
            torch.ones(2, device=device).add(1).sum().item()
        except torch.OutOfMemoryError:      # the GPU works, and is full
            raise
        except (RuntimeError, AssertionError) as error:
            reason = f"GPU {device.index} cannot be used ({first_line(error)})"
            check(gpu is None, f"--gpu {gpu}: {reason}: install a PyTorch for this card and its "
                               "driver (pytorch.org), or leave --gpu out to train on the CPU")
            print(f"note: {reason}: this runs on the CPU", file=sys.stderr)
            device = torch.device("cpu")
    new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if amp == "auto":
        amp = "bf16" if new else "off"
        if checkpoint:          # two precisions in one run would be no run at all
            return device, getattr(torch, checkpoint["provenance"]["precision"])
    return device, PRECISIONS[amp]


# ---- the files of a run --------------------------------------------------------------------------
@contextlib.contextmanager
def claim(path):
    """Keep every other process from the name `path` while the block lasts. Raises DataError if one
    has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{path}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"{path} is under way in another process: wait for it, or choose another "
                        "folder") from None


def run_once(script, train, args, ds, r, path, config):
    """The result of a run, from `train` or from an earlier time, and its table: printed anew, so
    that whoever asks again sees it again."""
    with claim(path):
        result = finished(path, config, args.amp)
        if result is None:
            result = train(args, ds, r, path, config)
        else:
            say_if_code_changed(path, result.get("code"), current_code(script))
        print_table(result)
        print(f"result: {path}.json")
    return result


def first_line(error):
    """What an error says, in a line; its kind, if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def check_same_run(file, config, then, precision, amp):
    """Raise DataError if a file is of another config, or of another precision than one that was
    asked for by name."""
    check(then == config, f"{file} is of another run: {', '.join(differences(then, config))}; "
                          "choose another --out")
    asked = str(PRECISIONS.get(amp)).removeprefix("torch.")
    check(amp == "auto" or asked == precision,
          f"{file} was trained in {precision}, --amp {amp} asks for {asked}: leave --amp out, or "
          "choose another --out")


def finished(path, config, amp="auto"):
    """The result that stands at <path>.json; None if there is none.

    Raises DataError if it is of another run: nothing is ever written over a result.
    """
    try:
        result = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        then = {key: result.get(key) for key in config}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        raise DataError(f"{path}.json is no result: remove it, or choose another --out") from None
    check_same_run(f"{path}.json", config, then, result.get("precision"), amp)
    return result


def half_done(path, config, resume, amp="auto"):
    """The checkpoint at <path>.pt to go on from, on the CPU; None if there is none. Nothing in it
    is executed.

    Raises DataError if it is of another run, if `resume` was not asked for, or if it is damaged:
    cut, or with a bit changed, which torch alone would load.
    """
    try:
        with zipfile.ZipFile(f"{path}.pt") as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it has changed")
        checkpoint = torch.load(f"{path}.pt", map_location="cpu", weights_only=True)
        then, done = checkpoint["config"], len(checkpoint["log"])
        precision = checkpoint["provenance"]["precision"]
    except FileNotFoundError:
        return None
    except (PermissionError, MemoryError):      # not the file's fault
        raise
    except Exception as error:      # torch and zipfile raise many kinds for a damaged file
        raise DataError(f"{path}.pt is damaged, or of another version ({type(error).__name__}): "
                        "remove it to start anew") from error
    check_same_run(f"{path}.pt", config, then, precision, amp)
    check(resume, f"{path}.pt is at epoch {done}: --resume goes on, another --out starts anew")
    return checkpoint


def restore(path, checkpoint, model, optimizer, generator):
    """Put a checkpoint's state into these three. Raises DataError where it does not fit them."""
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        generator.set_state(checkpoint["generator"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}.pt does not fit this version of the script "
                        f"({first_line(error)}): remove it to start anew") from None


def save(path, ds, provenance, device, **state):
    """The checkpoint: whole or not at all, with what a reader needs to predict without the data."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        provenance["peak_memory"] = max(peak, provenance["peak_memory"] or 0)
    with whole_file(f"{path}.pt") as file:
        torch.save({**state, "provenance": provenance, **ds.description}, file)


def current_code(script):
    """Which code this is: `commit`, the last one that touched the script or the package `data`,
    with -dirty behind it if they are changed or untracked, None where git cannot tell; `sha256`
    over their bytes."""
    script = Path(script).resolve()

    def git(*words):
        command = ["git", "-C", str(script.parent), *words, "--", script.name, "data"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    digest = hashlib.sha256()
    for file in (script, *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(file.read_bytes())
    try:
        commit = git("log", "-1", "--format=%H")
        untracked = script.name not in git("ls-files").split("\n")      # status hides ignored files
        commit += "-dirty" * bool(commit and (untracked or git("status", "--porcelain")))
    except OSError:         # no git here
        commit = ""
    return dict(commit=commit or None, sha256=digest.hexdigest())


def say_if_code_changed(path, code, now):
    """A line if the code is not that of the last stretch that trained a run."""
    then = code[-1] if code else {}
    if then.get("sha256") != now["sha256"]:
        print(f"note: the script or the package data has changed since {path.name} was trained "
              f"(commit {then.get('commit')}, now {now['commit']})", file=sys.stderr)


def provenance(script, path, model, device, dtype, checkpoint=None):
    """What a result says of its making. `code` has an entry for each stretch that trained the run,
    with the epoch at which it began; `peak_memory` is the most of all stretches, on the GPU."""
    now, before, done = current_code(script), [], 0
    peak = None if device.type == "cpu" else 0
    if checkpoint:
        before, done = checkpoint["provenance"]["code"], len(checkpoint["log"])
        peak = checkpoint["provenance"]["peak_memory"]
        say_if_code_changed(path, before, now)
    name = f"{platform.machine()} CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        torch.cuda.reset_peak_memory_stats(device)
    return dict(
        precision=str(dtype).removeprefix("torch."), commit=now["commit"],
        code=[*before, dict(epoch=done, **now)], device=name, threads=torch.get_num_threads(),
        versions=dict(python=platform.python_version(), torch=str(torch.__version__),
                      numpy=np.__version__),
        n_parameters=sum(p.numel() for p in model.parameters()), peak_memory=peak)


# ---- what a run says -----------------------------------------------------------------------------
def print_epoch(log, n_epochs):
    """The last record of the log, and the time that is left, in a line."""
    record, words = log[-1], []
    for name, value in record["loss"].items():
        words.append(f"{name} {value:.3f}")
    words.append("| val")
    for head, score in record["val"].items():
        words.append(f"{head} {100 * score['accuracy']:.1f}")
    left = datetime.timedelta(seconds=round((n_epochs - len(log)) * record["seconds"]))
    stage = " ".join([record["stage"], *([record["modality"]] if "modality" in record else [])])
    print(f"{stage} {len(log)}/{n_epochs} | loss", *words, f"| {left} left", flush=True)


def rules(log, head):
    """A head's test scores at its `last` epoch (quote this), at that of `best_val` accuracy, and at
    that of `best_test` accuracy, as published code chooses: optimistic, to compare only. Where each
    stage trains one modality, the epochs are those of the stage that trained the head last."""
    log = [e for e in log if head in e["test"]]
    if "modality" in log[-1]:
        stage = log[-1]["stage"], log[-1]["modality"]
        log = [e for e in log if (e["stage"], e["modality"]) == stage]
    chosen = {"last": log[-1]}
    for part in ("val", "test"):
        if log[-1][part]:
            chosen[f"best_{part}"] = max(log, key=lambda e: e[part][head]["accuracy"])
    return {rule: {**e["test"][head], "stage": e["stage"], "epoch": e["epoch"]}
            for rule, e in chosen.items()}


def rounded(tree):
    """Numbers in dicts and lists, to five digits: enough for a record, at a third of the bytes."""
    return json.loads(json.dumps(tree), parse_float=lambda digits: round(float(digits), 5))


def write_result(path, args, ds, config, provenance, log, logits, y, **more):
    """The JSON of a finished run (docs/result.md); returns the result.

    logits  {head: (N, C)} on the test items, y (N,) their labels; heads that are called like a
            modality are its own and stand under `modality_heads`
    more    entries that only this method has
    """
    def split(named, ours, own):
        return {ours: {key: named[key] for key in named if key not in ds.modalities},
                own: {key: named[key] for key in named if key in ds.modalities}}

    said, epochs = {}, []
    for head, o in logits.items():
        said[head] = dict(predictions=o.argmax(1).tolist(),
                          confidence=rounded(o.softmax(1).amax(1).tolist()))
    for record in log:
        parts = {part: split(rounded(record[part]), "heads", "modality_heads")
                 for part in ("val", "test") if record[part]}
        epochs.append({**record, **split(record["loss"], "loss", "modality_loss"), **parts})
    result = dict(
        schema=3, **config, **provenance, command=args.command,
        seconds=sum(record["seconds"] for record in log),
        **{f"n_{part}": len(ds.indices(part)) for part in ("train", "val", "test")},
        classes=ds.classes, **more,
        **split({head: rules(log, head) for head in logits}, "heads", "modality_heads"),
        test=dict(labels=y.tolist(), **split(said, "heads", "modality_heads")), epochs=epochs)
    with whole_file(f"{path}.json") as file:
        file.write(json.dumps(result, separators=(",", ":")).encode())
    return result


def print_table(result):
    """A result for a person: our heads, then the encoders."""
    rows = [(head + " (the answer)" * (head == result["answer"]), rules, None)
            for head, rules in result["heads"].items()]
    rows += [(f"encoder of {m}", result["modality_heads"].get(m, {}), probe)
             for m, probe in result["probes"].items()]
    print(f"\n{'test, %':24}{'last':>8}{'best val':>10}{'best test':>11}{'macro-F1':>10}"
          f"{'probe':>8}")
    for name, by_rule, probe in rows:
        shown = [by_rule.get(rule, {}) for rule in ("last", "best_val", "best_test")]
        cells = [scores.get("accuracy") for scores in shown]
        cells += [shown[0].get("macro_f1"), probe]
        cells = ["-" if cell is None else f"{100 * cell:.1f}" for cell in cells]
        print(f"{name:24}" + "".join(c.rjust(n) for c, n in zip(cells, (8, 10, 11, 10, 8))))
    said = ("Quote `last`; `best test` is chosen on the test set, as published code does; `probe`: "
            "a linear classifier on the frozen encoder. Compare with python joint_baseline.py and "
            "with its --ensemble.")
    print(textwrap.fill(said, 98))


# ---- how a command ends --------------------------------------------------------------------------
@contextlib.contextmanager
def exit_codes(prog):
    """For `if __name__ == "__main__"`: no traceback for what is no bug.

    2    DataError, OSError, out of memory: what the user can mend
    1    FloatingPointError: a loss or a feature that is not finite
    130  Ctrl-C;  143  SIGTERM;  141  whoever read the output (`| head`) has gone
    """
    def say(message):
        print(f"{Path(prog).name}: {message}", file=sys.stderr)

    with contextlib.suppress(ValueError):       # only the main thread may set a handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say("stopped: nobody reads the output any more")
        sys.exit(141)
    except (DataError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        say(f"error: {error}")
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not full and "can't allocate memory" not in str(error):      # torch's, on a CPU
            raise
        say(f"error: out of memory ({first_line(error)}): free some of it and go on (a training "
            "run: with --resume), or start it with a smaller --batch-size and another --out")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (130, 143):
            say("interrupted; what was finished is kept")
        sys.exit(code)
