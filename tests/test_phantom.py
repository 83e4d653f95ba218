"""The factory that the demo and the tests stand on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from launch.phantom import CLASSES, Phantom, draw, to_mr, write_archive, write_mask, write_series
from medpsp.dicom.read import read_pixels
from tests.factory import header_of, headers, values_of

SMALL = Phantom(shape=(6, 48, 40))


def test_a_seed_draws_the_same_patient() -> None:
    hu, label = draw(SMALL, 5)
    again, label_again = draw(SMALL, 5)
    assert hu.dtype == np.int16
    assert label.dtype == np.uint8
    assert hu.shape == label.shape == SMALL.shape
    assert (hu == again).all()
    assert (label == label_again).all()


def test_patients_differ() -> None:
    drawn = [draw(SMALL, seed) for seed in range(6)]
    for i, (hu, label) in enumerate(drawn):
        for other, other_label in drawn[:i]:
            assert (hu != other).mean() > 0.5
            assert (label != other_label).mean() > 0.01


@pytest.mark.parametrize("shape", [(4, 32, 32), (6, 48, 40), (12, 64, 64)])
def test_every_class_is_in_every_patient(shape: tuple[int, int, int]) -> None:
    for seed in range(30):
        _, label = draw(Phantom(shape=shape), seed)
        assert np.unique(label).tolist() == list(range(len(CLASSES)))


def test_organs_have_their_contrast() -> None:
    hu, label = draw(Phantom(shape=(12, 96, 96)), 0)
    means = [float(hu[label == index].mean()) for index in range(4)]
    assert means[1:] == pytest.approx([70, 140, 15], abs=25)  # noise 22 HU, organ offset 8 HU
    assert means[0] < -300  # mostly air
    assert hu.min() >= -1024
    assert hu.max() <= 3000


def test_files_are_what_the_geometry_says(tmp_path: Path) -> None:
    phantom = replace(SMALL, spacing=(5.0, 2.0, 1.5))
    hu, _ = draw(phantom, 1)
    paths = write_series(tmp_path, "P7", hu, phantom)
    assert [path.name for path in paths] == [f"IM{n:04d}" for n in (6, 5, 4, 3, 2, 1)]
    ds = pydicom.dcmread(paths[2])
    assert (ds.PatientID, str(ds.PatientName)) == ("P7", "Phantom^P7")
    assert ds.InstanceNumber == 4
    assert [float(v) for v in ds.PixelSpacing] == [2, 1.5]
    assert [float(v) for v in ds.ImagePositionPatient] == [-30, -48, -690]
    assert (ds.pixel_array.astype(int) - 1024 == hu[2]).all()
    assert len({pydicom.dcmread(path).SOPInstanceUID for path in paths}) == 6


def test_folders_are_series_of_one_patient(tmp_path: Path) -> None:
    hu, _ = draw(SMALL, 1)
    refs = [header_of(write_series(tmp_path / name, "P", hu, SMALL)[0]) for name in ("a", "b")]
    assert refs[0].series_uid != refs[1].series_uid
    assert refs[0].sop_uid != refs[1].sop_uid


def test_mr_has_no_rescale_and_no_window(tmp_path: Path) -> None:
    phantom = replace(SMALL, modality="MR")
    values = to_mr(draw(phantom, 1)[0], 1)
    assert values.min() == 0
    path = write_series(tmp_path, "P", values, phantom)[0]
    ds = pydicom.dcmread(path)
    assert ds.SOPClassUID.name == "MR Image Storage"
    assert not {"RescaleSlope", "RescaleIntercept", "WindowCenter"} & set(ds.dir())
    assert (values_of(path) == values[0]).all()


def test_mr_scale_differs_between_patients() -> None:
    hu, _ = draw(SMALL, 1)
    assert to_mr(hu, 1).max() != to_mr(hu, 2).max()
    assert (to_mr(hu, 1) == to_mr(hu, 1)).all()


def test_mask_is_stored_in_another_axis_order(tmp_path: Path) -> None:
    _, label = draw(SMALL, 1)
    write_mask(tmp_path / "a" / "m.nii.gz", label, SMALL)
    image = nib.load(tmp_path / "a" / "m.nii.gz")
    stored = np.asarray(image.dataobj)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")  # the DICOM runs to L, P, S
    assert (stored[::-1, ::-1].transpose(2, 1, 0) == label).all()


def test_archive_is_messy_and_repeats(tmp_path: Path) -> None:
    for name in ("one", "two"):
        dicom, masks = write_archive(tmp_path / name, 4, SMALL, seed=3)
        assert sorted(p.name for p in masks.iterdir()) == [f"PHANTOM00{n}.nii.gz" for n in range(4)]
        assert (dicom / "README.txt").is_file()
        assert (dicom / "0" / "EMPTY").stat().st_size == 0
        assert (dicom / "0" / "CUT").stat().st_size == 400
        assert sum(p.is_file() for p in dicom.rglob("*")) == 4 * 6 + 3
    volumes = [
        [read_pixels(ref) for ref in headers(tmp_path / name / "dicom" / "0" / "S00003")]
        for name in ("one", "two")
    ]
    assert (np.stack(volumes[0]) == np.stack(volumes[1])).all()
