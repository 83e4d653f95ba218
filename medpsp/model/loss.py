"""Dice + Focal, normalised over the valid pixels of the whole global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medpsp.config import LossConfig
from medpsp.types import IGNORE

EPS = 1.0
"""Pixels added to both sides of Dice: a class of a handful of pixels does not swing the loss."""

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
    logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor, reduce: Reduce
) -> Loss:
    """``dice`` * (1 - Dice) + ``focal`` * Focal.

    Args:
        logits: (N, K, H, W).
        target: (N, H, W) integer class indices; 255 is not counted.
        config: Shares of both parts and gamma.
        weights: (K,) class weights of the focal part.
        reduce: Sums a vector over all ranks, with gradient; the identity for one rank. Dice is a
            ratio of sums, so averaging it over ranks would make it depend on their number.

    Returns:
        The loss of the global batch, equal on all ranks. Dice is the mean over the foreground
        classes present in the target; an absent class takes part in the focal term only. A
        batch without valid pixels gives 0.
    """
    classes = logits.shape[1]
    valid = target != IGNORE
    safe = torch.where(valid, target, 0).long()
    log_p = F.log_softmax(logits.float(), dim=1)
    truth = F.one_hot(safe, classes).permute(0, 3, 1, 2) * valid[:, None]  # (N, K, H, W)
    p = log_p.exp() * valid[:, None]
    log_pt = log_p.gather(1, safe[:, None])[:, 0]  # p_t from the unweighted softmax
    pixel_weight = weights[safe] * valid
    focal_sum = -(focal_factor(log_pt, config.gamma) * log_pt * pixel_weight).sum()
    sums = torch.cat(
        [
            (p * truth).sum((0, 2, 3)),
            p.sum((0, 2, 3)),
            truth.sum((0, 2, 3)).to(p.dtype),
            torch.stack([focal_sum, pixel_weight.sum().to(p.dtype)]),
        ]
    )
    sums = reduce(sums)
    overlap, predicted, true = sums[: 3 * classes].view(3, classes)
    scores = (2 * overlap + EPS) / (predicted + true + EPS)
    present = true > 0
    present[0] = False  # background: its Dice is close to 1 and dilutes the gradient
    count = present.sum().clamp_min(1)
    dice = torch.where(present, 1 - scores, 0).sum() / count
    focal = sums[-2] / sums[-1].clamp_min(1e-6)
    return Loss(total=config.dice * dice + config.focal * focal, dice=dice, focal=focal)


def focal_factor(log_pt: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma (Lin et al. 2017, eq. 4); exactly 1 for gamma 0, with a gradient of 0.

    The base stays above 0: below gamma 1 the slope there is infinite, and only the convention for
    the slope of clamp at its own bound would keep NaN from the weights.
    """
    if gamma == 0:
        return torch.ones_like(log_pt)
    return (-torch.expm1(log_pt)).clamp_min(1e-12).pow(gamma)


def class_weights(pixels: Tensor, kind: str) -> Tensor:
    """(K,) weights from the training pixels of each class, mean 1 over classes that occur.

    ``inverse``: 1 / frequency. ``median_frequency``: median frequency / frequency (Eigen &
    Fergus 2015), its square root here: the full ratio, 100 and more for a lesion, makes focal
    loss flood the mask. Weights are capped at 20 times the smallest.

    Args:
        pixels: (K,) counts.
        kind: ``none``, ``inverse`` or ``median_frequency``.
    """
    if kind == "none":
        return torch.ones(len(pixels))
    seen = pixels > 0
    frequency = pixels.double() / pixels.sum().clamp_min(1)
    if kind == "inverse":
        raw = 1 / frequency.clamp_min(1e-12)
    else:
        raw = (frequency[seen].median() / frequency.clamp_min(1e-12)).sqrt()
    raw = torch.where(seen, raw, 0.0)
    if not bool(seen.any()):
        return torch.ones(len(pixels))
    raw = raw.clamp_max(20 * float(raw[seen].min()))
    return (raw / raw[seen].mean()).float()
