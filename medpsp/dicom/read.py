"""One image object to a `SliceRef` a frame (header), and one frame to modality values (pixels)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom import pixels
from medpsp.dicom.decode import layout_of, stored_values
from medpsp.dicom.flat import read_flat
from medpsp.dicom.flatscan import slices_of_flat
from medpsp.dicom.opened import opened
from medpsp.dicom.parse import parse, refusing
from medpsp.dicom.slices import slices_of
from medpsp.dicom.values import blank_outside
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy, SliceRef


class Pixels(NamedTuple):
    """(H, W) or (H, W, 3) modality values, and where they are padding; None for nowhere."""

    values: NDArray[Any]
    padding: NDArray[np.bool_] | None


def read_headers(place: Place, file_id: str, policy: ReadPolicy) -> list[SliceRef]:
    """Read the header of one object: a `SliceRef` for each of its frames.

    A single image whose pixels are cut short or in an unknown transfer syntax is left to
    `read_frame`: the slice then keeps its place in the series, and the others theirs.

    Raises:
        DicomError: What keeps it from being an image for us: NOT_IMAGE, DICOMDIR, LABEL_OBJECT,
            MODALITY_SKIPPED, SC_IMAGE, LOCALIZER, DOSE_REPORT, PHI_BURNED_IN,
            PHOTOMETRIC_UNSUPPORTED, HDR_REQUIRED_MISSING, ELEM_INVALID, and the codes of `parse`,
            `layout_of` and `check_pixels`.
    """
    return slices_of(parse(place), place, file_id, policy)


def scan_header(path: str, file_id: str, policy: ReadPolicy) -> list[SliceRef] | None:
    """`read_headers` of an ordinary file, in a tenth of its time or less.

    Returns:
        None for whatever is not ordinary, archives and what cannot be opened among it: the long
        way by `container.objects_of` and `read_headers` then says what it is.

    Raises:
        DicomError: As `read_headers`, for an ordinary file that is no image for us.
    """
    flat = read_flat(path)
    return slices_of_flat(flat, Place(path), file_id, policy) if flat else None


def read_frame(ref: SliceRef) -> Pixels:
    """Modality values of one frame (PS3.3 C.11.1), or RGB; and its padding.

    Returns:
        (H, W) of ``ref.dtype``, int16 only where that is exact; (H, W, 3) uint8 for colour.

    Raises:
        DicomError: PIX_TRUNCATED, TS_MISMATCH, DEC_ERROR, SIGN_MISMATCH, VALUE_RANGE, or a code
            of `read_headers`.
    """
    parsed = opened(ref.place)
    with refusing("DEC_ERROR", "pixels not decodable"):
        layout = layout_of(parsed)
        stored = stored_values(parsed, layout, ref.frame)
        if stored.flags:
            raise DicomError(stored.flags[0], "the codestream is signed, PixelRepresentation is 0")
        if stored.space.startswith("MONOCHROME"):
            padding = pixels.padding_of(parsed.header, layout, stored)
            values = pixels.modality_values(parsed.header, stored.values, ref, padding)
        else:
            padding, values = None, pixels.colour_values(parsed.header, layout, stored, ref)
        if ref.region:
            values = blank_outside(values, ref.region)
    if values.shape[:2] != (ref.rows, ref.columns):
        raise DicomError(
            "DEC_ERROR", f"decoded shape {values.shape}, header says {(ref.rows, ref.columns)}"
        )
    return Pixels(values, padding)


def read_pixels(ref: SliceRef) -> NDArray[Any]:
    """The values of `read_frame`."""
    return read_frame(ref).values
