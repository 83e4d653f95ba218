"""One stage of training on one rank: forward, backward, step. DDP here, DeepSpeed in `zero`."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medpsp.config import TrainConfig
from medpsp.model.psp import PSPNet
from medpsp.train.guard import Statistics
from medpsp.train.optimizer import (
    Moments,
    build_adamw,
    load_moments,
    moments_of,
    set_rate,
)
from medpsp.types import World

Logits = tuple[Tensor, Tensor | None]
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False
}
"""Rank 0's are given out when they are needed; the newer torch warns of the older name."""


class Engine(Protocol):
    """Built anew for each stage, because what trains changes."""

    def forward(self, image: Tensor, keys: Tensor | None, last: bool) -> Logits:
        """Logits (N, K, H, W) of a micro-batch, and those of the auxiliary head.

        Args:
            image: (N, C, H, W).
            keys: (N,) of the samples.
            last: Whether gradients are summed over the ranks after it.
        """

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradient."""

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; returns the norm of the gradient, and 1.0 if it was left out.

        Args:
            rate: Of the schedule.
        """

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers, whole; every rank must call it, and has them."""

    def moments(self) -> Moments:
        """State of the optimizer, whole; every rank must call it, and has it."""

    def close(self) -> None:
        """Let go of the network."""


class DdpEngine:
    """One process, or DistributedDataParallel.

    Args:
        model: Its ``requires_grad`` says what trains in this stage.
        train: Of the configuration.
        world: Ranks.
        moments: Of the stages before.
    """

    def __init__(self, model: PSPNet, train: TrainConfig, world: World, moments: Moments) -> None:
        self._model, self._train, self._before = model, train, moments
        self._statistics = Statistics(model)
        self._optimizer: Any = build_adamw(model, train)
        load_moments(self._optimizer, model.named_parameters(), moments)
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        mode = "default" if train.compile is True else train.compile
        net: nn.Module = torch.compile(model, mode=mode) if mode else model  # type: ignore[assignment]
        self._ddp: DistributedDataParallel | None = None
        if world.size > 1:
            self._ddp = DistributedDataParallel(
                net,
                gradient_as_bucket_view=True,
                static_graph=train.accumulate == 1,
                **NO_BUFFERS,
            )
        self._net = self._ddp or net
        self._fresh = True

    def forward(self, image: Tensor, keys: Tensor | None, last: bool) -> Logits:
        """See `Engine`."""
        if self._fresh:
            self._optimizer.zero_grad()
            self._statistics.keep()
            self._fresh = False
        with self._alone(last), autocast(self._train, image.device):
            return self._net(image, keys)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        with self._alone(last):
            loss.backward()  # type: ignore[no-untyped-call]

    def _alone(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients stay on this rank until the last micro-batch."""
        if self._ddp is None or last:
            return contextlib.nullcontext()
        return self._ddp.no_sync()

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """See `Engine`.

        The fused optimizer divides gradients by ``grad_scale`` and does nothing where
        ``found_inf`` is 1: what GradScaler uses these for fits clipping and bad steps as well.
        """
        set_rate(self._optimizer, rate)
        norm = torch.nn.utils.get_total_norm(p.grad for p in self._trained if p.grad is not None)
        bad = (~torch.isfinite(norm)).to(torch.float32)
        self._optimizer.grad_scale = (norm / self._train.clip_norm).clamp_min(1.0).float()
        self._optimizer.found_inf = bad
        self._optimizer.step()
        self._statistics.take_back(bad)
        self._fresh = True
        return norm, bad

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._model.state_dict()

    def moments(self) -> Moments:
        """See `Engine`."""
        return moments_of(self._optimizer, self._model.named_parameters(), self._before)

    def close(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad()


def autocast(train: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 where it is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")


def build_engine(model: PSPNet, train: TrainConfig, world: World, moments: Moments) -> Engine:
    """The engine that ``train.engine`` names."""
    if train.engine == "ddp":
        return DdpEngine(model, train, world, moments)
    from medpsp.train.zero import ZeroEngine  # DeepSpeed takes seconds to import

    return ZeroEngine(model, train, world, moments)
