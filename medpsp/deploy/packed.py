"""Masks of a whole series in a fraction of their size."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]


class Slices(Protocol):
    """(N, H, W) class indices, slice by slice; an array is one, too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W)."""

    def __getitem__(self, place: int, /) -> Mask:
        """(H, W)."""


class PackedMask:
    """A mask (N, H, W) uint8, compressed slice by slice.

    Organs take 0.01 bytes a voxel, noise of two classes 0.2.

    Args:
        shape: (N, H, W); slices that are never set are 0.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._slices: dict[int, bytes] = {}

    def __setitem__(self, place: int, mask: Mask) -> None:
        self._slices[place] = zlib.compress(mask.tobytes(), 1)

    def __getitem__(self, place: int, /) -> Mask:
        if place not in self._slices:
            return np.zeros(self.shape[1:], np.uint8)
        held = zlib.decompress(self._slices[place])
        return np.frombuffer(held, np.uint8).reshape(self.shape[1:])

    def chosen(self, places: Sequence[int]) -> PackedMask:
        """(M, H, W) slices in another order, packed as they are."""
        some = PackedMask((len(places), *self.shape[1:]))
        some._slices = {n: self._slices[z] for n, z in enumerate(places) if z in self._slices}
        return some


def held(mask: Slices, count: int) -> tuple[NDArray[np.bool_], str]:
    """Look through a mask, slice by slice.

    Args:
        mask: (N, H, W).
        count: K classes.

    Returns:
        (N, K) which of them each slice holds, and the SHA-256 of the mask.

    Raises:
        ValueError: A class of K or above.
    """
    found, digest = np.zeros((mask.shape[0], count), dtype=np.bool_), hashlib.sha256()
    for number in range(mask.shape[0]):
        plane = np.ascontiguousarray(mask[number])
        pixels = np.bincount(plane.ravel(), minlength=count)
        if len(pixels) > count:
            raise ValueError(f"slice {number} up to class {len(pixels) - 1} of {count}")
        found[number] = pixels > 0
        digest.update(plane.data)
    return found, digest.hexdigest()
