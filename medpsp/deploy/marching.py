"""Closed surfaces of binary volumes: marching cubes, slice pair by slice pair, with numpy alone.

Lorensen and Cline, SIGGRAPH 1987. The table of cells is derived, not typed in, by two rules that
make every surface a manifold, where each edge has two triangles and each vertex one fan of them:
inside voxels that meet only across a diagonal stay apart (Dürst 1988 showed the holes of the
original table), and no polygon is cut along a face of its cell, where the next cell could cut too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int32]

EDGES = (
    (0, 1),
    (2, 3),
    (4, 5),
    (6, 7),
    (0, 2),
    (1, 3),
    (4, 6),
    (5, 7),
    (0, 4),
    (1, 5),
    (2, 6),
    (3, 7),
)
"""Corners of a cell's 12 edges: four along x, along y, along z; corner = x + 2 y + 4 z."""

FACES = ((0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5))
"""Corners of a cell's 6 faces, anticlockwise as seen from outside."""


class Shell(NamedTuple):
    """A closed surface in voxel indices.

    Attributes:
        vertices: (V, 3) float32 places (column, row, slice), each half-way between the centres of
            a voxel inside and a neighbour outside: one vertex a voxel face.
        sides: (V,) int8, 1 or -1 where the outside is at the next or previous column, else 0.
        triangles: (T, 3) int32 rows of `vertices`, anticlockwise as seen from outside.
    """

    vertices: NDArray[np.float32]
    sides: NDArray[np.int8]
    triangles: Ints


def march(slices: Callable[[], Iterable[Bools]], height: int, width: int) -> Shell:
    """Find the surface of a binary volume; outside its borders nothing is inside.

    Args:
        slices: Gives (H, W) each, in order, and is asked twice: arrays that were made too small and
            grown leave holes in memory of up to their size. Two slices are held at a time.
        height: H.
        width: W.

    Returns:
        The surface; without a vertex where nothing is inside.
    """
    size = height + 2, width + 2
    table = _table()
    of_kind = (table[:, :, 0] >= 0).sum(axis=1)
    vertices = triangles = 0
    for lower, upper in _pairs(slices(), size):
        vertices += sum(int(np.count_nonzero(a != b)) for a, b in _faces(lower, upper))
        triangles += int(of_kind[_kinds(lower, upper)].sum())
    builder = _Builder(
        size,
        table,
        Shell(
            np.empty((vertices, 3), np.float32),
            np.empty(vertices, np.int8),
            np.empty((triangles, 3), np.int32),
        ),
    )
    for lower, upper in _pairs(slices(), size):
        builder.add(lower, upper)
    return builder.shell


def _pairs(slices: Iterable[Bools], size: tuple[int, int]) -> Iterator[tuple[Bools, Bools]]:
    """Each slice and the next, padded, with an empty one at either end."""
    lower = np.zeros(size, dtype=np.bool_)
    for inside in slices:
        upper = np.pad(inside, 1)
        yield lower, upper
        lower = upper
    yield lower, np.zeros_like(lower)


class _Builder:
    """Fills a shell; sizes are those of padded slices."""

    def __init__(self, size: tuple[int, int], table: NDArray[np.int8], shell: Shell) -> None:
        self.table, self.shell = table, shell
        self.count, self.drawn, self.depth = 0, 0, 0  # vertices, triangles, slices
        # number of the vertex between a voxel and the next one, set only where there is a vertex:
        # along x and along y in the lower and the upper slice, and along z
        self.lower, self.upper = np.empty((2, 2, *size), dtype=np.int32)
        self.between = np.empty(size, dtype=np.int32)

    def add(self, lower: Bools, upper: Bools) -> None:
        """Take the cells between two slices."""
        self.lower, self.upper = self.upper, self.lower
        if lower.any() or upper.any():
            z = self.depth - 1.0  # of the lower one; padding starts at -1
            into = *self.upper, self.between
            shifts = (0.5, 0.0, z + 1), (0.0, 0.5, z + 1), (0.0, 0.0, z + 0.5)
            for (here, following), numbers, shift in zip(
                _faces(lower, upper), into, shifts, strict=True
            ):
                self._number(here, following, numbers, shift)
            self._cells(lower, upper)
        self.depth += 1

    def _number(
        self, here: Bools, following: Bools, into: Ints, shift: tuple[float, float, float]
    ) -> None:
        rows, columns = np.nonzero(here != following)
        some = slice(self.count, self.count + len(rows))
        into[rows, columns] = np.arange(some.start, some.stop, dtype=np.int32)
        for axis, places in enumerate((columns - 1, rows - 1, np.zeros_like(rows))):
            self.shell.vertices[some, axis] = places + shift[axis]
        self.shell.sides[some] = here[rows, columns].astype(np.int8) * 2 - 1 if shift[0] else 0
        self.count = some.stop

    def _cells(self, lower: Bools, upper: Bools) -> None:
        kind = _kinds(lower, upper)
        y, x = np.nonzero((kind != 0) & (kind != 255))
        cuts = np.stack(
            [plane[0, y + dy, x] for plane in (self.lower, self.upper) for dy in (0, 1)]
            + [plane[1, y, x + dx] for plane in (self.lower, self.upper) for dx in (0, 1)]
            + [self.between[y + dy, x + dx] for dy in (0, 1) for dx in (0, 1)],
            axis=1,
        )
        edges = self.table[kind[y, x]]
        used = edges[:, :, 0] >= 0
        cells = np.nonzero(used)[0]
        some = slice(self.drawn, self.drawn + len(cells))
        self.shell.triangles[some] = cuts[cells[:, None], edges[used]]
        self.drawn = some.stop


def _faces(lower: Bools, upper: Bools) -> tuple[tuple[Bools, Bools], ...]:
    """Voxels and their next ones: along x and y in the upper slice, and along z up to it."""
    return (upper[:, :-1], upper[:, 1:]), (upper[:-1], upper[1:]), (lower, upper)


def _kinds(lower: Bools, upper: Bools) -> NDArray[np.uint8]:
    """(H - 1, W - 1) of (H, W) each: which of the corners of each cell are inside, as bits."""
    kinds: NDArray[np.uint8] = _quads(lower) + 16 * _quads(upper)
    return kinds


def _quads(inside: Bools) -> NDArray[np.uint8]:
    """(H - 1, W - 1) of (H, W): which of four neighbours are inside, as bits."""
    bits = inside.view(np.uint8)
    pairs = bits[:, :-1] + 2 * bits[:, 1:]
    return pairs[:-1] + 4 * pairs[1:]


def _table() -> NDArray[np.int8]:
    """(256, 5, 3) edges of the triangles of each kind of cell; -1 where there are fewer."""
    table = np.full((256, 5, 3), -1, dtype=np.int8)
    for kind in range(256):
        triangles = [triangle for loop in _loops(kind) for triangle in _fan(loop)]
        if triangles:
            table[kind, : len(triangles)] = triangles
    return table


def _loops(kind: int) -> Iterator[list[int]]:
    """Polygons of cut edges of a cell; bit c of its kind says whether corner c is inside."""
    following: dict[int, int] = {}
    for face in FACES:
        for first in range(4):
            if kind >> face[first - 1] & 1 or not kind >> face[first] & 1:
                continue
            last = first  # of a run of inside corners around the face
            while kind >> face[(last + 1) % 4] & 1:
                last += 1
            start = _edge(face[first - 1], face[first])
            following[start] = _edge(face[last % 4], face[(last + 1) % 4])
    while following:
        first = min(following)
        loop, edge = [first], following.pop(first)
        while edge != first:
            loop.append(edge)
            edge = following.pop(edge)
        yield loop


def _edge(corner: int, other: int) -> int:
    return EDGES.index((min(corner, other), max(corner, other)))


def _fan(loop: list[int]) -> list[tuple[int, int, int]]:
    """Triangles of a polygon; at least one of its corners sees none of the others along a face."""
    for turn in range(len(loop)):
        first, *rest = loop[turn:] + loop[:turn]
        diagonals = [{*EDGES[first], *EDGES[edge]} for edge in rest[1:-1]]
        if not any(diagonal <= set(face) for diagonal in diagonals for face in FACES):
            break
    return [(first, a, b) for a, b in pairwise(rest)]
