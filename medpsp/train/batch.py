"""What the loop eats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medpsp.types import IGNORE

if TYPE_CHECKING:  # loader workers cut crops without it
    from torch import Tensor

    from medpsp.train.warp import Draw

Part = tuple[slice, slice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images and labels of one rank's share of a step.

    Attributes:
        image: (N, C, H, W) float32 in [0, 1]; brightened ones go a little beyond.
        label: (N, H, W) uint8 class indices, 255 ignored.
        patients: (N) pseudonyms.
        keys: (N,) int64 of seed, stage, epoch and sample: what is random about a sample in the
            network follows from them. Absent outside training.
        samples: (N) what names them in a message.
        draws: (N) augmentation that is still to be applied, or none.
    """

    image: Tensor
    label: Tensor
    patients: tuple[str, ...]
    keys: Tensor | None = None
    samples: tuple[str, ...] = ()
    draws: tuple[Draw, ...] = ()

    def micro(self, count: int) -> tuple[Batch, ...]:
        """The micro-batches of a step, one after another in ``image``."""
        if count == 1:
            return (self,)
        size = len(self.image) // count
        parts = [slice(n * size, (n + 1) * size) for n in range(count)]
        return tuple(
            Batch(
                image=self.image[part],
                label=self.label[part],
                patients=self.patients[part],
                keys=None if self.keys is None else self.keys[part],
                samples=self.samples[part],
                draws=self.draws[part],
            )
            for part in parts
        )


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
