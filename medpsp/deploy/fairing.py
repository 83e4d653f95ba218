"""Surfaces that are smooth and still enclose what their voxels fill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.deploy.marching import Ints, Shell

Floats = NDArray[np.float64]
Shifts = NDArray[np.float32]

BLOCK = 2**13
"""Triangles or vertices at once."""

STEPS, PACE, REACH = 10, 0.6, 0.4
"""Smoothing steps, the share of the way to the neighbours' mean that each goes, and how far a
vertex may come from its place, in voxels: constrained surface nets (Gibson, MICCAI 1998).
Normals of spheres are off by 1.5 degrees on average (voxels as thick as wide) and 6.3 (slices of
5 voxels); after Taubin's filter (0.5, -0.53, 10 steps) by 5.5 and 16.6."""

VOLUME_RTOL, VOLUME_STEPS, VOLUME_PACE = 1e-5, 20, 0.25
"""A surface encloses its voxels' volume within this share; it takes 2 to 7 steps (organs, spheres,
sheets, lines, single voxels, noise of any density). The pace is the longest step, in voxels."""


def fair(shell: Shell) -> Shifts:
    """Smooth a surface; each connected part of it keeps the volume of its voxels.

    Holds some 30 bytes a vertex besides the surface, which has 37.

    Returns:
        (3, V) how far to move the vertices (column, row, slice), in voxels.
    """
    shifts = np.empty(shell.vertices.shape[::-1], dtype=np.float32)
    for axis, start in enumerate(shell.vertices.T):
        shifts[axis] = _smoothed(start, shell.triangles)
    part = _parts(len(shell.vertices), shell.triangles)
    # the divergence theorem on the voxel faces, of which those that look along x are enough
    volumes = np.zeros(part.max(initial=-1) + 1)
    for some in pieces(len(part)):
        np.add.at(volumes, part[some], shell.vertices[some, 0] * np.float64(shell.sides[some]))
    _inflate(shifts, shell, part, volumes)
    return shifts


def pieces(count: int) -> Iterator[slice]:
    """Rows 0 to ``count``, some at a time."""
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def vertex_areas(places: NDArray[np.float32], triangles: Ints) -> Shifts:
    """How the volume grows as a vertex moves.

    Args:
        places: (3, V) of the vertices.
        triangles: (T, 3).

    Returns:
        (3, V) a third of the area vectors around each vertex.
    """
    areas = np.zeros(places.shape, dtype=np.float32)
    for corners in _blocks(triangles):
        _add_areas(areas, corners, [places[:, corner].astype(np.float64) for corner in corners])
    return areas


def _add_areas(
    areas: NDArray[np.floating], corners: NDArray[np.intp], places: list[Floats]
) -> Floats:
    """(B,) volumes of the tetrahedra between the origin and triangles; their areas are added.

    Of (3, B) ``corners``, with three (3, B) ``places``.
    """
    first, second, third = places
    along, across = second - first, third - first
    volumes = np.zeros(corners.shape[1])
    for axis in range(3):
        j, k = axis - 2, axis - 1
        area = (along[j] * across[k] - along[k] * across[j]) / 6
        volumes += area * first[axis]
        for corner in corners:
            np.add.at(areas[axis], corner, area.astype(areas.dtype, copy=False))
    return volumes


def _blocks(triangles: Ints) -> Iterator[NDArray[np.intp]]:
    """(3, B) corners of some triangles after the others."""
    for some in pieces(len(triangles)):
        yield triangles[some].T.astype(np.intp, order="C")


def _smoothed(start: NDArray[np.float32], triangles: Ints) -> Floats:
    """(V,) how far coordinates move to the mean of their neighbours, but within `REACH`.

    The mean of each axis is its own, so that voxels may count in place of mm.
    """
    neighbours = _around(np.ones(len(start), dtype=np.uint8), triangles)
    smooth = start.astype(np.float64)
    for _ in range(STEPS):
        mean = _around(smooth, triangles)
        mean /= neighbours
        mean -= smooth
        mean *= PACE
        smooth += mean
        del mean  # before the next
        smooth -= start
        np.clip(smooth, -REACH, REACH, out=smooth)
        smooth += start
    smooth -= start
    return smooth


def _around(values: NDArray[Any], triangles: Ints) -> NDArray[Any]:
    """(V,) sums over the neighbours: of every edge once each way, since the surface is closed."""
    total = np.zeros_like(values)
    for corners in _blocks(triangles):
        for k in range(3):
            np.add.at(total, corners[k - 1], values[corners[k]])
    return total


def _parts(count: int, triangles: Ints) -> Ints:
    """(V,) number of the connected part of each vertex."""
    root = np.arange(count, dtype=np.int32)
    for some in pieces(len(triangles)):
        block = triangles[some]
        a, b = block[:, :2].ravel(), block[:, 1:].ravel()
        while (apart := (a := _top(root, a)) != (b := _top(root, b))).any():
            a, b = a[apart], b[apart]
            np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        _top(root, block)  # short ways for the next block
    root = _top(root, np.arange(count, dtype=np.int32))
    numbers: Ints = np.cumsum(root == np.arange(count), dtype=np.int32) - 1
    return numbers[root]


def _top(root: Ints, places: Ints) -> Ints:
    """Where the ways from these end; they are made short on the way."""
    while ((end := root[up := root[places]]) != up).any():
        root[places] = end
    return up


def _inflate(shifts: Shifts, shell: Shell, part: Ints, volumes: Floats) -> None:
    """Move vertices along their normals, each part alike, until each encloses its volume.

    Newton's method; volumes of cavities are negative. Scaling would move thin rings as a whole.
    Shifts are exact to 3e-8 voxels as float32, where places far from the origin would not be.
    """
    areas = np.empty_like(shifts)
    for _ in range(VOLUME_STEPS):
        areas[:] = 0
        missing = volumes.copy()
        for corners in _blocks(shell.triangles):
            places = [shell.vertices[one].T + np.float64(shifts[:, one]) for one in corners]
            np.subtract.at(missing, part[corners[0]], _add_areas(areas, corners, places))
        if (np.abs(missing) <= VOLUME_RTOL * np.abs(volumes)).all():
            break
        whole = np.zeros_like(volumes)
        for some in pieces(len(part)):
            np.add.at(whole, part[some], _lengths(areas[:, some]))
        step = np.clip(missing / whole, -VOLUME_PACE, VOLUME_PACE)
        for some in pieces(len(part)):
            length = _lengths(areas[:, some])
            length[length == 0] = 1
            shifts[:, some] += areas[:, some] * (step[part[some]] / length)


def _lengths(vectors: Shifts) -> Floats:
    """(B,) of (3, B)."""
    lengths: Floats = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=0))
    return lengths
