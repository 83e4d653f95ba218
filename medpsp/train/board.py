"""TensorBoard: scalars and overlays. Only rank 0 has a writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from medpsp.intensity import overlay


class Board:
    """One event folder a run; a resumed run replaces the points it repeats."""

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_step) if folder else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Points at ``step``; NaN is left out."""
        if self.writer:
            for name, value in values.items():
                if np.isfinite(value):
                    self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str) -> None:
        """A text tab."""
        if self.writer:
            self.writer.add_text(name, text)

    def overlays(
        self,
        step: int,
        images: NDArray[np.float32],
        truth: NDArray[np.uint8],
        predicted: NDArray[np.uint8],
    ) -> None:
        """Rows of image, truth, prediction.

        Args:
            step: Where on the time axis.
            images: (N, C, H, W) in [0, 1], grey or RGB.
            truth: (N, H, W) class indices.
            predicted: (N, H, W) class indices.
        """
        if not self.writer:
            return
        pictures = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0]
        rows = [
            np.concatenate([overlay(i, np.zeros_like(t)), overlay(i, t), overlay(i, p)], axis=1)
            for i, t, p in zip(pictures, truth, predicted, strict=True)
        ]
        self.writer.add_image(
            "val/overlay (image, truth, prediction)", np.concatenate(rows), step, dataformats="HWC"
        )

    def close(self) -> None:
        """Flush and close."""
        if self.writer:
            self.writer.close()
