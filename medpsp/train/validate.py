"""Validation while training: pooled Dice, and a few slices to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medpsp.train.batch import Batch
from medpsp.train.metrics import Counts, confusion, dice_per_class, mean_foreground
from medpsp.train.ranks import sum_counts

if TYPE_CHECKING:
    from medpsp.train.loop import Run


def validate(run: Run, model: nn.Module, step: int) -> float:
    """Mean Dice of the foreground classes over the validation slices; 0 where there are none.

    All ranks take part, and all get the same; rank 0 writes it to the board.
    """
    names = run.config.data.classes
    counts = evaluate(model, run.val_batches(), len(names), run.device)
    dice = dice_per_class(sum_counts(counts, run.device))
    score = mean_foreground(dice)
    if run.leads:
        shown = {f"val/dice/{n}": float(d) for n, d in zip(names[1:], dice[1:], strict=True)}
        run.board.scalars(step, {"val/dice_mean": score, **shown})
        if drawn := run.examples:
            predicted = predict_batch(model, drawn, run.device)
            run.board.overlays(step, drawn.image.numpy(), drawn.label.numpy(), predicted)
    return 0.0 if math.isnan(score) else score


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
    dtype = next(model.parameters()).dtype
    logits, _ = model(batch.image.to(device, dtype))
    mask: NDArray[np.uint8] = logits.argmax(1).to(torch.uint8).cpu().numpy()
    return mask
