"""A fingerprint that pictures of one scan share: a difference hash of 256 bits.

16 x 17 block means; a bit is set where a block is brighter than its left neighbour by more than
2 % of the range of the means, so that noise on flat ground sets none. Copies that were windowed,
scaled, or compressed with loss differ in few bits. (N. Krawetz, "Kind of Like That", 2013.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 256
_ROWS, _COLUMNS = 16, 17
_STEP = 0.02
_SAMPLES = 8
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
    means = _blocks(_blocks(grey, _ROWS, 0), _COLUMNS, 1)
    steps = np.diff(means, axis=1)
    bits = steps > _STEP * np.ptp(means)
    return np.packbits(bits).tobytes().hex()


def _blocks(values: NDArray[np.float32], count: int, axis: int) -> NDArray[np.float32]:
    edges = np.arange(count) * values.shape[axis] // count
    sums: NDArray[np.float32] = np.add.reduceat(values, edges, axis=axis)
    sizes = np.diff(edges, append=values.shape[axis]).astype(np.float32)
    means: NDArray[np.float32] = sums / (sizes[:, None] if axis == 0 else sizes)
    return means
