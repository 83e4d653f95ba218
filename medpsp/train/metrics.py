"""Confusion counts that add up over slices, patients and ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medpsp.types import IGNORE

Counts = NDArray[np.int64]


def confusion(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> Counts:
    """(K, K) pixel counts, truth in rows; ignored pixels are left out."""
    valid = truth != IGNORE
    index = truth[valid].astype(np.int64) * classes + predicted[valid]
    return np.bincount(index, minlength=classes * classes).reshape(classes, classes)


def dice_per_class(counts: Counts) -> NDArray[np.float64]:
    """(K,) 2 TP / (truth + predicted); NaN where a class is in neither."""
    size = counts.sum(0) + counts.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(size > 0, 2 * np.diag(counts) / np.maximum(size, 1), np.nan)


def iou_per_class(counts: Counts) -> NDArray[np.float64]:
    """(K,) TP / (truth or predicted); NaN where a class is in neither."""
    both = np.diag(counts)
    size = counts.sum(0) + counts.sum(1) - both
    with np.errstate(invalid="ignore"):
        return np.where(size > 0, both / np.maximum(size, 1), np.nan)


def mean_foreground(values: NDArray[np.float64]) -> float:
    """Mean over classes 1.. that are not NaN; NaN if all are."""
    foreground = values[1:]
    seen = foreground[~np.isnan(foreground)]
    return float(seen.mean()) if seen.size else float("nan")


class ConstantMask:
    """The best mask that never looks at the image: the floor every Dice is read against.

    The mean label of the training slices on a relative grid; a pixel gets class k where its
    frequency of k exceeds the threshold that gave the best Dice on those slices.
    """

    GRID = 64

    def __init__(self, classes: int) -> None:
        self.sums = np.zeros((classes, self.GRID, self.GRID))
        self.slices = 0

    def add(self, label: NDArray[np.uint8]) -> None:
        """Count one training label (H, W)."""
        small = _resample(label, (self.GRID, self.GRID))
        for index in range(len(self.sums)):
            self.sums[index] += small == index
        self.slices += 1

    def threshold(self, index: int) -> float:
        """The frequency above which predicting class ``index`` gave the best Dice."""
        frequency = self.sums[index].ravel() / max(1, self.slices)
        order = np.sort(frequency)[::-1]
        hits = np.cumsum(order)
        dice = 2 * hits / np.maximum(np.arange(1, len(order) + 1) + order.sum(), 1e-9)
        return float(order[int(dice.argmax())])

    def predict(self, index: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """(H, W) pixels that get class ``index``."""
        frequency = self.sums[index] / max(1, self.slices)
        chosen = (frequency >= max(self.threshold(index), 1e-9)).astype(np.uint8)
        return _resample(chosen, shape).astype(bool)


def _resample(values: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Nearest neighbour on relative coordinates."""
    rows = ((np.arange(shape[0]) + 0.5) * values.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * values.shape[1] / shape[1]).astype(int)
    return values[np.ix_(rows, columns)]
