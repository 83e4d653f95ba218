"""A mask as a DICOM SEG that an archive keeps beside the images (PS3.3 A.51, C.8.20).

highdicom builds it from stand-ins of the images, one a slice and of one pixel: real headers lack
elements that it asks for, hold values that it refuses, or are several objects of many frames.
References, frame size and pixels are then put in from the images and the mask.
"""

from __future__ import annotations

import io
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydicom import config
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage, generate_uid
from pydicom.valuerep import validate_value

from medpsp.deploy.packed import Slices, held
from medpsp.dicom.frames import functional
from medpsp.dicom.header import Header
from medpsp.dicom.opened import opened
from medpsp.dicom.parse import parse, refusing
from medpsp.errors import DicomError
from medpsp.intensity import class_colour
from medpsp.types import Place, Series

if TYPE_CHECKING:  # it takes 0.4 s to import
    from highdicom.seg import SegmentDescription

logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # its warnings quote names of patients

Code = Sequence[str]
"""Coding scheme designator, code value, code meaning (PS3.3 8.8)."""
LEARNED: Code = ("DCM", "123110", "Artificial Intelligence")
TISSUE: Code = ("SCT", "85756007", "Tissue")
"""Category and type of a class without codes: it is in the lists of both (CID 7150, 7166), claims
next to nothing, and is what 3D Slicer gives a segment that nobody described."""
_AS_IS = "PatientName PatientID AccessionNumber StudyID IssuerOfPatientID".split()
"""What archives tell patients and studies apart by stays as it is, valid or not."""
_IF_VALID = """PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName PatientAge
PatientSize PatientWeight StudyDescription PatientIdentityRemoved DeidentificationMethod
LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod""".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a SEG says of the model that made it.

    Attributes:
        name, version: Of the model, for people; of medpsp.
        digest: Of the model file, hex; its first 16 digits are the serial number of the device.
        classes: Names of the class ids; the first is the background.
        codes: Class name to ``category`` and ``type``; `TISSUE` where one is missing.
    """

    name: str
    version: str
    digest: str
    classes: tuple[str, ...]
    codes: Mapping[str, Mapping[str, Code]] = field(default_factory=dict)


def write_seg(path: Path, mask: Slices, series: Series, model: ModelFacts) -> Path:
    """Write the mask of one series as BINARY SEG: a segment for each class that was found.

    Where none was, each class is a segment with one empty frame on the first slice: a SEG has
    frames, and this one says what was looked for. No other empty frame is written. Patient and
    study are the real ones of the first image. The same input gives the same UIDs.

    Frames lie where their slices lie. Those of images without patient geometry (ultrasound,
    photographs) have no position, only the images that they reference (PS3.3 A.51): archives
    keep such a SEG, viewers that go by position do not show it. Memory grows with frames, not
    with pixels: they are looked at one slice at a time, and packed one frame at a time, 1 bit
    each, as every receiver reads them.

    Args:
        path: File to write; it appears when it is whole.
        mask: (N, H, W) class ids in the order of ``series.slices``.
        series: Its headers are read again.
        model: What segmented it.

    Raises:
        DicomError: SEG_NOT_WRITTEN where a UID is missing or the headers make no SEG; a code of
            `parse` where an image can no longer be read.
        ValueError, OSError: The mask does not fit; the file cannot be written.
    """
    wanted = len(series.slices), series.first.rows, series.first.columns
    if mask.shape != wanted:
        raise ValueError(f"mask {mask.shape}, expected {wanted}")
    found, digest = held(mask, len(model.classes))
    with refusing("SEG_NOT_WRITTEN", "the headers of the images make no SEG"):
        kinds = _kinds(series)
        seg, classes = _described(found, digest, series, model)
        frames = _refer(seg, series, kinds)
        if series.affine is None:
            _unplace(seg, series, [number for number, _ in frames])
        header = io.BytesIO()
        seg.save_as(header, enforce_file_format=True)
    _save(path, header.getvalue(), mask, [(n, classes[k - 1]) for n, k in frames])
    return path


def _kinds(series: Series) -> dict[Place, str]:
    """SOPClassUID of each object; all else that a SEG must name is there, too."""
    first, places = series.first, dict.fromkeys(ref.place for ref in series.slices)
    kinds = {place: str(opened(place).header.get("SOPClassUID") or "") for place in places}
    needed = {
        "StudyInstanceUID (0020,000D)": first.study_uid,
        "SeriesInstanceUID (0020,000E)": first.series_uid,
        "SOPInstanceUID (0008,0018)": all(ref.sop_uid for ref in series.slices),
        "SOPClassUID (0008,0016)": all(kinds.values()),
        "FrameOfReferenceUID (0020,0052)": first.frame_of_reference or series.affine is None,
    }
    if missing := [name for name, there in needed.items() if not there]:
        raise DicomError("SEG_NOT_WRITTEN", f"images without {', '.join(missing)}")
    return kinds


def _described(
    found: NDArray[np.bool_], digest: str, series: Series, model: ModelFacts
) -> tuple[Dataset, list[int]]:
    """All but pixels and references, and the class of each segment; see `held`."""
    from highdicom.seg import Segmentation

    found[0] |= not found[:, 1:].any()
    found[:, 0] = False
    classes: list[int] = np.flatnonzero(found.any(axis=0)).tolist()
    uids = _uids(digest, series, model)
    seg = Segmentation(
        source_images=_stand_ins(series),
        pixel_array=found[:, None, None, classes].astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[_segment(n, k, model) for n, k in enumerate(classes, 1)],
        series_instance_uid=uids[0],
        sop_instance_uid=uids[1],
        series_number=1000,  # beyond those that scanners give
        instance_number=1,
        manufacturer="medpsp",
        manufacturer_model_name=model.name[:64],
        device_serial_number=model.digest[:16],
        software_versions=f"medpsp {model.version}"[:64],
        content_label="SEG",
        content_description="Automatic segmentation",
        series_description=f"{model.name[:48]} segmentation",
        specific_character_set="ISO_IR 192",  # UTF-8: names of any source, and of classes
    )
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uids[2]
    del seg.PixelData
    seg.Rows, seg.Columns = series.first.rows, series.first.columns
    seg.ContentCreatorName, seg.SegmentsOverlap = None, "NO"  # no person; a pixel has one class
    return seg, classes


def _segment(number: int, index: int, model: ModelFacts) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept

    def coded(code: Code) -> CodedConcept:
        return CodedConcept(value=code[1], scheme_designator=code[0], meaning=code[2])

    codes = model.codes.get(model.classes[index], {})
    return SegmentDescription(
        segment_number=number,
        segment_label=model.classes[index][:64],
        segmented_property_category=coded(codes.get("category", TISSUE)),
        segmented_property_type=coded(codes.get("type", TISSUE)),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name="medpsp",
            family=coded(LEARNED),
            version=model.version,
            parameters={"model": model.name, "digest": model.digest},
        ),
        display_color=CIELabColor.from_rgb(*class_colour(index)),
    )


def _stand_ins(series: Series) -> list[Dataset]:
    """A CT image a slice, whose SOPInstanceUID is its number; the first has the identity.

    Without geometry they stand in a line, in highdicom's order; `_unplace` takes it out again.
    """
    first, placed = series.first, series.affine is not None
    header, shared = parse(first.place).header, Dataset()
    shared.SOPClassUID, shared.Modality, shared.Rows, shared.Columns = CTImageStorage, "CT", 1, 1
    shared.StudyInstanceUID, shared.SeriesInstanceUID = first.study_uid, first.series_uid
    shared.FrameOfReferenceUID = first.frame_of_reference or "0"
    shared.PixelSpacing = list(first.pixel_spacing or (1, 1))
    shared.ImageOrientationPatient = list((placed and first.orientation) or (1, 0, 0, 0, 1, 0))
    thickness = functional(header, first.frame, "PixelMeasuresSequence", "SliceThickness")
    shared.SliceThickness = thickness if isinstance(thickness, float) and thickness > 0 else None
    images = [Dataset() for _ in series.slices]
    for number, (image, ref) in enumerate(zip(images, series.slices, strict=True)):
        image.update(shared)
        image.SOPInstanceUID = str(number)
        image.ImagePositionPatient = list((placed and ref.position) or (0, 0, -number))
    for keyword in (*_AS_IS, *_IF_VALID):
        value = _text(header, keyword)
        if value or keyword in (*_AS_IS[:4], *_IF_VALID[:5]):
            setattr(images[0], keyword, value or None)
    return images


def _text(header: Header, keyword: str) -> str:
    """An element as text; empty where it is missing, or must be valid and is not."""
    value = header.get(keyword)
    values = value if isinstance(value, MultiValue) else [value]
    texts = [str(v).strip(" \0") for v in values if v is not None]
    if keyword in _IF_VALID:
        try:
            for text in texts:
                validate_value(dictionary_VR(keyword), text, config.RAISE)
        except ValueError:
            return ""
        if keyword == "PatientSex" and texts not in (["M"], ["F"], ["O"]):
            return ""
    return "\\".join(texts)


def _uids(pixels: str, series: Series, model: ModelFacts) -> list[str]:
    """Of the series (images and model), of the object and of its dimensions (and mask)."""
    images = [f"{ref.sop_uid}/{ref.frame}" for ref in series.slices]
    source = "\n".join([*images, *model.classes, model.digest])
    mixed = ["series", source], ["object", source, pixels], ["dimensions", source, pixels]
    return [generate_uid(entropy_srcs=sources) for sources in mixed]


def _refer(seg: Dataset, series: Series, kinds: Mapping[Place, str]) -> list[tuple[int, int]]:
    """Put the images in the place of their stand-ins; returns slice and segment of each frame."""
    groups, images = seg.PerFrameFunctionalGroupsSequence, {}
    sources = [group.DerivationImageSequence[0].SourceImageSequence[0] for group in groups]
    slices = [int(source.ReferencedSOPInstanceUID) for source in sources]
    for ref in series.slices:
        image = images[ref.sop_uid] = Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = kinds[ref.place], ref.sop_uid
    for number, source in zip(slices, sources, strict=True):  # frames of a slice share theirs
        ref = series.slices[number]
        source.update(images[ref.sop_uid])
        if ref.frames > 1:
            source.ReferencedFrameNumber = ref.frame + 1
    seg.SourceImageSequence = list(images.values())
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = list(images.values())
    segments = [group.FrameContentSequence[0].DimensionIndexValues[0] for group in groups]
    shared = seg.SharedFunctionalGroupsSequence[0].pop("SegmentIdentificationSequence", None)
    for group in groups if shared else ():  # of one segment; older OHIF looks for it in frames
        group.add(shared)
    return list(zip(slices, segments, strict=True))


def _unplace(seg: Dataset, series: Series, slices: Sequence[int]) -> None:
    """Take the line of the stand-ins out: a frame has the number of its slice instead."""
    shared, index = seg.SharedFunctionalGroupsSequence[0], seg.DimensionIndexSequence[1]
    del seg.FrameOfReferenceUID, seg.PositionReferenceIndicator, shared.PlaneOrientationSequence
    seg.pop("DimensionOrganizationType", None)
    seg.PatientOrientation = None  # the standard asks for it instead, if only as unknown
    shared.PixelMeasuresSequence[0].pop("SpacingBetweenSlices", None)
    if series.first.pixel_spacing is None:
        del shared.PixelMeasuresSequence
    index.DimensionIndexPointer, index.FunctionalGroupPointer = 0x00209057, 0x00209111
    index.DimensionDescriptionLabel = "In-Stack Position Number"
    for number, group in zip(slices, seg.PerFrameFunctionalGroupsSequence, strict=True):
        del group.PlanePositionSequence
        content = group.FrameContentSequence[0]
        content.StackID, content.InStackPositionNumber = "1", number + 1
        content.DimensionIndexValues = [content.DimensionIndexValues[0], number + 1]


def _save(path: Path, header: bytes, mask: Slices, frames: Sequence[tuple[int, int]]) -> None:
    """Header, then the bits of each frame (slice, class), first pixel lowest (PS3.5 8.1.1)."""
    size = -(-len(frames) * mask[0].size // 8)
    part, rest = path.with_name(f"{path.name}.part"), np.zeros(0, dtype=np.bool_)
    try:
        with part.open("wb") as file:
            file.write(header + struct.pack("<HH2s2xL", 0x7FE0, 0x10, b"OB", size + size % 2))
            for number, index in frames:  # a frame may begin inside a byte
                bits = np.concatenate([rest, (mask[number] == index).ravel()])
                whole = len(bits) // 8 * 8
                file.write(np.packbits(bits[:whole], bitorder="little").data)
                rest = bits[whole:]
            file.write(np.packbits(rest, bitorder="little").tobytes() + b"\0" * (size % 2))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
