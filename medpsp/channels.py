"""What the network sees of a slice: windows, colours and neighbouring slices as channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medpsp.intensity import to_unit
from medpsp.types import FloatArray, Window


def neighbours(places: Mapping[int, int], here: int, context: int) -> tuple[int, ...]:
    """The slices from ``context`` before to ``context`` behind a slice.

    Args:
        places: Place on the grid of the series to a number of the slice.
        here: Place of the slice.
        context: How many on either side.

    Returns:
        2 * context + 1 numbers; where a place holds no slice, the nearest one stands for it, of
        two the one nearer to the slice itself.
    """
    return tuple(
        places[place]
        if place in places
        else places[min(places, key=lambda at: (abs(at - place), abs(at - here)))]
        for place in range(here - context, here + context + 1)
    )


def window_channels(
    values: NDArray[np.generic], windows: Sequence[Window], inverted: bool
) -> list[FloatArray]:
    """One (H, W) or (H, W, 3) float32 image in [0, 1] for each window.

    Args:
        values: (H, W) or (H, W, 3) modality values.
        windows: In modality units.
        inverted: True for MONOCHROME1.
    """
    return [to_unit(values, w, inverted).astype(np.float32, copy=False) for w in windows]


def stacked(units: Sequence[FloatArray]) -> FloatArray:
    """Images (H, W) or (H, W, 3) as one: itself where there is one, else (H, W, C)."""
    if len(units) == 1:
        return units[0]
    return np.concatenate([unit if unit.ndim == 3 else unit[..., None] for unit in units], axis=2)


def channels_first(image: FloatArray, channels: int) -> FloatArray:
    """(H, W) or (H, W, C) to (C, H, W) of ``channels``; grey is repeated; a view."""
    first = image.transpose(2, 0, 1) if image.ndim == 3 else image[None]
    return np.broadcast_to(first, (channels, *first.shape[1:]))
