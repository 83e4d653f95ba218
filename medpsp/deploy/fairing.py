"""Surfaces that are smooth and still enclose what their voxels fill."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medpsp.deploy.marching import Ints, Shell

Floats = NDArray[np.float64]

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

    Works axis by axis and corner by corner: all at once would take 15 times the mesh.

    Returns:
        (V, 3) places of the vertices (column, row, slice) in voxels.
    """
    smooth = np.stack([_smoothed(axis, shell.triangles) for axis in shell.vertices.T])
    part = _parts(smooth.shape[1], shell.triangles)
    # the divergence theorem on the voxel faces, of which those that look along x are enough
    flux = np.bincount(part, shell.vertices[:, 0] * shell.sides)
    return _inflated(smooth, shell.triangles, part, flux.astype(np.float64)).T


def vertex_areas(places: Floats, triangles: Ints) -> Floats:
    """How the volume grows as a vertex moves.

    Args:
        places: (3, V) of the vertices.
        triangles: (T, 3).

    Returns:
        (3, V) a third of the area vectors around each vertex.
    """
    first, second, third = triangles.T
    along, across = (np.stack([x[end] - x[first] for x in places]) for end in (second, third))
    areas = np.zeros_like(places)
    for axis in range(3):
        j, k = axis - 2, axis - 1
        area = (along[j] * across[k] - along[k] * across[j]) / 6
        for corner in triangles.T:
            areas[axis] += np.bincount(corner, area, minlength=places.shape[1])
    return areas


def _smoothed(start: NDArray[np.float32], triangles: Ints) -> Floats:
    """(V,) coordinates, each nearer to the mean of its neighbours, but within `REACH`.

    The mean of each axis is its own, so that voxels may count in place of mm.
    """
    corners = triangles.T
    pairs = [(corners[k - 1], corners[k]) for k in range(3)]  # every edge, once each way
    neighbours = sum(np.bincount(here, minlength=len(start)) for here, _ in pairs)
    smooth = start.astype(np.float64)
    for _ in range(STEPS):
        total = sum(np.bincount(here, smooth[there], len(start)) for here, there in pairs)
        smooth += PACE * (total / neighbours - smooth)
        np.clip(smooth, start - REACH, start + REACH, out=smooth)
    return smooth


def _parts(count: int, triangles: Ints) -> NDArray[np.intp]:
    """(V,) number of the connected part of each vertex."""
    root = np.arange(count, dtype=np.int32)
    a, b = triangles[:, :2].ravel(), triangles[:, 1:].ravel()
    while (apart := a != b).any():
        a, b = a[apart], b[apart]
        root[np.maximum(a, b)] = np.minimum(a, b)  # of several, any will do: the next round joins
        while (root[root] != root).any():
            root = root[root]
        a, b = root[a], root[b]
    return np.unique(root, return_inverse=True)[1]


def _inflated(places: Floats, triangles: Ints, part: NDArray[np.intp], volumes: Floats) -> Floats:
    """(3, V) places moved along their normals, each part alike, until each encloses its volume.

    Newton's method; volumes of cavities are negative. Scaling would move thin rings as a whole.
    """
    for _ in range(VOLUME_STEPS):
        areas = vertex_areas(places, triangles)
        missing = volumes - np.bincount(part, (places * areas).sum(axis=0)) / 3
        if (np.abs(missing) <= VOLUME_RTOL * np.abs(volumes)).all():
            break
        length = np.sqrt((areas**2).sum(axis=0))
        step = np.clip(missing / np.bincount(part, length), -VOLUME_PACE, VOLUME_PACE)
        places += areas * (step[part] / np.where(length > 0, length, 1))
    return places
