"""The three scripts, one after another, with BatchNorm in eval mode, so that a batch may be split without changing a number.

    torchrun --standalone --nproc_per_node=2 tests/frozen_batchnorm.py FOLDER OUT
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dimml  # noqa: E402
import joint_baseline  # noqa: E402
import udi  # noqa: E402
from data import processes  # noqa: E402

batch_norm = torch.nn.functional.batch_norm
torch.nn.functional.batch_norm = lambda x, mean, var, weight, bias, training, *rest: batch_norm(x, mean, var, weight, bias, False, *rest)


def main(folder, out):
    leave, processes.leave = processes.leave, lambda: None                   # torchrun's meeting place serves once
    common = ["--dataset", folder, "--batch-size", "8", "--lr", "1e-4", "--out", out, "--amp", "off"]
    dimml.main([*common, "--epochs", "2", "--warmup", "1", "--fusion-epochs", "1"])
    udi.main([*common, "--epochs", "1"])
    joint_baseline.main([*common, "--epochs", "1"])
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
