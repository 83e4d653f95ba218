"""Augmentation behind one function: `augment(image, label, level, rng)`.

`warp` draws, `warpcv` applies it here, and `warptorch` to batches where the network runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medpsp.train.augmentextra import build_transforms
from medpsp.train.warp import AugmentOptions, Draw, draw
from medpsp.train.warpcv import apply_draw

__all__ = ["AugmentOptions", "Draw", "apply_draw", "augment", "build_transforms", "draw"]

_USUAL = AugmentOptions()


def augment(
    image: NDArray[np.float32],
    label: NDArray[np.uint8],
    level: str,
    rng: np.random.Generator,
    *,
    options: AugmentOptions = _USUAL,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Deform and brighten one sample; what is given is left as it is.

    Args:
        image: (H, W) or (H, W, C), any range and number of channels; all are treated alike.
        label: (H, W) class indices; what is turned in from outside becomes 255, and the image 0
            there: air, after windowing.
        level: ``none``, ``low`` (rotation, brightness), ``mid`` (and grid distortion) or
            ``high`` (and elastic deformation).
        rng: Keyed on (seed, epoch, sample), so that no worker count changes the result.
        options: Flips, spacing, and transforms of albumentations.

    Returns:
        What was given, where nothing was drawn.
    """
    if level == "none":
        return image, label
    rows, columns = label.shape
    drawn = draw(level, rng, (rows, columns), options)
    image, label = apply_draw(image, label, drawn)
    if options.transforms is None:
        return image, label
    return options.transforms(image, label, rng)
