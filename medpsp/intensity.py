"""Numbers in, numbers out: from modality values to what the network sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medpsp.types import FloatArray, Window

CT_WINDOW = Window(center=40.0, width=400.0)
"""Soft tissue in HU; used for CT when the configuration names no window."""

PERCENTILES = (0.5, 99.5)
"""Range kept where the modality has no absolute scale (MR): nnU-Net uses the same pair."""

EIGHT_BIT = Window(center=127.5, width=255.0)
"""The full range of 8-bit images, as LINEAR_EXACT."""


def to_unit(values: NDArray[np.generic], window: Window, inverted: bool = False) -> FloatArray:
    """Map modality values to [0, 1] by a LINEAR_EXACT window (PS3.3 C.11.2.1.3.2).

    Args:
        values: (..., H, W) modality values of any real dtype.
        window: Centre and width in the same units; the width is above 0.
        inverted: True for MONOCHROME1, where low values are bright (PS3.3 C.7.6.3.1.2).

    Returns:
        float32 of the same shape; values outside the window clip to 0 or 1, NaN counts as low.
    """
    low = np.float32(window.center - window.width / 2)
    unit = (values.astype(np.float32) - low) / np.float32(window.width)
    np.fmax(unit, 0.0, out=unit)  # unlike clip, it turns NaN into 0: one would spoil a whole step
    np.fmin(unit, 1.0, out=unit)
    return 1.0 - unit if inverted else unit


def percentile_window(values: NDArray[np.generic]) -> Window:
    """Window from the 0.5 and 99.5 percentiles of the non-zero, finite values of a series.

    A series that is constant or all zero gets a width of 1, so that nothing divides by zero.
    """
    flat = values[np.isfinite(values) & (values != 0)]
    if flat.size == 0:
        return Window(center=0.5, width=1.0)
    low, high = (float(v) for v in np.percentile(flat, PERCENTILES))
    return Window(center=(low + high) / 2, width=max(high - low, 1.0 if high == low else 1e-6))


def needs_series_values(modality: str, fixed: Window | None) -> bool:
    """True where `series_window` looks at the pixels of the whole series."""
    return fixed is None and modality not in ("CT", "IMAGE8")


def series_window(modality: str, fixed: Window | None, values: NDArray[np.generic]) -> Window:
    """The window a series is shown to the network with.

    Order: the configured window, 40/400 HU for CT, the full range for 8-bit images
    (pseudo-modality ``IMAGE8``), else percentiles of the series.

    Args:
        modality: DICOM Modality (0008,0060).
        fixed: The configured window, if any.
        values: (N, H, W) modality values of the whole series; may be empty when
            `needs_series_values` is False.
    """
    if fixed is not None:
        return fixed
    if modality == "CT":
        return CT_WINDOW
    if modality == "IMAGE8":
        return EIGHT_BIT
    return percentile_window(values)


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


def overlay(image: FloatArray, mask: NDArray[np.uint8], opacity: float = 0.45) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an image in [0, 1] with its classes tinted; background and 255 are not."""
    grey = np.repeat(image[..., None] * 255, 3, axis=2)
    tinted = (mask > 0) & (mask != 255)
    colours = CLASS_COLOURS[1 + (mask[tinted] - 1) % (len(CLASS_COLOURS) - 1)]
    grey[tinted] = grey[tinted] * (1 - opacity) + colours * opacity
    return grey.clip(0, 255).astype(np.uint8)
