"""Ranks: join, sum, agree, leave. One process and many look the same from the loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from medpsp.machine import threads_each
from medpsp.types import World

log = logging.getLogger("medpsp")
Work = Any
"""torch.distributed.Work: of a collective that runs beside us."""


RECORD = "TORCH_FR_DUMP_TEMP_FILE"
"""torch appends the rank to it."""


class Flags:
    """Small numbers that all ranks agree on, by a group of its own on the CPU."""

    group: Any = None


@contextmanager
def process_group(
    world: World,
    threads: int,
    seconds: float = 600,
    *,
    alone: bool = False,
    records: Path | None = None,
) -> Iterator[torch.device]:
    """Join the ranks (nccl with a GPU each, else gloo) and yield this rank's device.

    Args:
        world: Who we are.
        threads: Of torch; 0: the share of a rank of this machine's cores that are ours.
        seconds: A collective that takes longer is an error.
        alone: Whether one process needs a group, too, as for DeepSpeed.
        records: Folder for what nccl remembers of its last collectives, where one fails.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # torchrun's ranks on this machine
    torch.set_num_threads(threads or threads_each(world.size))
    device = _device(world, here)
    limit, backend = timedelta(seconds=seconds), "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and records:
        keep_record(records)
    if world.size == 1 and alone:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        Flags.group = dist.new_group(backend="gloo")
    if world.size > 1:
        dist.init_process_group(backend, timeout=limit)
        # flags must not wait for a GPU; and gloo's own order of calls is left alone
        Flags.group = dist.new_group(backend="gloo", timeout=limit)
    try:
        yield device
    finally:
        if dist.is_initialized():
            Flags.group = None
            dist.destroy_process_group()


def _device(world: World, here: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < here:  # nccl refuses two ranks on one GPU
        if gpus and world.rank == 0:
            log.warning("train: %d ranks on %d GPU, so all use the CPU (train.ranks)", here, gpus)
        return torch.device("cpu")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def keep_record(folder: Path) -> None:
    """Let nccl remember its last collectives: ``record-RANK`` in a folder, read by torchfrtrace.

    To be called before the process group is made. What the environment says already, stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault(RECORD, str(folder.resolve() / "record-"))


def write_record() -> None:
    """Write that file now: a watch ends the process before nccl's own time is over."""
    place = os.environ.get(RECORD)
    if place is None or not dist.is_initialized() or dist.get_backend() != "nccl":
        return
    from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

    with suppress(OSError):
        Path(f"{place}{dist.get_rank()}").write_bytes(_dump_nccl_trace())


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients.

    Every rank then holds the loss of the global batch, each parameter's gradient on a rank is
    ``size`` times that rank's share, and the mean over ranks makes it the gradient of the sum.
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


def gather_numbers(values: list[float]) -> NDArray[np.float64]:
    """(ranks, len(values)) of every rank, on all of them."""
    mine = torch.tensor(values, dtype=torch.float64)
    if not dist.is_initialized():
        return np.array([values])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine, group=Flags.group)
    return torch.stack(every).numpy()


class Agreement:
    """The highest number that any rank said; known a step later, so that nobody waits for it."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Work] | None = None

    def say(self, number: int) -> int:
        """Say a number; returns what all agreed on in the call before, at once for one rank."""
        if not dist.is_initialized():
            return number
        agreed = 0
        if self._pending is not None:
            tensor, work = self._pending
            work.wait()
            agreed = int(tensor)
        tensor = torch.tensor(number)
        op = dist.ReduceOp.MAX
        self._pending = tensor, dist.all_reduce(tensor, op, group=Flags.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None


def share_buffers(model: nn.Module) -> None:
    """Give every rank the BatchNorm statistics of rank 0, the ones that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
