"""Slices to series: group by identity, order by position along the normal, find the affine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import GeometryError
from medpsp.types import Series, SliceRef

SPACING_RTOL, SPACING_ATOL_MM = 0.01, 0.01
"""Two slice distances are the same within max(1 %, 0.01 mm): decimal strings carry noise."""

ORTHOGONAL_TOL = 1e-3

SAME_GRID_TOL = 1e-3
"""Direction cosines (absolute) and pixel spacings (relative) this close are one grid."""


def group_series(
    slices: Iterable[SliceRef],
) -> tuple[list[Series], list[tuple[SliceRef, GeometryError]]]:
    """Group and order slices; a group without regular geometry is refused slice by slice.

    The order of the input and of file names does not matter. Files of one SOPInstanceUID are one
    image if their headers agree: all but the first by ``file_id`` are refused as DUP_SOP_UID.
    Where the headers differ nobody knows which is right: all are refused as DUP_CONFLICT.

    Returns:
        The series, sorted by (patient, series UID, first position), and the refused slices.
    """
    refused: list[tuple[SliceRef, GeometryError]] = []
    groups: dict[tuple[object, ...], list[SliceRef]] = defaultdict(list)
    by_uid: dict[str, list[SliceRef]] = defaultdict(list)
    for ref in sorted(slices, key=lambda r: r.file_id):
        by_uid[ref.sop_uid].append(ref)
    for same in by_uid.values():
        if len(same) > 1 and len({replace(ref, path="", file_id="") for ref in same}) > 1:
            error = GeometryError("DUP_CONFLICT", f"{len(same)} files of one SOPInstanceUID differ")
            refused.extend((ref, error) for ref in same)
            continue
        groups[_group_key(same[0])].append(same[0])
        error = GeometryError("DUP_SOP_UID", "SOPInstanceUID seen before")
        refused.extend((ref, error) for ref in same[1:])
    series: list[Series] = []
    for group in (grid for members in groups.values() for grid in _grids(members)):
        try:
            series.append(order_series(group))
        except GeometryError as error:
            refused.extend((ref, error) for ref in group)
    series.sort(key=lambda s: (s.first.patient_id, s.first.series_uid, s.z_mm[0], s.first.file_id))
    return series, refused


def _group_key(ref: SliceRef) -> tuple[object, ...]:
    geometry = (ref.position, ref.orientation, ref.pixel_spacing)
    return (
        ref.patient_id,
        ref.series_uid,
        ref.modality,
        ref.rows,
        ref.columns,
        ref.dtype,
        ref.photometric,
        tuple(value is None for value in geometry),  # one slice without must not cost the rest
        ref.series_split_key,
    )


def _grids(members: list[SliceRef]) -> list[list[SliceRef]]:
    """Split slices by direction and pixel spacing; by distance, since rounding parts neighbours."""
    grids: list[list[SliceRef]] = []
    for ref in members:
        home = next((grid for grid in grids if _same_grid(grid[0], ref)), None)
        if home is None:
            grids.append([ref])
        else:
            home.append(ref)
    return grids


def _same_grid(a: SliceRef, b: SliceRef) -> bool:
    cosines = zip(a.orientation or (), b.orientation or (), strict=True)
    spacings = zip(a.pixel_spacing or (), b.pixel_spacing or (), strict=True)
    return all(abs(p - q) <= SAME_GRID_TOL for p, q in cosines) and all(
        math.isclose(p, q, rel_tol=SAME_GRID_TOL) for p, q in spacings
    )


def order_series(group: list[SliceRef]) -> Series:
    """Order slices along the normal and check that they are evenly spaced.

    Raises:
        GeometryError: GEOM_MISSING, GEOM_BAD_IOP, GEOM_BAD_SPACING, DUP_POSITION,
            MISSING_SLICES, UNEVEN_SPACING.
    """
    first = group[0]
    if any(r.position is None or r.orientation is None or r.pixel_spacing is None for r in group):
        raise GeometryError(
            "GEOM_MISSING", "needs ImagePositionPatient, ImageOrientationPatient and PixelSpacing"
        )
    row_dir, col_dir = _directions(first)
    positions = np.array([r.position for r in group], dtype=np.float64)  # (N, 3) mm LPS
    depth = positions @ np.cross(row_dir, col_dir)  # (N,) mm along the normal
    order = np.argsort(depth, kind="stable")
    depth, positions = depth[order], positions[order]
    step = _slice_step(depth, positions)
    rows_mm, cols_mm = first.pixel_spacing or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = row_dir * cols_mm  # along a row the column index grows: PixelSpacing[1]
    affine[:3, 1] = col_dir * rows_mm
    affine[:3, 2] = step if len(group) > 1 else np.cross(row_dir, col_dir)
    affine[:3, 3] = positions[0]
    return Series(
        slices=tuple(group[i] for i in order),
        affine=tuple(tuple(float(v) for v in row) for row in affine),
        z_mm=tuple(float(v) for v in depth),
    )


def _directions(ref: SliceRef) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    row_dir, col_dir = np.array(ref.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(row_dir), np.linalg.norm(col_dir)
    if min(lengths) < 0.5 or abs(row_dir @ col_dir) > ORTHOGONAL_TOL * lengths[0] * lengths[1]:
        raise GeometryError("GEOM_BAD_IOP", "row and column directions are not orthogonal")
    if min(ref.pixel_spacing or (0.0,)) <= 0:
        raise GeometryError("GEOM_BAD_SPACING", "PixelSpacing must be above 0 mm")
    return row_dir / lengths[0], col_dir / lengths[1]


def _slice_step(depth: NDArray[np.float64], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vector from one slice to the next, mm; sheared where the gantry was tilted."""
    if len(depth) == 1:
        return np.zeros(3)
    gaps = np.diff(depth)
    typical = float(np.sort(gaps)[(gaps.size - 1) // 2])  # of two gaps the smaller is the spacing
    tolerance = max(SPACING_RTOL * typical, SPACING_ATOL_MM)
    if float(gaps.min()) <= SPACING_ATOL_MM:
        count = int((gaps <= SPACING_ATOL_MM).sum())
        raise GeometryError("DUP_POSITION", f"{count} slices lie where another one lies")
    odd = np.flatnonzero(np.abs(gaps - typical) > tolerance)
    if odd.size:
        ratio = gaps[odd] / typical
        whole = bool(((np.round(ratio) >= 2) & (np.abs(ratio - np.round(ratio)) < 0.05)).all())
        code = "MISSING_SLICES" if whole else "UNEVEN_SPACING"
        raise GeometryError(
            code,
            f"{odd.size} of {gaps.size} distances differ from {typical:.3f} mm, "
            f"the first is {gaps[odd[0]]:.3f} mm after slice {int(odd[0]) + 1}",
        )
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(depth) - 1)
    drift = np.abs(positions - (positions[0] + np.arange(len(depth))[:, None] * step)).max()
    if drift > max(0.1, tolerance):
        raise GeometryError("UNEVEN_SPACING", f"positions leave a straight line by {drift:.2f} mm")
    return step
