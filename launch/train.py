"""The training job. Here, and only here, the training loop meets the shards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from launch.chain import Told, has_failed, tell, told_by
from launch.cluster import detect_world, end_time
from launch.ranks import end_with_parent, say_last, start_ranks
from launch.rundir import REASONS, RunDir
from launch.trained import NO_BETTER, early, labelled_rows
from medpsp.config import Config
from medpsp.errors import ConfigError
from medpsp.types import World
from medpsp.words import many

if TYPE_CHECKING:
    import torch

    from medpsp.train.checkpoint import TrainState
    from medpsp.train.loop import Run
    from medpsp.train.stop import StopRequest
    from shards.index import SliceRow

log = logging.getLogger("medpsp")
EXAMPLES = 8
"""Patients with a slice that is predicted at every evaluation to be looked at: as many as the
batches of an evaluation hold, so that it needs no more memory."""


def train_job(config: Config) -> None:
    """Train with ``train.ranks`` ranks: in this process, or as torchrun's children."""
    world = detect_world()
    if config.train.batch_size % (world.size * config.train.accumulate):
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} cannot be shared by {world.size} ranks "
            f"with {config.train.accumulate} micro-batches each; take a multiple of both"
        )
    try:
        config.check_batch_norm(world.size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows = labelled_rows(config)
    if lacking := [s for s in ("train", "val") if not any(row.split == s for row in rows)]:
        raise ConfigError(
            f"data.split: no {' and no '.join(lacking)} patient has labels, so nothing can be "
            "learnt or scored; label some, raise data.split.val, or use another key"
        )
    if "WORLD_SIZE" not in os.environ:
        log.info("train: %s to start", many(config.train.ranks, "rank"))
        if config.train.ranks > 1:
            start_ranks(config)
            return
    from medpsp.train.stop import StopRequest

    # a validation may last, and silence would be taken for deafness
    heard = "train: asked to end, saves first; a second Ctrl-C ends it at once"
    with StopRequest(end_time(), heard=heard if world.rank == 0 else "").listening() as stop:
        end_with_parent()
        _train(config, world, rows, stop)


def _train(config: Config, world: World, rows: tuple[SliceRow, ...], stop: StopRequest) -> None:
    import torch

    from medpsp.model.norm import check_device
    from medpsp.model.psp import build_model
    from medpsp.stages import in_steps
    from medpsp.train.boardsetup import finish
    from medpsp.train.loop import fit
    from medpsp.train.memory import memory_note
    from medpsp.train.ranks import process_group
    from medpsp.train.same import begun_stages
    from medpsp.train.watch import Watch
    from shards.dataset import stage_rows

    run, train = RunDir(config.out), config.train
    before = _last_state(run)
    begun = begun_stages(before) if before else ()
    train = in_steps(train, lambda fraction: len(stage_rows(rows, fraction)), begun)
    config = config.model_copy(update={"train": train})
    limits = train.first_step_seconds, train.step_seconds
    zero = train.engine != "ddp"
    folder = run.logs / "ranks"
    with (
        Watch(folder, world, limits, tell=partial(_say, run), stop=stop) as watch,
        process_group(world, train.threads, max(limits) + 60, alone=zero, records=folder) as device,
    ):
        watch.at(0, "model", first=True)
        check_device(config.model, device)
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        # a checkpoint has all weights: those it began with may be gone
        chosen = config.model.untrained if before else config.model
        model = build_model(chosen, len(config.data.classes))
        if train.precision == "fp64":
            model.double()
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        if world.rank == 0:
            log.info(
                "train: %s on %s, engine %s", many(world.size, "rank"), device.type, train.engine
            )
            log.info("train: %s", memory_note(model, train, world))
            _warn_of_random_parts(config)
        parts = _run_of(config, world, rows, device, before.step if before else 0)
        parts = replace(parts, stop=stop, watch=watch)
        with closing(parts.board):  # when stopped, too: what was said must be in the file
            state = fit(parts, model)
            finish(parts.board, config, state.step, state.best)
    if world.rank == 0:
        _say_end(run, state)


def _say_end(run: RunDir, state: TrainState) -> None:
    from medpsp.train.checkpoint import read_state

    if state.best < 0:
        log.info("train: %s, no validation", many(state.step, "step"))
        return
    best = run.checkpoints / "best"
    step = read_state(best).step if best.is_dir() else state.step
    more = f"; {NO_BETTER}" if early(step, state.step) else ""
    said = "train: %s, best validation Dice %.3f at step %d%s"
    log.info(said, many(state.step, "step"), state.best, step, more)


def _last_state(run: RunDir) -> TrainState | None:
    """Where training goes on; None before its first step."""
    from medpsp.train.checkpoint import latest_checkpoint, read_state

    newest = latest_checkpoint(run.checkpoints)
    return read_state(newest) if newest else None


def refuse_other_run(config: Config, any_data: bool = False) -> None:
    """Refuse a run folder whose checkpoints belong to another run, before anything is written.

    Args:
        config: Of the run.
        any_data: Its shards are made first, so that what they hold is not known yet.

    Raises:
        CheckpointError: As `medpsp.train.same.refuse_other`.
        ShardError: There are no shards.
    """
    folder = RunDir(config.out).checkpoints
    if REASONS in os.environ or not folder.is_dir():  # who started this rank has looked
        return
    from medpsp.train.checkpoint import newest_of, whole_checkpoints
    from medpsp.train.same import DATA, refuse_other
    from shards.index import read_manifest

    found, _ = whole_checkpoints(folder)
    if newest := newest_of(found):
        state = found[newest]
        data_id = state.model[DATA] if any_data else read_manifest(config.shards).data_id
        refuse_other(config, newest, state, data_id)


def _judged_by(val: Sequence[SliceRow]) -> str:
    """Digest of the slices that a score is of: their values, and the pixels of each class."""
    told = sorted([row.series, row.slice_index, row.crc32c, list(row.histogram)] for row in val)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _warn_of_random_parts(config: Config) -> None:
    """Where a stage leaves a part as it is, which has not learnt anything yet."""
    parts = [
        f"{stage.name} ({stage.trains})" for stage in config.train.stages if stage.trains != "all"
    ]
    if parts and not config.model.pretrained:
        log.warning(
            "train: stages that train a part only (%s) are for pretrained weights, and "
            "model.pretrained is false; train.preset=progressive needs none",
            ", ".join(parts),
        )


def _say(run: RunDir, line: str, code: int) -> None:
    say_last(line, code=code)
    if REASONS not in os.environ:  # this process ends at once, and `status` asks why
        told, known = Told.begun(os.environ, ""), told_by(run, "train")
        if known and (known.job, known.restarts) == (told.job, told.restarts):
            told = known  # it knows when it began
        with suppress(OSError):
            if not has_failed(run, "train", told):
                tell(run, "train", told.ended_with(code, line))


def _run_of(
    config: Config,
    world: World,
    rows: tuple[SliceRow, ...],
    device: torch.device,
    first_step: int,
) -> Run:
    import torch

    from medpsp.model.loss import class_weights
    from medpsp.train.boardsetup import data_text, open_board
    from medpsp.train.loop import Run
    from shards.dataset import example_batch, stage_rows, train_batches, whole_slices
    from shards.index import SHARDS, class_pixels, read_manifest

    run, root = RunDir(config.out), config.shards
    val = [row for row in rows if row.split == "val"]
    clean = [row for row in val if "PHI_BURNED_IN" not in row.flags]  # event files travel
    pixels = class_pixels(stage_rows(rows, 1.0), len(config.data.classes))
    weights = class_weights(torch.from_numpy(pixels), config.loss.class_weights).to(device)
    manifest = read_manifest(root)
    content = manifest.tables[SHARDS]
    facts = {"data": data_text(content, config.data.classes, weights.tolist())}
    board = open_board(run.tensorboard if world.rank == 0 else None, first_step, config, facts)
    if world.rank == 0:
        shares = ", ".join(f"{float(w):.2f}" for w in weights)
        log.info("train: class weights %s", shares)

    def batches(stage: int, first: int) -> Any:
        return train_batches(root, rows, config, world, (stage, first))

    return Run(
        config=config,
        world=world,
        device=device,
        checkpoints=run.checkpoints,
        board=board,
        weights=weights.double() if config.train.precision == "fp64" else weights,
        data_id=manifest.data_id,
        content=content,
        judged=_judged_by(val),
        examples=example_batch(root, clean, config, EXAMPLES) if clean else None,
        batches=batches,
        val_batches=lambda: whole_slices(root, val, world, config),
        val_slices=len(val[world.rank :: world.size]),
    )
