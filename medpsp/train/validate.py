"""Validation while training: pooled Dice, what lies behind it, and a few slices to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medpsp.modelconfig import ModelConfig
from medpsp.progress import Bar
from medpsp.tiles import Tiling
from medpsp.train.batch import Batch
from medpsp.train.boardcounts import Tally, sum_all
from medpsp.train.metrics import Counts, confusion, dice_per_class, mean_foreground
from medpsp.train.sliding import probabilities

if TYPE_CHECKING:
    from medpsp.train.loop import Run


def validate(run: Run, model: nn.Module, step: int, *, show: bool = True) -> float:
    """Mean Dice of the foreground classes over the validation slices; 0 where there are none.

    All ranks take part, and all get the same; rank 0 writes it to the board.

    Args:
        run: The run.
        model: Its network.
        step: Steps that are done.
        show: Write it to the board.
    """
    names = run.config.data.classes
    tally = Tally.empty(len(names))
    counts = evaluate(model, _watched(run, step), len(names), run.config.tiling, tally)
    counts, tally = sum_all(counts, tally, run.device)
    dice = dice_per_class(counts)
    score = mean_foreground(dice)
    if run.leads and show:
        last = step - 1  # the step that was done last, as the board counts
        shown = {f"val/dice/{n}": float(d) for n, d in zip(names[1:], dice[1:], strict=True)}
        run.board.scalars(last, {"val/dice_mean": score, **shown})
        run.board.tables(last, names, counts, tally)
        if drawn := run.examples:
            predicted = predict_batch(model, drawn, run.config.tiling)
            images = shown_channels(drawn.image.numpy(), run.config.model)
            run.board.overlays(last, images, drawn.label.numpy(), predicted)
    return 0.0 if math.isnan(score) else score


def _watched(run: Run, step: int) -> Iterator[Batch]:
    """The validation batches; each has the time of a first step before the watch ends the run."""
    with Bar("validate", run.val_slices, "slices", show=run.leads, inner=True) as bar:
        for batch in run.val_batches():
            run.at(step, "evaluate", first=True)
            yield batch
            bar.advance(len(batch.label))


def shown_channels(images: NDArray[np.float32], model: ModelConfig) -> NDArray[np.float32]:
    """(N, 1 or 3, H, W) of the slice itself: its first window, or its colours."""
    of_a_slice = model.channels // (2 * model.context + 1)
    first = model.context * of_a_slice
    return images[:, first : first + (3 if model.in_channels == 3 else 1)]


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: int,
    tiling: Tiling,
    tally: Tally | None = None,
) -> Counts:
    """(K, K) confusion counts over the batches, truth in rows.

    Args:
        model: A network of K classes.
        batches: With labels.
        classes: K.
        tiling: How much of a slice the network sees at once.
        tally: Where to count the probabilities, too.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    for batch in batches:
        seen = probabilities(model, batch.image, tiling)
        counts += confusion(batch.label.numpy(), _classes(seen), classes)
        if tally:  # a broken network is sure of nothing
            tally.add(seen.nan_to_num(), batch.label.to(seen.device))
    return counts


def predict_batch(model: nn.Module, batch: Batch, tiling: Tiling) -> NDArray[np.uint8]:
    """(N, H, W) class indices."""
    return _classes(probabilities(model, batch.image, tiling))


def _classes(seen: Tensor) -> NDArray[np.uint8]:
    mask: NDArray[np.uint8] = seen.argmax(1).to(torch.uint8).cpu().numpy()
    return mask
