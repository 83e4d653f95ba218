"""Probabilities of whole slices: in one piece or window by window, mirrored or not.

Memory is that of the probabilities of the slices given, and of one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

MIRRORED: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""Axes turned over: none, left and right, top and bottom, both."""

SIGMA = 1 / 8
"""Width of the Gaussian in windows: the edge of a window sees half of its surroundings (the value
of nnU-Net, Isensee et al. 2021)."""


@torch.no_grad()
def probabilities(
    model: nn.Module,
    image: Tensor,
    *,
    window: tuple[int, int] | None = None,
    overlap: float = 0.5,
    flips: bool = False,
) -> Tensor:
    """(N, K, H, W) probabilities, float32, on the device of the image.

    Args:
        model: Gives logits (N, K, h, w) and something else for (N, C, h, w).
        image: (N, C, H, W).
        window: Rows and columns that the network sees at once; None: the whole slice. A slice
            that is smaller goes through whole along that axis.
        overlap: Least share of a window that lies in the next one, below 1.
        flips: Mean over the four mirrored images.
    """
    model.eval()

    def predict(part: Tensor) -> Tensor:
        axes = MIRRORED if flips else MIRRORED[:1]
        return torch.stack([_softmax(model, part, turned) for turned in axes]).mean(0)

    return predict(image) if window is None else _blended(predict, image, window, overlap)


def _softmax(model: nn.Module, image: Tensor, turned: tuple[int, ...]) -> Tensor:
    logits: Tensor = model(image.flip(turned))[0]
    return logits.flip(turned).float().softmax(1)


def _blended(
    predict: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], overlap: float
) -> Tensor:
    """Mean of all windows, each weighted by a Gaussian around its middle."""
    height, width = image.shape[-2:]
    rows, columns = min(window[0], height), min(window[1], width)
    weight = (_bump(rows)[:, None] * _bump(columns)[None, :]).to(image.device)
    total, seen = None, torch.zeros(height, width, device=image.device)
    for top in window_starts(height, rows, overlap):
        for left in window_starts(width, columns, overlap):
            here = (..., slice(top, top + rows), slice(left, left + columns))
            part = predict(image[here])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[here] += part * weight
            seen[here] += weight
    if total is None:
        raise ValueError(f"image of {height} x {width}: nothing to predict")
    return total / seen


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover an axis: evenly spread, the last one ends with it."""
    free = length - window
    count = math.ceil(free / max(1, int(window * (1 - overlap)))) + 1
    return [round(i * free / max(1, count - 1)) for i in range(count)]


def _bump(length: int) -> Tensor:
    """(length,) a Gaussian around the middle, above 0 everywhere."""
    place = (torch.arange(length) - (length - 1) / 2) / (SIGMA * length)
    return torch.exp(-0.5 * place**2)
