"""Archives with one trap each, and a judge that knows the truth at world points.

The phantom is coded by position: the value of a voxel follows from its volume, slice, row and
column. Rows, columns and slices have three sizes and three spacings, so no swap stays hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from medpsp.dicom.container import walk_objects
from medpsp.dicom.read import read_headers, read_pixels
from medpsp.errors import DicomError, SourceError
from medpsp.types import ReadPolicy, Series, SliceRef
from tests.factory import grouped

POINTS = 240
"""World points looked at in each volume."""

Edit = Callable[[Dataset, int], object]
Floats = NDArray[np.float64]
Images = dict[tuple[str, int], NDArray[Any]]  # (file id, frame) to (H, W)
CLOSE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Volume:
    """What lies where. ``code`` sets volumes of one archive apart; ``step`` in mm LPS."""

    code: int = 0
    shape: tuple[int, int, int] = (20, 48, 64)
    spacing: tuple[float, float] = (0.8, 0.6)
    axes: tuple[tuple[float, ...], tuple[float, ...]] = ((1, 0, 0), (0, 1, 0))
    step: tuple[float, ...] = (0, 0, 2.5)
    origin: tuple[float, ...] = (-19.0, -17.0, -423.5)
    levels: int = 4001
    lowest: int = 0
    offset: float = -1024
    slopes: tuple[float, ...] = (1,)  # one for each slice, or one for all
    extra_mm: tuple[float, ...] = ()  # for each slice, along ``step``

    @property
    def affine(self) -> Floats:
        """(4, 4) index (column, row, slice) to mm LPS, where slices are evenly spaced."""
        affine = np.eye(4)
        affine[:3, 0] = np.array(self.axes[0]) * self.spacing[1]
        affine[:3, 1] = np.array(self.axes[1]) * self.spacing[0]
        affine[:3, 2], affine[:3, 3] = self.step, self.origin
        return affine

    def corner(self, k: int) -> Floats:
        """(3,) mm LPS of the first pixel of a slice."""
        along = np.array(self.step) / np.linalg.norm(self.step)
        extra = self.extra_mm[k] if self.extra_mm else 0.0
        return np.array(self.origin) + k * np.array(self.step) + extra * along

    @cached_property
    def corners(self) -> Floats:
        """(N, 3) of all slices."""
        return np.stack([self.corner(k) for k in range(self.shape[0])])

    @cached_property
    def values(self) -> Floats:
        """(N, H, W) modality values."""
        return np.stack(
            [self.stored(k) * self.slope(k) + self.offset for k in range(self.shape[0])]
        )

    def stored(self, k: int) -> NDArray[np.int64]:
        """(H, W) stored values of a slice."""
        j, i = np.indices(self.shape[1:])
        return (331 * k + 67 * j + 7 * i + 1009 * self.code) % self.levels + self.lowest

    def slope(self, k: int) -> float:
        """RescaleSlope of a slice."""
        return self.slopes[k % len(self.slopes)]


@dataclass
class Archive:
    """A folder under construction, and the truth about it."""

    root: Path
    volumes: list[Volume] = field(default_factory=list)
    sources: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)

    def add(self, volume: Volume, edit: Edit = lambda ds, k: None, folder: str = "a") -> None:
        """Write a volume as one file a slice."""
        for k in range(volume.shape[0]):
            ds = slice_of(volume, k)
            edit(ds, k)
            self.save(ds, f"{folder}/{volume.code}-{k:02d}")
            self.sources[len(self.volumes), k] = f"{folder}/{volume.code}-{k:02d}", 0
        self.volumes.append(volume)

    def save(self, ds: Dataset, name: str) -> Path:
        """Write a data set in the transfer syntax of its file meta."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        return path

    def path(self, k: int, volume: int = 0) -> Path:
        """The file of a slice."""
        return self.root / self.sources[volume, k][0]

    def remove(self, *wanted: int) -> None:
        """Delete the files of slices: nobody can ask for them any more."""
        for k in wanted:
            self.path(k).unlink()
            del self.sources[0, k]


def slice_of(volume: Volume, k: int) -> Dataset:
    """A CT slice of 12 bits as explicit little endian."""
    ds = header_of(volume)
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["slice", str(volume.code), str(k)])
    ds.InstanceNumber = k + 1
    ds.AcquisitionNumber = 1
    ds.SliceThickness = "3.7"  # is no spacing
    ds.ImagePositionPatient = [f"{v:.6f}" for v in volume.corner(k)]
    ds.ImageOrientationPatient = [f"{v:.9f}" for axis in volume.axes for v in axis]
    ds.PixelSpacing = [f"{v:g}" for v in volume.spacing]
    ds.RescaleSlope, ds.RescaleIntercept = f"{volume.slope(k):g}", f"{volume.offset:g}"
    put(ds, volume.stored(k))
    return ds


def header_of(volume: Volume) -> Dataset:
    """What slices and frames have in common."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PatientID, ds.Modality = "TRAP", "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(ds, keyword, generate_uid(entropy_srcs=[keyword]))
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    _, ds.Rows, ds.Columns = volume.shape
    return ds


def put(ds: Dataset, stored: NDArray[Any]) -> None:
    """Set the pixels, native, in the byte order of the transfer syntax."""
    size = ds.BitsAllocated // 8
    order = ">" if ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    raw = (stored.astype(np.int64) & (2**ds.BitsAllocated - 1)).astype(f"{order}u{size}").tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OW" if size == 2 else "OB"


def to_mr(ds: Dataset, k: int) -> None:
    """No rescale, no window."""
    ds.Modality, ds.SOPClassUID = "MR", MRImageStorage
    del ds.RescaleSlope, ds.RescaleIntercept


def enhanced(
    archive: Archive,
    volumes: Sequence[Volume],
    frames: Sequence[tuple[int, int]],
    edit: Callable[[Dataset, int, int], object] = lambda groups, v, k: None,
    modality: str = "CT",
) -> None:
    """Write volumes as one multi-frame object; ``frames`` are (volume, slice) in their order."""
    ds = header_of(volumes[0])
    ds.Modality = modality
    ds.SOPClassUID = EnhancedCTImageStorage if modality == "CT" else EnhancedMRImageStorage
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["enhanced"])
    ds.NumberOfFrames = len(frames)
    shared = Dataset()
    shared.PixelMeasuresSequence = one(PixelSpacing=list(volumes[0].spacing), SliceThickness="3.7")
    cosines = [v for axis in volumes[0].axes for v in axis]
    shared.PlaneOrientationSequence = one(ImageOrientationPatient=cosines)
    shared.PixelValueTransformationSequence = one(
        RescaleSlope=volumes[0].slopes[0], RescaleIntercept=volumes[0].offset, RescaleType="HU"
    )
    ds.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for number, (v, k) in enumerate(frames):
        item = Dataset()
        corner = [f"{c:.6f}" for c in volumes[v].corner(k)]
        item.PlanePositionSequence = one(ImagePositionPatient=corner)
        item.FrameContentSequence = one(StackID="1", InStackPositionNumber=k + 1)
        edit(item, v, k)
        groups.append(item)
        archive.sources[v, k] = "enhanced", number
    ds.PerFrameFunctionalGroupsSequence = Items(groups)
    put(ds, np.stack([volumes[v].stored(k) for v, k in frames]))
    archive.volumes += volumes
    archive.save(ds, "enhanced")


def one(**elements: Any) -> Items:
    """A sequence of one item."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return Items([item])


@dataclass
class Verdict:
    """What became of the world points and of the files."""

    series: list[Series] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)

    @property
    def flags(self) -> set[str]:
        """Of all series."""
        return {flag for item in self.series for flag in item.flags}

    @property
    def sizes(self) -> list[int]:
        """Slices of each series, large ones first."""
        return sorted((len(item.slices) for item in self.series), reverse=True)


def judge(archive: Archive, policy: ReadPolicy) -> Verdict:
    """Read the archive as a conversion does, then look at the truth's voxels through the affines.

    A point is ``right`` (found with its value in a series), ``flat`` (its value is right in an
    image without a place), ``coded`` (not there, and its object has a reason), ``silent`` (not
    there, no reason) or ``wrong`` (some series shows something there that no volume has).
    """
    verdict = Verdict()
    refs: list[SliceRef] = []
    refused: set[tuple[str, int]] = set()

    def refuse(name: str, frame: int, error: SourceError) -> None:
        verdict.codes[error.code] += 1
        refused.add((name, frame))

    for found in walk_objects(archive.root):
        try:
            if found.code:
                raise DicomError(found.code, found.detail)
            refs += read_headers(found.place, found.name, policy)
        except DicomError as error:
            refuse(found.name, -1, error)
    verdict.series, left = grouped(refs, policy)
    for ref, error in left:
        refuse(ref.file_id, ref.frame, error)
    images: Images = {}
    for ref in (r for item in verdict.series for r in item.slices):
        try:
            images[ref.file_id, ref.frame] = read_pixels(ref)
        except DicomError as error:
            refuse(ref.file_id, ref.frame, error)
    for v in range(len(archive.volumes)):
        verdict.points += _fates(archive, v, verdict.series, images, refused)
    return verdict


def _fates(
    archive: Archive,
    v: int,
    series: Sequence[Series],
    images: Images,
    refused: set[tuple[str, int]],
) -> Counter[str]:
    volume, rng = archive.volumes[v], np.random.default_rng(v)
    k = rng.choice([k for k in range(volume.shape[0]) if (v, k) in archive.sources], POINTS)
    j, i = (rng.integers(0, size, POINTS) for size in volume.shape[1:])
    world = volume.corners[k] + np.stack([i, j], axis=1) @ volume.affine[:3, :2].T  # (P, 3)
    expected = volume.values[k, j, i]
    allowed = np.stack([_truth_at(other, world) for other in archive.volumes])  # (V, P)
    seen = np.stack([_shown_at(item, world, images) for item in series] or [0 * k + np.nan])
    fits = np.isclose(seen[:, None], allowed[None], **CLOSE).any(axis=1) | np.isnan(seen)
    right = np.isclose(seen, expected, **CLOSE).any(axis=0)
    loose = {(r.file_id, r.frame) for s in series if s.affine is None for r in s.slices}
    fates: Counter[str] = Counter()
    for n in range(POINTS):
        source = archive.sources[v, int(k[n])]
        if not fits[:, n].all():
            fates["wrong"] += 1
        elif right[n]:
            fates["right"] += 1
        elif source in refused or (source[0], -1) in refused:
            fates["coded"] += 1
        else:
            flat = source in loose and images[source][j[n], i[n]] == expected[n]
            fates["flat" if flat else "silent"] += 1
    return fates


def _truth_at(volume: Volume, world: Floats) -> Floats:
    """(P,) value of the voxel nearest to each point; NaN beyond the volume."""
    normal = np.cross(*volume.axes)
    depth = (world[:, None] - volume.corners) @ normal  # (P, N) mm above each slice
    k = np.abs(depth).argmin(axis=1)
    plane = np.array(volume.axes) / np.array(volume.spacing)[::-1, None]
    i, j = np.rint((world - volume.corners[k]) @ plane.T).astype(int).T
    inside = (j >= 0) & (j < volume.shape[1]) & (i >= 0) & (i < volume.shape[2])
    inside &= np.abs(depth).min(axis=1) <= np.linalg.norm(volume.step) / 2
    values = volume.values[k, j.clip(0, volume.shape[1] - 1), i.clip(0, volume.shape[2] - 1)]
    return np.where(inside, values, np.nan)


def _shown_at(series: Series, world: Floats, images: Images) -> Floats:
    """(P,) what a user of the series sees at each point: the nearest voxel of its grid, or NaN."""
    seen = np.full(len(world), np.nan)
    if series.affine is None:
        return seen
    inverse = np.linalg.inv(series.affine)
    index = np.rint(world @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)  # (P, 3)
    rows, columns = series.first.rows, series.first.columns
    for place, ref in zip(series.grid_index, series.slices, strict=True):
        i, j, k = index.T
        here = (k == place) & (j >= 0) & (j < rows) & (i >= 0) & (i < columns)
        if (ref.file_id, ref.frame) in images:
            seen[here] = images[ref.file_id, ref.frame][j[here], i[here]]
    return seen
