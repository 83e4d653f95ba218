"""Polygons to pixels: even-odd fill by scan lines; a pixel is inside where its centre is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CHUNK = 1 << 19  # edge crossings at a time, some 40 MB


def fill_even_odd(
    rings: Sequence[Floats], shape: tuple[int, int]
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Pixels whose centre lies inside an odd number of rings.

    Rings inside rings are holes, and a seam walked to and fro (keyhole) cancels itself. A centre
    on a left or upper edge is inside, on a right or lower edge outside, so that rings that share
    an edge share no pixel. What lies outside the image is cut off.

    Args:
        rings: (P, 2) column and row of the corners, finite, pixel centres at whole numbers; the
            last corner is joined to the first.
        shape: (H, W) of the image.

    Returns:
        (rows, columns) of a box around the rings, cut to the image, and the mask of that box.
    """
    corners = np.concatenate(rings)
    followers = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    down, right = (_range(corners[:, 1 - axis], shape[axis]) for axis in range(2))
    rows, columns = down.stop - down.start, right.stop - right.start
    origin = np.array([right.start, down.start], dtype=np.float64)
    # every edge from its upper end: walked to and fro it crosses a line at the very same place
    swap = (corners[:, 1] > followers[:, 1])[:, None]
    upper = np.where(swap, followers, corners) - origin
    lower = np.where(swap, corners, followers) - origin
    first, stop = (np.ceil(ends[:, 1]).clip(0, rows).astype(np.int64) for ends in (upper, lower))
    crossing = np.flatnonzero(stop > first)
    upper, lower, first, counts = upper[crossing], lower[crossing], first[crossing], stop - first
    total = np.cumsum(counts[crossing])
    toggles = np.zeros(rows * (columns + 1), dtype=np.int64)
    start = 0
    while start < len(total):
        done = total[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(total, done + _CHUNK, side="right")))
        part = slice(start, end)
        row, across = _crossings(upper[part], lower[part], first[part], counts[crossing][part])
        column = np.ceil(across).clip(0, columns).astype(np.int64)
        toggles += np.bincount(row * (columns + 1) + column, minlength=len(toggles))
        start = end
    parity = (toggles & 1).astype(np.uint8).reshape(rows, columns + 1)[:, :columns]
    return (down, right), np.bitwise_xor.accumulate(parity, axis=1).astype(np.bool_)


def _range(along: Floats, size: int) -> slice:
    ends = np.array([np.floor(along.min()), np.ceil(along.max()) + 1]).clip(0, size)
    return slice(int(ends[0]), int(ends[1]))


def _crossings(
    upper: Floats, lower: Floats, first: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Floats]:
    """Row and column of every crossing of an edge with the centre line of a row.

    Args:
        upper, lower: (E, 2) column and row of the ends.
        first: (E,) the first row that is crossed.
        counts: (E,) how many are.
    """
    edge = np.repeat(np.arange(len(counts)), counts)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (row - upper[edge, 1]) / (lower[edge, 1] - upper[edge, 1])
    return row, upper[edge, 0] + share * (lower[edge, 0] - upper[edge, 0])
