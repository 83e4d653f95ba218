"""Whether a probability of 0.9 is right nine times in ten: counts that add up over slices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bins = NDArray[np.float64]
"""(3, B): voxels of each bin, sum of their confidence, how many of them are right."""

BINS = 15
"""Of equal width, each with its upper edge (Guo et al. 2017, On Calibration of Modern Neural
Networks)."""


def calibration_bins(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> Bins:
    """Count voxels by confidence.

    Args:
        confidence: (...) probability of the class that was predicted, in [0, 1].
        correct: (...) whether it is the true one. Ignored voxels are in neither.
    """
    flat, right = confidence.ravel(), correct.ravel()
    place = np.clip(np.ceil(flat * BINS).astype(np.int64) - 1, 0, BINS - 1)
    weights = (None, flat, right)
    return np.stack([np.bincount(place, w, minlength=BINS).astype(np.float64) for w in weights])


def calibration_error(bins: Bins) -> NDArray[np.float64]:
    """Expected calibration error, (..., 3, B) to (...), in [0, 1]; NaN where nothing is counted.

    The sum over the bins of n_b / n |accuracy_b - confidence_b|.
    """
    voxels, confidence, right = np.moveaxis(bins, -2, 0)
    total = voxels.sum(-1)
    with np.errstate(invalid="ignore"):
        error: NDArray[np.float64] = np.abs(right - confidence).sum(-1) / np.where(
            total > 0, total, np.nan
        )
    return error
