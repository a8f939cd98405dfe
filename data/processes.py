"""Several processes, one a GPU, started by torchrun; without it there is one, and nothing here changes anything.

Every process draws the same random numbers and takes its share of each batch. `gather` puts the features of the shares
together, so that each process computes the loss of the whole batch, also where items meet in it; `average_gradients`
makes one step of it. BatchNorm alone sees the share, as in DistributedDataParallel.
"""

import os

import torch
import torch.distributed as dist


def join():
    """Join torchrun's processes -> this one's number on its machine, which is its GPU's; None without torchrun."""
    if "LOCAL_RANK" not in os.environ:
        return None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ["LOCAL_RANK"])


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share):
        shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(count())]
        dist.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(count())[rank()] * count()


def gather(share):
    """The shares (B / P, ...) of all P processes, in order -> (B, ...), the same in each.

    Its gradient is that of the own share, times P: the mean over processes, which `average_gradients` takes, is then the
    gradient of the whole batch's loss, for what stands before `gather` and for what stands behind it.
    """
    return share if count() == 1 else _Gather.apply(share)


def average_gradients(optimizer):
    """The mean over processes of all gradients that the optimizer will use, in one message."""
    if count() > 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= count()
        for gradient, mean in zip(gradients, together.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))


def share_buffers(model):
    """The first process's buffers, BatchNorm's statistics among them, for all."""
    if count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
