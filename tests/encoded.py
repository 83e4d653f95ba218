"""Objects of any transfer syntax, written from stored values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian

from launch.codestreams import ENCODERS, Array, fragmented, known_syntax, set_syntax
from launch.phantom import Phantom
from tests.factory import one_slice


def vr_of(vr: str, value: Any) -> str:
    """One of the VRs that the dictionary leaves open, US or SS or OW."""
    if " or " not in vr:
        return vr
    if isinstance(value, bytes):
        return "OW"
    return "SS" if min(np.atleast_1d(value)) < 0 else "US"


def write_object(
    path: Path, values: Array, syntax: str = ExplicitVRLittleEndian, **elements: Any
) -> Path:
    """A CT of one frame (H, W) or (H, W, 3), or of several (F, ...), without rescaling.

    Bits and sign follow the dtype. ``elements`` replace elements, or drop them (None);
    ``PixelData`` may be the bytes behind the tag of an encapsulated object.
    """
    colour = values.ndim > 2 and values.shape[-1] == 3 and values.dtype == np.uint8
    frames = values if values.ndim == 3 + colour else values[None]
    bits = 8 * values.dtype.itemsize
    native = syntax not in ENCODERS
    order = ">" if syntax == ExplicitVRBigEndian else "<"

    def edit(ds: Dataset) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(ds, keyword, "1.2.3")  # the same wherever it is written
        ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        ds.Rows, ds.Columns = frames.shape[1:3]
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
        ds.PixelRepresentation = int(values.dtype.kind == "i")
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        if colour:
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 3, "RGB"
            ds.PlanarConfiguration = 0
        if values is frames:
            ds.NumberOfFrames = len(frames)
        if native:
            data = frames.astype(frames.dtype.newbyteorder(order)).tobytes()
        else:
            data = fragmented([ENCODERS[syntax](frame) for frame in frames])
        ds.PixelData = data + b"\0" * (len(data) % 2)
        if not native:
            ds.file_meta.TransferSyntaxUID = known_syntax(syntax)
        for keyword, value in elements.items():
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)
                ds[keyword].VR = vr_of(ds[keyword].VR, value)
        ds["PixelData"].VR = "OW" if native and bits > 8 else "OB"
        ds["PixelData"].is_undefined_length = not native

    syntax_of_header = UID(syntax) if native else ExplicitVRLittleEndian
    one_slice(path, edit, Phantom(shape=(1, 40, 36), syntax=syntax_of_header))
    if not native:
        set_syntax(path, syntax)
    return path
