"""A mask comes back from its SEG voxel for voxel, whoever reads it, and names its images."""

from __future__ import annotations

import shutil
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    UltrasoundMultiFrameImageStorage,
)

from medpsp.deploy.segobject import ModelFacts, write_seg
from medpsp.dicom.container import objects_of
from medpsp.dicom.names import NameRule
from medpsp.dicom.placement import LPS_TO_RAS, grid_of
from medpsp.dicom.read import read_headers
from medpsp.dicom.seg import read_segments
from medpsp.errors import DicomError
from medpsp.types import ReadPolicy, Series
from tests.factory import grouped, headers
from tests.labelled import ORIENTATIONS, PLAIN, SHAPE, Affine, item, turned

Mask = NDArray[np.uint8]
Need = Callable[[str, bool, str], None]
CLASSES = ("background", "liver", "kidney", "lesion")
LIVER = {
    "category": ("SCT", "123037004", "Anatomical Structure"),
    "type": ("SCT", "10200004", "Liver"),
}
FACTS = ModelFacts(
    name="abdomen", version="1.2.0", digest="ab12" * 16, classes=CLASSES, codes={"liver": LIVER}
)
RULE = NameRule(classes=CLASSES)
KEEP = ReadPolicy(burned_in="keep")
IDENTITY = ("CANARY", "19470811", "20210304")


def image(number: int, shape: tuple[int, ...], **elements: Any) -> Dataset:
    ds = item(
        SOPClassUID=CTImageStorage,
        SOPInstanceUID=f"1.2.3.{number + 1}",
        StudyInstanceUID="1.2.4",
        SeriesInstanceUID="1.2.5",
        FrameOfReferenceUID="1.2.6",
        PatientName="Canary^CANARY",
        PatientID="CANARY",
        PatientBirthDate="19470811",
        PatientSex="F",
        StudyDate="20210304",
        StudyTime="101500",
        StudyID="7",
        AccessionNumber="CANARY",
        ReferringPhysicianName="",
        Modality="CT",
        RescaleSlope="1",
        RescaleIntercept="0",
        RescaleType="HU",
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        Rows=shape[-2],
        Columns=shape[-1],
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=0,
        PixelData=bytes(2 * int(np.prod(shape))),
    )
    ds["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def save(ds: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)


def numbers(values: NDArray[np.float64]) -> list[str]:
    return [f"{v:.10f}"[:16] for v in values]


def plane(affine: Affine) -> dict[str, Any]:
    sizes = np.linalg.norm(affine[:3, :2], axis=0)
    return {
        "ImageOrientationPatient": numbers((affine[:3, :2] / sizes).T.ravel()),
        "PixelSpacing": numbers(sizes[::-1]),
        "SliceThickness": "2.5",
    }


def single_frames(folder: Path, shape: tuple[int, ...], affine: Affine, **elements: Any) -> None:
    """Files whose SOPInstanceUID ends in the number of the slice, from 1."""
    for k in range(shape[0]):
        place = {"ImagePositionPatient": numbers((affine @ [0, 0, k, 1])[:3])}
        save(image(k, shape[1:], **plane(affine), **place, **elements), folder / f"{k}")


def series_in(folder: Path, policy: ReadPolicy | None = None) -> Series:
    (series,), refused = grouped(headers(folder, policy), policy)
    assert not refused
    return series


def in_order(mask: Mask, series: Series) -> Mask:
    """Slices as the series has them; files are named by the number of the slice."""
    return mask[[int(ref.sop_uid.rsplit(".", 1)[1]) - 1 for ref in series.slices]]


def plain_series(folder: Path, **elements: Any) -> Series:
    single_frames(folder, SHAPE, PLAIN, **elements)
    return series_in(folder)


def truth(seed: int = 0, shape: tuple[int, ...] = SHAPE, classes: int = 4) -> Mask:
    return np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)


def read_own(path: Path, series: Series) -> tuple[Mask, dict[str, int]]:
    ds = pydicom.dcmread(path)
    pixels = ds.pixel_array.reshape(ds.NumberOfFrames, ds.Rows, ds.Columns)
    found = read_segments(ds, lambda number: pixels[number], grid_of(series), RULE)
    return found.values, found.notes


def class_of(ds: Dataset, segment: int) -> int:
    return CLASSES.index(ds.SegmentSequence[segment - 1].SegmentLabel)


def points_plain(path: Path) -> NDArray[np.float64]:
    """(P, 4): x, y, z mm LPS and class of each labelled voxel, by PS3.3 C.7.6.2.1.1 alone."""
    ds = pydicom.dcmread(path)
    shared = ds.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    down, across = (float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing)
    found = []
    for group, pixels in zip(ds.PerFrameFunctionalGroupsSequence, ds.pixel_array, strict=True):
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        segment = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for row, column in np.argwhere(pixels):
            at = place + cosines[:3] * across * column + cosines[3:] * down * row
            found.append([*at, class_of(ds, segment)])
    return np.array(found)


def points_of(values: Mask, affine: Affine) -> NDArray[np.float64]:
    """The same of an array whose three indices the affine maps to mm LPS."""
    index = np.argwhere(values)
    at = index @ affine[:3, :3].T + affine[:3, 3]
    return np.column_stack([at, values[tuple(index.T)]])


def points_highdicom(path: Path) -> NDArray[np.float64]:
    from highdicom.seg import segread

    seg = segread(path)
    volume = seg.get_volume(combine_segments=True)
    to_class = np.array([0] + [class_of(seg, n) for n in seg.segment_numbers], np.uint8)
    return points_of(to_class[volume.array], volume.affine)


def points_dcmqi(path: Path, out: Path) -> NDArray[np.float64]:
    """By DCMTK and ITK."""
    out.mkdir()
    call = ["segimage2itkimage", "--inputDICOM", path, "--outputDirectory", out, "-t", "nii"]
    subprocess.run(call, check=True, capture_output=True, timeout=60)
    ds, found = pydicom.dcmread(path), []
    for name in sorted(out.glob("*.nii.gz")):
        loaded: Any = nib.load(name)
        values = np.asarray(loaded.dataobj).astype(np.uint8)
        (segment,) = set(np.unique(values).tolist()) - {0}
        found.append(
            points_of((values > 0) * np.uint8(class_of(ds, segment)), LPS_TO_RAS @ loaded.affine)
        )
    return np.concatenate(found)


def assert_same(points: NDArray[np.float64], mask: Mask, affine: Affine) -> None:
    """Whether points are the labelled voxels of (N, H, W), each with its class."""
    index = (points[:, :3] - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    places = np.rint(index).astype(int)
    assert np.abs(index - places).max() < 1e-4
    found = np.zeros(mask.shape[::-1], np.uint8)
    found[tuple(places.T)] = points[:, 3]
    assert len(points) == np.count_nonzero(mask)
    np.testing.assert_array_equal(found.T, mask)


def errors_of(path: Path) -> list[str]:
    call = ["dciodvfy", path]
    told = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False).stderr
    assert "Segmentation" in told
    return [line for line in told.splitlines() if line.startswith("Error")]


@pytest.fixture
def verify(need: Need) -> Callable[[Path], list[str]]:
    need("dciodvfy", shutil.which("dciodvfy") is not None, "apt-get install dicom3tools")
    return errors_of


def oriented(order: tuple[int, ...], flips: tuple[int, ...]) -> tuple[Mask, Affine, Mask, Affine]:
    """A mask and its affine; and both with the axes in another order and running other ways."""
    affine = turned([3, -1, 2], 0.6) @ PLAIN
    affine[:3, 3] = [-80, 40, 900]
    values = truth(3)
    mask, index = values.transpose(2, 1, 0).transpose(order), np.eye(4)[:, [*order, 3]]
    for axis in flips:
        index[:, 3] += index[:, axis] * (mask.shape[axis] - 1)
        index[:, axis] *= -1
        mask = np.flip(mask, axis)
    return values, affine, mask.transpose(2, 1, 0), affine @ index


@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_each_of_48_orientations(
    tmp_path: Path, order: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    values, affine, mask, turned_affine = oriented(order, flips)
    single_frames(tmp_path / "dicom", mask.shape, turned_affine)
    series = series_in(tmp_path / "dicom")
    path = write_seg(tmp_path / "seg.dcm", in_order(mask, series), series, FACTS)
    assert_same(points_plain(path), values, affine)
    assert_same(points_highdicom(path), values, affine)
    found, notes = read_own(path, series)
    np.testing.assert_array_equal(found, in_order(mask, series))
    assert notes == {}


@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS[:: len(ORIENTATIONS) // 8])
def test_dcmqi_reads_the_same(
    tmp_path: Path, need: Need, order: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    need("dcmqi", shutil.which("segimage2itkimage") is not None, "pip install dcmqi")
    values, affine, mask, turned_affine = oriented(order, flips)
    single_frames(tmp_path / "dicom", mask.shape, turned_affine)
    series = series_in(tmp_path / "dicom")
    path = write_seg(tmp_path / "seg.dcm", in_order(mask, series), series, FACTS)
    assert_same(points_dcmqi(path, tmp_path / "out"), values, affine)


def test_what_it_says(tmp_path: Path, verify: Callable[[Path], list[str]]) -> None:
    series = plain_series(tmp_path / "dicom")
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2, 3] = mask[3, 0, 0] = 1
    mask[1, 4, 5] = 3
    path = write_seg(tmp_path / "seg.dcm", in_order(mask, series), series, FACTS)
    assert verify(path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dicom", "seg.dcm"]
    ds = pydicom.dcmread(path)
    assert [s.SegmentLabel for s in ds.SegmentSequence] == ["liver", "lesion"]
    liver, lesion = ds.SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert liver.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("medpsp", "1.2.0")
    assert (ds.PatientID, ds.PatientName, ds.StudyDate) == ("CANARY", "Canary^CANARY", "20210304")
    assert (ds.StudyInstanceUID, ds.FrameOfReferenceUID) == ("1.2.4", "1.2.6")
    assert ds.SeriesInstanceUID != "1.2.5"
    assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.5"
    assert len(ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 4
    assert ds.SeriesDescription == "abdomen segmentation"
    assert (ds.DeviceSerialNumber, ds.SoftwareVersions) == ("ab12" * 4, "medpsp 1.2.0")
    assert ds["ContentCreatorName"].is_empty
    # 30 pixels a frame, so 3 frames are 90 bits: 12 bytes
    assert (ds.NumberOfFrames, len(ds.PixelData)) == (3, 12)
    sources = [
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for group in ds.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(sources) == ["1.2.3.2", "1.2.3.2", "1.2.3.4"]


def test_one_segment_is_named_in_each_frame(
    tmp_path: Path, verify: Callable[[Path], list[str]]
) -> None:
    series, mask = plain_series(tmp_path / "dicom"), 3 * truth(1, classes=2)
    path = write_seg(tmp_path / "seg.dcm", in_order(mask, series), series, FACTS)
    assert verify(path) == []
    assert [s.SegmentLabel for s in pydicom.dcmread(path).SegmentSequence] == ["lesion"]
    assert_same(points_plain(path), mask, PLAIN)
    assert_same(points_highdicom(path), mask, PLAIN)
    np.testing.assert_array_equal(read_own(path, series)[0], in_order(mask, series))


def test_where_nothing_was_found(tmp_path: Path, verify: Callable[[Path], list[str]]) -> None:
    series = plain_series(tmp_path / "dicom")
    path = write_seg(tmp_path / "seg.dcm", np.zeros(SHAPE, np.uint8), series, FACTS)
    assert verify(path) == []
    ds = pydicom.dcmread(path)
    assert [s.SegmentLabel for s in ds.SegmentSequence] == ["liver", "kidney", "lesion"]
    assert ds.NumberOfFrames == 3  # one a class
    found, notes = read_own(path, series)
    assert not found.any()
    assert notes == {"LABEL_EMPTY": 1}


def test_the_same_input_gives_the_same_uids(tmp_path: Path) -> None:
    series, mask = plain_series(tmp_path / "dicom"), truth()

    def uids(mask: Mask, facts: ModelFacts = FACTS) -> tuple[str, ...]:
        ds = pydicom.dcmread(write_seg(tmp_path / "seg.dcm", mask, series, facts))
        (dimensions,) = {i.DimensionOrganizationUID for i in ds.DimensionIndexSequence}
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        return ds.SeriesInstanceUID, ds.SOPInstanceUID, dimensions

    first = uids(mask)
    assert uids(np.asfortranarray(mask)) == first
    other = mask.copy()
    other[0, 0, 0] = 1 + other[0, 0, 0] % 3
    assert [a == b for a, b in zip(uids(other), first, strict=True)] == [True, False, False]
    assert not set(uids(mask, replace(FACTS, digest="cd"))) & set(first)


def test_members_of_a_zip(tmp_path: Path) -> None:
    single_frames(tmp_path / "dicom", SHAPE, PLAIN)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "dicom").iterdir():
            archive.write(path, path.name)
    refs = [
        ref
        for found in objects_of("a.zip", str(tmp_path / "a.zip"))
        if not found.code
        for ref in read_headers(found.place, found.name, ReadPolicy())
    ]
    assert len(refs) == 4
    (series,), _ = grouped(refs)
    mask = in_order(truth(), series)
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    np.testing.assert_array_equal(read_own(path, series)[0], mask)
    assert pydicom.dcmread(path).PatientID == "CANARY"


def enhanced(path: Path, places: list[int], **elements: Any) -> None:
    groups = [
        item(
            PlanePositionSequence=[
                item(ImagePositionPatient=numbers((PLAIN @ [0, 0, place, 1])[:3]))
            ],
            FrameContentSequence=[item(StackID="1", InStackPositionNumber=place + 1)],
        )
        for place in places
    ]
    geometry = plane(PLAIN)
    shared = item(
        PlaneOrientationSequence=[
            item(ImageOrientationPatient=geometry.pop("ImageOrientationPatient"))
        ],
        PixelMeasuresSequence=[item(**geometry)],
    )
    ds = image(
        places[0],
        (len(places), *SHAPE[1:]),
        SOPClassUID=EnhancedCTImageStorage,
        NumberOfFrames=len(places),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
        **elements,
    )
    save(ds, path)


def frames_named(path: Path) -> set[tuple[str, str, int | None]]:
    sources = [
        group.DerivationImageSequence[0].SourceImageSequence[0]
        for group in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    ]
    return {
        (s.ReferencedSOPClassUID, s.ReferencedSOPInstanceUID, s.get("ReferencedFrameNumber"))
        for s in sources
    }


def test_multi_frame_images(tmp_path: Path, verify: Callable[[Path], list[str]]) -> None:
    """Two objects, whose frames are out of order, are one volume."""
    enhanced(tmp_path / "dicom" / "a", [2, 0])
    enhanced(tmp_path / "dicom" / "b", [1, 3])
    series = series_in(tmp_path / "dicom")
    mask = truth(5)
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    assert verify(path) == []
    assert_same(points_plain(path), mask, PLAIN)
    assert_same(points_highdicom(path), mask, PLAIN)
    assert read_own(path, series) == (pytest.approx(mask), {})
    names = {"1.2.3.3": (1, 2), "1.2.3.2": (1, 2)}
    assert frames_named(path) == {
        (EnhancedCTImageStorage, uid, n) for uid, found in names.items() for n in found
    }
    images = pydicom.dcmread(path).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {i.ReferencedSOPInstanceUID for i in images} == set(names)
    # a stack that is a part of its object refers to its own frames
    part = replace(series, slices=series.slices[1:3], z_mm=series.z_mm[1:3])
    write_seg(path, mask[1:3], part, FACTS)
    assert frames_named(path) == {
        (EnhancedCTImageStorage, "1.2.3.2", 1),
        (EnhancedCTImageStorage, "1.2.3.3", 1),
    }


def cine(path: Path, frames: int, **elements: Any) -> Series:
    ds = image(
        0,
        (frames, 5, 6),
        SOPClassUID=UltrasoundMultiFrameImageStorage,
        Modality="US",
        NumberOfFrames=frames,
        **elements,
    )
    del ds.FrameOfReferenceUID
    save(ds, path)
    return series_in(path.parent, KEEP)


@pytest.mark.parametrize("frames", [1, 4])
def test_ultrasound_lies_on_the_frames_it_references(
    tmp_path: Path, verify: Callable[[Path], list[str]], frames: int
) -> None:
    series = cine(tmp_path / "dicom" / "cine", frames)
    assert series.affine is None
    mask = truth(6)[:frames]
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    assert verify(path) == []
    found, notes = read_own(path, series)
    np.testing.assert_array_equal(found, mask)
    assert notes == {"SEG_BY_REFERENCE": 3 * frames}
    assert "PlanePositionSequence" not in str(pydicom.dcmread(path))
    from highdicom.seg import segread

    seg, names = segread(path), ["1.2.3.1"]
    again = (
        seg.get_pixels_by_source_instance(names, combine_segments=True)
        if frames == 1
        else seg.get_pixels_by_source_frame(names[0], [1, 2, 3, 4], combine_segments=True)
    )
    np.testing.assert_array_equal(again, mask)


def test_a_cine_of_which_few_frames_show_something(
    tmp_path: Path, verify: Callable[[Path], list[str]]
) -> None:
    series, mask = cine(tmp_path / "dicom" / "cine", 9), np.zeros((9, 5, 6), np.uint8)
    mask[3, 1, 1], mask[7, 2, 2] = 2, 1
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    assert verify(path) == []
    np.testing.assert_array_equal(read_own(path, series)[0], mask)
    assert {frame for _, _, frame in frames_named(path)} == {4, 8}


def test_single_photographs(tmp_path: Path, verify: Callable[[Path], list[str]]) -> None:
    for number in range(3):
        ds = image(number, (5, 6), Modality="OT")
        del ds.FrameOfReferenceUID
        save(ds, tmp_path / "dicom" / f"{number}")
    series = series_in(tmp_path / "dicom", KEEP)
    mask = in_order(truth(8)[:3], series)
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    assert verify(path) == []
    np.testing.assert_array_equal(read_own(path, series)[0], mask)


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        ({"frame_of_reference": ""}, "FrameOfReferenceUID (0020,0052)"),
        ({"study_uid": ""}, "StudyInstanceUID (0020,000D)"),
        ({"sop_uid": "", "series_uid": ""}, "SeriesInstanceUID (0020,000E), SOPInstanceUID"),
    ],
)
def test_what_must_be_named_is_asked_for(
    tmp_path: Path, missing: dict[str, str], name: str
) -> None:
    series = plain_series(tmp_path / "dicom")
    refs = tuple(replace(ref, **missing) for ref in series.slices)
    told = refused(tmp_path, replace(series, slices=refs))
    assert told.startswith(f"SEG_NOT_WRITTEN: images without {name}")


def refused(tmp_path: Path, series: Series) -> str:
    with pytest.raises(DicomError) as caught:
        write_seg(tmp_path / "seg.dcm", truth(), series, FACTS)
    assert not list(tmp_path.glob("seg*"))
    told = str(caught.value)
    assert not any(text in told for text in (*IDENTITY, str(tmp_path)))
    return told


def test_a_file_that_is_gone_or_damaged(tmp_path: Path) -> None:
    series = plain_series(tmp_path / "dicom")
    refs = tuple(replace(ref, orientation=(1.0, 0.0)) for ref in series.slices)
    assert refused(tmp_path, replace(series, slices=refs)).startswith("SEG_NOT_WRITTEN: the head")
    shutil.rmtree(tmp_path / "dicom")
    assert refused(tmp_path, series).startswith("FILE_UNREADABLE")


ODD_HEADERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "empty": (
        {"PatientID": "", "PatientBirthDate": "", "PatientSex": None},
        {"PatientID": "", "PatientBirthDate": "", "PatientSex": "", "PatientName": "Canary^CANARY"},
    ),
    "invalid": (
        {"PatientSex": "unknown", "PatientBirthDate": "11.8.47", "StudyTime": "10:15"},
        {"PatientSex": "", "PatientBirthDate": "", "StudyTime": "", "PatientID": "CANARY"},
    ),
    "long": ({"PatientID": "CANARY" * 20}, {"PatientID": "CANARY" * 20}),
    "two ids": ({"PatientID": ["CANARY", "B"]}, {"PatientID": "['CANARY', 'B']"}),
    "latin": (
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg", "PatientID": "Ä1"},
        {"PatientName": "Müller^Jörg", "PatientID": "Ä1"},
    ),
    "japanese": (
        {
            "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
            "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        },
        {"PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"},
    ),
    "lossy": (
        {
            "LossyImageCompression": "01",
            "LossyImageCompressionRatio": "12.5",
            "LossyImageCompressionMethod": "ISO_10918_1",
        },
        {"LossyImageCompression": "01", "LossyImageCompressionMethod": "ISO_10918_1"},
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("case", ODD_HEADERS)
def test_odd_headers(tmp_path: Path, case: str) -> None:
    elements, expected = ODD_HEADERS[case]
    series = plain_series(tmp_path / "dicom", **elements)
    mask = in_order(truth(), series)
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    ds = pydicom.dcmread(path)
    assert {keyword: str(ds.get(keyword) or "") for keyword in expected} == expected
    np.testing.assert_array_equal(read_own(path, series)[0], mask)


def test_a_header_that_lacks_most(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def bare(path: Path) -> None:
        ds = pydicom.dcmread(path)
        for keyword in ("PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"):
            del ds[keyword]
        del ds.AccessionNumber, ds.StudyTime, ds.ReferringPhysicianName, ds.SliceThickness
        ds.PatientName = "CANARY without^a^^^^^comma"
        block = ds.private_block(0x0009, "CANARY", create=True)
        block.add_new(1, "LO", "CANARY")
        ds.save_as(path)

    single_frames(tmp_path / "dicom", SHAPE, PLAIN)
    for path in (tmp_path / "dicom").iterdir():
        bare(path)
    series = series_in(tmp_path / "dicom")
    path = write_seg(tmp_path / "seg.dcm", in_order(truth(), series), series, FACTS)
    assert pydicom.dcmread(path).PatientID in ("", None)
    assert not any(element.tag.is_private for element in pydicom.dcmread(path))
    assert "CANARY" not in caplog.text


def test_a_mask_of_other_size_or_classes_is_refused(tmp_path: Path) -> None:
    series = plain_series(tmp_path / "dicom")
    with pytest.raises(ValueError, match=r"mask \(4, 5, 5\), expected \(4, 5, 6\)"):
        write_seg(tmp_path / "seg.dcm", truth()[:, :, 1:], series, FACTS)
    with pytest.raises(ValueError, match="slice 0 up to class 4 of 4"):
        write_seg(tmp_path / "seg.dcm", truth() + np.uint8(1), series, FACTS)


def test_memory(tmp_path: Path) -> None:
    """At most 1.5 bytes a voxel beside the mask; here 6 classes are in each of 30 slices."""
    shape = (30, 256, 256)
    single_frames(tmp_path / "dicom", shape, PLAIN)
    series = series_in(tmp_path / "dicom")
    classes = ("background", *(f"organ {n}" for n in range(6)))
    mask = truth(7, shape, 7)
    import highdicom.seg  # noqa: F401 - not counted

    tracemalloc.start()
    write_seg(tmp_path / "seg.dcm", mask, series, replace(FACTS, classes=classes))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "seg.dcm").stat().st_size > 6 * mask.size / 8
    assert peak < 1.5 * mask.size, f"{peak / mask.size:.2f} bytes a voxel"


def test_pixels_are_not_read(tmp_path: Path) -> None:
    """A header is enough: files whose pixels are cut off still make a SEG."""
    series = plain_series(tmp_path / "dicom")
    for ref in series.slices:
        data = Path(ref.path).read_bytes()
        Path(ref.path).write_bytes(data[:-50])
    mask = in_order(truth(), series)
    path = write_seg(tmp_path / "seg.dcm", mask, series, FACTS)
    np.testing.assert_array_equal(read_own(path, series)[0], mask)
