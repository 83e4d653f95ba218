"""Numbers in, numbers out: from modality values to what the network sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import DicomError
from medpsp.types import FloatArray, VoiFunction, Window

CT_WINDOW = Window(center=40.0, width=400.0)
"""Soft tissue in HU; used for CT when the configuration names no window."""

PERCENTILES = (0.5, 99.5)
"""Range kept where the modality has no absolute scale (MR): nnU-Net uses the same pair."""

EIGHT_BIT = Window(center=127.5, width=255.0)
"""The full range of 8-bit images, colour or grey, as LINEAR_EXACT: v / 255."""


def to_unit(values: NDArray[np.generic], window: Window, inverted: bool = False) -> FloatArray:
    """Map modality values to [0, 1]: what the network sees.

    LINEAR_EXACT (PS3.3 C.11.2.1.3.2) in single precision; the functions of `voi` for windows of a
    header.

    Args:
        values: (..., H, W) modality values of any real dtype, or (..., H, W, 3) RGB.
        window: Centre and width in the same units; the width is above 0.
        inverted: True for MONOCHROME1, where low values are bright (PS3.3 C.7.6.3.1.2).

    Returns:
        float32 of the same shape; values outside the window clip to 0 or 1, NaN counts as low.
    """
    if window.function != "LINEAR_EXACT":
        unit = voi(values, window)
        return 1.0 - unit if inverted else unit
    low = np.float32(window.center - window.width / 2)
    unit = (values.astype(np.float32) - low) / np.float32(window.width)
    np.fmax(unit, 0.0, out=unit)  # unlike clip, it turns NaN into 0: one would spoil a whole step
    np.fmin(unit, 1.0, out=unit)
    return 1.0 - unit if inverted else unit


def voi(values: NDArray[np.generic], window: Window) -> FloatArray:
    """Map modality values to [0, 1] as a viewer does (PS3.3 C.11.2.1.2.1, C.11.2.1.3).

    With centre c and width w: LINEAR (x - (c - 0.5)) / (w - 1) + 0.5, so that w is a number of
    grey levels and a width of 1 a step above c - 0.5; LINEAR_EXACT (x - c) / w + 0.5;
    SIGMOID 1 / (1 + exp(-4 (x - c) / w)). MONOCHROME1 is turned over after it: 1 - voi(...).

    Args:
        values: Modality values of any shape and real dtype.
        window: Centre and width in the same units, and VOI LUT Function.

    Returns:
        float32 of the same shape; NaN counts as low.

    Raises:
        DicomError: VOI_INVALID where the width is below 1 for LINEAR or not above 0, or where
            the function is none of the three.
    """
    function = window.function
    if function not in get_args(VoiFunction):  # it may be text of a file: not quoted
        raise DicomError("VOI_INVALID", "VOILUTFunction is not one of PS3.3 C.11.2.1.3")
    x, width = values.astype(np.float64) - window.center, window.width
    if not width > 0 or (function == "LINEAR" and width < 1):
        raise DicomError("VOI_INVALID", f"WindowWidth {width:g} with VOILUTFunction {function}")
    if function == "SIGMOID":
        unit = 0.5 + 0.5 * np.tanh(2 * x / width)  # the same curve; exp would overflow
    elif function == "LINEAR_EXACT":
        unit = x / width + 0.5
    elif width > 1:
        unit = (x + 0.5) / (width - 1) + 0.5
    else:
        unit = (x > -0.5).astype(np.float64)
    return np.fmin(np.fmax(unit, 0.0), 1.0).astype(np.float32)


def voi_lut(
    values: NDArray[np.generic], descriptor: tuple[int, int, int], table: NDArray[np.integer]
) -> FloatArray:
    """Map modality values to [0, 1] by an item of the VOI LUT Sequence (PS3.3 C.11.2.1.1).

    Args:
        values: Modality values of any shape and real dtype; a fraction takes the nearer entry.
        descriptor: LUT Descriptor (0028,3002): number of entries, where 0 stands for 65536; first
            value mapped, signed where the values are; bits of an entry, 8 to 16.
        table: LUT Data (0028,3006), one unsigned entry a place.

    Returns:
        float32 of the same shape: entry / (2^bits - 1). Values below the first and above the last
        place take the entry at that end, NaN the first.

    Raises:
        DicomError: VOI_INVALID where the table is shorter than its descriptor says, or the bits
            are none of 8 to 16.
    """
    entries, first, bits = descriptor
    entries = entries or 65536
    if len(table) < entries or not 8 <= bits <= 16:
        raise DicomError(
            "VOI_INVALID", f"LUTData of {len(table)} entries of {bits} bits, expected {entries}"
        )
    unit: FloatArray = np.minimum(table / (2**bits - 1), 1).astype(np.float32)
    place = np.fmax(np.rint(values.astype(np.float64)) - first, 0)
    shown: FloatArray = unit[np.fmin(place, entries - 1).astype(np.intp)]
    return shown


def valid_windows(
    centers: Sequence[float | None], widths: Sequence[float | None]
) -> tuple[Window, ...]:
    """The usable pairs of Window Center and Window Width, in their order.

    Args:
        centers: (0028,1050), VM 1-n; None stands for an empty value.
        widths: (0028,1051); what has no partner is left out.

    Returns:
        Windows of finite numbers with a width above 0; none where the file should be treated as
        one without a window.
    """
    return tuple(
        Window(center=center, width=width)
        for center, width in zip(centers, widths, strict=False)
        if center is not None
        and width is not None
        and math.isfinite(center)
        and math.isfinite(width)
        and width > 0
    )


MANY = 2**17
"""Whole numbers up to here are counted one by one."""


class ValueCounts:
    """How often each modality value occurs; small, whatever the number of slices, and additive.

    Whole numbers are counted as they are, also those of a float image that has no others; other
    floating point values are rounded to bfloat16 first (0.4 % at most). Zeros, NaN and infinities
    are left out.
    """

    def __init__(self) -> None:
        self._counts: dict[float, int] = {}

    def add(self, values: NDArray[np.generic], valid: NDArray[np.bool_] | None = None) -> None:
        """Count values; ``valid`` is False for padding (PS3.3 C.7.5.1.1.2), which does not count.

        Args:
            values: Modality values of any shape, int16, uint8 or float.
            valid: Of the same shape.
        """
        flat = values.ravel() if valid is None else values[valid]
        if flat.dtype.kind == "f":
            flat = flat[np.isfinite(flat)]
            if (np.abs(flat) < MANY).all() and (flat == np.rint(flat)).all():
                flat = flat.astype(np.int64)
        if flat.dtype.kind == "f":
            bits = np.ascontiguousarray(flat, np.float32).view(np.uint32)
            found = np.bincount((bits + np.uint32(0x8000)) >> 16)
            keys = np.flatnonzero(found)
            known = (keys.astype(np.uint32) << 16).view(np.float32)
        else:
            low = int(flat.min(initial=0))
            found = np.bincount(flat.astype(np.intp) - low)
            keys = np.flatnonzero(found)
            known = keys + low  # type: ignore[assignment]
        self.add_counts(zip(known.tolist(), found[keys].tolist(), strict=True))

    def add_counts(self, pairs: Iterable[tuple[float, int]]) -> None:
        """Add what `pairs` of another one gave."""
        for value, count in pairs:
            if math.isfinite(value) and value != 0:
                self._counts[value] = self._counts.get(value, 0) + count

    @property
    def pairs(self) -> list[tuple[float, int]]:
        """Values and their counts, from the lowest."""
        return sorted(self._counts.items())

    def percentiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """As `numpy.percentile` with linear interpolation; at least one value must be counted."""
        values, counts = zip(*self.pairs, strict=True)
        ends = np.cumsum(counts)
        found = []
        for share in shares:
            place = share / 100 * (int(ends[-1]) - 1)
            low, high = (
                float(values[int(np.searchsorted(ends, n, side="right"))])
                for n in (math.floor(place), math.ceil(place))
            )
            found.append(low + (high - low) * (place - math.floor(place)))
        return tuple(found)


def percentile_window(counts: ValueCounts) -> Window:
    """Window from the 0.5 and 99.5 percentiles of the non-zero, finite values of a series.

    A series that is constant or all zero gets a width of 1, so that nothing divides by zero.
    """
    if not counts.pairs:
        return Window(center=0.5, width=1.0)
    low, high = counts.percentiles(PERCENTILES)
    return Window(center=(low + high) / 2, width=high - low if high > low else 1.0)


def needs_series_values(modality: str, fixed: Window | None, channels: int = 1) -> bool:
    """True where `series_window` looks at the pixels of the whole series."""
    return channels == 1 and fixed is None and modality not in ("CT", "IMAGE8")


def series_window(
    modality: str, fixed: Window | None, counts: ValueCounts, channels: int = 1
) -> Window:
    """The window a series is shown to the network with.

    Colour is shown whole: v / 255. Grey: the configured window, 40/400 HU for CT, the full range
    for 8-bit images (pseudo-modality ``IMAGE8``), else percentiles of the series.

    Args:
        modality: DICOM Modality (0008,0060).
        fixed: The configured window, if any.
        counts: Of the modality values of the whole series, padding left out; looked at only where
            `needs_series_values` is True.
        channels: 1 grey or 3 RGB.
    """
    if channels != 1:
        return EIGHT_BIT
    if fixed is not None:
        return fixed
    if modality == "CT":
        return CT_WINDOW
    if modality == "IMAGE8":
        return EIGHT_BIT
    return percentile_window(counts)


CLASS_COLOURS = np.array(
    [
        [0, 0, 0],
        [230, 159, 0],
        [86, 180, 233],
        [220, 50, 80],
        [0, 158, 115],
        [240, 228, 66],
        [204, 121, 167],
        [0, 114, 178],
    ],
    dtype=np.float32,
)
"""RGB of the classes, in turn; from Okabe and Ito's set for colour-blind readers."""


def class_colour(index: int) -> tuple[int, int, int]:
    """RGB of a class from 1 on, wherever one is drawn; the colours repeat."""
    red, green, blue = _colours_of(np.array(index)).tolist()
    return int(red), int(green), int(blue)


def _colours_of(classes: NDArray[np.integer]) -> FloatArray:
    colours: FloatArray = CLASS_COLOURS[1 + (classes - 1) % (len(CLASS_COLOURS) - 1)]
    return colours


def overlay(image: FloatArray, mask: NDArray[np.uint8], opacity: float = 0.45) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image in [0, 1] with its classes tinted; background and 255 are not.

    Args:
        image: (H, W) or (H, W, 3).
        mask: (H, W) class indices.
        opacity: Share of the colour of the class.
    """
    rgb = np.repeat(image[..., None] * 255, 3, axis=2) if image.ndim == 2 else image * 255
    tinted = (mask > 0) & (mask != 255)
    rgb[tinted] = rgb[tinted] * (1 - opacity) + _colours_of(mask[tinted]) * opacity
    return rgb.clip(0, 255).astype(np.uint8)
