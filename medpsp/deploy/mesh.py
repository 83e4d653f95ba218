"""Surfaces of masks as STL and GLB, and volumes in ml."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp import __version__
from medpsp.deploy.fairing import Floats, fair, vertex_areas
from medpsp.deploy.marching import Ints, march
from medpsp.errors import GeometryError
from medpsp.intensity import CLASS_COLOURS

Mask = NDArray[np.uint8]

BLOCK = 8192
"""Triangles of an STL put together at once: 0.4 MB."""

FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
"""50 bytes of a binary STL."""

LPS_TO_GLTF = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)
"""A rotation: x = left, y = up = superior, z = front = anterior (glTF 2.0, 3.4)."""

AXES = {"x": "left", "y": "superior", "z": "anterior", "unit": "metre", "origin": "of the patient"}


class Surface(NamedTuple):
    """A closed triangle mesh: each edge has two triangles, which run along it in opposite ways.

    Attributes:
        vertices: (V, 3) float32, mm in the LPS space of the patient.
        triangles: (T, 3) int32 rows of `vertices`, anticlockwise as seen from outside.
    """

    vertices: NDArray[np.float32]
    triangles: Ints


class Part(NamedTuple):
    """One class of a GLB: its index, which decides the colour, its name and its surface."""

    label: int
    name: str
    surface: Surface


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


def class_surface(mask: Mask, label: int, affine: Floats) -> Surface:
    """The smooth closed surface of one class.

    Each connected part of it encloses exactly the volume of its voxels. Voxels of the class that
    touch at an edge or a corner only are apart. What the border of the volume cuts is closed there.
    Holds two slices besides the surface.

    Args:
        mask: (N, H, W) class indices.
        label: Of the class.
        affine: (4, 4), index (column, row, slice) to mm LPS; it may shear or mirror.

    Returns:
        The surface; without a triangle where the mask has no such voxel.

    Raises:
        GeometryError: GEOM_NONFINITE.
    """
    mirrored = _determinant(affine) < 0
    slices, rows, columns = _bounds(mask, label)
    box = mask[slices, rows, columns]
    shell = march((part == label for part in box), *box.shape[1:])
    triangles = shell.triangles
    corner = np.array([columns.start, rows.start, slices.start])
    vertices = (fair(shell) + corner) @ affine[:3, :3].T + affine[:3, 3]
    return Surface(
        vertices.astype(np.float32), triangles[:, ::-1].copy() if mirrored else triangles
    )


def write_meshes(stem: Path, mask: Mask, affine: Floats, classes: Sequence[str]) -> list[Path]:
    """Write the surface of every class that the mask holds.

    ``<stem>.<index>-<class>.stl`` for each and ``<stem>.glb`` with all of them; no file where there
    is background alone. The same bytes for the same mask.

    Args:
        stem: Path in an existing folder, its name free of identities.
        mask: (N, H, W) class indices.
        affine: (4, 4), index (column, row, slice) to mm LPS.
        classes: K names, background first; voxels of K and above are not drawn.

    Returns:
        The files written.

    Raises:
        GeometryError: GEOM_NONFINITE.
    """
    held = np.zeros(256, dtype=np.bool_)
    for part in mask:
        held[part] = True
    files, parts = [], []
    for label, name in enumerate(classes[1:], start=1):
        if held[label]:
            surface = class_surface(mask, label, affine)
            parts.append(Part(label, name, surface))
            plain = re.sub(r"\W+", "_", name, flags=re.ASCII)[:60]  # names of files have an end
            files.append(stem.with_name(f"{stem.name}.{label}-{plain}.stl"))
            write_stl(files[-1], surface)
    if parts:
        files.append(stem.with_name(f"{stem.name}.glb"))
        write_glb(files[-1], parts)
    return files


def write_stl(path: Path, surface: Surface) -> None:
    """Write a binary STL in mm LPS.

    LPS is what 3D Slicer (since 4.11) reads an STL as, and what its header says here the way that
    Slicer's own files do: ``SPACE=LPS``.
    """

    def chunks() -> Iterable[bytes]:
        yield b"medpsp, mm, SPACE=LPS".ljust(80) + struct.pack("<I", len(surface.triangles))
        for start in range(0, len(surface.triangles), BLOCK):
            corners = surface.vertices[surface.triangles[start : start + BLOCK]]
            facets = np.zeros(len(corners), dtype=FACET)
            a, b, c = corners.astype(np.float64).transpose(1, 0, 2)
            facets["normal"], facets["corners"] = _unit(np.cross(b - a, c - a)), corners
            yield facets.tobytes()

    _save(path, chunks())


def write_glb(path: Path, parts: Sequence[Part]) -> None:
    """Write a binary glTF 2.0 with one mesh, node and material a class, in real size.

    Metres with y up, as glTF demands: x = left, y = superior, z = anterior of the patient, from the
    same origin as the STL. With normals: without, viewers must show flat facets (3.7.2.1).

    Args:
        path: To write.
        parts: At least one; none is empty.
    """
    blobs: list[NDArray[Any]] = []
    accessors: list[dict[str, Any]] = []
    for part in parts:
        vertices, triangles = part.surface
        places = vertices @ LPS_TO_GLTF.T / np.float32(1000)
        normals = _unit(vertex_areas(vertices.T.astype(np.float64), triangles).T) @ LPS_TO_GLTF.T
        blobs += [places, normals.astype(np.float32), triangles.ravel()]
        low, high = places.min(axis=0).tolist(), places.max(axis=0).tolist()
        floats = {"componentType": 5126, "count": len(places), "type": "VEC3"}
        corners = {"componentType": 5125, "count": triangles.size, "type": "SCALAR"}
        accessors += [{**floats, "min": low, "max": high}, floats.copy(), corners]
    views, start = [], 0
    for number, blob in enumerate(blobs):  # numbers of 4 bytes throughout: no gaps to fill
        target = 34963 if number % 3 == 2 else 34962
        views.append(
            {"buffer": 0, "byteOffset": start, "byteLength": blob.nbytes, "target": target}
        )
        accessors[number]["bufferView"] = number
        start += blob.nbytes
    tree = {
        "asset": {"version": "2.0", "generator": f"medpsp {__version__}", "extras": AXES},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(parts)))}],
        "nodes": [{"name": part.name, "mesh": n} for n, part in enumerate(parts)],
        "meshes": [
            {"name": part.name, "primitives": [_primitive(n)]} for n, part in enumerate(parts)
        ],
        "materials": [_material(part) for part in parts],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + start, len(text), 0x4E4F534A)
    head += text + struct.pack("<II", start, 0x004E4942)
    _save(path, [head, *(blob.astype(blob.dtype.newbyteorder("<")).tobytes() for blob in blobs)])


def _primitive(number: int) -> dict[str, Any]:
    first = 3 * number
    attributes = {"POSITION": first, "NORMAL": first + 1}
    return {"attributes": attributes, "indices": first + 2, "material": number}


def _material(part: Part) -> dict[str, Any]:
    """Matt, in the colour of the overlays; glTF wants linear light (3.9.2), not sRGB."""
    srgb = CLASS_COLOURS[1 + (part.label - 1) % (len(CLASS_COLOURS) - 1)].astype(np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    colour = [round(float(v), 6) for v in linear]
    surface = {"baseColorFactor": [*colour, 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.6}
    return {"name": part.name, "pbrMetallicRoughness": surface}


def _save(path: Path, chunks: Iterable[bytes]) -> None:
    """The whole file or none."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _unit(vectors: Floats) -> Floats:
    """(..., 3) of length 1; zero ones stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _determinant(affine: Floats) -> float:
    size = float(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else 0.0
    if not size:
        raise GeometryError("GEOM_NONFINITE", "the affine of the mask is not finite, or flat")
    return size


def _bounds(mask: Mask, label: int) -> tuple[slice, slice, slice]:
    """The box that holds a class; empty where there is none."""
    slices = np.zeros(mask.shape[0], dtype=np.bool_)
    rows, columns = (np.zeros(size, dtype=np.bool_) for size in mask.shape[1:])
    for number, part in enumerate(mask):
        inside = part == label
        rows |= inside.any(axis=1)
        columns |= inside.any(axis=0)
        slices[number] = inside.any()
    box = [np.flatnonzero(axis) for axis in (slices, rows, columns)]
    z, y, x = (slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0) for at in box)
    return z, y, x
