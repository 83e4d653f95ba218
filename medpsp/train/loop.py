"""The training loop. Open this file first.

`fit` walks the steps of the schedule; `train_step` is one of them. The loop takes any iterable of
batches and knows neither disk nor cluster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from medpsp.config import Config, StageConfig
from medpsp.errors import TrainError
from medpsp.model.loss import Loss, segmentation_loss
from medpsp.model.psp import PSPNet
from medpsp.progress import Bar
from medpsp.stages import lr_at, stage_at, total_steps, trained_parts
from medpsp.train.batch import Batch
from medpsp.train.board import Board
from medpsp.train.checkpoint import TrainState
from medpsp.train.ema import Average
from medpsp.train.engine import Engine, build_engine
from medpsp.train.guard import Guard
from medpsp.train.optimizer import Moments
from medpsp.train.ranks import Agreement, gather_numbers, share_buffers, sum_over_ranks
from medpsp.train.resume import restore, scores_at
from medpsp.train.saving import rescore, save, score
from medpsp.train.stop import StopRequest, interrupted
from medpsp.train.timing import Clock
from medpsp.train.warptorch import apply_batch
from medpsp.train.watch import Watch
from medpsp.types import World

log = logging.getLogger("medpsp")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything `fit` needs besides the network.

    Attributes:
        batches: Stage index and first step within the stage to this rank's batches.
        val_batches: This rank's share of the validation slices, whole slices.
        val_slices: How many these are; 0 where unknown.
        examples: A few validation slices to draw; None where all may show a name.
        weights: (K,) class weights.
        data_id: Of the shards; a checkpoint goes on only with the data it was made from.
        content, judged: See `TrainState`.
        stop: Asked at every step boundary.
        watch: Told at every step; None for none.
    """

    config: Config
    world: World
    device: torch.device
    checkpoints: Path
    board: Board
    batches: Callable[[int, int], Iterable[Batch]]
    val_batches: Callable[[], Iterable[Batch]]
    examples: Batch | None
    weights: Tensor
    val_slices: int = 0
    data_id: str = ""
    content: str = ""
    judged: str = ""
    stop: StopRequest = field(default_factory=StopRequest)
    watch: Watch | None = None

    @property
    def leads(self) -> bool:
        """True on the rank that writes."""
        return self.world.rank == 0

    def at(self, step: int, phase: str, first: bool = False) -> None:
        """Tell the watch."""
        if self.watch:
            self.watch.at(step, phase, first)


@dataclass(kw_only=True)
class Progress:
    """What changes while `fit` runs: network, optimizer, counters.

    Attributes:
        state: Of the last checkpoint or evaluation.
        moments: Of the optimizer, of the stages before.
    """

    model: PSPNet
    average: Average
    state: TrainState
    moments: Moments
    guard: Guard
    clock: Clock


def fit(run: Run, model: PSPNet) -> TrainState:
    """Train to the end of the schedule, from the newest checkpoint if there is one.

    Raises:
        CheckpointError, ConfigError: As `restore`.
        NonFiniteLossError: Too many steps in a row had no finite gradient.
        Interrupted: A signal came or the time is over; everything is saved.
        TrainError: A stage has fewer batches than steps.
    """
    progress = begin(run, model)
    total, agreement = total_steps(run.config.train.stages), Agreement()
    with Bar("train", total, "steps", show=run.leads) as bar:
        bar.resume_at(progress.state.step)
        while progress.state.step < total:
            bar.note = ""  # of the stage before
            run_stage(run, progress, agreement, bar)
    agreement.close()
    return progress.state


def begin(run: Run, model: PSPNet) -> Progress:
    """Where the newest checkpoint stands, or before the first step."""
    train = run.config.train
    restored = restore(run, model)
    state = restored.state
    progress = Progress(
        model=model,
        average=Average(model, train, restored.ema),
        state=state,
        moments=restored.moments,
        guard=Guard(run.device, train.most_bad_steps, state.bad),
        clock=Clock(run.config, model, run.device, run.world),
    )
    late = state.step and not state.scored and scores_at(run.config, state.step)
    if late or restored.rescore:
        if asked := int(gather_numbers([run.stop.code]).max()):  # it may take long
            raise interrupted(asked, state.step)
        if restored.rescore:
            rescore(run, progress, restored.rescore)
        if late:
            score(run, progress, restored.weights)  # it was killed while it did
    return progress


def run_stage(run: Run, progress: Progress, agreement: Agreement, bar: Bar) -> None:
    """Train to the end of the stage that the state lies in."""
    train, state = run.config.train, progress.state
    index, within = stage_at(train.stages, state.step)
    stage = train.stages[index]
    run.at(state.step, "data", first=True)
    engine = enter_stage(progress.model, stage, run, progress.moments)
    end, step = state.step + stage.steps - within, state.step
    batches = iter(run.batches(index, within))
    while step < end:
        began = time.perf_counter()
        run.at(step, "data", first=step == state.step)
        batch = next(batches, None)
        if batch is None:
            raise TrainError(f"stage {stage.name}: the batches ended before step {end}")
        waited = time.perf_counter() - began
        run.at(step, "step", first=step == state.step)
        try:
            loss, norm = train_step(run, engine, progress, batch, step)
        except RuntimeError as error:
            if train.compile and run.stop.killed_compilers(error):
                raise interrupted(run.stop.code, progress.state.step) from error
            raise
        step += 1
        progress.clock.add(len(batch.label), waited, time.perf_counter() - began)
        if step % train.log_every == 0 or step == end:
            progress.guard.look()
            report_step(run, progress, loss, norm, step - 1)
            bar.note = f"{stage.name} loss {float(loss.total):.3f}"
            if progress.state.best >= 0:  # below, nothing was validated yet
                bar.note += f", validation Dice {progress.state.score:.3f}"
        bar.advance()
        asked = agreement.say(run.stop.code)
        ends, scores = step == total_steps(train.stages), scores_at(run.config, step)
        if scores or asked or step % train.save_every == 0:
            # who is asked to end may have half a minute: the next start scores
            save(run, engine, progress, step, scores=scores and (ends or not asked))
        if asked and not ends:
            agreement.close()
            raise interrupted(asked, step)
    progress.moments = engine.moments()
    engine.close()


def enter_stage(model: PSPNet, stage: StageConfig, run: Run, moments: Moments) -> Engine:
    """Set which parts train, and wrap the network for the ranks."""
    parts = trained_parts(stage)
    if run.leads:
        log.info("train: stage %s, trains %s; its readers start", stage.name, stage.trains)
    for part in ("backbone", "head"):
        for parameter in model.part_parameters(part):
            parameter.requires_grad_(part in parts)
    model.train()
    share_buffers(model)  # a frozen norm uses its statistics: the same ones on every rank
    return build_engine(model, run.config.train, run.world, moments)


def train_step(
    run: Run, engine: Engine, progress: Progress, batch: Batch, step: int
) -> tuple[Loss, Tensor]:
    """Forward, loss of the global batch, backward, one step of the optimizer.

    Returns:
        The mean loss of the micro-batches, and the norm of the gradient; both on the device.
    """
    config, parts, own = run.config, [], torch.zeros((), device=run.device)
    count, compiled = config.train.accumulate, bool(config.train.compile)
    measure = partial(segmentation_loss, reduce=sum_over_ranks, compiled=compiled)
    for number, micro in enumerate(batch.micro(count)):
        last = number + 1 == count
        image, label, keys = to_device(micro, run)
        logits, aux = engine.forward(image, keys, last)
        loss = measure(logits, label, config.loss, run.weights)
        total = loss.total
        if aux is not None:
            extra = measure(aux, label, config.loss, run.weights)
            total = total + config.loss.aux * extra.total
        engine.backward(total / count if count > 1 else total, last)
        parts.append(loss.detach())
        own = own + logits.detach().sum()
    norm, bad = engine.step(lr_at(config.train, step))
    progress.guard.count(step, bad, own, batch.samples)
    progress.average.update()
    return mean_loss(parts), norm


def to_device(batch: Batch, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image in the layout and precision of the network, label, and keys."""
    train, device = run.config.train, run.device
    dtype = torch.float64 if train.precision == "fp64" else torch.float32
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    image = batch.image.to(device, dtype, non_blocking=True)
    label = batch.label.to(device, non_blocking=True)
    if batch.draws:
        image, label = apply_batch(image, label, batch.draws)
    keys = None if batch.keys is None else batch.keys.to(device, non_blocking=True)
    return image.contiguous(memory_format=layout), label, keys


def mean_loss(parts: list[Loss]) -> Loss:
    """Of the micro-batches."""
    if len(parts) == 1:
        return parts[0]
    return Loss(
        *(
            torch.stack([getattr(part, name) for part in parts]).mean()
            for name in ("total", "dice", "focal")
        )
    )


def report_step(run: Run, progress: Progress, loss: Loss, norm: Tensor, step: int) -> None:
    """Scalars of a step, every ``log_every``; all ranks take part."""
    index, _ = stage_at(run.config.train.stages, step)
    rate = lr_at(run.config.train, step)
    measured = progress.clock.read()
    run.board.scalars(
        step,
        {
            "train/loss": float(loss.total),
            "train/dice_loss": float(loss.dice),
            "train/focal_loss": float(loss.focal),
            "train/grad_norm": float(norm),
            "train/bad_steps": float(progress.guard.total),
            "train/lr/backbone": rate,
            "train/lr/head": rate * run.config.train.head_lr,
            "stage/index": float(index),
            **measured,
        },
    )
