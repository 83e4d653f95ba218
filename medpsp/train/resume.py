"""Where training goes on: the newest checkpoint that verifies, if it belongs to this run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpsp.config import Config
from medpsp.errors import CheckpointError
from medpsp.model.psp import PSPNet
from medpsp.stages import stage_at, total_steps
from medpsp.train.checkpoint import TrainState, latest_checkpoint, load_checkpoint, mark_best
from medpsp.train.optimizer import Moments, no_moments


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint holds besides the weights, which are in the network."""

    state: TrainState
    moments: Moments
    ema: dict[str, Tensor] | None


def identify(config: Config, data_id: str = "") -> dict[str, Any]:
    """What must be equal for weights to be used: network, classes, labels, windows, splits."""
    tree = config.model.model_dump(mode="json", exclude={"pretrained", "dropout"})
    return {**tree, "classes": list(config.data.classes), "data (labels, window, split)": data_id}


def schedule_of(config: Config) -> dict[str, Any]:
    """What gives a step number its meaning."""
    stages = [[stage.name, stage.steps] for stage in config.train.stages]
    return {"batch_size": config.train.batch_size, "stages": stages}


def same_so_far(state: TrainState, config: Config) -> bool:
    """Whether the steps done are the same in this schedule; later ones may differ."""
    now, stages = schedule_of(config), config.train.stages
    if state.step > total_steps(stages) or state.schedule.get("batch_size") != now["batch_size"]:
        return False
    index, _ = stage_at(stages, state.step - 1)
    done: list[Any] = state.schedule["stages"]
    return done[:index] == now["stages"][:index] and state.stage == stages[index].name


def restore(config: Config, folder: Path, data_id: str, model: PSPNet, *, leads: bool) -> Restored:
    """Load the newest checkpoint into a network, or start at step 0.

    Any engine and any number of ranks may have written it.

    Args:
        config: Of the run.
        folder: Its checkpoints.
        data_id: Of the shards.
        model: On its device.
        leads: Whether this rank may set the link to the best checkpoint.

    Raises:
        CheckpointError: It was made with another network, other data or another schedule, or
            ``train.resume`` wants it otherwise.
    """
    path, wish = latest_checkpoint(folder), config.train.resume
    if path is None:
        if wish == "must":
            raise CheckpointError(f"checkpoints {folder}: none, and train.resume is must")
        start = TrainState(step=0, stage="", best=-1.0, score=0.0, model={})
        return Restored(state=start, moments=no_moments(), ema=None)
    if wish == "never":
        raise CheckpointError(
            f"checkpoint {path}: there is one, and train.resume is never; use another out folder, "
            "or delete its checkpoints"
        )
    tensors, state = load_checkpoint(path, torch.device("cpu"))
    wanted = identify(config, data_id)
    changed = [key for key, value in wanted.items() if state.model.get(key) != value]
    if not same_so_far(state, config):
        changed.append("train.stages or train.batch_size")
    if changed:
        raise CheckpointError(
            f"checkpoint {path}: made with other {', '.join(changed)}; use another out folder, "
            "or delete its checkpoints"
        )
    model.load_state_dict(tensors["model"])
    if leads and state.scored and state.score == state.best:  # killed before it was marked
        mark_best(path)
    return Restored(state=state, moments=tensors["optimizer"], ema=tensors.get("ema"))
