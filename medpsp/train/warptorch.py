"""Draws on a batch, in torch: on the device where the network runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medpsp.train.warp import Bend, Draw
from medpsp.types import IGNORE


@torch.no_grad()
def apply_batch(images: Tensor, labels: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Deform and brighten samples as `warpcv.apply_draw` does, all at once.

    Args:
        images: (N, C, H, W) float32 or float64, any range; 0 comes in from outside, label 255.
        labels: (N, H, W) uint8, on the same device.
        draws: One a sample, of its shape.

    Returns:
        New tensors, or those given where nothing was drawn.
    """
    images = _brightened(images, draws)
    moving = [n for n, drawn in enumerate(draws) if drawn.moves]
    if not moving:
        return images, labels
    index = torch.tensor(moving, device=images.device)
    with torch.autocast(images.device.type, enabled=False):  # places in bf16 err by pixels
        source = _sources([draws[n] for n in moving], images)
        return (
            images.index_copy(0, index, _sampled(images[index], source)),
            labels.index_copy(0, index, _nearest(labels[index], source)),
        )


def _brightened(images: Tensor, draws: Sequence[Draw]) -> Tensor:
    if not any(drawn.brightens for drawn in draws):
        return images
    numbers = images.new_tensor([(drawn.gain, drawn.offset) for drawn in draws])
    numbers = numbers[:, :, None, None, None]
    return images * numbers[:, 0] + numbers[:, 1]


def _sources(draws: Sequence[Draw], like: Tensor) -> Tensor:
    """Source column and row of every output pixel, (N, 2, H, W)."""
    columns, rows = zip(*(drawn.axes() for drawn in draws), strict=True)
    source = _placed(columns, like)[:, :, None, :] + _placed(rows, like)[:, :, :, None]
    bends = {n: bend for n, drawn in enumerate(draws) if (bend := drawn.bend()) is not None}
    if bends:
        most = max(len(bend.along) for bend in bends.values())
        even = [_with_nodes(bend, most) for bend in bends.values()]
        left = _placed([bend.dense() for bend in even], like)[:, None]
        right = _placed([bend.along for bend in even], like).transpose(1, 2)
        # only this part is a product: in TF32, where that is allowed, places err by 0.01 px at most
        moved = left @ right
        source.index_add_(0, torch.tensor(list(bends), device=like.device), moved)
    return source


def _with_nodes(bend: Bend, count: int) -> Bend:
    """Rows of nodes up to a count; those added move nothing."""
    more = count - len(bend.along)
    return bend._replace(along=np.pad(bend.along, ((0, more), (0, 0), (0, 0))))


def _placed(arrays: Sequence[np.typing.NDArray[np.float64]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(like.device, like.dtype)


def _sampled(images: Tensor, source: Tensor) -> Tensor:
    """Bilinear; 0 outside."""
    rows, columns = images.shape[2:]
    sides = source.new_tensor([columns, rows])
    places = (2 * source.permute(0, 2, 3, 1) + 1) / sides - 1
    return F.grid_sample(images, places, align_corners=False)


def _nearest(labels: Tensor, source: Tensor) -> Tensor:
    """The label at the nearest pixel, 255 outside."""
    rows, columns = labels.shape[1:]
    x, y = source.round().long().unbind(1)
    inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    flat = (y.clamp(0, rows - 1) * columns + x.clamp(0, columns - 1)).flatten(1)
    found = labels.flatten(1).gather(1, flat).view_as(labels)
    return torch.where(inside, found, torch.full_like(found, IGNORE))
