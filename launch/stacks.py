"""Cases: the slices of one series, what the network is shown of them, and what it makes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medpsp.config import Config
from medpsp.types import IGNORE

if TYPE_CHECKING:
    import torch

    from medpsp.model.psp import PSPNet
    from medpsp.progress import Bar
    from medpsp.train.batch import Batch
    from medpsp.train.surface import Grid
    from shards.index import SliceRow
    from shards.reader import ShardReader

Labels = NDArray[np.uint8]
Stack = tuple["SliceRow", ...]
"""Slices of one case in their order along the normal."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What turns slices into classes."""

    config: Config
    model: PSPNet
    device: torch.device
    reader: ShardReader


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A case as the network sees it.

    Attributes:
        truth: (N, H, W), 255 ignored.
        classes: (N, H, W).
        bins: Of `calibration_bins`.
    """

    truth: Labels
    classes: Labels
    bins: NDArray[np.float64]


def stacks_of(rows: Sequence[SliceRow]) -> list[Stack]:
    """The cases: one a series, its slices by their place; in the order of the pseudonyms."""
    groups: dict[tuple[str, str, str], list[SliceRow]] = defaultdict(list)
    for row in rows:
        groups[row.patient, row.series, row.bucket].append(row)
    return [tuple(sorted(groups[key], key=lambda row: row.slice_index)) for key in sorted(groups)]


def grid_of(stack: Stack) -> Grid | None:
    """Where the voxels of a case lie; None where the distance between its slices is not known."""
    from medpsp.train.surface import Grid

    first = stack[0]
    if len(first.affine) != 16 or not np.isfinite(first.spacing).all():
        return None
    columns = np.array(first.affine).reshape(4, 4)[:3, :3]  # mm along column, row, slice
    places = np.array([row.slice_index for row in stack], dtype=np.int64)
    return Grid(places, columns[:, ::-1].T)


def network_inputs(net: Network, stack: Stack) -> Iterator[Batch]:
    """What the network is shown of a case, a slice at a time: (1, C, H, W) and label (1, H, W)."""
    from shards.dataset import Inputs

    inputs = Inputs(net.reader, net.config, stack)
    for row in stack:
        yield inputs.batch((row,))


def predict_stack(net: Network, stack: Stack, bar: Bar) -> Predicted:
    """Run the network over a case; its probabilities are in memory for one slice at a time."""
    from medpsp.train.calibration import BINS, calibration_bins
    from medpsp.train.sliding import probabilities

    settings, planes, bins = net.config.evaluate, [], np.zeros((3, BINS))
    for batch in network_inputs(net, stack):
        shares = probabilities(net.model, batch.image, net.config.tiling, settings.flips)
        best, index = (t[0].cpu().numpy() for t in shares.max(1))
        label, found = batch.label[0].numpy(), index.astype(np.uint8)
        known = label != IGNORE
        bins += calibration_bins(best[known], found[known] == label[known])
        planes.append((label, found))
        bar.advance()
    truth, classes = (np.stack(each) for each in zip(*planes, strict=True))
    return Predicted(truth=truth, classes=classes, bins=bins)
