"""Binary STL and glTF files of surfaces, written piece by piece."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp import __version__
from medpsp.deploy.fairing import pieces, vertex_areas
from medpsp.deploy.marching import Ints
from medpsp.errors import DicomError
from medpsp.intensity import class_colour

FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
"""50 bytes of a binary STL."""

MOST_GLB = 2**32 - 1
"""Bytes that a GLB can say of itself (glTF 2.0, 4.4.2)."""

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


def write_stl(path: Path, surface: Surface) -> None:
    """Write a binary STL in mm LPS.

    LPS is what 3D Slicer (since 4.11) reads an STL as, and what its header says here the way that
    Slicer's own files do: ``SPACE=LPS``.
    """

    def chunks() -> Iterable[bytes]:
        yield b"medpsp, mm, SPACE=LPS".ljust(80) + struct.pack("<I", len(surface.triangles))
        for some in pieces(len(surface.triangles)):
            corners = surface.vertices[surface.triangles[some]]
            facets = np.zeros(len(corners), dtype=FACET)
            a, b, c = corners.astype(np.float64).transpose(1, 0, 2)
            facets["normal"], facets["corners"] = _unit(np.cross(b - a, c - a)), corners
            yield facets.tobytes()

    _save(path, chunks())


def write_glb(path: Path, parts: Iterable[Part]) -> None:
    """Write a binary glTF 2.0 with one mesh, node and material a class, in real size.

    Metres with y up, as glTF demands: x = left, y = superior, z = anterior of the patient, from the
    same origin as the STL. With normals: without, viewers must show flat facets (3.7.2.1).

    Args:
        path: To write.
        parts: At least one; none is empty. They are taken one after another.

    Raises:
        DicomError: MESH_NOT_WRITTEN: the file would be larger than its own lengths can say.
    """
    numbers = path.with_name(f".partial-{path.name}.bin")
    try:
        with numbers.open("wb") as file:
            tree = _numbers(file, parts)
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        size = tree["buffers"][0]["byteLength"]
        whole = 28 + len(text) + size
        if whole > MOST_GLB:
            raise DicomError("MESH_NOT_WRITTEN", f"a GLB of {whole} bytes; it ends at 4 GiB")
        head = struct.pack("<4sIIII", b"glTF", 2, whole, len(text), 0x4E4F534A)
        head += text + struct.pack("<II", size, 0x004E4942)
        with numbers.open("rb") as file:
            _save(path, itertools.chain([head], iter(lambda: file.read(2**20), b"")))
    finally:
        numbers.unlink(missing_ok=True)


def _numbers(file: BinaryIO, parts: Iterable[Part]) -> dict[str, Any]:
    """Places, normals and triangles of each part into a file, and the JSON that tells of them."""
    names, materials = [], []
    accessors: list[dict[str, Any]] = []
    views: list[dict[str, Any]] = []
    for part in parts:
        names.append(part.name)
        materials.append(_material(part))
        vertices, triangles = part.surface
        turned = vertices @ LPS_TO_GLTF.T
        turned /= 1000
        low, high = turned.min(axis=0).tolist(), turned.max(axis=0).tolist()
        floats = {"componentType": 5126, "count": len(turned), "type": "VEC3"}
        corners = {"componentType": 5125, "count": triangles.size, "type": "SCALAR"}
        accessors += [{**floats, "min": low, "max": high}, floats, corners]
        _view(file, views, (turned[some] for some in pieces(len(turned))))
        del turned
        areas = vertex_areas(vertices.T, triangles)
        of_pieces = (_unit(areas[:, some].T) @ LPS_TO_GLTF.T for some in pieces(len(vertices)))
        _view(file, views, of_pieces)
        _view(file, views, (triangles[some] for some in pieces(len(triangles))))
        del part, vertices, triangles, areas  # before the next is made
    return {
        "asset": {"version": "2.0", "generator": f"medpsp {__version__}", "extras": AXES},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(names)))}],
        "nodes": [{"name": name, "mesh": n} for n, name in enumerate(names)],
        "meshes": [{"name": name, "primitives": [_primitive(n)]} for n, name in enumerate(names)],
        "materials": materials,
        "accessors": [{**one, "bufferView": n} for n, one in enumerate(accessors)],
        "bufferViews": views,
        "buffers": [{"byteLength": file.tell()}],
    }


def _view(file: BinaryIO, views: list[dict[str, Any]], arrays: Iterable[NDArray[Any]]) -> None:
    """Append numbers of 4 bytes, so that no gaps need filling, and say where they are."""
    start = file.tell()
    for array in arrays:
        file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
    target = 34963 if len(views) % 3 == 2 else 34962
    place = {"buffer": 0, "byteOffset": start, "byteLength": file.tell() - start}
    views.append({**place, "target": target})


def _primitive(number: int) -> dict[str, Any]:
    first = 3 * number
    attributes = {"POSITION": first, "NORMAL": first + 1}
    return {"attributes": attributes, "indices": first + 2, "material": number}


def _material(part: Part) -> dict[str, Any]:
    """Matt, in the colour of the overlays; glTF wants linear light (3.9.2), not sRGB."""
    srgb = np.array(class_colour(part.label)) / 255
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


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """(..., 3) of length 1; zero ones stay."""
    length: NDArray[np.floating] = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
