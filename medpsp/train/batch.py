"""What the loop eats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medpsp.types import IGNORE

if TYPE_CHECKING:  # loader workers cut crops without it
    from torch import Tensor

Part = tuple[slice, slice]


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
    source, target = crop_parts(label.shape, size, rng)
    return padded(image[source], label[source], size, target)


def crop_parts(
    shape: tuple[int, ...], size: tuple[int, int], rng: np.random.Generator
) -> tuple[Part, Part]:
    """What of a slice of ``shape`` a random crop of ``size`` shows, and where in the crop."""
    source, target = [], []
    for have, want in zip(shape, size, strict=True):
        shift = int(rng.integers(0, abs(have - want) + 1))
        length = min(have, want)
        source.append(slice(shift, shift + length) if have > want else slice(0, length))
        target.append(slice(shift, shift + length) if have < want else slice(0, length))
    return (source[0], source[1]), (target[0], target[1])


def padded(
    image: NDArray[np.float32], label: NDArray[np.uint8], size: tuple[int, int], target: Part
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A crop of ``size`` with image and label at ``target``, 0 and ignore around; a copy."""
    out_image = np.zeros((*size, *image.shape[2:]), dtype=np.float32)
    out_label = np.full(size, IGNORE, dtype=np.uint8)
    out_image[target] = image
    out_label[target] = label
    return out_image, out_label
