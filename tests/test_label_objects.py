"""Label objects of an archive: whose they are, and that none is lost without a trace."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import ExplicitVRLittleEndian

from launch.phantom import Phantom, write_series
from medpsp.config import Config
from medpsp.dicom.labelref import label_head
from medpsp.dicom.names import NameRule, name_rule
from medpsp.dicom.placement import LPS_TO_RAS
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.scan import find_labels
from medpsp.errors import SourceError
from medpsp.types import Place, Series
from shards.gather import LABELS, Gathered, file_id, gather
from tests.labelled import RTSTRUCT, SEG, contour, frame_of, item, rtstruct, seg, slice_ref

SHAPE = Phantom(shape=(4, 12, 10), spacing=(5.0, 2.0, 2.0))
AFFINE = SHAPE.affine_lps()
KEY = b"k" * 32
PATIENTS = tuple(f"P{n}" for n in range(6))  # some in training, some in validation
Make = Callable[..., Config]


def stored(path: Path, ds: Dataset, patient: str, uid: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.PatientID, ds.SOPInstanceUID = patient, "1.2.3"
    ds.FrameOfReferenceUID = ""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = uid
    ds.save_as(path, enforce_file_format=True)
    return path


def square(path: Path, patient: str, left: int = 2, name: str = "liver") -> Path:
    """An RTSTRUCT of 4 x 4 voxels on slice 1."""
    corners = np.array([(0, 0), (4, 0), (4, 4), (0, 4)]) - 0.5 + (left, 2)
    points = np.column_stack([corners, np.ones((4, 2))]) @ AFFINE.T
    return stored(path, rtstruct({name: [contour(points[:, :3])]}), patient, RTSTRUCT)


def whole(path: Path, patient: str) -> Path:
    """A SEG that is liver all over."""
    frames = [frame_of(AFFINE, k, 1) for k in range(4)]
    ds = seg("BINARY", frames, {1: "liver"}, AFFINE, SHAPE.shape[1:])
    ds.BitsAllocated = ds.BitsStored = ds.SamplesPerPixel = 1
    ds.HighBit = ds.PixelRepresentation = 0
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelData = pack_bits(np.ones(SHAPE.shape, np.uint8))
    return stored(path, ds, patient, SEG)


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def images(root: Path, patients: Sequence[str] = PATIENTS) -> None:
    for patient in patients:
        write_series(root / "dicom" / patient, patient, np.zeros(SHAPE.shape, np.int16), SHAPE)


def gathered(make_config: Make, root: Path, **data: Any) -> Gathered:
    """What is there, after a check that every object is accounted for."""
    config = make_config(root, root / "out", classes=("background", "liver", "tumour"), **data)
    found = gather(config.data, KEY)
    kept = {ref.file_id for p in found.planned for ref in p.series.slices}
    assert len(kept | {row.file_id for row in found.rows}) == found.objects
    return found


def series_of(found: Gathered, patient: str) -> Series:
    (series,) = (p.series for p in found.planned if p.series.first.patient_id == patient)
    return series


def code_of(found: Gathered, name: str) -> tuple[str, str]:
    (row,) = (row for row in found.rows if row.file_id == file_id(KEY, name))
    return row.status, row.code


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(1) as made:
        yield made


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def test_every_object_of_a_labels_folder_has_a_row(tmp_path: Path, make_config: Make) -> None:
    images(tmp_path)
    for patient in PATIENTS:
        square(tmp_path / "masks" / patient, patient)
    square(tmp_path / "masks" / "stranger", "nobody")
    cut(square(tmp_path / "masks" / "cut", PATIENTS[0]), 0.7)
    whole(tmp_path / "masks" / "other", PATIENTS[0])
    write_series(tmp_path / "masks" / "s", "P0", np.zeros((1, 12, 10), np.int16), SHAPE)
    (tmp_path / "masks" / "note.txt").write_text("what the doctor said")
    (tmp_path / "masks" / "empty").touch()
    (tmp_path / "masks" / "gone").symlink_to(tmp_path / "nowhere")
    found = gathered(make_config, tmp_path, label_format="rtstruct")
    assert found.objects == 6 * 4 + 6 + 7
    assert {row.file_id for row in found.rows} == {
        file_id(KEY, LABELS + p.relative_to(tmp_path / "masks").as_posix())
        for p in (tmp_path / "masks").rglob("*")
        if p.name != "s"
    }
    assert Counter((row.status, row.code) for row in found.rows) == {
        ("kept", "LABEL_USED"): 6,
        ("quarantined", "LABEL_UNMATCHED"): 1,
        ("quarantined", "HDR_TRUNCATED"): 1,
        ("skipped", "LABEL_OBJECT"): 1,
        ("skipped", "LABEL_NOT"): 1,
        ("skipped", "NOT_DICOM"): 1,
        ("quarantined", "FILE_EMPTY"): 1,
        ("skipped", "NOT_REGULAR"): 1,
    }


@pytest.mark.parametrize("where", ["masks", "dicom/labels", "dicom"])
def test_a_damaged_object_marks_the_series_of_its_patient(
    tmp_path: Path, make_config: Make, where: str
) -> None:
    images(tmp_path)
    folder = tmp_path / (where if where != "dicom" else "dicom/among them")
    for patient in PATIENTS:
        square(folder / f"{patient}-liver", patient)
    cut(square(folder / "header", PATIENTS[0], name="tumour"), 0.7)  # parsing fails
    square(folder / "names", PATIENTS[1], name="tumour")
    twice = rtstruct({"tumour": []})
    contours = [contour([(0, 0, 0), (1, 0, 0), (1, 1, 0)])]
    contours[0].ContourData = ["1", "2"]
    twice.ROIContourSequence = [item(ReferencedROINumber=1, ContourSequence=contours)]
    stored(folder / "points", twice, PATIENTS[2], RTSTRUCT)  # its references cannot be read
    found = gathered(
        make_config,
        tmp_path,
        label_format="rtstruct",
        labels=None if where == "dicom" else tmp_path / where,
    )
    marked = {p: "LABEL_INCOMPLETE" in series_of(found, p).flags for p in PATIENTS}
    assert marked == {p: p in ("P0", "P2") for p in PATIENTS}
    prefix = LABELS if where == "masks" else folder.relative_to(tmp_path / "dicom").as_posix() + "/"
    assert code_of(found, prefix + "header") == ("quarantined", "HDR_TRUNCATED")
    assert code_of(found, prefix + "points") == ("quarantined", "RT_POINT_INVALID")
    assert code_of(found, prefix + "names") == ("kept", "LABEL_USED")
    assert len(series_of(found, "P1").masks) == 2
    assert found.objects == 6 * 4 + 6 + 3


@pytest.mark.parametrize("by", ["series", "image"])
def test_contours_of_a_modality_that_is_left_out_are_not_those_of_another(
    tmp_path: Path, make_config: Make, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    images(tmp_path)
    for patient in PATIENTS:
        square(tmp_path / "dicom/labels" / patient, patient)
    mr = Phantom(shape=(4, 12, 10), spacing=(5.0, 2.0, 2.0), modality="MR")
    values = np.zeros(SHAPE.shape, np.int16)
    one = pydicom.dcmread(write_series(tmp_path / "dicom/mr", "P0", values, mr)[0])
    path = square(tmp_path / "dicom/labels/of-mr", "P0", left=5)
    ds = pydicom.dcmread(path)
    if by == "series":
        series = item(SeriesInstanceUID=one.SeriesInstanceUID)
        study = item(RTReferencedSeriesSequence=[series])
        ds.ReferencedFrameOfReferenceSequence = [item(RTReferencedStudySequence=[study])]
    else:
        (drawn,) = ds.ROIContourSequence[0].ContourSequence
        drawn.ContourImageSequence = [item(ReferencedSOPInstanceUID=one.SOPInstanceUID)]
    ds.save_as(path)
    found = gathered(make_config, tmp_path, label_format="rtstruct", labels=None, modalities=["CT"])
    assert code_of(found, "labels/of-mr") == ("skipped", "LABEL_OTHER_MODALITY")
    assert len(series_of(found, "P0").masks) == 1
    assert "LABEL_INCOMPLETE" not in series_of(found, "P0").flags
    assert "label object" not in caplog.text


def test_a_labels_folder_below_the_archive_leaves_the_rest_of_it_out(
    tmp_path: Path, make_config: Make
) -> None:
    images(tmp_path)
    for patient in PATIENTS:
        square(tmp_path / "dicom" / "good" / patient, patient)
        square(tmp_path / "dicom" / "old" / patient, patient, left=5)
    labels = tmp_path / "dicom" / "good"
    found = gathered(make_config, tmp_path, label_format="rtstruct", labels=labels)
    assert found.objects == 6 * 4 + 12
    assert Counter(row.code for row in found.rows) == {"LABEL_USED": 6, "LABEL_OBJECT": 6}


def test_the_start_of_an_object_says_whose_it_is(tmp_path: Path, pool: SandboxPool) -> None:
    path = square(tmp_path / "f", "PATIENT")
    assert label_head(Place(str(path))) == ("rtstruct", "PATIENT")
    damaged = cut(path, 0.8)
    (label,) = find_labels(tmp_path, str, pool).labels
    assert (label.kind, label.code, label.patient_id) == ("rtstruct", "HDR_TRUNCATED", "PATIENT")
    damaged.write_bytes(damaged.read_bytes()[:140])
    found = find_labels(tmp_path, str, pool)
    assert found.labels == []
    assert [row.status for row in found.rows] == ["quarantined"]


RULE = NameRule(classes=("background", "liver", "tumour"))


def read(box: Sandbox, series: Series, rule: NameRule = RULE, resample: str = "never") -> Any:
    return box.labels(series, rule, "affine", resample)


def test_a_label_object_that_is_cut_short_is_no_image_that_is(
    tmp_path: Path, make_config: Make, box: Sandbox
) -> None:
    images(tmp_path)
    for patient in PATIENTS:
        path = whole(tmp_path / "masks" / patient, patient)
    size = os.path.getsize(path)
    found = gathered(make_config, tmp_path, label_format="seg")
    assert read(box, series_of(found, PATIENTS[-1])).values.all()
    os.truncate(path, size - 40)  # of 60 bytes of pixels
    with pytest.raises(SourceError, match="LABEL_UNREADABLE: PIX_TRUNCATED: "):
        read(box, series_of(found, PATIENTS[-1]))


def test_two_versions_of_an_rtstruct_are_refused_or_united_on_demand(
    tmp_path: Path, make_config: Make, box: Sandbox
) -> None:
    images(tmp_path)
    for patient in PATIENTS:
        square(tmp_path / "masks" / patient, patient)
    square(tmp_path / "masks" / "P0 again", "P0")
    square(tmp_path / "masks" / "P1 moved", "P1", left=5)
    square(tmp_path / "masks" / "P2 tumour", "P2", left=6, name="tumour")
    found = gathered(make_config, tmp_path, label_format="rtstruct")
    assert (read(box, series_of(found, "P0")).values == 1).sum() == 16
    with pytest.raises(SourceError, match="LABEL_SEVERAL: 2 objects"):
        read(box, series_of(found, "P1"))
    assert np.bincount(read(box, series_of(found, "P2")).values.ravel())[1:].tolist() == [16, 16]
    config = make_config(tmp_path, tmp_path / "out", label_overlap="priority")
    rule = NameRule(classes=RULE.classes, overlap=name_rule(config.data).overlap)
    united = read(box, series_of(found, "P1"), rule)
    assert (united.values == 1).sum() == 28  # 16 + 16, and 4 in both
    assert united.notes == {"LABEL_SEVERAL": 1}


def test_a_mask_of_one_series_is_no_background_of_another(
    tmp_path: Path, make_config: Make, box: Sandbox
) -> None:
    images(tmp_path)
    above = AFFINE.copy()
    above[:3, 3] += 20 * AFFINE[:3, 2]  # the same lattice, 100 mm higher
    ras = LPS_TO_RAS @ AFFINE
    (tmp_path / "masks").mkdir()
    for patient in PATIENTS:
        values = np.full(SHAPE.shape[::-1], patient != "P1", np.uint8)
        nib.save(nib.Nifti1Image(values, ras), tmp_path / "masks" / f"{patient}.nii.gz")
    found = gathered(make_config, tmp_path)
    near = series_of(found, "P0")
    far = Series(
        slices=near.slices,
        affine=tuple(map(tuple, above.tolist())),
        z_mm=near.z_mm,
        masks=near.masks,
        mask_kind="nifti",
        mask_partial=True,  # as of every series that shares its mask with another
    )
    assert read(box, near).values.all()
    for resample in ("never", "nearest"):
        with pytest.raises(SourceError, match="MASK_ELSEWHERE"):
            read(box, far, resample=resample)
    assert read(box, series_of(found, "P1")).notes == {"LABEL_EMPTY": 1}


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_a_large_mask_takes_little_more_than_its_classes(
    tmp_path: Path, dtype: type, name: str
) -> None:
    # 64 M voxels: as int64 512 MiB, as uint8 64; they are read, and mapped into as many
    shape = (512, 512, 256)
    image = nib.Nifti1Image(np.broadcast_to(np.ones((), dtype), shape), LPS_TO_RAS)
    nib.save(image, tmp_path / name)
    with Sandbox(memory_mib=256) as box:
        affine = tuple(map(tuple, np.eye(4).tolist()))
        series = large(affine, Place(str(tmp_path / name)))
        found = read(box, series)
    assert found.values.shape == shape[::-1]
    assert found.values.dtype == np.uint8
    assert found.values.all()
    assert found.notes == {}


def large(affine: Any, place: Place) -> Series:
    refs = [slice_ref(rows=512, columns=512, sop_uid=f"1.{k}") for k in range(256)]
    return Series(slices=tuple(refs), affine=affine, z_mm=(), masks=(place,), mask_kind="nifti")
