"""A draw on one sample, with OpenCV: one remap of the image and one of the label."""

from __future__ import annotations

import threading
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.train.warp import Bend, Draw
from medpsp.types import IGNORE

Floats = NDArray[np.float32]
_CHANNELS = 4  # most that a remap takes
_ROWS = 32  # of a map that are worked on at once: the caches hold them


class _Space(threading.local):
    """Memory for the maps, kept: to ask for 4 MB and give it back takes as long as the rest."""

    maps: Floats = np.empty((0, 2, 0), np.float32)
    part: Floats = np.empty((0, 2, 0), np.float32)

    def of(self, shape: tuple[int, int]) -> Floats:
        """(H, 2, W); what was there before is overwritten."""
        rows, columns = shape
        if self.maps.shape != (rows, 2, columns):
            self.maps = np.empty((rows, 2, columns), np.float32)
            self.part = np.empty((min(rows, _ROWS), 2, columns), np.float32)
        return self.maps


_space = _Space()


def apply_draw(
    image: Floats, label: NDArray[np.uint8], drawn: Draw
) -> tuple[Floats, NDArray[np.uint8]]:
    """Deform and brighten one sample.

    Args:
        image: (H, W) or (H, W, C), any range, any number of channels; 0 comes in from outside.
        label: (H, W); what comes in from outside becomes 255.
        drawn: Of that shape.

    Returns:
        New arrays, or those given where nothing was drawn.
    """
    if drawn.brightens:  # first, so that what comes in from outside stays 0
        image = image * np.float32(drawn.gain)
        image += np.float32(drawn.offset)
    if not drawn.moves:
        return image, label
    cv2 = _cv2()
    x, y = _sources(drawn)
    mask = cv2.remap(
        np.ascontiguousarray(label),
        x,
        y,
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=IGNORE,
    )
    return _sampled(image, x, y), mask


def _sampled(image: Floats, x: Floats, y: Floats) -> Floats:
    if image.ndim == 2 or image.shape[2] <= _CHANNELS:
        return _remapped(image, x, y)
    starts = range(0, image.shape[2], _CHANNELS)
    parts = [image[..., start : start + _CHANNELS] for start in starts]
    return np.concatenate([_remapped(part, x, y) for part in parts], axis=2)


def _remapped(image: Floats, x: Floats, y: Floats) -> Floats:
    cv2 = _cv2()
    warped: Floats = cv2.remap(
        np.ascontiguousarray(image), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )
    return warped.reshape(image.shape)  # a last axis of 1 was dropped


def _sources(drawn: Draw) -> tuple[Floats, Floats]:
    """Column and row in the source of every output pixel, (H, W) each, until the next call."""
    columns, rows = (part.astype(np.float32) for part in drawn.axes())
    maps = _space.of(drawn.shape)
    np.add(rows.T[:, :, None], columns, out=maps)
    bend = drawn.bend()
    if bend is not None:
        _bend(maps, bend, _space.part)
    return maps[:, 0], maps[:, 1]


def _bend(maps: Floats, bend: Bend, part: Floats) -> None:
    """Add the elastic part to (H, 2, W) maps; ``part`` is memory for some rows of them.

    No product of matrices, numpy's or OpenCV's: their BLAS may take threads, of which loader
    workers have one, and then other bits. Multiplying and adding has the same bits everywhere.
    """
    weights = bend.weights.astype(np.float32)[:, :, None]
    flat, part = (m.reshape(len(m), -1) for m in (maps, part))  # numpy runs through long rows
    along = bend.along.astype(np.float32).reshape(len(bend.along), -1)
    same = np.flatnonzero(np.diff(bend.first, prepend=-1))  # where the next row of nodes begins
    starts = np.union1d(same, np.arange(0, len(flat), _ROWS)).tolist()
    for start, end in pairwise([*starts, len(flat)]):
        for k in range(4):
            product = part[: end - start]
            np.multiply(weights[k, start:end], along[bend.first[start] + k], out=product)
            flat[start:end] += product


@lru_cache
def _cv2() -> Any:
    import cv2

    cv2.setNumThreads(0)  # ranks share cores
    return cv2
