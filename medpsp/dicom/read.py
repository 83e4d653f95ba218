"""One image object to a `SliceRef` a frame (header), and one frame to modality values (pixels)."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.uid import UID

from medpsp.dicom import deidentify, frames
from medpsp.dicom.codestream import Layout
from medpsp.dicom.decode import Stored, check_pixels, layout_of, stored_values
from medpsp.dicom.labelref import KINDS as LABEL_KINDS
from medpsp.dicom.parse import Parsed, parse, refusing
from medpsp.dicom.values import (
    blank_outside,
    luma,
    padding_mask,
    rescale,
    rescaled_dtype,
    ybr_to_rgb,
)
from medpsp.errors import DicomError
from medpsp.types import PixelDtype, Place, ReadPolicy, SliceRef

DICOMDIR = "1.2.840.10008.1.3.10"
_COLOUR = (
    "PALETTE COLOR",
    "RGB",
    "YBR_FULL",
    "YBR_FULL_422",
    "YBR_PARTIAL_420",
    "YBR_ICT",
    "YBR_RCT",
)


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
    parsed = parse(place)
    ds = parsed.header
    with refusing("ELEM_INVALID", "a header value is malformed"):
        _check_kind(parsed)
        modality = str(ds.get("Modality") or "")
        if policy.modalities is not None and modality not in policy.modalities:
            raise DicomError("MODALITY_SKIPPED", "modality not in data.modalities")
        _check_wanted(ds, policy)
        layout = layout_of(parsed)
        if layout.frames > 1:  # a header may claim any number of them
            check_pixels(parsed, layout)
        groups = ds.get("PerFrameFunctionalGroupsSequence")
        if groups is not None and len(groups) != layout.frames:
            raise DicomError(
                "ELEM_INVALID", f"{len(groups)} functional groups, {layout.frames} frames"
            )
        common = _of_object(ds, place, file_id, layout, _region(ds, modality, policy))
        first = SliceRef(**common, **_of_frame(parsed, layout, 0, policy))
        if groups is None:  # frames differ in their place only
            return [
                replace(first, frame=n, position=frames.position(ds, n, layout.frames))
                for n in range(layout.frames)
            ]
        others = range(1, layout.frames)
        return [first] + [
            SliceRef(**common, **_of_frame(parsed, layout, n, policy)) for n in others
        ]


def read_frame(ref: SliceRef) -> Pixels:
    """Modality values of one frame (PS3.3 C.11.1), or RGB; and its padding (P2).

    Returns:
        (H, W) of ``ref.dtype``, int16 only where that is exact; (H, W, 3) uint8 for colour.

    Raises:
        DicomError: PIX_TRUNCATED, TS_MISMATCH, DEC_ERROR, SIGN_MISMATCH, or a code of
            `read_headers`.
    """
    stat = os.stat(ref.path) if os.path.exists(ref.path) else None
    parsed = _parsed(ref.place, (stat.st_mtime_ns, stat.st_size) if stat else (0, 0))
    with refusing("DEC_ERROR", "pixels not decodable"):
        layout = layout_of(parsed)
        stored = stored_values(parsed, layout, ref.frame)
        if stored.flags:
            raise DicomError(stored.flags[0], "the codestream is signed, PixelRepresentation is 0")
        if stored.space.startswith("MONOCHROME"):
            padding = padding_mask(stored.values, *frames.padding(parsed.header, layout))
            values = _modality_values(parsed.header, stored.values, ref, padding)
        else:
            padding, values = None, _colour(parsed.header, stored, ref)
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


@lru_cache(maxsize=1)
def _parsed(place: Place, stamp: tuple[int, int]) -> Parsed:
    """The last object: frames of one follow one another. ``stamp`` tells a changed file."""
    return parse(place)


def _check_kind(parsed: Parsed) -> None:
    ds = parsed.header
    kind = UID(str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or ""))
    if kind == DICOMDIR or "DirectoryRecordSequence" in ds:
        raise DicomError("DICOMDIR", "a directory of files")
    if kind in LABEL_KINDS:
        raise DicomError("LABEL_OBJECT", LABEL_KINDS[kind])
    if "Rows" in ds and "Columns" in ds:
        return
    # pydicom reads a cut file without a word
    if not kind:
        raise DicomError("HDR_TRUNCATED", "an object without SOPClassUID (0008,0016)")
    if kind.name.endswith("Image Storage"):
        raise DicomError("HDR_TRUNCATED", "an image object without Rows (0028,0010)")
    raise DicomError("NOT_IMAGE", kind.name if kind.is_valid and not kind.is_private else "private")


def _check_wanted(ds: Dataset, policy: ReadPolicy) -> None:
    """S4: what is no part of a volume is left out, unless the policy keeps it."""
    kind = UID(str(ds.get("SOPClassUID") or ""))
    value = ds.get("ImageType") or []
    words = [value] if isinstance(value, str) else [str(v) for v in value]
    if {"LABEL", "OVERVIEW"} & set(words):
        raise DicomError("PHI_BURNED_IN", "the photograph of a slide's label")
    if policy.non_volumes == "keep":
        return
    if "LOCALIZER" in words:
        raise DicomError("LOCALIZER", "a localizer; data.non_volumes keeps it")
    if any("DOSE" in word for word in words):
        raise DicomError("DOSE_REPORT", "a dose sheet; data.non_volumes keeps it")
    if "Secondary Capture" in kind.name:
        raise DicomError("SC_IMAGE", "a secondary capture; data.non_volumes keeps it")


def _region(ds: Dataset, modality: str, policy: ReadPolicy) -> tuple[int, int, int, int] | None:
    """What of the image is shown: all of it, or the region of ultrasound."""
    if policy.burned_in == "keep" or not deidentify.burned_in_suspected(ds, modality):
        return None
    box = frames.image_box(ds) if policy.burned_in == "blank" else None
    if box is None:
        raise DicomError(
            "PHI_BURNED_IN",
            "BurnedInAnnotation is not NO and the kind of image may show names; see data.burned_in",
        )
    return box


def _of_object(
    ds: Dataset,
    place: Place,
    file_id: str,
    layout: Layout,
    region: tuple[int, int, int, int] | None,
) -> dict[str, Any]:
    return {
        "path": place.path,
        "member": place.member,
        "file_id": file_id,
        "patient_id": str(ds.get("PatientID") or ""),
        "series_uid": str(ds.get("SeriesInstanceUID") or ""),
        "sop_uid": str(ds.get("SOPInstanceUID") or ""),
        "modality": str(ds.get("Modality") or ""),
        "rows": layout.rows,
        "columns": layout.columns,
        "photometric": layout.photometric,
        "frames": layout.frames,
        "frame_of_reference": str(ds.get("FrameOfReferenceUID") or ""),
        "study_date": str(ds.get("StudyDate") or ""),
        "region": region,
        "manufacturer": deidentify.manufacturer(ds),
        "body_part": deidentify.body_part(ds),
    }


def _names_possible(ds: Dataset, modality: str, policy: ReadPolicy) -> list[str]:
    kept = policy.burned_in == "keep" and deidentify.burned_in_suspected(ds, modality)
    return ["PHI_BURNED_IN"] if kept else []


def _of_frame(parsed: Parsed, layout: Layout, frame: int, policy: ReadPolicy) -> dict[str, Any]:
    ds = parsed.header
    modality = str(ds.get("Modality") or "")
    slope, intercept, given = frames.rescaling(ds, frame)
    pixel_spacing, source = frames.spacing(ds, frame, modality)
    window, any_window = frames.window(ds, frame)
    flags = [*parsed.flags, *_names_possible(ds, modality, policy)]
    if not (ds.get("SeriesInstanceUID") and ds.get("SOPInstanceUID")):
        flags.append("UID_MISSING")  # frame of reference and geometry must tell series apart
    if modality == "CT" and not given and "ModalityLUTSequence" not in ds:
        flags.append("RESCALE_ABSENT")
    if source == "detector":
        flags.append("SPACING_DETECTOR")
    if any_window and window is None:
        flags.append("VOI_INVALID")
    if window is None and "VOILUTSequence" in ds:
        flags.append("VOI_LUT")
    if deidentify.face_possible(modality, deidentify.body_part(ds)):
        flags.append("RECOGNIZABLE_FACE_POSSIBLE")
    if str(ds.get("DimensionOrganizationType") or "").startswith("TILED"):
        flags.append("TILED")
    return {
        "frame": frame,
        "dtype": _dtype(ds, layout, (slope, intercept), policy),
        "position": frames.position(ds, frame, layout.frames),
        "orientation": frames.orientation(ds, frame),
        "pixel_spacing": pixel_spacing,
        "spacing_source": source,
        "window": window,
        "series_split_key": frames.split_key(ds, frame),
        "collision_key": frames.collision_key(ds, frame),
        "flags": tuple(flags),
    }


def _dtype(
    ds: Dataset, layout: Layout, rescaling: tuple[float, float], policy: ReadPolicy
) -> PixelDtype:
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


def _modality_values(
    ds: Dataset, stored: NDArray[Any], ref: SliceRef, padding: NDArray[np.bool_] | None
) -> NDArray[Any]:
    if "ModalityLUTSequence" in ds:
        return np.asarray(apply_modality_lut(stored, ds)).astype(np.float32)
    slope, intercept, _ = frames.rescaling(ds, ref.frame)
    return rescale(stored, (slope, intercept), ref.dtype, padding)


def _colour(ds: Dataset, stored: Stored, ref: SliceRef) -> NDArray[Any]:
    values = stored.values
    if stored.space == "PALETTE COLOR":
        table = apply_color_lut(values, ds)[..., :3]
        if table.dtype == np.uint16:
            every = np.arange(2**16, dtype=np.uint16)
            if table.max() > 255 or apply_color_lut(every, ds).max() > 255:
                table = table >> 8  # else 8-bit entries lie in a table of 16 bits
        values = table.astype(np.uint8)
    elif stored.space == "YBR_FULL":
        values = ybr_to_rgb(values)
    return luma(values) if ref.dtype == "int16" else values
