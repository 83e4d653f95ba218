"""Steps whose gradient is not finite are left out, without waiting for the device to say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medpsp.errors import NonFiniteLossError

SHOWN = 8
"""Samples named in the message, at most."""


class _Step(NamedTuple):
    step: int
    bad: Tensor
    own: Tensor
    samples: tuple[str, ...]


class Guard:
    """Counts the steps that were left out.

    Numbers stay on the device; `look` brings them over, every few steps, when they are needed
    anyway.

    Args:
        device: Of the network.
        most: Steps in a row that may be left out.
        in_a_row: That were left out before a restart.
    """

    def __init__(self, device: torch.device, most: int, in_a_row: int = 0) -> None:
        self._most = most
        self._row = torch.tensor(float(in_a_row), device=device)
        self._worst = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)
        self._seen: deque[_Step] = deque(maxlen=4096)

    def count(self, step: int, bad: Tensor, own: Tensor, samples: tuple[str, ...]) -> None:
        """Note a step.

        Args:
            step: Its number.
            bad: 1.0 where it was left out, else 0.0; on the device.
            own: Any number that is finite if the logits of this rank are; on the device.
            samples: What was in it, on this rank.
        """
        self._row = (self._row + bad) * bad
        self._worst = torch.maximum(self._worst, self._row)
        self._total = self._total + bad
        self._seen.append(_Step(step, bad, own, samples))

    @property
    def in_a_row(self) -> int:
        """Steps left out up to now, without a good one between."""
        return int(self._row)

    @property
    def total(self) -> int:
        """Steps left out since the start of the process."""
        return int(self._total)

    def look(self) -> None:
        """End training where too many were left out.

        Raises:
            NonFiniteLossError: On all ranks alike, since all hold the same gradient.
        """
        if float(self._worst) >= self._most:
            bad = [seen for seen in self._seen if float(seen.bad)]
            told = f"step {bad[-1].step}: the gradient was not finite {self._most} times in a row; "
            own = [seen for seen in bad if not bool(torch.isfinite(seen.own))]
            names = dict.fromkeys(name for seen in reversed(own) for name in seen.samples)
            if own:
                told += f"samples of this rank: {', '.join([*names][:SHOWN]) or 'unknown'}; "
            else:
                told += "the logits of this rank were finite; "
            raise NonFiniteLossError(
                f"{told}lower train.stages lr, or check the windows of the shards", own=bool(own)
            )
        self._seen.clear()


def all_finite(weights: Iterable[Tensor]) -> bool:
    """Whether no number is infinite or NaN."""
    sums = [tensor.detach().double().sum() for tensor in weights if tensor.is_floating_point()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


class Statistics:
    """The buffers that a network gathers while it trains, in one piece of memory.

    So one copy keeps them and one takes back what a bad step made of them.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and name.startswith("running_")
        ]
        self._flat: Tensor | None = None
        if owners:
            self._flat = torch.cat([buffer.detach().reshape(-1) for _, _, buffer in owners])
            self._before = self._flat.clone()
            start = 0
            for module, name, buffer in owners:
                view = self._flat[start : start + buffer.numel()].view_as(buffer)
                module.register_buffer(name, view)
                start += buffer.numel()

    def keep(self) -> None:
        """Before a forward pass."""
        if self._flat is not None:
            self._before.copy_(self._flat)

    def take_back(self, bad: Tensor) -> None:
        """After it: as it was where ``bad`` is 1."""
        if self._flat is not None:
            torch.where(bad.bool(), self._before, self._flat, out=self._flat)
