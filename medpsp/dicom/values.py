"""Stored values to modality values and to RGB: numbers in, numbers out.

The order is normative: stored bits, padding, modality LUT (PS3.3 C.11.1); VOI comes at read time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import DicomError
from medpsp.types import Box, PixelDtype

YBR_TO_RGB = np.array(
    [[1.0, 0.0, 1.402], [1.0, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587], [1.0, 1.772, 0.0]],
    dtype=np.float32,
)
"""Inverse of the equations of YBR_FULL, PS3.3 C.7.6.3.1.2."""

LUMA = np.array([299, 587, 114], dtype=np.int32)
"""Thousandths."""


def rescaled_dtype(
    modality: str, rescaling: tuple[float, float], bits: int, signed: bool
) -> PixelDtype:
    """int16 where slope is 1 and every value the header allows is an exact int16, else float32.

    CT is int16 although 16 stored bits and an intercept of -1024 could leave its range: HU do
    not, and `rescale` refuses the slice that does.
    """
    slope, intercept = rescaling
    if slope != 1 or not float(intercept).is_integer():
        return "float32"
    low = -(2 ** (bits - 1)) if signed else 0
    high = 2 ** (bits - signed) - 1
    fits = low + intercept >= -32768 and high + intercept <= 32767
    return "int16" if fits or (modality == "CT" and bits <= 16) else "float32"


def rescale(
    stored: NDArray[Any],
    rescaling: tuple[float, float],
    dtype: PixelDtype,
    padding: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    """stored * slope + intercept (PS3.3 C.11.1.1.2), in int32 or float64 on the way.

    Padding beyond int16 is clipped: it means nothing but itself.

    Raises:
        DicomError: VALUE_RANGE where a value that is no padding leaves int16, or a float pixel
            is infinite as float32 (NaN stays), ELEM_INVALID where rescaling goes beyond float32.
    """
    slope, intercept = rescaling
    if dtype == "int16":
        quick = _shifted(stored, int(intercept))
        if quick is not None:
            return quick
        wide = stored.astype(np.int64)
        wide += int(intercept)
        values = wide.astype(np.int16)
        if (beyond := values != wide).any():
            if padding is None or (beyond & ~padding).any():
                raise DicomError("VALUE_RANGE", "modality values leave the range of int16")
            values = wide.clip(-32768, 32767).astype(np.int16)
        return values
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        result = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    if stored.dtype.kind == "f" and np.isinf(result).any():
        raise DicomError("VALUE_RANGE", "float pixels beyond float32")
    if stored.dtype.kind != "f" and not np.isfinite(result).all():
        raise DicomError("ELEM_INVALID", "RescaleSlope or RescaleIntercept overflows float32")
    return result


def _shifted(stored: NDArray[Any], offset: int) -> NDArray[np.int16] | None:
    """Whole numbers plus ``offset`` as int16; None where one of them leaves its range."""
    if stored.dtype.kind not in "iu" or not stored.size:
        return None
    if offset or stored.dtype != np.int16:  # else nothing can leave
        low, high = int(stored.min()) + offset, int(stored.max()) + offset
        if low < -32768 or high > 32767:
            return None
    # sums modulo 2**16 of what is in range at the end are exact, whatever the sign of the bits
    words = stored.view(np.uint16) if stored.dtype.itemsize == 2 else stored.astype(np.uint16)
    return np.asarray((words + np.uint16(offset % 2**16)).view(np.int16))


def padding_mask(
    stored: NDArray[Any], value: float | None, limit: float | None
) -> NDArray[np.bool_] | None:
    """Where stored values are padding: one value, or the inclusive range to the limit.

    PS3.3 C.7.5.1.1.2; None for nowhere.
    """
    if value is None:
        return None
    ends: list[float] = sorted((value, value if limit is None else limit))
    if stored.dtype.kind in "iu" and all(float(end).is_integer() for end in ends):
        ends = [int(end) for end in ends]  # a float would make floats of all pixels
    if stored.size and (ends[1] < stored.min() or ends[0] > stored.max()):
        return None  # looking at two numbers costs a tenth of a mask
    same = ends[0] == ends[1]
    mask: NDArray[np.bool_] = (
        stored == ends[0] if same else (stored >= ends[0]) & (stored <= ends[1])
    )
    return mask if mask.any() else None


def ybr_to_rgb(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) YBR_FULL to RGB, both uint8; the same bytes on every CPU."""
    y, cb, cr = np.moveaxis(values, -1, 0).astype(np.float32)
    cb -= 128
    cr -= 128
    # no product of matrices: BLAS rounds differently from CPU to CPU, and so would halves
    rgb = np.stack([row[0] * y + row[1] * cb + row[2] * cr for row in YBR_TO_RGB], axis=-1)
    return np.asarray(np.rint(rgb, out=rgb).clip(0, 255, out=rgb).astype(np.uint8))


def luma(rgb: NDArray[np.uint8]) -> NDArray[np.int16]:
    """(H, W) brightness 0..255 of (H, W, 3) RGB, ITU-R BT.601; exact, halves go up."""
    return np.asarray(((rgb.astype(np.int32) @ LUMA + 500) // 1000).astype(np.int16))


def blank_outside(values: NDArray[Any], boxes: Sequence[Sequence[int]]) -> NDArray[Any]:
    """Zeros outside all of the boxes of (first row, first column, rows, columns)."""
    kept = np.zeros_like(values)
    for row, column, rows, columns in boxes:
        inside = (slice(row, row + rows), slice(column, column + columns))
        kept[inside] = values[inside]
    return kept


def covered_pixels(boxes: Sequence[Box]) -> int:
    """Number of pixels in one or more of the boxes."""
    if not boxes:
        return 0
    sides = np.array(boxes, dtype=np.int64)
    first, last = sides[:, :2], sides[:, :2] + sides[:, 2:]
    rows, columns = (np.unique([first[:, k], last[:, k]]) for k in (0, 1))
    inside = np.zeros((len(rows) - 1, len(columns) - 1), dtype=np.bool_)
    for (top, left), (bottom, right) in zip(first, last, strict=True):
        inside[
            np.searchsorted(rows, top) : np.searchsorted(rows, bottom),
            np.searchsorted(columns, left) : np.searchsorted(columns, right),
        ] = True
    return int(np.diff(rows) @ inside @ np.diff(columns))
