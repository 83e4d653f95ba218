"""What the pixels of an object become: which dtype, and stored values to it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from medpsp.dicom import frames
from medpsp.dicom.codestream import Layout
from medpsp.dicom.decode import Stored
from medpsp.dicom.header import Header
from medpsp.dicom.values import luma, padding_mask, rescale, rescaled_dtype, ybr_to_rgb
from medpsp.errors import DicomError
from medpsp.types import PixelDtype, ReadPolicy, SliceRef

_COLOUR = (
    "PALETTE COLOR",
    "RGB",
    "YBR_FULL",
    "YBR_FULL_422",
    "YBR_PARTIAL_420",
    "YBR_ICT",
    "YBR_RCT",
)
FLOAT32_BITS = 24
"""Whole numbers of more bits are no exact float32."""


def dtype_of(
    ds: Header, layout: Layout, rescaling: tuple[float, float], policy: ReadPolicy
) -> PixelDtype:
    """The dtype of the values of a frame.

    Raises:
        DicomError: PHOTOMETRIC_UNSUPPORTED, BITS_UNSUPPORTED.
    """
    if layout.photometric in ("MONOCHROME1", "MONOCHROME2") and layout.samples == 1:
        if layout.floating or "ModalityLUTSequence" in ds:
            return "float32"
        modality = str(ds.get("Modality") or "")
        return rescaled_dtype(modality, rescaling, layout.stored, layout.signed)
    known = layout.photometric if layout.photometric in _COLOUR else "missing or unknown"
    if known != layout.photometric or (layout.samples == 1) != (known == "PALETTE COLOR"):
        raise DicomError("PHOTOMETRIC_UNSUPPORTED", f"{known} with {layout.samples} samples")
    if layout.allocated != 8 and known != "PALETTE COLOR":
        raise DicomError("BITS_UNSUPPORTED", f"colour of {layout.allocated} bits, expected 8")
    return "int16" if policy.colour == "grey" else "uint8"


def may_round(layout: Layout, dtype: PixelDtype) -> bool:
    """Whether stored whole numbers may be too long for float32."""
    return dtype == "float32" and not layout.floating and layout.stored > FLOAT32_BITS


def padding_of(ds: Header, layout: Layout, stored: Stored) -> NDArray[np.bool_] | None:
    """(H, W) where the image is padding, or None for nowhere.

    A padding value that BitsStored cannot hold is looked for in all bits of the pixel: cut to
    the bits that count it would be like an honest value.
    """
    value, limit = frames.padding(ds, layout)
    low = -(2 ** (layout.stored - 1)) if layout.signed else 0
    high = 2 ** (layout.stored - layout.signed) - 1
    held = layout.floating or all(low <= v <= high for v in (value, limit) if v is not None)
    return padding_mask(stored.values if held else stored.whole, value, limit)


def modality_values(
    ds: Header, stored: NDArray[Any], ref: SliceRef, padding: NDArray[np.bool_] | None
) -> NDArray[Any]:
    """(H, W) modality values of ``ref.dtype``; raises as `rescale` does."""
    if "ModalityLUTSequence" in ds:
        # a table is unusual to `flat`, so that pydicom has read it
        return np.asarray(apply_modality_lut(stored, cast(Dataset, ds))).astype(np.float32)
    slope, intercept, _ = frames.rescaling(ds, ref.frame)
    return rescale(stored, (slope, intercept), ref.dtype, padding)


def colour_values(ds: Header, layout: Layout, stored: Stored, ref: SliceRef) -> NDArray[Any]:
    """(H, W, 3) uint8 RGB, or its (H, W) int16 brightness."""
    values = stored.values
    if stored.space == "PALETTE COLOR":
        frames.mend_palette(ds, layout)
        whole = cast(Dataset, ds)  # a palette is unusual to `flat`
        table = apply_color_lut(values, whole)[..., :3]
        if table.dtype == np.uint16:
            every = np.arange(2**16, dtype=np.uint16)
            if table.max() > 255 or apply_color_lut(every, whole).max() > 255:
                table = table >> 8  # else 8-bit entries lie in a table of 16 bits
        values = table.astype(np.uint8)
    elif stored.space == "YBR_FULL":
        values = ybr_to_rgb(values)
    return luma(values) if ref.dtype == "int16" else values
