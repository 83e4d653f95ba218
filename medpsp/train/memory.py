"""What weights and optimizer take on each rank and on disk, before anything is started."""

from __future__ import annotations

from torch import nn

from medpsp.config import TrainConfig
from medpsp.types import World

MIB = 2**20
COPIES = {"ddp": 0, "zero1": 2, "zero2": 3, "zero3": 4}
"""Of weights, gradients and two moments, how many an engine divides among the ranks."""


def memory_note(model: nn.Module, train: TrainConfig, world: World) -> str:
    """One line: what the engine takes, and what plain DDP would take.

    Weights, gradients and the two moments of AdamW, and the network that is scored where that is
    another one (see `ema.Average`); activations, which are most of it, are the same for every
    engine.
    """
    one = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    plain = (4 + bool(train.ema)) * one
    divided = COPIES[train.engine]
    ours = plain - divided * one * (1 - 1 / world.size)
    if train.engine == "zero3":  # a whole copy on each rank
        ours += one
    text = f"weights, gradients and moments take {ours:.0f} MiB on a rank"
    if not divided:
        return f"{text}, activations come on top"
    less = "less" if ours <= plain else "more"
    saved = f"{abs(plain - ours):.0f} MiB {less} than ddp, which is the faster one"
    return f"{text}, {saved}; activations come on top"


def checkpoint_bytes(model: nn.Module, train: TrainConfig) -> int:
    """Of one: the weights, two moments of AdamW and, where it is on, the average of the weights."""
    one = (8 if train.precision == "fp64" else 4) * sum(p.numel() for p in model.parameters())
    return one * (3 + bool(train.ema))


def checkpoints_kept(train: TrainConfig) -> int:
    """At most, between two saves: the ends of the stages, the best and the newest two."""
    return len(train.stages) + 3
