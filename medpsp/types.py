"""Frozen types that pass between the floors. numpy only.

Axis letters: N slices, H rows, W columns, C image channels, K classes. Patient coordinates are
DICOM LPS in mm unless a name says RAS. Index order of an affine is (column, row, slice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
"""Label value that neither loss nor metrics count."""

Split = Literal["train", "val", "test"]
PixelDtype = Literal["int16", "float32"]
Status = Literal["kept", "skipped", "quarantined", "duplicate"]
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A VOI window in modality units (HU for CT); PS3.3 C.11.2.1.2."""

    center: float
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRef:
    """One image object as the header scan saw it; pixels are read later from ``path``.

    ``patient_id``, ``series_uid`` and ``path`` are the real ones: they stay in the memory of the
    conversion and never reach a shard, a table or a log. ``file_id`` is the pseudonym.
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
    position: tuple[float, float, float] | None = None  # (0020,0032), mm LPS
    orientation: tuple[float, ...] | None = None  # (0020,0037), six direction cosines
    pixel_spacing: tuple[float, float] | None = None  # (0028,0030): between rows, between columns
    window: Window | None = None
    sop_uid: str = ""
    series_split_key: str = ""  # what else keeps slices of one SeriesInstanceUID apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Slices that belong together, in order along the slice normal.

    Attributes:
        slices: All of one matrix size, modality and dtype.
        affine: (4, 4) index (column, row, slice) to mm LPS, as nested tuples; None where the
            slices are single images without patient geometry.
        z_mm: Distance of each slice along the normal, mm; empty without geometry.
        masks: Mask files: one NIfTI for the series, or one PNG a slice; empty if unlabelled.
        split: Set when a split list names it; None leaves it to the keyed hash of the patient.
    """

    slices: tuple[SliceRef, ...]
    affine: tuple[tuple[float, ...], ...] | None
    z_mm: tuple[float, ...]
    masks: tuple[str, ...] = ()
    split: Split | None = None

    @property
    def first(self) -> SliceRef:
        """The first slice; every field that defines the series is the same in all."""
        return self.slices[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRow:
    """What became of one object of the archive; these rows add up to the objects found."""

    file_id: str
    status: Status
    code: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this process stands among the ranks of one training run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
