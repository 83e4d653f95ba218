"""Surfaces of masks, and volumes in ml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medpsp.deploy.fairing import Floats, fair, pieces
from medpsp.deploy.marching import Bools, march
from medpsp.deploy.meshfiles import Part, Surface, write_glb, write_stl
from medpsp.deploy.packed import Slices
from medpsp.errors import GeometryError

Box = tuple[slice, slice, slice]


def volumes_ml(counts: NDArray[np.integer], affine: Floats) -> tuple[float, ...]:
    """Volumes: numbers of voxels times |determinant of the affine| / 1000.

    Args:
        counts: (K,) voxels of each class.
        affine: (4, 4), index (column, row, slice) to mm.

    Returns:
        (K,) ml.

    Raises:
        GeometryError: GEOM_NONFINITE.
    """
    voxel = abs(_determinant(affine))
    return tuple(int(count) * voxel / 1000 for count in counts)


def class_surface(mask: Slices, label: int, affine: Floats, box: Box | None = None) -> Surface:
    """The smooth closed surface of one class.

    Each connected part of it encloses exactly the volume of its voxels. Voxels of the class that
    touch at an edge or a corner only are apart. What the border of the volume cuts is closed there.
    Holds two slices besides the surface.

    Args:
        mask: (N, H, W) class indices.
        label: Of the class.
        affine: (4, 4), index (column, row, slice) to mm LPS; it may shear or mirror.
        box: That holds the class, if that is known.

    Returns:
        The surface; without a triangle where the mask has no such voxel.

    Raises:
        GeometryError: GEOM_NONFINITE.
    """
    mirrored = _determinant(affine) < 0
    slices, rows, columns = box or class_boxes(mask).get(label, (slice(0, 0),) * 3)

    def parts() -> Iterator[Bools]:
        return (mask[z][rows, columns] == label for z in range(slices.start, slices.stop))

    shell = march(parts, rows.stop - rows.start, columns.stop - columns.start)
    corner = np.array([columns.start, rows.start, slices.start])
    shifts, vertices = fair(shell), np.empty_like(shell.vertices)
    for some in pieces(len(vertices)):
        places = shell.vertices[some] + np.float64(shifts[:, some].T) + corner
        vertices[some] = places @ affine[:3, :3].T + affine[:3, 3]
    return Surface(vertices, shell.triangles[:, ::-1] if mirrored else shell.triangles)


def class_boxes(mask: Slices) -> dict[int, Box]:
    """The box (slices, rows, columns) of each class that a mask holds."""
    ends: dict[int, NDArray[np.int64]] = {}
    for z in range(mask.shape[0]):
        part = mask[z]
        for label in map(int, np.flatnonzero(np.bincount(part.ravel()))):
            rows, columns = (np.flatnonzero((part == label).any(axis=axis)) for axis in (1, 0))
            here = np.array([(z, rows[0], columns[0]), (z, rows[-1], columns[-1])])
            first, last = ends.get(label, here)
            ends[label] = np.stack([np.minimum(first, here[0]), np.maximum(last, here[1])])
    return {label: _box(one) for label, one in ends.items()}


def _box(ends: NDArray[np.int64]) -> Box:
    z, y, x = (slice(int(first), int(last) + 1) for first, last in ends.T)
    return z, y, x


def write_meshes(stem: Path, mask: Slices, affine: Floats, classes: Sequence[str]) -> list[Path]:
    """Write the surface of every class that the mask holds.

    ``<stem>.<index>-<class>.stl`` for each and ``<stem>.glb`` with all of them; no file where there
    is background alone. The same bytes for the same mask. One surface is held at a time.

    Args:
        stem: Path in an existing folder, its name free of identities.
        mask: (N, H, W) class indices.
        affine: (4, 4), index (column, row, slice) to mm LPS.
        classes: K names, background first; voxels of K and above are not drawn.

    Returns:
        The files written.

    Raises:
        GeometryError: GEOM_NONFINITE.
        DicomError: MESH_NOT_WRITTEN, when the STL files are there and no GLB can be.
    """
    boxes = class_boxes(mask)
    drawn = {n: name for n, name in enumerate(classes) if n and n in boxes}
    files = {n: _stl(stem, n, name) for n, name in drawn.items()}

    def parts() -> Iterator[Part]:
        for label, name in drawn.items():
            part = Part(label, name, class_surface(mask, label, affine, boxes[label]))
            write_stl(files[label], part.surface)
            yield part
            del part  # before the next surface is made

    if not drawn:
        return []
    both = stem.with_name(f"{stem.name}.glb")
    write_glb(both, parts())
    return [*files.values(), both]


def _stl(stem: Path, label: int, name: str) -> Path:
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII)[:60]  # names of files have an end
    return stem.with_name(f"{stem.name}.{label}-{plain}.stl")


def _determinant(affine: Floats) -> float:
    size = float(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else 0.0
    if not size:
        raise GeometryError("GEOM_NONFINITE", "the affine of the mask is not finite, or flat")
    return size
