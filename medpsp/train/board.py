"""TensorBoard: scalars, pictures, curves, texts. Only rank 0 has a writer.

The axis counts steps that are done: what belongs to step n (from 0) stands at n + 1, the scores
after it, too. So a run that goes on from a checkpoint of S steps hides whatever lies beyond S,
and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from medpsp.train.boardcounts import BUCKETS, Tally
from medpsp.train.calibration import calibration_error
from medpsp.train.metrics import Counts, confusion, dice_per_class, mean_foreground
from medpsp.train.pictures import (
    Picture,
    confusion_picture,
    contoured,
    reliability_picture,
    tinted_rows,
)
from medpsp.types import IGNORE
from medpsp.words import many

ROWS = 4
"""Examples drawn at every evaluation; of the others only those that are worst, median or best."""
MOST_WAIT = 10.0
"""Seconds by which clocks of nodes may differ."""


class Board:
    """One event folder a run; a resumed run replaces the points it repeats.

    Args:
        folder: Of the events; None for a board that writes nothing.
        first_step: Steps that are done.
        marks: First step of a stage to what is said of it when it is reached.
    """

    def __init__(
        self, folder: Path | None, first_step: int, marks: Mapping[int, str] | None = None
    ) -> None:
        self.first_step = first_step
        self.writer: SummaryWriter | None = None
        if folder:
            _wait_for_a_later_name(folder)
            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._marks = {step: text for step, text in (marks or {}).items() if step >= first_step}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of a step, counted from 0; NaN is left out.

        They are in the file when this returns: a process that is killed loses none that lie
        before its last checkpoint.
        """
        if not self.writer:
            return
        for start in [start for start in self._marks if start <= step]:
            self.writer.add_text("stage", self._marks.pop(start), start + 1)
        for name, value in values.items():
            if np.isfinite(value):
                self.writer.add_scalar(name, value, step + 1)
        self.writer.flush()

    def text(self, name: str, text: str) -> None:
        """A text tab, as of the first step of this process."""
        if self.writer:
            self.writer.add_text(name, text, self.first_step + 1)

    def summaries(self, *summaries: Any) -> None:
        """Messages of plug-ins (tensorboard's Summary), as of the first step of this process."""
        if self.writer:
            for summary in summaries:
                writer: Any = self.writer.file_writer
                writer.add_summary(summary, self.first_step + 1)

    def overlays(
        self,
        step: int,
        images: NDArray[np.float32],
        truth: NDArray[np.uint8],
        predicted: NDArray[np.uint8],
    ) -> None:
        """The first examples in colours; those of the lowest, middle and highest Dice in contours.

        Args:
            step: Counted from 0.
            images: (N, C, H, W) in [0, 1], grey or RGB.
            truth: (N, H, W) class indices.
            predicted: (N, H, W) class indices.
        """
        if not self.writer:
            return
        shown = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0]
        rows = tinted_rows(shown[:ROWS], truth[:ROWS], predicted[:ROWS])
        self._picture("val/overlay (image, truth, prediction)", rows, step)
        for name, (index, dice) in ranked(truth, predicted).items():
            caption = f"{name} of {many(len(truth), 'slice')}: no. {index}, Dice {dice:.3f}"
            drawn = contoured(shown[index], truth[index], predicted[index], caption)
            self._picture(f"val/case/{name}", drawn, step)
        self.writer.flush()

    def tables(self, step: int, names: Sequence[str], counts: Counts, tally: Tally) -> None:
        """Confusion matrix, reliability diagram, and precision over recall of every class.

        Args:
            step: Counted from 0.
            names: (K) of the classes, the background first.
            counts: (K, K) of all validation slices.
            tally: Of the same slices; nothing is shown where it is empty.
        """
        if not self.writer or not counts.any():
            return
        self._picture("val/confusion", confusion_picture(counts, names), step)
        self._picture("val/reliability", reliability_picture(tally.bins), step)
        for index, name in enumerate(names[1:], 1):
            self.writer.add_pr_curve_raw(
                f"val/pr/{name}", *tally.curve(index), step + 1, num_thresholds=BUCKETS
            )
        self.scalars(step, {"val/ece": float(calibration_error(tally.bins))})

    def _picture(self, name: str, picture: Picture, step: int) -> None:
        if self.writer:
            self.writer.add_image(name, picture, step + 1, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        if self.writer:
            self.writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Files are read by name, which begins with the second: two of one second may change places."""
    seconds = (path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*"))
    newest = max((int(second) for second in seconds if second.isdecimal()), default=0)
    time.sleep(min(max(newest + 1 - time.time(), 0), MOST_WAIT))


def ranked(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> dict[str, tuple[int, float]]:
    """Index and mean foreground Dice of the worst, the median and the best slice.

    Args:
        truth: (N, H, W) class indices.
        predicted: (N, H, W) class indices.

    Returns:
        By name; none where all slices are background only. Of equal ones the first, and of an
        even number the lower median; no slice has two names: of two there is no median, of one
        no best either.
    """
    classes = 1 + max(int(m[m != IGNORE].max(initial=0)) for m in (truth, predicted))
    pairs = zip(truth, predicted, strict=True)
    dice = [mean_foreground(dice_per_class(confusion(t, p, classes))) for t, p in pairs]
    order = sorted((n for n, d in enumerate(dice) if np.isfinite(d)), key=lambda n: dice[n])
    if not order:
        return {}
    last = len(order) - 1
    places = {last // 2: "median", last: "best", 0: "worst"}  # of equal places the last one counts
    return {places[at]: (order[at], dice[order[at]]) for at in (0, last // 2, last)}
