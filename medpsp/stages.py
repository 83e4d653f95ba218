"""The progressive schedule as pure functions of the step number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from medpsp.config import StageConfig, TrainConfig

Part = Literal["backbone", "head"]
FINAL_LR_RATIO = 0.05
"""Where the last stage ends, relative to its own rate, if it does not say."""
POLY_POWER = 0.9
"""Of Zhao et al. 2017, 5.1."""


def total_steps(stages: tuple[StageConfig, ...]) -> int:
    """Optimiser steps of the whole schedule, after `in_steps`."""
    return sum(stage.steps for stage in stages)


def in_steps(
    train: TrainConfig,
    slices: Callable[[float], int],
    begun: Sequence[tuple[str, int, float | None]] = (),
) -> TrainConfig:
    """The same schedule with the steps of every stage.

    Args:
        train: Of the configuration.
        slices: Training slices that take part at a fraction of the patients.
        begun: Name, steps and epochs of the first stages, of a checkpoint. Where the epochs are the
            same, the steps are, too: an archive that has grown must not change what is done.
    """
    stages = []
    for index, stage in enumerate(train.stages):
        steps = stage.steps
        if stage.epochs is not None:
            steps = max(1, round(stage.epochs * slices(stage.fraction) / train.batch_size))
            if index < len(begun):
                name, known, epochs = begun[index]
                if (name, epochs) == (stage.name, stage.epochs):
                    steps = known
        stages.append(stage.model_copy(update={"steps": steps}))
    return train.model_copy(update={"stages": tuple(stages)})


def stage_at(stages: tuple[StageConfig, ...], step: int) -> tuple[int, int]:
    """Stage index and step within it for a 0-based global step below `total_steps`.

    Raises:
        IndexError: The step lies at or after the end.
    """
    for index, stage in enumerate(stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    raise IndexError("step lies after the last stage")


def lr_at(train: TrainConfig, step: int) -> float:
    """Learning rate of a global step.

    Each stage goes from its own rate to ``lr_end``, by default the next stage's rate, so that it
    never jumps; the first ``warmup_steps`` rise linearly from 1/warmup_steps.
    """
    index, within = stage_at(train.stages, step)
    stage = train.stages[index]
    end = stage.lr_end
    if end is None:
        last = index + 1 == len(train.stages)
        end = stage.lr * FINAL_LR_RATIO if last else train.stages[index + 1].lr
    share = within / stage.steps
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "poly": math.pow(1 - share, POLY_POWER),
        "constant": 1.0,
    }[stage.shape]
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    return (end + (stage.lr - end) * left) * warm


def trained_parts(stage: StageConfig) -> frozenset[Part]:
    """Which parts of the network get gradients in a stage."""
    both: frozenset[Part] = frozenset({"backbone", "head"})
    return {"all": both, "backbone": frozenset({"backbone"}), "head": frozenset({"head"})}[  # type: ignore[return-value]
        stage.trains
    ]


def in_stage(order: float, fraction: float) -> bool:
    """Whether a patient takes part: ``order`` is its keyed hash in [0, 1).

    A threshold, not a rank, so the 20 % set lies inside the 60 % set and new patients move no
    old one.
    """
    return order < fraction
