"""Surfaces that are smooth and still enclose what their voxels fill."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from medpsp.deploy.marching import Ints, Shell

Floats = NDArray[np.float64]

BLOCK = 2**13
"""Triangles at once."""

STEPS, PACE, REACH = 10, 0.6, 0.4
"""Smoothing steps, the share of the way to the neighbours' mean that each goes, and how far a
vertex may come from its place, in voxels: constrained surface nets (Gibson, MICCAI 1998).
Normals of spheres are off by 1.5 degrees on average (voxels as thick as wide) and 6.3 (slices of
5 voxels); after Taubin's filter (0.5, -0.53, 10 steps) by 5.5 and 16.6."""

VOLUME_RTOL, VOLUME_STEPS, VOLUME_PACE = 1e-5, 20, 0.25
"""A surface encloses its voxels' volume within this share; it takes 2 to 7 steps (organs, spheres,
sheets, lines, single voxels, noise of any density). The pace is the longest step, in voxels."""


def fair(shell: Shell) -> Floats:
    """Smooth a surface; each connected part of it keeps the volume of its voxels.

    Holds the mesh three times.

    Returns:
        (V, 3) places of the vertices (column, row, slice) in voxels.
    """
    smooth = np.stack([_smoothed(axis, shell.triangles) for axis in shell.vertices.T])
    part = _parts(smooth.shape[1], shell.triangles)
    # the divergence theorem on the voxel faces, of which those that look along x are enough
    flux = np.bincount(part, shell.vertices[:, 0] * shell.sides)
    return _inflated(smooth, shell.triangles, part, flux.astype(np.float64)).T


def vertex_areas(places: NDArray[np.floating], triangles: Ints) -> Floats:
    """How the volume grows as a vertex moves.

    Args:
        places: (3, V) of the vertices, of any floats.
        triangles: (T, 3).

    Returns:
        (3, V) float64, a third of the area vectors around each vertex.
    """
    areas = np.zeros(places.shape)
    for corners in _blocks(triangles):
        first, second, third = (places[:, corner].astype(np.float64) for corner in corners)
        along, across = second - first, third - first
        for axis in range(3):
            j, k = axis - 2, axis - 1
            area = (along[j] * across[k] - along[k] * across[j]) / 6
            for corner in corners:
                np.add.at(areas[axis], corner, area)
    return areas


def _blocks(triangles: Ints) -> Iterator[NDArray[np.intp]]:
    """(3, B) corners of some triangles after the others."""
    for start in range(0, len(triangles), BLOCK):
        yield triangles[start : start + BLOCK].T.astype(np.intp, order="C")


def _smoothed(start: NDArray[np.float32], triangles: Ints) -> Floats:
    """(V,) coordinates, each nearer to the mean of its neighbours, but within `REACH`.

    The mean of each axis is its own, so that voxels may count in place of mm.
    """
    neighbours = _around(np.ones(len(start)), triangles)
    smooth = start.astype(np.float64)
    for _ in range(STEPS):
        mean = _around(smooth, triangles)
        mean /= neighbours
        mean -= smooth
        mean *= PACE
        smooth += mean
        np.clip(smooth, start - REACH, start + REACH, out=smooth)
    return smooth


def _around(values: Floats, triangles: Ints) -> Floats:
    """(V,) sums over the neighbours: of every edge once each way, since the surface is closed."""
    total = np.zeros(len(values))
    for corners in _blocks(triangles):
        for k in range(3):
            np.add.at(total, corners[k - 1], values[corners[k]])
    return total


def _parts(count: int, triangles: Ints) -> Ints:
    """(V,) number of the connected part of each vertex."""
    root = np.arange(count, dtype=np.int32)
    for start in range(0, len(triangles), BLOCK):
        block = triangles[start : start + BLOCK]
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


def _inflated(places: Floats, triangles: Ints, part: Ints, volumes: Floats) -> Floats:
    """(3, V) places moved along their normals, each part alike, until each encloses its volume.

    Newton's method; volumes of cavities are negative. Scaling would move thin rings as a whole.
    """
    for _ in range(VOLUME_STEPS):
        areas = vertex_areas(places, triangles)
        missing = volumes - np.bincount(part, np.einsum("ij,ij->j", places, areas)) / 3
        if (np.abs(missing) <= VOLUME_RTOL * np.abs(volumes)).all():
            break
        length = np.sqrt(np.einsum("ij,ij->j", areas, areas))
        step = np.clip(missing / np.bincount(part, length), -VOLUME_PACE, VOLUME_PACE)
        length[length == 0] = 1
        for axis in range(3):
            areas[axis] *= step[part]
            areas[axis] /= length
            places[axis] += areas[axis]
        del areas, length  # before the next
    return places
