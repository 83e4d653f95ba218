"""Frozen types that pass between the floors. numpy only.

Axis letters: N slices, H rows, W columns, C image channels, K classes. Patient coordinates are
DICOM LPS in mm unless a name says RAS. Index order of an affine is (column, row, slice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Label value that neither loss nor metrics count."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
PixelDtype = Literal["int16", "float32", "uint8"]  # uint8 is RGB, (H, W, 3)
SpacingSource = Literal["patient", "calibrated", "detector", "ultrasound", ""]
VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
"""VOI LUT Function (0028,1056); an absent one means LINEAR."""
MaskKind = Literal["", "nifti", "png", "seg", "rtstruct"]
Status = Literal["kept", "skipped", "quarantined", "duplicate"]
STATUSES: tuple[Status, ...] = get_args(Status)
FloatArray = NDArray[np.floating[Any]]
Box = tuple[int, int, int, int]
"""First row, first column, rows, columns of a part of an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A VOI window in modality units (HU for CT) and its function (PS3.3 C.11.2.1.2)."""

    center: float
    width: float
    function: VoiFunction = "LINEAR_EXACT"


class Place(NamedTuple):
    """Where the bytes of an object are: a file, or a member of a zip or tar file."""

    path: str
    member: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPolicy:
    """What the user decided about objects that are readable but doubtful; `DataConfig` says more.

    Attributes:
        modalities: To keep; None keeps all.
        gaps: A series with a hole becomes two, stays one with marked holes, or is quarantined.
        burned_in: Objects that may show a name in their pixels: quarantined, blanked outside the
            ultrasound region (and quarantined where there is none), or kept.
        non_volumes: Localizers, secondary captures and dose sheets.
        colour: Colour images stay RGB, or become their brightness (ITU-R BT.601).
    """

    modalities: tuple[str, ...] | None = None
    gaps: Literal["split", "fill", "reject"] = "split"
    burned_in: Literal["quarantine", "blank", "keep"] = "quarantine"
    non_volumes: Literal["skip", "keep"] = "skip"
    colour: Literal["keep", "grey"] = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRef:
    """One frame of one image object as the header scan saw it; pixels are read later.

    ``patient_id``, the UIDs, dates, times and the place are the real ones: they stay in the
    memory of the conversion and never reach a shard, a table or a log. ``file_id`` is the
    pseudonym of the object. An object of one frame has frame 0 of 1.

    Attributes:
        patient_id: Empty where the header has none, until `group_series` puts a stand-in.
        photometric: MONOCHROME1 also where PresentationLUTShape inverts MONOCHROME2.
        position, orientation: (0020,0032) mm LPS, (0020,0037) six direction cosines.
        pixel_spacing: Between rows, between columns, mm; see ``spacing_source`` for its trust:
            patient plane, calibrated projection, detector plane, ultrasound region.
        series_split_key: Keeps slices of one SeriesInstanceUID apart: kind of image, unit of its
            values, frame of reference, stack.
        contrast_key: Echo, b-value, kernel, tube voltage: separates slices where their positions
            collide, and where those of one value are a regular stack of their own.
        collision_key: Temporal position, trigger, gradient direction, acquisition: separates
            slices only where their positions collide.
        times: Of acquisition and of content, or empty: the last thing to tell slices of one
            position apart.
        flags: Codes of what is unusual but readable, for example RESCALE_ABSENT.
        region: Boxes of (first row, first column, rows, columns) that are shown, all else is
            blanked; without any, all is shown.
        manufacturer, body_part: Of a closed vocabulary, or empty.
    """

    path: str
    file_id: str
    patient_id: str
    series_uid: str
    modality: str
    rows: int
    columns: int
    dtype: PixelDtype
    photometric: str
    member: str = ""
    frame: int = 0
    frames: int = 1
    position: tuple[float, float, float] | None = None
    orientation: tuple[float, ...] | None = None
    pixel_spacing: tuple[float, float] | None = None
    spacing_source: SpacingSource = ""
    window: Window | None = None
    sop_uid: str = ""
    study_uid: str = ""
    frame_of_reference: str = ""
    study_date: str = ""
    series_split_key: str = ""
    contrast_key: tuple[str, ...] = ()
    collision_key: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    region: tuple[Box, ...] = ()
    manufacturer: str = ""
    body_part: str = ""

    @property
    def place(self) -> Place:
        """Where the bytes are."""
        return Place(self.path, self.member)

    @property
    def channels(self) -> int:
        """1 grey or 3 RGB."""
        return 3 if self.dtype == "uint8" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Slices that belong together, in order along the slice normal.

    Attributes:
        slices: All of one matrix size, modality and dtype.
        affine: (4, 4) index (column, row, grid) to mm LPS, as nested tuples; None where the
            slices are single images without patient geometry.
        z_mm: Distance of each slice along the normal, mm; empty without geometry.
        grid: Place of each slice on the regular grid of the affine; has gaps only where
            ``ReadPolicy.gaps`` is ``fill``. Empty stands for 0, 1, 2 ...
        masks: Mask objects: one or several for the series, or one PNG a slice; empty if
            unlabelled. ``mask_kind`` says how to read them, ``mask_partial`` that they cover
            other series too, so that what lies outside this one is no error.
        split: Set when a split list names it; None leaves it to the keyed hash of the patient.
        flags: Codes of what is unusual about the series as a whole, for example GANTRY_TILT.
    """

    slices: tuple[SliceRef, ...]
    affine: tuple[tuple[float, ...], ...] | None
    z_mm: tuple[float, ...]
    grid: tuple[int, ...] = ()
    masks: tuple[Place, ...] = ()
    mask_kind: MaskKind = ""
    mask_partial: bool = False
    split: Split | None = None
    flags: tuple[str, ...] = ()

    @property
    def first(self) -> SliceRef:
        """The first slice; every field that defines the series is the same in all."""
        return self.slices[0]

    @property
    def grid_index(self) -> tuple[int, ...]:
        """``grid``, spelt out."""
        return self.grid or tuple(range(len(self.slices)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, W) of the regular grid, holes counted."""
        return self.grid_index[-1] + 1, self.first.rows, self.first.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRow:
    """What became of one object of the archive, or of one of its frames."""

    file_id: str
    status: Status
    code: str
    detail: str = ""
    frame: int = -1  # -1: the whole object


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this process stands among the ranks of one training run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
