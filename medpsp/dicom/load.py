"""The pixels of a whole series, decoded by several sandboxes at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from medpsp.dicom.read import Pixels
from medpsp.dicom.sandbox import Sandbox, SandboxPool, or_error
from medpsp.errors import SourceError
from medpsp.types import Series, SliceRef

Refused = list[tuple[SliceRef, SourceError]]


def read_series(pool: SandboxPool, series: Series) -> tuple[Pixels, Series, Refused]:
    """(N, H, W[, 3]) values of a series.

    Images without geometry stand alone: those that fail are left out, as long as one is left.

    Returns:
        Values and padding, the series of the slices that they are, and the slices left out.

    Raises:
        SourceError: A slice of a volume cannot be decoded, or no image at all.
    """
    found: list[Pixels] = []
    kept: list[int] = []
    refused: Refused = []
    for number, (ref, pixels) in enumerate(pool.map(or_error(Sandbox.frame), series.slices)):
        if isinstance(pixels, Pixels):
            found.append(pixels)
            kept.append(number)
        elif series.affine is None:
            refused.append((ref, pixels))
        else:
            raise pixels
    if not found:
        raise refused[0][1]
    values = np.stack([pixels.values for pixels in found])
    padding = None
    if any(pixels.padding is not None for pixels in found):
        padding = np.zeros(values.shape, dtype=np.bool_)
        for place, pixels in zip(padding, found, strict=True):
            place[...] = False if pixels.padding is None else pixels.padding
    readable = replace(
        series,
        slices=tuple(series.slices[n] for n in kept),
        grid=tuple(series.grid_index[n] for n in kept),
    )
    return Pixels(values, padding), readable, refused
