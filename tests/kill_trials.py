"""Kill runs at random moments, resume them, and compare them bit for bit with unbroken ones.

    python tests/kill_trials.py --trials 100 --seed 0

Each trial: one of the three scripts, float32 or bfloat16, killed by SIGKILL up to three times,
anywhere between its first step and its last line, checkpoints being written included. Prints a line
a trial; exit code 1 if one ended otherwise.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import arrays, outcome, same  # noqa: E402

import dimml  # noqa: E402
import joint_baseline  # noqa: E402
import udi  # noqa: E402
from data import store  # noqa: E402

RUNS = {"dimml": (dimml, ["--epochs", "3", "--warmup", "1", "--fusion-epochs", "2"]),
        "udi": (udi, ["--epochs", "2"]),
        "joint_baseline": (joint_baseline, ["--epochs", "3", "--balance", "ogm_ge"])}


def start(script, command):
    """The script in a child process, forked when all is imported, so that a trial takes seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            script.main(command)
            code = 0
        finally:
            os._exit(code)
    return child


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                                  # a forked child has no others
    draw, killed, lost = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = str(store.write(scratch / "tiny", **arrays(n=24)))
        whole = {}              # (script, precision): outcome and seconds of an unbroken run
        for trial in range(args.trials):
            name, amp = draw.choice(list(RUNS)), draw.choice(["off", "bf16"])
            script, flags = RUNS[name]
            command = ["--dataset", folder, "--batch-size", "6", "--amp", amp, *flags, "--out"]
            if (name, amp) not in whole:
                begun = time.time()
                child = start(script, [*command, str(scratch / "whole")])
                assert os.waitpid(child, 0)[1] == 0
                whole[name, amp] = outcome(scratch / "whole"), time.time() - begun
                shutil.rmtree(scratch / "whole")
            unbroken, seconds = whole[name, amp]
            out, kills = scratch / "killed", 0
            for _ in range(draw.randint(1, 3)):
                child = start(script, [*command, str(out), "--resume"])
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            code = os.waitpid(start(script, [*command, str(out), "--resume"]), 0)[1]
            good = code == 0 and same(outcome(out), unbroken)
            shutil.rmtree(out, ignore_errors=True)
            killed, lost = killed + kills, lost + (not good)
            print(f"trial {trial}: {name} {amp}, killed {kills} times:",
                  "the same bits" if good else "NOT THE SAME", flush=True)
    print(f"{args.trials} trials, {killed} kills, {args.trials - lost} ended with the same bits")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
