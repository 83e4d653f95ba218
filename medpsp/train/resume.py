"""Where training goes on: the newest checkpoint that verifies, if it belongs to this run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medpsp.config import Config
from medpsp.errors import CheckpointError
from medpsp.model.psp import PSPNet
from medpsp.stages import stage_at, total_steps
from medpsp.train.checkpoint import (
    TrainState,
    best_of,
    keep_as_best,
    load_checkpoint,
    newest_of,
    save_checkpoint,
    whole_checkpoints,
)
from medpsp.train.optimizer import Moments, no_moments
from medpsp.train.ranks import barrier
from medpsp.train.same import changes_told, refuse_other

if TYPE_CHECKING:
    from medpsp.train.loop import Run

log = logging.getLogger("medpsp")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint holds; the weights are in the network, too.

    Attributes:
        rescore: Another one, which was the best on validation slices that are others now.
    """

    state: TrainState
    moments: Moments
    ema: dict[str, Tensor] | None
    weights: dict[str, Tensor]
    rescore: Path | None = None


def restore(run: Run, model: PSPNet) -> Restored:
    """Load the newest checkpoint into a network, or start at step 0.

    Any engine and any number of ranks may have written it. Its other name, of a stage's end or of
    its step, is written anew where it is missing or damaged.

    Args:
        run: What does not change.
        model: On its device.

    Raises:
        CheckpointError: As `refuse_other`; none verifies; or there is none, and ``train.resume``
            is must.
        ConfigError: As `refuse_other`.
    """
    config, folder = run.config, run.checkpoints
    found, damaged = whole_checkpoints(folder)
    barrier()  # all have looked before anything is written
    path = newest_of(found)
    if path is None:
        if damaged:
            raise CheckpointError(f"{damaged[0]}; delete {folder} to start anew")
        if config.train.resume == "must":
            raise CheckpointError(f"checkpoints {folder}: none, and train.resume is must")
        start = TrainState(step=0, stage="", best=-1.0, score=0.0, model={})
        return Restored(state=start, moments=no_moments(), ema=None, weights={})
    refuse_other(config, path, found[path], run.data_id)
    tensors, state = load_checkpoint(path, torch.device("cpu"))
    barrier()  # all have read it before it may be written anew
    best, again, state = _best(run, state, found)
    if run.leads:
        for line in damaged:
            log.warning("train: left out: %s", line)
        log.info("train: goes on from step %d (%s)", state.step, path.name)
        for line in changes_told(state, config):
            log.warning("train: %s", line)
        for name in names_of(config, state.step):
            other = found.get(folder / name)
            if other is None or other.step != state.step:
                save_checkpoint(folder, name, tensors, state)
        if best is not None:  # it may have been killed before it was marked
            keep_as_best(best)
    model.load_state_dict(tensors["model"])
    return Restored(
        state=state,
        moments=tensors["optimizer"],
        ema=tensors.get("ema"),
        weights=tensors["model"],
        rescore=again,
    )


def _best(
    run: Run, state: TrainState, found: dict[Path, TrainState]
) -> tuple[Path | None, Path | None, TrainState]:
    """The checkpoint that is the best one, one to score again, and the state that knows of it.

    Only scores of the validation slices of now are compared. Where they are others than before,
    the best checkpoint of before is scored again, and the newest one too.
    """
    if run.content != state.content and state.content:
        log.warning(
            "train: the shards are not those of step %d (other labels, new studies or another "
            "profile): it goes on with them",
            state.step,
        )

    def is_of_now(known: TrainState) -> bool:
        """Earlier versions know their shards, not their validation slices."""
        return known.judged == run.judged or (not known.judged and known.content == run.content)

    now = is_of_now(state)

    def counts(known: TrainState) -> bool:
        """Also those of before that the newest one has been compared with."""
        return is_of_now(known) or (now and not known.judged and known.score <= state.best)

    best, again = best_of({path: s for path, s in found.items() if counts(s)}), None
    if not now:
        state = replace(state, scored=False, best=-1.0)
        if best is None:
            again = best_of(found)
            log.warning("train: the validation slices are others, so the best is scored again")
            if again and found[again].step == state.step and scores_at(run.config, state.step):
                again = None  # as the newest one it is
    if best is None or found[best].score < state.best:
        left = found[best].score if best else -1.0
        if state.best >= 0:
            log.warning(
                "train: the best checkpoint, Dice %.3f, is gone; the best one left is %s",
                *(state.best, f"{best.name}, Dice {left:.3f}" if best else "not scored yet"),
            )
        state = replace(state, best=left)
    elif state.best < 0:
        state = replace(state, best=found[best].score)
    return best, again, state


def names_of(config: Config, step: int) -> list[str]:
    """Checkpoints of a step: that of a stage's end, if it is one, and its own."""
    index, _ = stage_at(config.train.stages, step - 1)
    ends = step == total_steps(config.train.stages[: index + 1])
    stage = [f"stage-{index}-{config.train.stages[index].name}"] if ends else []
    return [*stage, f"step-{step:08d}"]


def scores_at(config: Config, step: int) -> bool:
    """Whether the validation split is scored after a step."""
    return step % config.train.eval_every == 0 or len(names_of(config, step)) > 1
