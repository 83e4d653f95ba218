"""Dice + Focal, normalised over the valid pixels of the whole global batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medpsp.config import LossConfig
from medpsp.types import IGNORE

EPS = 1.0
"""Pixels added to both sides of Dice: a class of a handful of pixels does not swing the loss."""

SPREAD = 20.0
"""Most that one class weight may be over another."""

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """Total and its parts, each a scalar."""

    total: Tensor
    dice: Tensor
    focal: Tensor

    def detach(self) -> Loss:
        """The same numbers without their graph."""
        return Loss(self.total.detach(), self.dice.detach(), self.focal.detach())


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    config: LossConfig,
    weights: Tensor,
    reduce: Reduce,
    *,
    compiled: bool = False,
) -> Loss:
    """``dice`` * (1 - Dice) + ``focal`` * Focal.

    Args:
        logits: (N, K, H, W).
        target: (N, H, W) integer class indices; 255 is not counted.
        config: Shares of both parts and gamma.
        weights: (K,) class weights of the focal part.
        reduce: Sums a vector over all ranks, with gradient; the identity for one rank. Dice is a
            ratio of sums, so averaging it over ranks would make it depend on their number.
        compiled: By torch.compile: in place of two dozen walks over the pixels a few.

    Returns:
        The loss of the global batch, equal on all ranks. Dice is the mean over the foreground
        classes present in the target; an absent class takes part in the focal term only. A
        batch without valid pixels gives 0.
    """
    classes = logits.shape[1]
    sums = (_compiled_sums() if compiled else _sums)(logits, target, weights, config.gamma)
    sums = reduce(sums)
    # without background: its Dice is close to 1 and dilutes the gradient
    overlap, predicted, true = sums[: 3 * classes].view(3, classes)[:, 1:]
    scores = (2 * overlap + EPS) / (predicted + true + EPS)
    present = true > 0
    count = present.sum().clamp_min(1)
    dice = torch.where(present, 1 - scores, 0).sum() / count
    focal = sums[-2] / sums[-1].clamp_min(1e-6)
    return Loss(total=config.dice * dice + config.focal * focal, dice=dice, focal=focal)


def _sums(logits: Tensor, target: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """(3 K + 2,): of each class overlap, predicted and true pixels; of focal loss and its weights.

    Everything that walks over the pixels.
    """
    labels = torch.arange(logits.shape[1], device=target.device, dtype=target.dtype)
    truth = target[:, None] == labels[:, None, None]  # (N, K, H, W)
    valid = target != IGNORE
    safe = torch.where(valid, target, 0).long()
    log_p = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    p = log_p.exp() * valid[:, None]
    log_pt = log_p.gather(1, safe[:, None]).squeeze(1)  # p_t from the unweighted softmax
    pixel_weight = weights.to(log_p.dtype)[safe] * valid
    focal_sum = -(focal_factor(log_pt, gamma) * log_pt * pixel_weight).sum()
    return torch.cat(
        [
            (p * truth).sum((0, 2, 3)),
            p.sum((0, 2, 3)),
            truth.sum((0, 2, 3)).to(p.dtype),
            torch.stack([focal_sum, pixel_weight.sum()]),
        ]
    )


@functools.cache
def _compiled_sums() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    return torch.compile(_sums)


def focal_factor(log_pt: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma (Lin et al. 2017, eq. 4); exactly 1 for gamma 0, with a gradient of 0.

    The base stays above 0: below gamma 1 the slope there is infinite, and only the convention for
    the slope of clamp at its own bound would keep NaN from the weights.
    """
    return (-torch.expm1(log_pt)).clamp_min(1e-12).pow(gamma)


def class_weights(pixels: Tensor, kind: str) -> Tensor:
    """(K,) weights from the training pixels of each class, mean 1 over classes that occur.

    ``inverse``: 1 / frequency. ``median_frequency``: median frequency / frequency (Eigen &
    Fergus 2015), its square root here: the full ratio, 100 and more for a lesion, makes focal
    loss flood the mask. ``effective_number``: (1 - b) / (1 - b^n) for n pixels (Cui et al. 2019).
    b is (V - 1) / V for a volume of V samples in a class: here the mean pixels of the classes that
    occur. Their 0.9999, for thousands of images, would give millions of pixels all one weight.

    Floors: a weight is at least 1/20 of the largest; a class that does not occur has weight 0,
    and with no pixels at all every weight is 1.

    Args:
        pixels: (K,) counts.
        kind: ``none``, ``inverse``, ``median_frequency`` or ``effective_number``.
    """
    seen = pixels > 0
    if kind == "none" or not bool(seen.any()):
        return torch.ones(len(pixels))
    raw = torch.where(seen, RAW_WEIGHTS[kind](pixels.double().where(seen, torch.nan)), 0.0)
    raw = raw.clamp_max(SPREAD * float(raw[seen].min()))
    return (raw / raw[seen].mean()).float()


def _inverse(pixels: Tensor) -> Tensor:
    return 1 / pixels


def _median_frequency(pixels: Tensor) -> Tensor:
    return (pixels.nanmedian() / pixels).sqrt()


def _effective_number(pixels: Tensor) -> Tensor:
    # b^n by logarithms: b is within 1e-9 of 1; where V is 1, b = 0 and its logarithm is -inf
    log_b = torch.log1p(-1 / pixels.nanmean())
    return -1 / torch.expm1(pixels * log_b)


RAW_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": _inverse,
    "median_frequency": _median_frequency,
    "effective_number": _effective_number,
}
"""(K,) pixels, NaN where a class does not occur, to weights up to a factor."""
