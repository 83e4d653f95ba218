"""Label objects and the series that they belong to, made in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import ArrayLike, NDArray
from pydicom.dataset import Dataset

from medpsp.types import Series, SliceRef

Affine = NDArray[np.float64]
PLAIN = np.diag([3.0, 2.0, 5.0, 1.0])  # column 3 mm, row 2 mm, slice 5 mm
SHAPE = (4, 5, 6)
PATIENT, FRAME = "patient", "1.2.9"
SEG, LABELMAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"

ORIENTATIONS = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for count in range(4)
    for flips in itertools.combinations(range(3), count)
]
"""Every order of the axes, with every set of axes that run the other way: 48."""


def turned(axis: ArrayLike, angle: float) -> Affine:
    """Rotation by Rodrigues' formula."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    out = np.eye(4)
    out[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return out


def slice_ref(**fields: Any) -> SliceRef:
    base = {
        "path": "/p",
        "file_id": "f",
        "patient_id": PATIENT,
        "series_uid": "1.2",
        "modality": "CT",
        "rows": SHAPE[1],
        "columns": SHAPE[2],
        "dtype": "int16",
        "photometric": "MONOCHROME2",
        "frame_of_reference": FRAME,
    }
    return SliceRef(**{**base, **fields})


def series(
    uid: str = "1.2",
    affine: Affine | None = PLAIN,
    shape: tuple[int, int, int] = SHAPE,
    **fields: Any,
) -> Series:
    """A series whose slices are ``uid``.0, ``uid``.1 ... and lie where the affine says."""
    slices, rows, columns = shape
    refs = [
        slice_ref(
            series_uid=uid, sop_uid=f"{uid}.{k}", **{"rows": rows, "columns": columns, **fields}
        )
        for k in range(slices)
    ]
    tuples = None if affine is None else tuple(tuple(float(v) for v in row) for row in affine)
    return Series(slices=tuple(refs), affine=tuples, z_mm=())


def series_of_files(paths: Sequence[Path]) -> Series:
    """Single-frame images of one volume, by pydicom and plain arithmetic."""
    heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    cosines = np.array(heads[0].ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(*cosines)
    heads.sort(key=lambda ds: float(np.array(ds.ImagePositionPatient, dtype=float) @ normal))
    places = np.array([ds.ImagePositionPatient for ds in heads], dtype=np.float64)
    affine = np.eye(4)
    affine[:3, 0] = cosines[0] * float(heads[0].PixelSpacing[1])
    affine[:3, 1] = cosines[1] * float(heads[0].PixelSpacing[0])
    affine[:3, 2] = (places[-1] - places[0]) / (len(heads) - 1) if len(heads) > 1 else normal
    affine[:3, 3] = places[0]
    refs = [
        slice_ref(
            path=str(ds.filename),
            patient_id=str(ds.PatientID),
            series_uid=str(ds.SeriesInstanceUID),
            sop_uid=str(ds.SOPInstanceUID),
            frame_of_reference=str(ds.get("FrameOfReferenceUID", "")),
            modality=str(ds.Modality),
            rows=int(ds.Rows),
            columns=int(ds.Columns),
        )
        for ds in heads
    ]
    return Series(slices=tuple(refs), affine=tuple(map(tuple, affine.tolist())), z_mm=())


def item(**elements: Any) -> Dataset:
    """A data set with these elements; a list of data sets makes a sequence."""
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def region(left: int, top: int, right: int, bottom: int, **elements: Any) -> Dataset:
    """A region of 2-D tissue of an ultrasound image: first and last column and row."""
    return item(
        **{
            "RegionSpatialFormat": 1,  # 2-D
            "RegionDataType": 1,  # tissue
            "RegionLocationMinX0": left,
            "RegionLocationMinY0": top,
            "RegionLocationMaxX1": right,
            "RegionLocationMaxY1": bottom,
            **elements,
        }
    )


def contour(points: ArrayLike, kind: str = "CLOSED_PLANAR") -> Dataset:
    """A contour of (P, 3) points, mm LPS."""
    flat = np.asarray(points, dtype=np.float64).ravel()
    return item(
        ContourGeometricType=kind,
        NumberOfContourPoints=len(flat) // 3,
        ContourData=[f"{v:.10g}"[:16] for v in flat],
    )


def rtstruct(regions: dict[str, list[Dataset]], **elements: Any) -> Dataset:
    """An RTSTRUCT whose regions 1, 2 ... have these names and contours."""
    return item(
        SOPClassUID=RTSTRUCT,
        Modality="RTSTRUCT",
        PatientID=PATIENT,
        FrameOfReferenceUID=FRAME,
        StructureSetROISequence=[
            item(ROINumber=n, ROIName=name) for n, name in enumerate(regions, 1)
        ],
        ROIContourSequence=[
            item(ReferencedROINumber=n, ContourSequence=contours)
            for n, contours in enumerate(regions.values(), 1)
        ],
        **elements,
    )


def frame_of(affine: Affine, number: int, segment: int | None, *sources: str) -> Dataset:
    """The functional groups of a frame that is slice ``number`` of a grid."""
    place = affine @ [0, 0, number, 1]
    groups = item(
        PlanePositionSequence=[item(ImagePositionPatient=[f"{v:.9g}" for v in place[:3]])]
    )
    if segment is not None:
        groups.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=segment)]
    if sources:
        images = [item(ReferencedSOPInstanceUID=uid) for uid in sources]
        groups.DerivationImageSequence = [item(SourceImageSequence=images)]
    return groups


def seg(
    kind: str,
    frames: Sequence[Dataset],
    labels: dict[int, str],
    affine: Affine = PLAIN,
    shape: tuple[int, int] = SHAPE[1:],
    **elements: Any,
) -> Dataset:
    """A SEG without pixels; orientation and spacing are shared and those of the affine."""
    sizes = np.linalg.norm(affine[:3, :2], axis=0)
    cosines = (affine[:3, :2] / sizes).T.ravel()
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[f"{v:.9g}" for v in cosines])],
        PixelMeasuresSequence=[item(PixelSpacing=[f"{sizes[1]:.9g}", f"{sizes[0]:.9g}"])],
    )
    ds = item(
        SOPClassUID=LABELMAP if kind == "LABELMAP" else SEG,
        Modality="SEG",
        PatientID=PATIENT,
        FrameOfReferenceUID=FRAME,
        SegmentationType=kind,
        NumberOfFrames=len(frames),
        Rows=shape[0],
        Columns=shape[1],
        SegmentSequence=[item(SegmentNumber=n, SegmentLabel=name) for n, name in labels.items()],
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=list(frames),
    )
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds
