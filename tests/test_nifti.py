"""NIfTI volumes for the device: what is refused, and how."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medpsp.dicom.nifti import open_nifti
from medpsp.errors import DicomError

VALUES = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "v.nii"
    nib.save(nib.Nifti1Image(VALUES, np.diag([2.0, 2.0, 3.0, 1.0])), path)
    return path


def test_whatever_is_wrong_with_a_header_is_one_refusal(volume: Path) -> None:
    whole, rng, codes = volume.read_bytes(), np.random.default_rng(2), set()
    for turn in range(300):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(352))] = int(rng.integers(256))
        volume.write_bytes(damaged[: int(rng.integers(len(whole)))] if turn % 4 == 0 else damaged)
        try:
            codes.add(len(list(open_nifti(volume).slices())) == 6)
        except DicomError as error:
            codes.add(error.code)
    assert {True, "NIFTI_UNREADABLE"} <= codes


@pytest.mark.parametrize(
    ("at", "value"), [(70, b"\x0f\x27"), (108, b"\0\0\xa0\xc0")], ids=["datatype", "vox_offset"]
)
def test_headers_that_nibabel_refuses_by_errors_of_its_own(
    volume: Path, at: int, value: bytes
) -> None:
    data = bytearray(volume.read_bytes())
    data[at : at + len(value)] = value
    volume.write_bytes(data)
    with pytest.raises(DicomError, match="NIFTI_UNREADABLE: HeaderDataError"):
        open_nifti(volume)


@pytest.mark.parametrize("name", ["V.NII.GZ", "v.nii.Gz"])
def test_a_name_in_capitals_is_packed_as_well(volume: Path, name: str) -> None:
    path = volume.with_name(name)
    path.write_bytes(gzip.compress(volume.read_bytes()))
    found = np.stack(list(open_nifti(path).slices()))
    assert (found == VALUES.transpose(2, 1, 0)).all()
