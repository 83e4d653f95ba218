"""Where training goes on: the newest checkpoint that verifies, if it belongs to this run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpsp.config import Config
from medpsp.errors import CheckpointError
from medpsp.model.psp import PSPNet
from medpsp.stages import stage_at, total_steps
from medpsp.train.checkpoint import (
    TrainState,
    best_of,
    load_checkpoint,
    mark_best,
    newest_of,
    whole_checkpoints,
)
from medpsp.train.optimizer import Moments, no_moments

log = logging.getLogger("medpsp")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint holds; the weights are in the network, too."""

    state: TrainState
    moments: Moments
    ema: dict[str, Tensor] | None
    weights: dict[str, Tensor]


REFINE = 2
"""Higher where the same configuration gives another network."""


def identify(config: Config, data_id: str = "") -> dict[str, Any]:
    """What must be equal for weights to be used: network, classes, labels, windows, splits."""
    tree = config.model.model_dump(mode="json", exclude={"pretrained", "dropout"})
    if config.model.head == "refine":
        tree["version of refine"] = REFINE
    return {**tree, "classes": list(config.data.classes), "data (labels, window, split)": data_id}


def schedule_of(config: Config) -> dict[str, Any]:
    """What gives a step number its meaning."""
    stages = [[stage.name, stage.steps] for stage in config.train.stages]
    return {"seed": config.seed, "batch_size": config.train.batch_size, "stages": stages}


def same_so_far(state: TrainState, config: Config) -> bool:
    """Whether the steps done are the same in this schedule; later ones may differ."""
    now, stages = schedule_of(config), config.train.stages
    alike = all(state.schedule.get(key) == now[key] for key in ("seed", "batch_size"))
    if state.step > total_steps(stages) or not alike:
        return False
    index, _ = stage_at(stages, state.step - 1)
    done: list[Any] = state.schedule["stages"]
    return done[:index] == now["stages"][:index] and state.stage == stages[index].name


def refuse_other(config: Config, path: Path, state: TrainState, data_id: str) -> None:
    """Refuse a checkpoint that this configuration cannot go on from.

    Raises:
        CheckpointError: It was made with another network, other data or another schedule, or
            ``train.resume`` is never.
    """
    if config.train.resume == "never":
        raise CheckpointError(
            f"checkpoint {path}: there is one, and train.resume is never; use another out folder, "
            "or delete its checkpoints"
        )
    wanted = identify(config, data_id)
    changed = [key for key, value in wanted.items() if state.model.get(key) != value]
    if not same_so_far(state, config):
        changed.append("train.stages, train.batch_size or seed")
    if changed:
        raise CheckpointError(
            f"checkpoint {path}: made with other {', '.join(changed)}; use another out folder, "
            "or delete its checkpoints"
        )


def restore(config: Config, folder: Path, data_id: str, model: PSPNet, *, leads: bool) -> Restored:
    """Load the newest checkpoint into a network, or start at step 0.

    Any engine and any number of ranks may have written it.

    Args:
        config: Of the run.
        folder: Its checkpoints.
        data_id: Of the shards.
        model: On its device.
        leads: Whether this rank says what is found, and may set the link to the best checkpoint.

    Raises:
        CheckpointError: As `refuse_other`; none verifies; or there is none, and ``train.resume``
            is must.
    """
    found, damaged = whole_checkpoints(folder)
    path = newest_of(found)
    if path is None:
        if damaged:
            raise CheckpointError(f"{damaged[0]}; delete {folder} to start anew")
        if config.train.resume == "must":
            raise CheckpointError(f"checkpoints {folder}: none, and train.resume is must")
        start = TrainState(step=0, stage="", best=-1.0, score=0.0, model={})
        return Restored(state=start, moments=no_moments(), ema=None, weights={})
    refuse_other(config, path, found[path], data_id)
    tensors, state = load_checkpoint(path, torch.device("cpu"))
    best = best_of(found)
    if best is not None and found[best].score < state.best:
        log.warning(
            "train: the best checkpoint, Dice %.3f, is gone; the best one left is %s, Dice %.3f",
            *(state.best, best.name, found[best].score),
        )
        state = replace(state, best=found[best].score)
    if leads:
        for line in damaged:
            log.warning("train: left out: %s", line)
        log.info("train: goes on from step %d (%s)", state.step, path.name)
        if best is not None:  # it may have been killed before it was marked
            mark_best(best)
    model.load_state_dict(tensors["model"])
    return Restored(
        state=state,
        moments=tensors["optimizer"],
        ema=tensors.get("ema"),
        weights=tensors["model"],
    )
