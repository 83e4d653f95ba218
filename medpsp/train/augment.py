"""Augmentation behind one function: `augment(image, label, level, rng)`.

albumentations 2.0.8 is kept inside: its own seeding repeats across loader workers, so every
sample is seeded by us, and its brightness transform clips to [0, 1], so it runs after windowing.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.types import IGNORE

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network on import


def augment(
    image: NDArray[np.float32], label: NDArray[np.uint8], level: str, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Deform and brighten one sample.

    Args:
        image: (H, W) or (H, W, 3) in [0, 1]; brightness moves all channels alike.
        label: (H, W) class indices; what is turned in from outside becomes 255.
        level: ``none``, ``low`` (rotation, brightness), ``mid`` (and grid distortion) or
            ``high`` (and elastic deformation of some pixels).
        rng: Keyed on (seed, epoch, sample), so that no worker count changes the result.
    """
    if level == "none":
        return image, label
    pipeline = _pipeline(level)
    pipeline.set_random_seed(int(rng.integers(2**31)))
    out = pipeline(image=image if image.ndim == 3 else image[..., None], mask=label)
    changed = out["image"].reshape(image.shape)
    return np.ascontiguousarray(changed), np.ascontiguousarray(out["mask"])


def _albumentations() -> Any:
    """albumentations without its torch part: a loader worker starts in a third of the time."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("albumentations")
    finally:
        if absent:
            del sys.modules["torch"]


@lru_cache
def _pipeline(level: str) -> Any:
    import cv2

    A = _albumentations()
    cv2.setNumThreads(0)  # ranks share cores
    border = {"border_mode": cv2.BORDER_CONSTANT, "fill": 0.0, "fill_mask": IGNORE}
    steps = [
        A.Rotate(limit=15, p=0.7, **border),
        A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=0.5),
    ]
    if level in ("mid", "high"):
        steps.insert(1, A.GridDistortion(num_steps=5, distort_limit=0.2, p=0.3, **border))
    if level == "high":
        # alpha 1 and sigma 50, the usual quote, move pixels by 0.003 px: this moves them by 2.5
        steps.insert(1, A.ElasticTransform(alpha=300, sigma=10, approximate=True, p=0.3, **border))
    return A.Compose(steps)
