"""What the header of one image object becomes: a `SliceRef` a frame, or the reason why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medpsp.dicom import deidentify, frames, pixels
from medpsp.dicom.codestream import Layout
from medpsp.dicom.decode import check_pixels, layout_of
from medpsp.dicom.header import Header
from medpsp.dicom.labelref import KINDS as LABEL_KINDS
from medpsp.dicom.parse import Parsed, refusing
from medpsp.dicom.values import covered_pixels
from medpsp.errors import DicomError, OtherModality
from medpsp.types import Box, Place, ReadPolicy, SliceRef

DICOMDIR = "1.2.840.10008.1.3.10"
MOST_SHOWN = 0.95
"""Regions that cover more of a frame blank nothing: names stand beside the picture."""


def slices_of(
    parsed: Parsed[Header], place: Place, file_id: str, policy: ReadPolicy
) -> list[SliceRef]:
    """The frames of an object of which the header is read.

    Raises:
        DicomError: As `read_headers`, without the codes of `parse`.
    """
    ds = parsed.header
    with refusing("ELEM_INVALID", "a header value is malformed"):
        _check_kind(parsed)
        modality = str(ds.get("Modality") or "")
        if policy.modalities is not None and modality not in policy.modalities:
            uids = (str(ds.get(key) or "") for key in ("SeriesInstanceUID", "SOPInstanceUID"))
            raise OtherModality("MODALITY_SKIPPED", "modality not in data.modalities", *uids)
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


def _check_kind(parsed: Parsed[Header]) -> None:
    ds = parsed.header
    kind = str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    if kind == DICOMDIR or "DirectoryRecordSequence" in ds:
        raise DicomError("DICOMDIR", "a directory of files")
    if kind in LABEL_KINDS:
        raise DicomError("LABEL_OBJECT", LABEL_KINDS[kind])
    if "Rows" in ds and "Columns" in ds:
        return
    # pydicom reads a cut file without a word
    if not kind:
        raise DicomError("HDR_TRUNCATED", "an object without SOPClassUID (0008,0016)")
    name = deidentify.uid_name(kind)
    if name.endswith("Image Storage"):
        raise DicomError("HDR_TRUNCATED", "an image object without Rows (0028,0010)")
    raise DicomError("NOT_IMAGE", name)


def _check_wanted(ds: Header, policy: ReadPolicy) -> None:
    """What is no part of a volume is left out, unless the policy keeps it."""
    words = deidentify.image_type(ds)
    if deidentify.slide_label(ds):
        raise DicomError("PHI_BURNED_IN", "the photograph of a slide's label")
    if policy.non_volumes == "keep":
        return
    if "LOCALIZER" in words:
        raise DicomError("LOCALIZER", "a localizer; data.non_volumes=keep keeps it")
    if any("DOSE" in word for word in words):
        raise DicomError("DOSE_REPORT", "a dose sheet; data.non_volumes=keep keeps it")
    if "Secondary Capture" in deidentify.uid_name(str(ds.get("SOPClassUID") or "")):
        raise DicomError("SC_IMAGE", "a secondary capture; data.non_volumes=keep keeps it")


def _region(ds: Header, modality: str, policy: ReadPolicy) -> tuple[Box, ...]:
    """What of the image is shown: all of it (no box), or the regions of ultrasound."""
    if policy.burned_in == "keep" or not deidentify.burned_in_suspected(ds, modality):
        return ()
    boxes = frames.image_boxes(ds) if policy.burned_in == "blank" else ()
    if not boxes:
        raise DicomError(
            "PHI_BURNED_IN",
            "BurnedInAnnotation is not NO and the kind of image may show names; see data.burned_in",
        )
    share = covered_pixels(boxes) / (int(ds.Rows) * int(ds.Columns))
    if share >= MOST_SHOWN:
        raise DicomError("PHI_BURNED_IN", f"its regions are {share:.0%} of it, nothing is blanked")
    return boxes


def _of_object(
    ds: Header, place: Place, file_id: str, layout: Layout, region: tuple[Box, ...]
) -> dict[str, Any]:
    return {
        "path": place.path,
        "member": place.member,
        "file_id": file_id,
        "patient_id": _patient(ds),
        "series_uid": str(ds.get("SeriesInstanceUID") or ""),
        "study_uid": str(ds.get("StudyInstanceUID") or ""),
        "sop_uid": str(ds.get("SOPInstanceUID") or ""),
        "modality": str(ds.get("Modality") or ""),
        "rows": layout.rows,
        "columns": layout.columns,
        "photometric": frames.photometric(ds, layout),
        "frames": layout.frames,
        "frame_of_reference": str(ds.get("FrameOfReferenceUID") or ""),
        "study_date": str(ds.get("StudyDate") or ""),
        "region": region,
        "manufacturer": deidentify.manufacturer(ds),
        "body_part": deidentify.body_part(ds),
    }


def _patient(ds: Header) -> str:
    """PatientID without what is not significant in it: spaces around (PS3.5 6.2, LO), NUL."""
    return str(ds.get("PatientID") or "").strip(" \0")


def _flags_of_object(parsed: Parsed[Header], policy: ReadPolicy) -> list[str]:
    ds = parsed.header
    modality = str(ds.get("Modality") or "")
    suspected = deidentify.burned_in_suspected(ds, modality)
    notes = {
        "PHI_BURNED_IN": suspected and policy.burned_in == "keep",
        "PHI_BLANKED": suspected and policy.burned_in == "blank",
        # frame of reference and geometry must tell series apart
        "UID_MISSING": not (ds.get("SeriesInstanceUID") and ds.get("SOPInstanceUID")),
        "PATIENT_ID_MISSING": not _patient(ds),
        "RECOGNIZABLE_FACE_POSSIBLE": deidentify.face_possible(modality, deidentify.body_part(ds)),
        "TILED": str(ds.get("DimensionOrganizationType") or "").startswith("TILED"),
    }
    return [*parsed.flags, *(code for code, is_so in notes.items() if is_so)]


def _of_frame(
    parsed: Parsed[Header], layout: Layout, frame: int, policy: ReadPolicy
) -> dict[str, Any]:
    ds = parsed.header
    modality = str(ds.get("Modality") or "")
    slope, intercept, given = frames.rescaling(ds, frame)
    dtype = pixels.dtype_of(ds, layout, (slope, intercept), policy)
    pixel_spacing, source = frames.spacing(ds, frame, modality)
    window, any_window = frames.window(ds, frame)
    ct, lut = modality == "CT", "ModalityLUTSequence" in ds
    notes = {
        "RESCALE_ABSENT": ct and not given and not lut,
        "RESCALE_NOT_HU": ct and frames.rescale_type(ds, frame) != "HU",
        "VALUE_ROUNDED": pixels.may_round(layout, dtype),
        "SPACING_DETECTOR": source == "detector",
        "VOI_INVALID": any_window and window is None,
        "VOI_LUT": window is None and "VOILUTSequence" in ds,
    }
    own = (code for code, is_so in notes.items() if is_so)
    return {
        "frame": frame,
        "dtype": dtype,
        "position": frames.position(ds, frame, layout.frames),
        "orientation": frames.orientation(ds, frame),
        "pixel_spacing": pixel_spacing,
        "spacing_source": source,
        "window": window,
        "series_split_key": frames.split_key(ds, frame),
        "contrast_key": frames.contrast_key(ds, frame),
        "collision_key": frames.collision_key(ds, frame),
        "times": frames.times(ds, frame),
        "flags": (*_flags_of_object(parsed, policy), *own),
    }
