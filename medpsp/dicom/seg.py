"""DICOM SEG onto the slices of a series (PS3.3 A.51, C.8.20)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medpsp.dicom.names import LabelVolume, NameRule, classes_of, count, paint, settle
from medpsp.dicom.placement import CORNER_TOL_VOXEL, Grid
from medpsp.dicom.segheader import Frame, Header, Source, read_frame, read_header
from medpsp.errors import LabelError


class Spot(NamedTuple):
    """Where a frame lies on the grid.

    Attributes:
        axes: Grid axis (0 column, 1 row, 2 slice) along the frame's columns, rows and normal.
        signs: 1 or -1: direction of the frame's columns and rows along them.
        start: Lowest grid index along each of ``axes``; may lie outside the grid.
    """

    axes: tuple[int, int, int]
    signs: tuple[int, int]
    start: tuple[int, int, int]


def read_segments(
    ds: Dataset, stored: Callable[[int], NDArray[Any]], grid: Grid, rule: NameRule
) -> LabelVolume:
    """Lay the segments of a SEG on the grid of a series, voxel by voxel, never interpolated.

    Every frame is placed by its own position and orientation, and may be turned or cropped
    against the series; frames without a position by the image that they reference.

    Args:
        ds: The parsed object.
        stored: Frame number from 0 to its (H, W) stored values.
        grid: Of the series.
        rule: SegmentLabel or SegmentNumber to class.

    Returns:
        (N, H, W) uint8 class indices; what no frame covers is 0. Notes: LABEL_NAME_UNMATCHED in
        segments, SEG_BY_REFERENCE and SEG_REFERENCE_DISAGREES in frames, SEG_OVERLAP in voxels,
        LABEL_EMPTY if nothing is labelled.

    Raises:
        LabelError: SEG_UNREADABLE, SEG_TYPE, SEG_TILED, SEG_FRAMES, SEG_NO_MAXIMUM, SEG_GEOMETRY,
            SEG_SEGMENT_UNKNOWN, SEG_SEGMENT_CONFLICT, SEG_GRID_MISMATCH, SEG_OUTSIDE_IMAGE,
            SEG_REFERENCE_DISAGREES, SEG_OVERLAP, LABEL_NO_CLASS.
        SourceError: What ``stored`` raises.
    """
    header = read_header(ds)
    notes: dict[str, int] = {}
    classes = classes_of(header.names, rule, True, notes)
    frames = [read_frame(ds, header, number) for number in range(header.frames)]
    slots = _slots(grid)
    spots = [_spot(frame, header.shape, grid, slots) for frame in frames]
    _check_references(frames, spots, slots, notes)
    values = np.zeros(grid.shape, dtype=np.uint8)
    clashes = lost = 0
    for number, (frame, spot) in enumerate(zip(frames, spots, strict=True)):
        wanted = header.kind == "LABELMAP" or classes.get(frame.segment, 0)
        if not wanted or (spot is None and grid.partial):
            continue
        pixels = stored(number)
        if pixels.shape != header.shape:
            raise LabelError("SEG_FRAMES", f"frame of {pixels.shape}, expected {header.shape}")
        for index, region in _regions(pixels, frame.segment, header, (classes, rule.threshold)):
            target, part = _cut(values, region, spot)
            clashes += paint(target, part, index)
            lost += int(np.count_nonzero(region)) - int(np.count_nonzero(part))
    if lost and not grid.partial:
        raise LabelError("SEG_OUTSIDE_IMAGE", f"{lost} labelled voxels lie outside the images")
    settle(clashes, "SEG_OVERLAP", rule, notes)
    count(notes, "LABEL_EMPTY", int(not values.any()))
    return LabelVolume(values, notes)


def _slots(grid: Grid) -> dict[Source, int]:
    """Slices by image; images of one frame also without its number."""
    often = Counter(uid for uid, _ in grid.slots)
    whole = {(uid, -1): slot for (uid, _), slot in grid.slots.items() if often[uid] == 1}
    return {**grid.slots, **whole}


def _spot(
    frame: Frame, shape: tuple[int, int], grid: Grid, slots: dict[Source, int]
) -> Spot | None:
    """Where a frame lies; None if wholly outside the grid."""
    if frame.affine is None or grid.affine is None:
        return _referenced(frame, shape, grid, slots)
    to_index = np.linalg.inv(grid.affine)
    steps = to_index[:3, :3] @ frame.affine  # (3, 3): along a row, along a column, first pixel
    steps[:, 2] += to_index[:3, 3]
    far = np.array([shape[1] - 1, shape[0] - 1])
    corners = np.array([(0, 0, 1), (far[0], 0, 1), (0, far[1], 1), (*far, 1)]).T  # (3, 4)
    at, size = steps @ corners, np.array(grid.shape[::-1])
    if ((at.max(axis=1) < -0.5) | (at.min(axis=1) > size - 0.5)).any():
        return None
    turn = np.round(steps)
    worst = float(np.abs(at - turn @ corners).max())
    used = np.abs(turn[:, :2])
    if not worst <= CORNER_TOL_VOXEL or (used.sum(0) != 1).any() or (used.sum(1) > 1).any():
        raise LabelError(
            "SEG_GRID_MISMATCH",
            f"a frame {shape} does not lie on the image grid {grid.shape}: a corner is off by "
            f"{worst:.2f} voxel, at most {CORNER_TOL_VOXEL} allowed",
        )
    across, down = (int(used[:, k].argmax()) for k in range(2))
    signs = int(turn[across, 0]), int(turn[down, 1])
    lowest = (turn @ corners).min(axis=1).astype(int)
    axes = (across, down, 3 - across - down)
    return Spot(axes, signs, (int(lowest[axes[0]]), int(lowest[axes[1]]), int(lowest[axes[2]])))


def _referenced(
    frame: Frame, shape: tuple[int, int], grid: Grid, slots: dict[Source, int]
) -> Spot | None:
    if not frame.sources:
        raise LabelError("SEG_GEOMETRY", "a frame has no position and references no image")
    found = {slots[source] for source in frame.sources if source in slots}
    if not found:
        return None
    if len(found) > 1 or shape != grid.shape[1:]:
        raise LabelError(
            "SEG_GEOMETRY",
            f"a frame {shape} without position references {len(found)} images {grid.shape[1:]}",
        )
    return Spot((0, 1, 2), (1, 1), (0, 0, found.pop()))


def _check_references(
    frames: Sequence[Frame],
    spots: Sequence[Spot | None],
    slots: dict[Source, int],
    notes: dict[str, int],
) -> None:
    """Position decides; the references of most frames must not tell another story."""
    checked = wrong = 0
    for frame, spot in zip(frames, spots, strict=True):
        found = {slots[source] for source in frame.sources if source in slots}
        count(notes, "SEG_BY_REFERENCE", int(frame.affine is None and spot is not None))
        if found and spot is not None and spot.axes[2] == 2:
            checked += 1
            wrong += spot.start[2] not in found
    if wrong > checked / 2:
        raise LabelError(
            "SEG_REFERENCE_DISAGREES",
            f"{wrong} of {checked} frames lie on another slice than the image they reference",
        )
    count(notes, "SEG_REFERENCE_DISAGREES", wrong)


def _regions(
    pixels: NDArray[Any], segment: int, header: Header, rule: tuple[dict[int, int], float]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(class index, (H, W) mask) of each class in a frame."""
    classes, threshold = rule
    if header.kind != "LABELMAP":
        share = threshold * header.full if header.kind == "FRACTIONAL" else 1
        yield classes[segment], pixels >= max(1, math.ceil(share - 1e-9))
        return
    for number in np.unique(pixels).tolist():
        if number == header.background:
            continue
        if number not in header.names:
            raise LabelError("SEG_SEGMENT_UNKNOWN", f"segment {number} is not described")
        if index := classes.get(number, 0):
            yield index, pixels == number


def _cut(
    values: NDArray[np.uint8], region: NDArray[np.bool_], spot: Spot | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The part of the volume that a frame covers, as a view, and the frame's part on it."""
    if spot is None:
        return np.zeros((0, 0), dtype=np.uint8), np.zeros((0, 0), dtype=np.bool_)
    across, down, normal = spot.axes
    block = np.moveaxis(values.transpose(2, 1, 0), (down, across, normal), (0, 1, 2))
    plane, region = block[..., spot.start[2]], region[:: spot.signs[1], :: spot.signs[0]]
    ours, theirs = [], []
    for start, size, limit in zip(spot.start[1::-1], region.shape, plane.shape, strict=True):
        low, high = max(start, 0), min(start + size, limit)
        ours.append(slice(low, high))
        theirs.append(slice(low - start, high - start))
    return plane[tuple(ours)], region[tuple(theirs)]
