"""What the network sees at once: a slice in tiles of the size that it was trained on.

The pyramid pools over all that it is given, so a network that was trained on crops sees something
else in a whole slice (Zhao et al. 2017 test by tiles, too). One function serves arrays and tensors:
scores in training, held-out patients and devices go the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGMA = 1 / 8
"""Width of the Gaussian in tiles: the edge of a tile sees half of its surroundings (the value of
nnU-Net, Isensee et al. 2021)."""

Place = tuple[Any, ...]
"""Index of the last two axes."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How slices are cut.

    Attributes:
        size: Rows and columns of a tile.
        overlap: Least share of a tile that lies in the next one, below 1.

    Raises:
        ValueError: A size or an overlap that cuts nothing.
    """

    size: tuple[int, int]
    overlap: float = 0.5

    def __post_init__(self) -> None:
        rows, columns = self.size
        if not (rows > 0 and columns > 0 and 0 <= self.overlap < 1):
            raise ValueError(f"tiles of {rows} x {columns} that overlap by {self.overlap}")


def _as_it_is(array: NDArray[Any]) -> Any:
    return array


def tiled(
    predict: Callable[[Any], Any],
    image: Any,
    tiling: Tiling,
    like: Callable[[NDArray[Any]], Any] = _as_it_is,
    outside: float = 0.0,
) -> Any:
    """(N, K, H, W) mean of what all tiles say, each weighted by a Gaussian around its middle.

    Args:
        predict: (N, C, h, w) of a tile to (N, K, h, w).
        image: (N, C, H, W), array or tensor. A side that is shorter than a tile is framed at both
            ends, as crops of training are.
        tiling: How to cut it.
        like: Makes of an array what the image is.
        outside: Value of the frame: what the network sees as 0.

    Raises:
        ValueError: The image has no pixel.
    """
    image, inside = framed(image, tiling.size, like, outside)
    places = tile_places(image.shape, tiling)
    if len(places) == 1:
        return predict(image)[inside]
    weight = like(_bump(tiling.size[0])[:, None] * _bump(tiling.size[1])[None, :])
    seen = like(np.zeros(image.shape[-2:], np.float32))
    total = None
    for place in places:
        part = predict(image[place])
        if total is None:
            total = like(np.zeros((*part.shape[:2], *image.shape[-2:]), np.float32))
        total[place] += part * weight
        seen[place] += weight
    return (total / seen)[inside]


def framed(
    image: Any,
    size: tuple[int, int],
    like: Callable[[NDArray[Any]], Any] = _as_it_is,
    outside: float = 0.0,
) -> tuple[Any, Place]:
    """An image, framed where it is smaller than a tile, and where it lies therein.

    Raises:
        ValueError: The image has no pixel.
    """
    height, width = image.shape[-2:]
    if not height * width:
        raise ValueError(f"image of {height} x {width}: nothing to predict")
    whole = max(height, size[0]), max(width, size[1])
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
    inside = (..., slice(top, top + height), slice(left, left + width))
    if whole == (height, width):
        return image, inside
    dtype = image.dtype if isinstance(image, np.ndarray) else np.float32
    frame = like(np.full((*image.shape[:-2], *whole), outside, dtype))
    frame[inside] = image
    return frame, inside


def tile_places(shape: tuple[int, ...], tiling: Tiling) -> list[Place]:
    """Where the tiles of a (..., H, W) image lie, no side of it shorter than a tile."""
    (height, width), (rows, columns) = shape[-2:], tiling.size
    return [
        (..., slice(top, top + rows), slice(left, left + columns))
        for top in tile_starts(height, rows, tiling.overlap)
        for left in tile_starts(width, columns, tiling.overlap)
    ]


def tile_starts(length: int, size: int, overlap: float) -> list[int]:
    """First pixels of tiles that cover an axis: evenly spread, the last one ends with it."""
    free = length - size
    count = math.ceil(free / max(1, int(size * (1 - overlap)))) + 1
    return [round(i * free / max(1, count - 1)) for i in range(count)]


def _bump(length: int) -> NDArray[np.float32]:
    """(length,) a Gaussian around the middle, above 0 everywhere."""
    place = (np.arange(length) - (length - 1) / 2) / (SIGMA * length)
    bump: NDArray[np.float32] = np.exp(-0.5 * place**2).astype(np.float32)
    return bump
