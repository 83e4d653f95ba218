"""The weights that are scored and exported: the trained ones, or their running mean."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from medpsp.config import TrainConfig
from medpsp.model.psp import PSPNet


class Average:
    """Exponential moving average of the weights (Polyak & Juditsky 1992); equal on all ranks.

    Args:
        model: The network that trains.
        train: ``ema`` is the share that is kept in a step; 0 for no average.
        known: Of a checkpoint: name to tensor.
    """

    def __init__(
        self, model: PSPNet, train: TrainConfig, known: dict[str, Tensor] | None = None
    ) -> None:
        self._model, self._decay = model, train.ema
        self._network = model
        if train.ema or train.engine == "zero3":  # there no rank alone can run the one that trains
            self._network = copy.deepcopy(model).requires_grad_(False)
            self._network.load_state_dict(known or model.state_dict())
            self._means = [p.detach() for p in self._network.parameters()]

    def update(self) -> None:
        """After a step."""
        if self._decay:
            now = [p.detach() for p in self._model.parameters()]
            torch._foreach_lerp_(self._means, now, 1 - self._decay)

    def scored(self, weights: dict[str, Tensor]) -> PSPNet:
        """The network to score.

        Args:
            weights: Of the one that trains, whole; the average takes the statistics of its norms.
        """
        if self._decay:
            for name, buffer in self._network.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        elif self._network is not self._model:
            self._network.load_state_dict(weights)
        return self._network

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """For a checkpoint: nothing, or ``ema`` and its weights."""
        return {"ema": self.scored(weights).state_dict()} if self._decay else {}


def scored_weights(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """What of a checkpoint is scored and exported."""
    found: dict[str, Tensor] = tensors.get("ema") or tensors["model"]
    return found
