"""Distances between the surfaces of two masks, in mm.

The surface of a mask are its voxels with a face on a known voxel outside of it or on the edge of
the image; a distance is one of voxel centres. HD95 is the greater of the two directed 95th
percentiles; NSD the share of the voxels of both surfaces that lie within a tolerance of the other.
So does Metrics Reloaded (Maier-Hein et al. 2024, Nature Methods 21, 195-212), and so does MONAI
1.6.1 by default, whose numbers these are where every voxel is known. NSD is of Nikolov et al. 2018
(arXiv 1809.04430), whose own code weights surfaces by their area: with thick slices it differs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
PERCENTILE = 95
DENSE = 50
"""A tree is the slower way from one voxel in so many on (26 M voxels of noise: 320 s)."""


class SurfaceScore(NamedTuple):
    """HD95 in mm and NSD in [0, 1]; NaN where a mask has no surface."""

    hd95: float
    nsd: float


class Grid(NamedTuple):
    """Where the voxels of a stack lie.

    Attributes:
        places: (N,) place of each slice, ascending. Slices whose places differ by more than 1 are
            no neighbours: of what lies between them nothing is known.
        steps: (3, 3) mm from a voxel to the next slice, row and column. Not orthogonal where the
            gantry was tilted.
    """

    places: NDArray[np.int64]
    steps: Floats


def surface_scores(
    truth: Mask, found: Mask, known: Mask, grid: Grid, tolerance: float
) -> SurfaceScore:
    """HD95 and NSD of two masks.

    Args:
        truth: (N, H, W), False where not known.
        found: (N, H, W), False where not known.
        known: (N, H, W), False for voxels that do not count.
        grid: Where they lie.
        tolerance: Of the NSD, mm.

    Returns:
        NaN for both where a mask is empty, or nothing around it is known.
    """
    first, second = (surface(mask, known, grid.places) for mask in (truth, found))
    if not (first.any() and second.any()):
        return SurfaceScore(np.nan, np.nan)
    directed = _distances(first, second, grid), _distances(second, first, grid)
    hd95 = max(float(np.percentile(d, PERCENTILE)) for d in directed)
    # a distance is a sum of rounded squares: one that equals the tolerance counts
    near = sum(int(np.count_nonzero(d <= tolerance * (1 + 1e-9))) for d in directed)
    return SurfaceScore(hd95, near / sum(len(d) for d in directed))


def surface(mask: Mask, known: Mask, places: NDArray[np.int64]) -> Mask:
    """(N, H, W) voxels of a mask with a face on a known voxel outside, or on the edge.

    The first and the last slice are edges; both sides of a gap are none.
    """
    outside = known & ~mask
    near = np.zeros_like(mask)
    near[[0, -1]] = near[:, [0, -1]] = near[:, :, [0, -1]] = True
    touch = (np.diff(places) == 1)[:, None, None]
    near[1:] |= outside[:-1] & touch
    near[:-1] |= outside[1:] & touch
    near[:, 1:] |= outside[:, :-1]
    near[:, :-1] |= outside[:, 1:]
    near[:, :, 1:] |= outside[:, :, :-1]
    near[:, :, :-1] |= outside[:, :, 1:]
    near &= mask
    return near


def _distances(start: Mask, end: Mask, grid: Grid) -> Floats:
    """(M,) mm from every voxel of ``start`` to the nearest of ``end``; both have some."""
    alone = start & ~end  # the others are 0 mm away: most, where the masks agree
    result = np.zeros(int(np.count_nonzero(start)))
    count = int(np.count_nonzero(alone))
    if count:
        dense = count * DENSE > alone.size and _is_box(grid)
        result[:count] = (_by_transform if dense else _by_tree)(alone, end, grid)
    return result


def _by_tree(start: Mask, end: Mask, grid: Grid) -> Floats:
    """Takes little memory, and time for every voxel of ``start``."""
    distance: Floats = KDTree(_points(end, grid)).query(_points(start, grid))[0]
    return distance


def _by_transform(start: Mask, end: Mask, grid: Grid) -> Floats:
    """Takes the same time for any masks, and 12 bytes a voxel; of a grid that is a box."""
    nearest = ndimage.distance_transform_edt(
        ~end,
        sampling=np.linalg.norm(grid.steps, axis=1),
        return_distances=False,
        return_indices=True,
    )
    away = np.stack([axis[start] for axis in nearest], axis=1) - np.argwhere(start)
    distance: Floats = np.linalg.norm(away @ grid.steps, axis=1)
    return distance


def _is_box(grid: Grid) -> bool:
    """No gaps, and right angles."""
    products = grid.steps @ grid.steps.T
    slant = np.abs(products - np.diag(np.diag(products))).max()
    return bool((np.diff(grid.places) == 1).all() and slant < 1e-6 * np.diag(products).min())


def _points(mask: Mask, grid: Grid) -> Floats:
    """(M, 3) mm of the voxels of a mask."""
    index = np.argwhere(mask)
    index[:, 0] = grid.places[index[:, 0]]
    points: Floats = index @ grid.steps
    return points
