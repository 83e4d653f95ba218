"""A fingerprint that pictures of one scan share: a difference hash of 256 bits.

16 x 17 block means; a bit is set where a block is brighter than its left neighbour. No threshold:
then no monotone change of the grey values, a window or a scale, turns a bit where it does not clip,
and bits of flat ground are noise, which no other scan has. Bits are compared in `bands`, each of a
part of the picture, so that what a window clips spoils only its own bands. (N. Krawetz, "Kind of
Like That", 2013.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 256
BANDS = 8
_ROWS, _COLUMNS = 16, 17
_SAMPLES = 5
"""Pixels sampled across each block; more change few bits and cost time."""


def difference_hash(values: NDArray[Any]) -> str:
    """64 hex digits of (H, W) or (H, W, 3) values, H and W at least 17; zeros for smaller ones."""
    height, width = values.shape[:2]
    if height < _ROWS or width < _COLUMNS:
        return "0" * (BITS // 4)
    thin = values[
        :: max(1, height // (_ROWS * _SAMPLES)), :: max(1, width // (_COLUMNS * _SAMPLES))
    ]
    grey = thin.astype(np.float32)
    if grey.ndim == 3:
        grey = grey.mean(axis=2)
    means = block_means(grey, (_ROWS, _COLUMNS))
    return np.packbits(means[:, 1:] > means[:, :-1]).tobytes().hex()


def bands(hashes: Sequence[str]) -> NDArray[np.uint32]:
    """(N, 8) bits of 4 rows and 8 columns of the hash each.

    Of the shapes of 32 bits tried (2 x 16, 4 x 8, 8 x 4) this one finds most windowed copies.
    """
    rows = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), 4, 4, 2)
    parts = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))  # group of rows, half, row
    return parts.view("<u4").reshape(len(hashes), BANDS).astype(np.uint32)


def tells(found: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Whether bands say anything: not those that nearly every flat picture or gradient has."""
    counts = np.bitwise_count(found)
    few = BITS // BANDS // 5
    told: NDArray[np.bool_] = (counts > few) & (counts < BITS // BANDS - few)
    return told


def block_means(values: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Means over a grid of blocks; ``values`` (H, W) has at least as many rows and columns."""
    for axis, count in enumerate(shape):
        edges, sizes = _blocks(values.shape[axis], count)
        sums: NDArray[np.float32] = np.add.reduceat(values, edges, axis=axis)
        values = sums / (sizes[:, None] if axis == 0 else sizes)
    return values


@lru_cache(maxsize=64)
def _blocks(length: int, count: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """First place and length of each block along an axis."""
    edges = np.arange(count) * length // count
    return edges, np.diff(edges, append=length).astype(np.float32)
