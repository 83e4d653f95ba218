"""What a DICOM SEG says besides its pixels (PS3.3 C.8.20.2, C.7.6.16)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from medpsp.dicom.decode import MAX_FRAMES
from medpsp.dicom.frames import functional, numbers, orientation, position
from medpsp.dicom.geometry import axes_of, check_slice
from medpsp.dicom.items import items_of, number_of, numbers_of, reading, text_of
from medpsp.dicom.placement import Floats
from medpsp.errors import GeometryError, LabelError

KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")
Source = tuple[str, int]
"""SOPInstanceUID and frame from 0 of an image; frame -1 where it is not said."""


class Frame(NamedTuple):
    """What the functional groups say of one frame.

    Attributes:
        segment: ReferencedSegmentNumber; 0 in a label map.
        affine: (3, 3) columns: step along a row, step along a column, first pixel; mm LPS. None
            where the frame has no position.
        sources: Images that it was made on.
    """

    segment: int
    affine: Floats | None
    sources: tuple[Source, ...]


class Header(NamedTuple):
    """What a SEG says besides its pixels.

    Attributes:
        kind: BINARY, FRACTIONAL or LABELMAP.
        names: SegmentNumber to SegmentLabel.
        full: MaximumFractionalValue; 0 where it is missing.
        background: Value of a label map where nothing is; None if each value is a segment.
        shape: (H, W) of a frame.
        frames: How many.
    """

    kind: str
    names: dict[int, str]
    full: int
    background: int | None
    shape: tuple[int, int]
    frames: int


def read_header(ds: Dataset) -> Header:
    """Read and check what describes a SEG as a whole.

    Raises:
        LabelError: SEG_UNREADABLE, SEG_TYPE, SEG_TILED, SEG_FRAMES, SEG_NO_MAXIMUM,
            SEG_SEGMENT_CONFLICT.
    """
    with reading("SEG_UNREADABLE"):
        kind = text_of(ds, "SegmentationType")
        if kind not in KINDS:
            raise LabelError("SEG_TYPE", f"SegmentationType is none of {', '.join(KINDS)}")
        if "TotalPixelMatrixRows" in ds:
            raise LabelError("SEG_TILED", "tiles of a whole slide have no place in a series")
        names: dict[int, str] = {}
        for item in items_of(ds, "SegmentSequence"):
            number, name = number_of(item, "SegmentNumber") or 0, text_of(item, "SegmentLabel")
            if names.setdefault(number, name) != name:
                raise LabelError("SEG_SEGMENT_CONFLICT", "one SegmentNumber has two labels")
        shape = (number_of(ds, "Rows") or 0, number_of(ds, "Columns") or 0)
        frames = number_of(ds, "NumberOfFrames") or 1
        groups = len(items_of(ds, "PerFrameFunctionalGroupsSequence"))
        described = groups == frames or (groups == 0 and frames == 1)
        if min(shape) < 1 or not described or frames > MAX_FRAMES:
            raise LabelError("SEG_FRAMES", f"{frames} frames of {shape}, {groups} are described")
        full = number_of(ds, "MaximumFractionalValue") or 0
        if kind == "FRACTIONAL" and full < 1:
            raise LabelError("SEG_NO_MAXIMUM", "no MaximumFractionalValue")
        background = number_of(ds, "PixelPaddingValue")
        if background is None and 0 not in names:
            background = 0
    return Header(kind, names, full, background, shape, frames)


def read_frame(ds: Dataset, header: Header, number: int) -> Frame:
    """Read the functional groups of one frame.

    Raises:
        LabelError: SEG_UNREADABLE, SEG_GEOMETRY, SEG_SEGMENT_UNKNOWN.
    """
    with reading("SEG_UNREADABLE"):
        found = functional(ds, number, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        segment = 0 if header.kind == "LABELMAP" else int(found or 0)
        if header.kind != "LABELMAP" and segment not in header.names:
            raise LabelError("SEG_SEGMENT_UNKNOWN", f"segment {segment} is not described")
        place, plane = position(ds, number, header.frames), orientation(ds, number)
        spacing = numbers(functional(ds, number, "PixelMeasuresSequence", "PixelSpacing"), 2)
        groups = items_of(ds, "PerFrameFunctionalGroupsSequence")[number : number + 1]
        sources = tuple(
            (text_of(item, "ReferencedSOPInstanceUID"), int(frame) - 1)
            for group in groups
            for item in items_of(group, "DerivationImageSequence", "SourceImageSequence")
            if text_of(item, "ReferencedSOPInstanceUID")
            for frame in numbers_of(item, "ReferencedFrameNumber") or (0,)
        )
    if place is None or plane is None or spacing is None:
        return Frame(segment, None, sources)
    try:
        check_slice(place, plane, spacing)
    except GeometryError as error:
        raise LabelError("SEG_GEOMETRY", error.detail) from None
    across, down, _ = axes_of(plane)
    affine = np.stack([across * spacing[1], down * spacing[0], np.array(place)], axis=1)
    return Frame(segment, affine, sources)


def sample_points(ds: Dataset, most: int) -> list[tuple[float, ...]]:
    """The first pixel of up to ``most`` frames, evenly taken, mm LPS; a voxel centre of the grid.

    Raises:
        LabelError: The codes of `read_header` and `read_frame`.
    """
    header = read_header(ds)
    step = -(-header.frames // most)
    frames = [read_frame(ds, header, number) for number in range(0, header.frames, step)]
    return [tuple(f.affine[:, 2].tolist()) for f in frames if f.affine is not None]
