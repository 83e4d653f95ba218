"""Does the ONNX file compute what the network computes?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medpsp.deploy.session import INPUT, class_masks, open_session
from medpsp.errors import ParityError
from medpsp.tiles import Tiling
from medpsp.train.metrics import confusion, dice_per_class, mean_foreground

SHAPES = ((1, 64, 64), (2, 97, 121), (1, 33, 47), (3, 128, 96), (1, 31, 1), (1, 160, 200))
"""(N, H, W) tried: square, odd, below the padding multiple, one column wide."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Largest difference of logits and number of changed pixels at one shape.

    ``relative`` is the difference over the largest logit, or over 1 where that is smaller: at
    logits of 700 the network itself is 0.004 away from its float64 self.
    """

    shape: tuple[int, int, int]
    max_abs_diff: float
    relative: float
    changed: int


def check_parity(model: nn.Module, path: Path, channels: int, tolerance: float) -> list[Parity]:
    """Compare network and file on random images at several shapes.

    Raises:
        ParityError: Logits differ by more than ``tolerance``, relatively, at some shape.
    """
    model.eval()
    session = open_session(path)
    rng = np.random.default_rng(0)
    rows = []
    for shape in SHAPES:
        n, h, w = shape
        image = rng.random((n, channels, h, w), dtype=np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(image))[0].numpy()
        found = session.run(None, {INPUT: image})[0]
        if found.shape != expected.shape:
            raise ParityError(f"{path.name} at (N,H,W)={shape}: shape {found.shape}")
        difference = float(np.abs(found - expected).max())
        changed = int((found.argmax(1) != expected.argmax(1)).sum())
        relative = difference / max(1.0, float(np.abs(expected).max()))
        rows.append(
            Parity(shape=shape, max_abs_diff=difference, relative=relative, changed=changed)
        )
    worst = max(rows, key=lambda row: np.nan_to_num(row.relative, nan=np.inf))
    if not worst.relative <= tolerance:  # written so that NaN fails
        raise ParityError(
            f"{path.name} at (N,H,W)={worst.shape}: logits differ by {worst.max_abs_diff:.2e}, "
            f"{worst.relative:.2e} of the largest; allowed {tolerance:.0e} "
            "(export.parity_tolerance)"
        )
    return rows


def mask_agreement(
    reference: Path,
    other: Path,
    images: Iterable[NDArray[np.float32]],
    classes: int,
    tiling: Tiling,
) -> float:
    """Mean foreground Dice of one file's masks against another's; NaN without any foreground."""
    sessions = open_session(reference), open_session(other)
    counts = np.zeros((classes, classes), dtype=np.int64)
    for image in images:
        first, second = (class_masks(session, image, tiling) for session in sessions)
        counts += confusion(first, second, classes)
    return mean_foreground(dice_per_class(counts))
