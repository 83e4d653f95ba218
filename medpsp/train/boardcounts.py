"""Counts behind the curves of a validation: they add up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medpsp.train.calibration import BINS, Bins, calibration_bins
from medpsp.train.metrics import Counts
from medpsp.train.ranks import sum_counts
from medpsp.types import IGNORE

BUCKETS = 127
"""Of a probability, and so thresholds of a curve: TensorBoard takes no more."""
GRAIN = 2**20
"""Sums of confidences travel in these parts: integers are the same in any order of ranks."""


Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """Each (BUCKETS,), where a pixel is of the class if its probability is i / (BUCKETS - 1)."""

    true_positives: Floats
    false_positives: Floats
    true_negatives: Floats
    false_negatives: Floats
    precision: Floats
    recall: Floats


@dataclass(kw_only=True)
class Tally:
    """What the probabilities of a validation were.

    Attributes:
        bins: (3, B) of `calibration_bins`.
        pixels: (K, 2, BUCKETS) by class, whether it is the true one, and its probability; none
            of the background.
    """

    bins: Bins
    pixels: Counts

    @classmethod
    def empty(cls, classes: int) -> Tally:
        """Nothing counted."""
        return cls(bins=np.zeros((3, BINS)), pixels=np.zeros((classes, 2, BUCKETS), np.int64))

    def add(self, probabilities: Tensor, label: Tensor) -> None:
        """Count a batch where it is; only counts and confidences leave the device.

        Args:
            probabilities: (N, K, H, W), on any device.
            label: (N, H, W) uint8 on the same one.
        """
        known = label != IGNORE
        truth = label[known].long()
        sure, predicted = (values[known] for values in probabilities.max(1))
        right = (predicted == truth).cpu().numpy()
        self.bins += calibration_bins(sure.float().cpu().numpy(), right)
        for index in range(1, len(self.pixels)):
            place = (probabilities[:, index][known] * (BUCKETS - 1)).long()
            place += BUCKETS * (truth == index)
            counted = torch.bincount(place, minlength=2 * BUCKETS).cpu().numpy()
            self.pixels[index] += counted.reshape(2, BUCKETS)

    def curve(self, index: int) -> Curve:
        """Precision and recall of a class; 0 where nothing is predicted or nothing is there."""
        false, true = (of[::-1].cumsum()[::-1].astype(np.float64) for of in self.pixels[index])
        precision, recall = true / np.maximum(true + false, 1), true / max(true[0], 1)
        return Curve(true, false, false[0] - false, true[0] - true, precision, recall)


def sum_all(counts: Counts, tally: Tally, device: torch.device) -> tuple[Counts, Tally]:
    """Confusion counts and tally of all ranks, in one collective.

    Args:
        counts: (K, K) of this rank.
        tally: Of this rank.
        device: Of the network.
    """
    bins = np.rint(tally.bins * GRAIN).astype(np.int64)
    parts = (counts, tally.pixels, bins)
    whole = sum_counts(np.concatenate([part.ravel() for part in parts]), device)
    ends = np.cumsum([part.size for part in parts])[:-1]
    summed = [
        found.reshape(part.shape) for found, part in zip(np.split(whole, ends), parts, strict=True)
    ]
    return summed[0], Tally(bins=summed[2] / GRAIN, pixels=summed[1])
