"""Does the ONNX file compute what the network computes, at every size?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.session import MARGIN, clear_pixels, feeds_of, open_session
from medpsp.errors import ParityError
from medpsp.types import FloatArray
from medpsp.words import many

_DRAWN = np.random.default_rng(0)
SHAPES: tuple[tuple[int, int, int], ...] = (
    (1, 64, 64),
    (2, 97, 121),
    (1, 33, 47),
    (3, 128, 96),
    (1, 31, 1),
    (1, 1, 1),
    (1, 160, 200),
    *((int(n), int(h), int(w)) for n, h, w in _DRAWN.integers(1, (4, 193, 193), (15, 3))),
)
"""(N, H, W) tried: squares, odd ones, below the padding multiple, one pixel, and 15 drawn."""


class Example(NamedTuple):
    """(1, P, H, W) modality values, and the (1, V, 3) windows they are seen through."""

    image: NDArray[Any]
    window: FloatArray | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Differences at one shape.

    ``relative`` is the difference over the largest logit, or over 1 where that is smaller: at
    logits of 700 the network itself is 0.004 away from its float64 self.

    Attributes:
        shape: (N, H, W).
        max_abs_diff: Of the logits.
        relative: See above.
        confidence: Largest difference of the confidence; 0 where the file gives none.
        changed: Pixels of another class although the two largest logits are `MARGIN` apart.
        ties: Pixels of another class between logits that are nearer.
    """

    shape: tuple[int, int, int]
    max_abs_diff: float
    relative: float
    confidence: float
    changed: int
    ties: int


def check_parity(
    unit: nn.Module,
    path: Path,
    given: GraphInput,
    examples: Sequence[Example],
    tolerance: float,
    advance: Callable[[], object] = lambda: None,
) -> list[Parity]:
    """Compare network and file at all of `SHAPES`.

    Args:
        unit: The network behind its windows: (image, window) to what the file gives, as
            `DeployGraph`, in torch.
        path: Of the file.
        given: What it takes.
        examples: Real images, which are repeated, turned and cut to the shapes: noise would leave
            most networks with one class.
        tolerance: Largest relative difference.
        advance: Called after each shape.

    Raises:
        ParityError: Logits or confidences differ by more, or a pixel changed its class.
    """
    session = open_session(path)
    rows = []
    for number, shape in enumerate(SHAPES):
        drawn = [_cut(one, shape[1:], number + n) for n, one in enumerate(_turns(examples, shape))]
        image = np.concatenate([one.image for one in drawn])
        windows = [one.window for one in drawn if one.window is not None]
        window = np.concatenate(windows) if not given.windows else None
        with torch.no_grad():
            tensors = [torch.from_numpy(a) for a in (image, window) if a is not None]
            expected = [out.numpy() for out in unit.eval()(*tensors)]
        found = session.run(None, feeds_of(image, window))
        rows.append(_compared(path, shape, expected, found))
        advance()
    worst = max(rows, key=lambda row: np.nan_to_num(row.relative, nan=np.inf))
    if not worst.relative <= tolerance:  # written so that NaN fails
        raise ParityError(
            f"{path.name} at (N,H,W)={worst.shape}: logits differ by {worst.max_abs_diff:.2e}, "
            f"{worst.relative:.2e} of the largest; allowed {tolerance:.0e} "
            "(export.parity_tolerance)"
        )
    for row in rows:
        if row.changed or not row.confidence <= tolerance:
            changed = many(row.changed, "pixel")
            raise ParityError(
                f"{path.name} at (N,H,W)={row.shape}: {changed} of another class "
                f"although their logits are {MARGIN:.0e} apart, confidences differ by "
                f"{row.confidence:.2e}; report it, with the versions of torch and onnxruntime"
            )
    return rows


def parity_says(rows: Sequence[Parity], tolerance: float) -> str:
    """What was found and expected, in words; of shapes that passed."""
    worst = max(row.relative for row in rows)
    return (
        f"logits differ from those of the network by {worst:.1e} of the largest at {len(rows)} "
        f"shapes, at most {tolerance:g} is expected, and no pixel of another class but near ties"
    )


def _turns(examples: Sequence[Example], shape: tuple[int, int, int]) -> list[Example]:
    return [examples[(sum(shape) + n) % len(examples)] for n in range(shape[0])]


def _cut(example: Example, size: tuple[int, ...], turn: int) -> Example:
    image = np.rot90(example.image, turn % 4, axes=(2, 3))
    pad = [(0, max(0, want - have)) for want, have in zip(size, image.shape[2:], strict=True)]
    wide = np.pad(image, [(0, 0), (0, 0), *pad], mode="wrap")
    # from the middle, where there is something to see
    top, left = ((have - want) // 2 for have, want in zip(wide.shape[2:], size, strict=True))
    return Example(wide[:, :, top : top + size[0], left : left + size[1]], example.window)


def _compared(
    path: Path, shape: tuple[int, int, int], expected: list[NDArray[Any]], found: list[NDArray[Any]]
) -> Parity:
    if [a.shape for a in expected] != [a.shape for a in found]:
        raise ParityError(f"{path.name} at (N,H,W)={shape}: shapes {[a.shape for a in found]}")
    (mask, logits, *rest), (mask_, logits_, *rest_) = expected, found
    difference = float(np.abs(logits_ - logits).max())
    clear, other = clear_pixels(logits), mask_ != mask
    return Parity(
        shape=shape,
        max_abs_diff=difference,
        relative=difference / max(1.0, float(np.abs(logits).max())),
        confidence=max(
            (float(np.abs(b - a).max()) for a, b in zip(rest, rest_, strict=True)), default=0.0
        ),
        changed=int((other & clear).sum()),
        ties=int((other & ~clear).sum()),
    )
