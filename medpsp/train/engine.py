"""Ranks: start, wrap, sum, stop. Plain processes and DDP look the same from the loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medpsp.types import World

log = logging.getLogger("medpsp")


@contextmanager
def process_group(world: World, threads: int) -> Iterator[torch.device]:
    """Join the ranks (nccl with a GPU each, else gloo) and yield this rank's device."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # torchrun's ranks on this machine
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // here))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = gpus >= here  # nccl refuses two ranks on one GPU
    if gpus and not cuda and world.rank == 0:
        log.warning("train: %d ranks on %d GPU, so all use the CPU (train.ranks)", here, gpus)
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world.size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    try:
        yield device
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The network as the loop calls it; wrapped anew when a stage changes what trains."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients.

    Every rank then holds the loss of the global batch, each parameter's gradient on a rank is
    ``size`` times that rank's share, and DDP's mean over ranks makes it the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, with gradient; the tensor itself for one rank."""
    if not dist.is_initialized():
        return x
    return _SumOverRanks.apply(x)  # type: ignore[no-any-return]


def sum_counts(counts: NDArray[np.int64], device: torch.device) -> NDArray[np.int64]:
    """Sum of integer counts over all ranks."""
    if not dist.is_initialized():
        return counts
    tensor = torch.from_numpy(counts).to(device)
    dist.all_reduce(tensor)
    summed: NDArray[np.int64] = tensor.cpu().numpy()
    return summed


def share_buffers(model: nn.Module) -> None:
    """Give every rank the BatchNorm statistics of rank 0, the ones that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
