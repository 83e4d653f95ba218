"""Grids: how a mask made on one lies on that of a series. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.names import count
from medpsp.errors import LabelError
from medpsp.types import Series

Floats = NDArray[np.float64]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CORNER_TOL_VOXEL = 0.1
"""Largest distance of a mapped grid corner from a voxel centre; catches 0.05 rad and 5 %."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """The grid of a series that labels are laid on.

    Attributes:
        shape: (N, H, W), holes counted.
        affine: (4, 4) index (column, row, slice) to mm LPS; None for images without it.
        slots: (SOPInstanceUID, frame from 0) of each image to its slice.
        partial: The series is one of several parts that the label object belongs to: what lies
            outside it is no error.
    """

    shape: tuple[int, int, int]
    affine: Floats | None = None
    slots: Mapping[tuple[str, int], int] = field(default_factory=dict)
    partial: bool = False


def grid_of(series: Series, partial: bool = False) -> Grid:
    """The grid of a series; ``partial`` if its label object belongs to other series too."""
    return Grid(
        shape=series.shape,
        affine=None if series.affine is None else np.array(series.affine),
        slots={
            (ref.sop_uid, ref.frame): place
            for ref, place in zip(series.slices, series.grid_index, strict=True)
        },
        partial=partial,
    )


def grid_tree(grid: Grid) -> dict[str, Any]:
    """A grid as lists and numbers; `grid_of_tree` makes an equal one of it."""
    return {
        "shape": grid.shape,
        "affine": None if grid.affine is None else grid.affine.tolist(),
        "slots": [[*key, place] for key, place in grid.slots.items()],
        "partial": grid.partial,
    }


def grid_of_tree(tree: dict[str, Any]) -> Grid:
    """The grid that `grid_tree` had."""
    return Grid(
        shape=tuple(tree["shape"]),
        affine=None if tree["affine"] is None else np.array(tree["affine"]),
        slots={(uid, number): place for uid, number, place in tree["slots"]},
        partial=tree["partial"],
    )


def place_mask(
    mask: NDArray[Any],
    mask_ras: Floats,
    affine_lps: Floats,
    shape: tuple[int, int, int],
    partial: bool = False,
    notes: dict[str, int] | None = None,
) -> NDArray[Any]:
    """Transpose, flip and paste a mask onto a series grid, bit-exact, without interpolation.

    The map from series index to mask index must be a signed permutation with an integral
    offset, tested at the corners of the grid, where small errors of rotation have grown.

    Args:
        mask: (i, j, k) in the order of its own affine.
        mask_ras: (4, 4) mask index to mm RAS.
        affine_lps: (4, 4) series index (column, row, slice) to mm LPS.
        shape: (N, H, W) of the series.
        partial: Labels outside the series are no error.
        notes: MASK_PARTIAL_COVER is added: voxels of the series that the mask does not reach.

    Returns:
        (N, H, W), 0 where the mask does not reach; a view where it reaches everywhere, since a
        volume of 512 x 512 x 800 has no room for copies.

    Raises:
        LabelError: MASK_GRID_MISMATCH, MASK_OUTSIDE_IMAGE, or MASK_ELSEWHERE where the grids do
            not touch: a mask says nothing of images that it does not reach.
    """
    slices, rows, columns = shape
    if slices == 1:  # one slice has no distance to the next: take the mask's along that direction
        affine_lps = affine_lps.copy()
        normal = affine_lps[:3, 2] / np.linalg.norm(affine_lps[:3, 2])
        lengths = np.linalg.norm(mask_ras[:3, :3], axis=0)
        along = np.abs((LPS_TO_RAS[:3, :3] @ normal) @ (mask_ras[:3, :3] / lengths))
        affine_lps[:3, 2] = normal * lengths[int(along.argmax())]
    size = np.array([columns, rows, slices])
    turn, offset = _permutation(np.linalg.inv(mask_ras) @ LPS_TO_RAS @ affine_lps, size, mask.shape)
    axes = [int(np.flatnonzero(turn[:, axis])[0]) for axis in range(3)]  # mask axis of each ours
    view = mask.transpose(axes)
    ours, theirs = [], []
    for axis, mask_axis in enumerate(axes):
        start, length = int(offset[mask_axis]), view.shape[axis]
        if turn[mask_axis, axis] < 0:
            view, start = np.flip(view, axis), length - 1 - start
        low = max(0, -start)
        high = max(low, min(int(size[axis]), length - start))
        ours.append(slice(low, high))
        theirs.append(slice(low + start, high + start))
    part = view[tuple(theirs)]
    whole = part.size == mask.size
    lost = 0 if whole else int(np.count_nonzero(mask)) - int(np.count_nonzero(part))
    _check_reach(lost, part.size, partial)
    if part.size == size.prod():
        return part.transpose(2, 1, 0)
    count({} if notes is None else notes, "MASK_PARTIAL_COVER", int(size.prod()) - part.size)
    out = np.zeros(shape, dtype=mask.dtype)
    out[tuple(reversed(ours))] = part.transpose(2, 1, 0)
    return out


def nearest_mask(
    mask: NDArray[Any],
    mask_ras: Floats,
    affine_lps: Floats,
    shape: tuple[int, int, int],
    partial: bool = False,
    notes: dict[str, int] | None = None,
) -> NDArray[Any]:
    """Take a mask on any grid by nearest voxel, slice by slice; arguments as `place_mask`.

    Raises:
        LabelError: MASK_OUTSIDE_IMAGE where labels lie over one voxel outside the image, or
            MASK_ELSEWHERE.
    """
    slices, rows, columns = shape
    to_mask = np.linalg.inv(mask_ras) @ LPS_TO_RAS @ affine_lps
    out = np.zeros(shape, dtype=mask.dtype)
    row, column = np.indices((rows, columns))
    plane = np.stack([column, row, np.zeros_like(row), np.ones_like(row)]).reshape(4, -1)
    limits, reached = np.array(mask.shape)[:, None], 0
    for number in range(slices):
        plane[2] = number
        index = np.round((to_mask @ plane)[:3]).clip(-1, limits).astype(np.int64)
        inside = ((index >= 0) & (index < limits)).all(axis=0)
        out[number].reshape(-1)[inside] = mask[tuple(index[:, inside])]
        reached += int(np.count_nonzero(inside))
    to_grid, size, lost = np.linalg.inv(to_mask), np.array([columns, rows, slices])[:, None], 0
    for number in range(mask.shape[2]):
        labelled = np.argwhere(mask[..., number]).T
        at = to_grid[:3, :2] @ labelled + (to_grid[:3, 2] * number + to_grid[:3, 3])[:, None]
        lost += int(((at < -1) | (at > size)).any(axis=0).sum())
    _check_reach(lost, reached, partial)
    count({} if notes is None else notes, "MASK_PARTIAL_COVER", out.size - reached)
    return out


def unsheared(affine_lps: Floats, slices: int) -> list[Floats]:
    """The grids that tools without shear give to a series with gantry tilt.

    ITK (so ITK-SNAP) keeps the direction of rows and columns and the length of the step between
    slices, and turns the step upright; others keep its height. Either may start at the first or
    the last slice. Empty where the affine has no shear.
    """
    step = affine_lps[:3, 2]
    normal = np.cross(affine_lps[:3, 0], affine_lps[:3, 1])
    normal *= np.sign(normal @ step) / np.linalg.norm(normal)
    height, length = float(normal @ step), float(np.linalg.norm(step))
    if slices == 1 or length - height < 1e-9 * length:
        return []
    found = []
    for distance in (length, height):
        for anchor in (0, slices - 1):
            made = affine_lps.copy()
            made[:3, 2] = normal * distance
            made[:3, 3] += anchor * (step - made[:3, 2])
            found.append(made)
    return found


def _permutation(
    to_mask: Floats, size: NDArray[np.int64], mask_shape: tuple[int, ...]
) -> tuple[Floats, Floats]:
    turn, offset = np.round(to_mask[:3, :3]), np.round(to_mask[:3, 3])
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (size - 1)
    error = corners @ (to_mask[:3, :3] - turn).T + (to_mask[:3, 3] - offset)
    worst = float(np.abs(error).max())
    near = worst <= CORNER_TOL_VOXEL and np.abs(offset).max() < 2**31  # False for NaN
    permutes = bool((np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all())
    if not permutes or not near:
        raise LabelError(
            "MASK_GRID_MISMATCH",
            f"mask {mask_shape} does not lie on the image grid {tuple(size.tolist())}: "
            f"a corner is off by {worst:.2f} voxel, at most {CORNER_TOL_VOXEL} allowed",
        )
    return turn, offset


def _check_reach(lost: int, reached: int, partial: bool) -> None:
    if lost and not partial:
        raise LabelError("MASK_OUTSIDE_IMAGE", f"{lost} labelled voxels lie outside the image")
    if not reached:
        raise LabelError("MASK_ELSEWHERE", "the mask reaches no voxel of these images")
