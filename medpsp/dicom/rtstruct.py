"""RTSTRUCT contours onto the slices of a series (PS3.3 C.8.8.6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medpsp.dicom.geometry import FAR_MM
from medpsp.dicom.items import items_of, number_of, reading, text_of
from medpsp.dicom.names import LabelVolume, NameRule, classes_of, count, paint, settle
from medpsp.dicom.placement import Floats, Grid
from medpsp.dicom.polygon import fill_even_odd
from medpsp.errors import LabelError

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
PARALLEL_TOL = 1e-2
"""Contours may leave their slice's plane by this angle, rad."""

SAME_PLANE = 0.05
"""Share of the slice distance by which two contours of one plane may differ, and one may wave."""

OFF_GRID_SHARE = 0.1
"""More contours than this beside the images: the structures belong to another series."""

MOST_POINTS = 4_000_000
"""Of one object; some 4 s to read. Large plans have a tenth of it."""

MOST_CROSSINGS = 30_000_000
"""Of contours with pixel rows; some 1 s to fill."""


class Contour(NamedTuple):
    """A closed contour: number of its ROI and (P, 3) points, mm LPS."""

    roi: int
    points: Floats


def read_contours(ds: Dataset, grid: Grid, rule: NameRule) -> LabelVolume:
    """Draw the regions of an RTSTRUCT on the grid of a series.

    A voxel belongs to a region if its centre lies inside. Contours of one region on one slice
    combine by exclusive or, so that a contour in a contour is a hole. A slice takes the contours
    of the plane nearest to it, at most half a slice away; the images that the object references
    play no part.

    Args:
        ds: The parsed object.
        grid: Of the series, with an affine.
        rule: ROIName to class.

    Returns:
        (N, H, W) uint8 class indices. Notes: LABEL_NAME_UNMATCHED (regions), and in contours
        RT_NOT_CLOSED, RT_FEW_POINTS, RT_DUPLICATE, RT_OFF_GRID, RT_OTHER_PLANE, RT_CLIPPED; in
        slices RT_SLICE_GAP, which a region skips between two that it has; in voxels RT_OVERLAP;
        LABEL_EMPTY if nothing is drawn.

    Raises:
        LabelError: RT_UNREADABLE, RT_POINT_INVALID, RT_SIZE_LIMIT, RT_ROI_CONFLICT,
            RT_NONPARALLEL, RT_OFF_GRID, RT_OVERLAP, LABEL_NO_CLASS, LABEL_NO_GEOMETRY.
    """
    if grid.affine is None:
        raise LabelError("LABEL_NO_GEOMETRY", "contours need images with patient geometry")
    notes: dict[str, int] = {}
    with reading("RT_UNREADABLE"):
        classes = classes_of(_names(ds), rule, False, notes)
        contours = list(_contours(ds, {n for n, index in classes.items() if index}, notes))
    values = np.zeros(grid.shape, dtype=np.uint8)
    clashes = 0
    for (roi, number), rings in sorted(_rings(contours, grid, notes).items()):
        box, region = fill_even_odd(rings, grid.shape[1:])
        clashes += paint(values[number][box], region, classes[roi])
    settle(clashes, "RT_OVERLAP", rule, notes)
    count(notes, "LABEL_EMPTY", int(not values.any()))
    return LabelVolume(values, notes)


def sample_points(ds: Dataset, most: int) -> list[tuple[float, ...]]:
    """The first point of up to ``most`` closed contours, evenly taken, mm LPS.

    Raises:
        LabelError: RT_UNREADABLE, RT_POINT_INVALID.
    """
    with reading("RT_UNREADABLE"):
        items = items_of(ds, "ROIContourSequence", "ContourSequence")
        closed = [item for item in items if text_of(item, "ContourGeometricType") in CLOSED]
        step = -(-len(closed) // most) or 1
        points = [_points(item, most=1, cut=True) for item in closed[::step]]
    return [tuple(p[0].tolist()) for p in points if len(p)]


def _names(ds: Dataset) -> dict[int, str]:
    names: dict[int, str] = {}
    for item in items_of(ds, "StructureSetROISequence"):
        number, name = number_of(item, "ROINumber"), text_of(item, "ROIName")
        if number is None:
            continue
        if names.setdefault(number, name) != name:
            raise LabelError("RT_ROI_CONFLICT", "one ROINumber has two names")
    return names


def _contours(ds: Dataset, wanted: set[int], notes: dict[str, int]) -> Iterator[Contour]:
    """The closed contours of the wanted regions; others are counted."""
    left = MOST_POINTS
    for region in items_of(ds, "ROIContourSequence"):
        roi = number_of(region, "ReferencedROINumber")
        if roi is None or roi not in wanted:
            continue
        for item in items_of(region, "ContourSequence"):
            if text_of(item, "ContourGeometricType") not in CLOSED:
                count(notes, "RT_NOT_CLOSED")
                continue
            points = _points(item, left)
            left -= len(points)
            if len(points) < 3:
                count(notes, "RT_FEW_POINTS")
            else:
                yield Contour(roi, points)


def _points(item: Dataset, most: int, cut: bool = False) -> Floats:
    """(P, 3) points of a contour; with ``cut`` no more than ``most``, else more are an error."""
    element = item.get_item("ContourData")  # its text: pydicom takes 3 us to make one number
    value: Any = None if element is None else element.value
    if not value:
        return np.zeros((0, 3))
    if isinstance(value, bytes):
        if value.count(b"\\") >= 3 * most and not cut:
            raise LabelError("RT_SIZE_LIMIT", f"over {MOST_POINTS} points")
        value = value.rstrip(b" \0").split(b"\\", 3 * most)[: 3 * most]
    numbers = np.fromiter(map(float, value), dtype=np.float64, count=len(value))
    if len(numbers) % 3 or not (np.abs(numbers) < FAR_MM).all():  # also for NaN
        raise LabelError("RT_POINT_INVALID", "ContourData holds other than triples of mm")
    return numbers.reshape(-1, 3)


def _rings(
    contours: Sequence[Contour], grid: Grid, notes: dict[str, int]
) -> dict[tuple[int, int], list[Floats]]:
    """(P, 2) column and row of the contours to draw, by region and slice."""
    if not contours or grid.affine is None:
        return {}
    points = np.concatenate([c.points for c in contours])
    sizes = np.array([len(c.points) for c in contours])
    starts = np.cumsum(sizes) - sizes
    to_index = np.linalg.inv(grid.affine)
    index = points @ to_index[:3, :3].T + to_index[:3, 3]
    low, high = (reduce.reduceat(index, starts) for reduce in (np.minimum, np.maximum))
    extent = np.maximum.reduceat(points, starts) - np.minimum.reduceat(points, starts)
    _check_parallel(high[:, 2] - low[:, 2], extent, 1 / float(np.linalg.norm(to_index[2, :3])))
    _check_crossings(index[:, 1].clip(-1, grid.shape[1]), starts)
    plane = np.add.reduceat(index[:, 2], starts) / sizes
    size = np.array(grid.shape[::-1])
    low[:, 2] = high[:, 2] = plane
    outside = (np.round(high) < 0) | (np.round(low) >= size)
    beside = np.asarray(outside.any(axis=1))
    _check_beside(beside, grid.partial, notes)
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in np.flatnonzero(~beside).tolist():
        found[contours[number].roi, int(np.round(plane[number]))].append(number)
    rings = {}
    for key, numbers in found.items():
        nearest = min(numbers, key=lambda n: abs(plane[n] - key[1]))
        kept = [n for n in numbers if abs(plane[n] - plane[nearest]) <= SAME_PLANE]
        count(notes, "RT_OTHER_PLANE", len(numbers) - len(kept))
        out = (low[kept, :2] <= -1) | (high[kept, :2] > size[:2])  # the next centres beyond
        count(notes, "RT_CLIPPED", int(out.any(axis=1).sum()))
        # 0.001 voxel: contours drawn through voxel centres then fall on one side all along
        drawn = [np.round(index[starts[n] : starts[n] + sizes[n], :2], 3) for n in kept]
        distinct = {ring.tobytes(): ring for ring in drawn}  # twice the same would cancel itself
        count(notes, "RT_DUPLICATE", len(drawn) - len(distinct))
        rings[key] = list(distinct.values())
    _count_gaps(rings, notes)
    return rings


def _check_parallel(waves: Floats, extent: Floats, distance: float) -> None:
    """A contour may wave about its plane a little, or be tilted by `PARALLEL_TOL`.

    Args:
        waves: (M,) from the lowest to the highest point of each contour, in slices.
        extent: (M, 3) its size, mm.
        distance: Between two slices, mm.
    """
    allowed = np.maximum(SAME_PLANE, PARALLEL_TOL * np.linalg.norm(extent, axis=1) / distance)
    tilted = int((waves > np.minimum(allowed, 1)).sum())
    if tilted:
        raise LabelError(
            "RT_NONPARALLEL", f"{tilted} of {len(waves)} contours do not lie in a slice's plane"
        )


def _check_crossings(rows: Floats, starts: NDArray[np.int64]) -> None:
    steps = np.abs(np.diff(rows, append=rows[-1:]))
    last = np.append(starts[1:], len(rows)) - 1
    steps[last] = np.abs(rows[last] - rows[starts])  # back to the first corner
    if steps.sum() > MOST_CROSSINGS:
        raise LabelError("RT_SIZE_LIMIT", f"contours cross over {MOST_CROSSINGS} pixel rows")


def _check_beside(beside: NDArray[np.bool_], partial: bool, notes: dict[str, int]) -> None:
    number = int(beside.sum())
    if number > OFF_GRID_SHARE * len(beside) and not partial:
        raise LabelError("RT_OFF_GRID", f"{number} of {len(beside)} contours lie beside the images")
    count(notes, "RT_OFF_GRID", number)


def _count_gaps(rings: dict[tuple[int, int], list[Floats]], notes: dict[str, int]) -> None:
    """Slices that a region skips: two tumours, or a contour on every second slice only."""
    for roi in {roi for roi, _ in rings}:
        slices = [number for known, number in rings if known == roi]
        count(notes, "RT_SLICE_GAP", max(slices) - min(slices) + 1 - len(slices))
