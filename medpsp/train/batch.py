"""What the loop eats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medpsp.types import IGNORE


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images and labels of one rank's share of a step.

    Attributes:
        image: (N, C, H, W) float32 in [0, 1].
        label: (N, H, W) uint8 class indices, 255 ignored.
        patients: (N) pseudonyms.
    """

    image: Tensor
    label: Tensor
    patients: tuple[str, ...]


def crop_or_pad(
    image: NDArray[np.float32],
    label: NDArray[np.uint8],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A random crop of ``size``; a smaller slice is placed at random on 0 and ignore.

    Args:
        image: (H, W) or (H, W, 3).
        label: (H, W).
        size: Rows and columns wanted.
        rng: Decides where.
    """
    out_image = np.zeros((*size, *image.shape[2:]), dtype=np.float32)
    out_label = np.full(size, IGNORE, dtype=np.uint8)
    source, target = [], []
    for have, want in zip(label.shape, size, strict=True):
        shift = int(rng.integers(0, abs(have - want) + 1))
        length = min(have, want)
        source.append(slice(shift, shift + length) if have > want else slice(0, length))
        target.append(slice(shift, shift + length) if have < want else slice(0, length))
    out_image[tuple(target)] = image[tuple(source)]
    out_label[tuple(target)] = label[tuple(source)]
    return out_image, out_label
