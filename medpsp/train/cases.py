"""Scores of one case: the slices of a series, one upon the other.

Conventions where a class is in neither, in one, or in both of truth and prediction:

    in neither       absent     no Dice, IoU, HD95, NSD: it counts in no mean
    in truth alone   missed     Dice, IoU and NSD 0, no HD95 (it would be infinite)
    predicted alone  invented   Dice, IoU and NSD 0, no HD95

So a mean of HD95 is over fewer cases than one of Dice: the number of missed and invented ones
belongs beside it (Maier-Hein et al. 2024, Nature Methods 21, 195-212).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medpsp.train.metrics import Counts, confusion
from medpsp.train.surface import Floats, Grid, SurfaceScore, surface_scores
from medpsp.types import IGNORE

Labels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of one case.

    Attributes:
        counts: (K, K) voxels, truth in rows, ignored ones left out.
        hd95: (K,) mm; NaN for the background, without geometry, and where one mask is empty.
        nsd: (K,) in [0, 1]; NaN for the background, without geometry, and where both are empty.
    """

    counts: Counts
    hd95: Floats
    nsd: Floats


def score_case(
    truth: Labels, predicted: Labels, classes: int, grid: Grid | None, tolerance: float
) -> Scores:
    """Score a stack.

    Ignored voxels and missing slices are the same thing: not known. They are taken out of both
    masks, and a mask has no surface on them.

    Args:
        truth: (N, H, W) class indices, 255 ignored.
        predicted: (N, H, W) class indices.
        classes: K.
        grid: Where the voxels lie; None: not known, so there are no distances.
        tolerance: Of the NSD, mm.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    for one, other in zip(truth, predicted, strict=True):  # a stack at once takes 16 bytes a voxel
        counts += confusion(one, other, classes)
    hd95, nsd = np.full(classes, np.nan), np.full(classes, np.nan)
    if grid is not None:
        boxes = _boxes(truth, predicted, classes)
        wanted, found = counts.sum(1), counts.sum(0)
        for index in range(1, classes):
            if wanted[index] and found[index]:
                score = _surfaces((truth, predicted), index, boxes[index], grid, tolerance)
                hd95[index], nsd[index] = score
            elif wanted[index] or found[index]:
                nsd[index] = 0.0
    return Scores(counts=counts, hd95=hd95, nsd=nsd)


def _surfaces(
    pair: tuple[Labels, Labels],
    index: int,
    box: tuple[slice, ...],
    grid: Grid,
    tolerance: float,
) -> SurfaceScore:
    truth, predicted = (labels[box] for labels in pair)
    known = truth != IGNORE
    cut = Grid(grid.places[box[0]], grid.steps)
    return surface_scores(truth == index, (predicted == index) & known, known, cut, tolerance)


def _boxes(truth: Labels, predicted: Labels, classes: int) -> dict[int, tuple[slice, ...]]:
    """Of each class: where it is in either, and a voxel around it, so that the box has no edge
    that the image does not have.
    """
    found = [ndimage.find_objects(labels, max_label=classes - 1) for labels in (truth, predicted)]
    boxes = {}
    for index in range(1, classes):
        parts = [of[index - 1] for of in found if of[index - 1] is not None]
        if parts:
            boxes[index] = tuple(
                slice(max(0, min(p.start for p in axis) - 1), min(n, max(p.stop for p in axis) + 1))
                for n, axis in zip(truth.shape, zip(*parts, strict=True), strict=True)
            )
    return boxes
