"""Probabilities of whole slices, tile by tile, mirrored or not.

Memory is that of the probabilities of the slices given, and of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medpsp.tiles import Tiling, tiled

MIRRORED: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""Axes turned over: none, left and right, top and bottom, both."""


@torch.no_grad()
def probabilities(model: nn.Module, image: Tensor, tiling: Tiling, flips: bool = False) -> Tensor:
    """(N, K, H, W) probabilities, float32 or better, on the device of the network.

    Args:
        model: Gives logits (N, K, h, w) and something else for (N, C, h, w).
        image: (N, C, H, W).
        tiling: How much the network sees at once.
        flips: Mean over the four mirrored images.
    """
    model.eval()
    weight = next(model.parameters())
    image = image.to(weight.device, weight.dtype)

    def predict(part: Tensor) -> Tensor:
        axes = MIRRORED if flips else MIRRORED[:1]
        return torch.stack([_softmax(model, part, turned) for turned in axes]).mean(0)

    seen: Tensor = tiled(predict, image, tiling, lambda array: torch.from_numpy(array).to(image))
    return seen


def _softmax(model: nn.Module, image: Tensor, turned: tuple[int, ...]) -> Tensor:
    logits: Tensor = model(image.flip(turned))[0]
    logits = logits.flip(turned)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
