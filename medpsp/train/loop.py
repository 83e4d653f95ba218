"""The training loop. Open this file first.

`fit` walks the steps of the schedule; `train_step` is one of them; `evaluate` scores a split.
The loop takes any iterable of batches and knows neither disk nor cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medpsp.config import Config, StageConfig
from medpsp.errors import CheckpointError, NonFiniteLossError, TrainError
from medpsp.model.loss import Loss, segmentation_loss
from medpsp.model.psp import PSPNet
from medpsp.progress import Bar
from medpsp.stages import lr_at, stage_at, total_steps, trained_parts
from medpsp.train.batch import Batch
from medpsp.train.board import Board
from medpsp.train.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    prune,
    save_checkpoint,
)
from medpsp.train.engine import barrier, share_buffers, sum_counts, sum_over_ranks, wrap
from medpsp.train.metrics import Counts, confusion, dice_per_class, mean_foreground
from medpsp.types import World


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything `fit` needs besides the network.

    Attributes:
        batches: Stage index and first step within the stage to this rank's batches.
        val_batches: This rank's share of the validation slices, whole slices.
        examples: A few validation slices to draw; None where all may show a name.
        weights: (K,) class weights.
        data_id: Of the shards; a checkpoint goes on only with the data it was made from.
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
    data_id: str = ""

    @property
    def leads(self) -> bool:
        """True on the rank that writes."""
        return self.world.rank == 0


def fit(run: Run, model: PSPNet) -> TrainState:
    """Train to the end of the schedule, from the newest checkpoint if there is one.

    Raises:
        CheckpointError: The checkpoint belongs to another network.
        NonFiniteLossError: The loss became NaN or infinite.
        TrainError: A stage has fewer batches than steps.
    """
    train = run.config.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=train.weight_decay)
    state = resume(run, model, optimizer)
    total = total_steps(train.stages)
    with Bar("train", total, "steps", show=run.leads) as bar:
        bar.resume_at(state.step)
        while state.step < total:
            index, within = stage_at(train.stages, state.step)
            stage = train.stages[index]
            net = enter_stage(model, stage, run.world)
            end = state.step + stage.steps - within
            for step, batch in zip(
                range(state.step, end), run.batches(index, within), strict=False
            ):
                loss = train_step(run, net, optimizer, batch, step)
                bar.advance(
                    note=f"{stage.name} loss {float(loss.total):.3f} dice {state.score:.3f}"
                )
                report_step(run, loss, optimizer, step, index)
                if step + 1 == end or (step + 1) % train.eval_every == 0:
                    state = evaluate_and_save(run, model, optimizer, state, step + 1)
            if state.step != end:
                raise TrainError(f"stage {stage.name}: the batches ended before step {end}")
    return state


def enter_stage(model: PSPNet, stage: StageConfig, world: World) -> nn.Module:
    """Set which parts train and wrap for the ranks."""
    parts = trained_parts(stage)
    for part in ("backbone", "head"):
        for parameter in model.part_parameters(part):
            parameter.requires_grad_(part in parts)
    return wrap(model, world)


def train_step(
    run: Run, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: int
) -> Loss:
    """Forward, loss of the global batch, backward, one optimiser step.

    Raises:
        NonFiniteLossError: On all ranks alike, since all hold the same loss and gradient.
    """
    config = run.config
    torch.manual_seed(config.seed * 1_000_003 + step * 4099 + run.world.rank)  # dropout
    net.train()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(config.train, step)
    image, label = batch.image.to(run.device), batch.label.to(run.device)
    logits, aux = net(image)
    loss = segmentation_loss(logits, label, config.loss, run.weights, sum_over_ranks)
    total = loss.total
    if aux is not None:
        extra = segmentation_loss(aux, label, config.loss, run.weights, sum_over_ranks)
        total = total + config.loss.aux * extra.total
    _require_finite(step, "loss", total)
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(
        [p for p in net.parameters() if p.grad is not None], config.train.clip_norm
    )
    _require_finite(step, "gradient", norm)  # so that no checkpoint ever holds NaN
    optimizer.step()
    return loss.detach()


def _require_finite(step: int, name: str, number: Tensor) -> None:
    value = float(number.detach())
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"step {step}: {name} is {value}; lower train.stages lr, or check the windows "
            "of the shards"
        )


def report_step(
    run: Run, loss: Loss, optimizer: torch.optim.Optimizer, step: int, stage: int
) -> None:
    """Scalars of one step, every ``log_every``."""
    if step % run.config.train.log_every == 0:
        run.board.scalars(
            step,
            {
                "train/loss": float(loss.total),
                "train/dice_loss": float(loss.dice),
                "train/focal_loss": float(loss.focal),
                "train/lr": optimizer.param_groups[0]["lr"],
                "stage/index": float(stage),
            },
        )


def evaluate_and_save(
    run: Run, model: PSPNet, optimizer: torch.optim.Optimizer, state: TrainState, step: int
) -> TrainState:
    """Score the validation split, draw, and write checkpoints."""
    config = run.config
    classes = len(config.data.classes)
    share_buffers(model)
    counts = sum_counts(evaluate(model, run.val_batches(), classes, run.device), run.device)
    dice = dice_per_class(counts)
    score = mean_foreground(dice)
    score = 0.0 if math.isnan(score) else score
    index, _ = stage_at(config.train.stages, step - 1)
    stage = config.train.stages[index]
    new = TrainState(
        step=step,
        stage=stage.name,
        score=score,
        best=max(score, state.best),
        model=identify(config, run.data_id),
        schedule=schedule_of(config),
    )
    if run.leads:
        names = config.data.classes[1:]
        run.board.scalars(
            step,
            {
                "val/dice_mean": score,
                **{f"val/dice/{n}": float(d) for n, d in zip(names, dice[1:], strict=True)},
            },
        )
        if drawn := run.examples:
            predicted = predict_batch(model, drawn, run.device)
            run.board.overlays(step, drawn.image.numpy(), drawn.label.numpy(), predicted)
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        last = step == sum(s.steps for s in config.train.stages[: index + 1])
        if last:
            save_checkpoint(run.checkpoints, f"stage-{index}-{stage.name}", tensors, new)
        path = save_checkpoint(run.checkpoints, f"step-{step:08d}", tensors, new)
        if score >= state.best:  # of two equal ones the later saw more
            mark_best(path)
        prune(run.checkpoints)
    barrier()
    return new


def evaluate(
    model: nn.Module, batches: Iterable[Batch], classes: int, device: torch.device
) -> Counts:
    """(K, K) confusion counts over the batches, truth in rows."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    for batch in batches:
        counts += confusion(batch.label.numpy(), predict_batch(model, batch, device), classes)
    return counts


@torch.no_grad()
def predict_batch(model: nn.Module, batch: Batch, device: torch.device) -> NDArray[np.uint8]:
    """(N, H, W) class indices."""
    model.eval()
    logits, _ = model(batch.image.to(device))
    mask: NDArray[np.uint8] = logits.argmax(1).to(torch.uint8).cpu().numpy()
    return mask


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


def resume(run: Run, model: PSPNet, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load the newest checkpoint, or start at step 0.

    Raises:
        CheckpointError: It was made with another network, other data or another schedule.
    """
    path = latest_checkpoint(run.checkpoints)
    if path is None:
        return TrainState(step=0, stage="", best=-1.0, score=0.0, model={})
    tensors, state = load_checkpoint(path, run.device)
    wanted = identify(run.config, run.data_id)
    changed = [k for k, v in wanted.items() if state.model.get(k) != v]
    if not same_so_far(state, run.config):
        changed.append("train.stages or train.batch_size")
    if changed:
        raise CheckpointError(
            f"checkpoint {path}: made with other {', '.join(changed)}; use another out folder, "
            "or delete its checkpoints"
        )
    model.load_state_dict(tensors["model"])
    optimizer.load_state_dict(tensors["optimizer"])
    if run.leads and state.score == state.best:  # killed between saving and marking
        mark_best(path)
    return state
