"""Saving: a checkpoint first, then its score, so that a long validation risks no step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medpsp.errors import NonFiniteLossError
from medpsp.stages import stage_at
from medpsp.train.checkpoint import (
    keep_as_best,
    load_checkpoint,
    mark_best,
    prune,
    rewrite_state,
    save_checkpoint,
    whole_checkpoints,
)
from medpsp.train.ema import scored_weights
from medpsp.train.engine import Engine
from medpsp.train.guard import all_finite
from medpsp.train.ranks import barrier, share_buffers
from medpsp.train.resume import names_of
from medpsp.train.same import identify, schedule_of
from medpsp.train.validate import validate

if TYPE_CHECKING:
    from medpsp.train.loop import Progress, Run


def save(run: Run, engine: Engine, progress: Progress, step: int, *, scores: bool) -> None:
    """Write a checkpoint; then score the validation split where ``scores`` is set.

    Raises:
        NonFiniteLossError: There are weights that nothing can go on from.
    """
    config, before = run.config, progress.state
    progress.guard.look()
    share_buffers(progress.model)
    index, _ = stage_at(config.train.stages, step - 1)
    stage = config.train.stages[index]
    state = replace(
        before,
        step=step,
        stage=stage.name,
        scored=False,
        bad=progress.guard.in_a_row,
        model=identify(config, run.data_id),
        schedule=schedule_of(config),
        content=run.content,
        judged=run.judged,
    )
    weights = engine.weights()
    if not all_finite(weights.values()):
        raise NonFiniteLossError(
            f"step {step}: weights became infinite or NaN, so it is not saved; lower train.stages "
            f"lr and give the same command again, which goes on from step {before.step}"
        )
    run.at(step, "save", first=True)
    tensors: dict[str, Any] = {"model": weights, "optimizer": engine.moments()}
    tensors |= progress.average.tensors(weights)
    if run.leads:
        for name in names_of(config, step):
            save_checkpoint(run.checkpoints, name, tensors, state)
    progress.state = state
    if scores:
        score(run, progress, weights)
    if run.leads:
        prune(run.checkpoints, step)
    barrier()
    progress.clock.restart()


def score(run: Run, progress: Progress, weights: dict[str, Tensor]) -> None:
    """Score the checkpoint that was written last: first saved, since scoring may take long."""
    before, step = progress.state, progress.state.step
    run.at(step, "evaluate", first=True)
    found = validate(run, progress.average.scored(weights), step)
    progress.model.train()
    best = max(found, before.best)
    state = replace(before, score=found, best=best, scored=True, judged=run.judged)
    run.at(step, "save", first=True)
    if run.leads:
        for name in names_of(run.config, step):
            rewrite_state(run.checkpoints / name, state)
        if found >= before.best:  # of two equal ones the later saw more
            mark_best(run.checkpoints / names_of(run.config, step)[-1])
    progress.state = state


def rescore(run: Run, progress: Progress, path: Path) -> None:
    """Score an earlier checkpoint on the validation slices of now: later ones are compared with it.

    Args:
        run: With other validation slices than the checkpoint was scored on.
        progress: Learns the score as the best so far.
        path: Of the checkpoint that was the best one.
    """
    tensors, state = load_checkpoint(path, torch.device("cpu"))
    run.at(state.step, "evaluate", first=True)
    network = copy.deepcopy(progress.model)
    network.load_state_dict(scored_weights(tensors))
    found = validate(run, network, state.step, show=False)
    if run.leads:
        state = replace(state, score=found, best=found, scored=True, judged=run.judged)
        whole, _ = whole_checkpoints(run.checkpoints)  # to rewrite a damaged one would hide that
        for other in [other for other, known in whole.items() if known.step == state.step]:
            rewrite_state(other, state)
        keep_as_best(path)
    barrier()
    progress.state = replace(progress.state, best=found)
