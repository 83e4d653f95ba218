"""Copies of a scan under another patient, on real CT: every one is found, and nothing else is.

Eight patients, 424 slices cut around a sarcoma. Each copy is made of one of them in train, in the
ways that scans travel: in 8 bits, in a window of the abdomen, as JPEG, at half the size.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.uid import generate_uid

from medpsp.config import Config
from medpsp.identity import create_key, load_key, split_of
from shards.build import build_shards
from shards.check import check_shards
from shards.index import read_index

Picture = NDArray[np.float64]


def windowed(hu: Picture, centre: float, width: float) -> Picture:
    return (((hu - centre) / width + 0.5).clip(0, 1) * 255).round()


def jpeg(hu: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(windowed(hu, 500, 3100).astype(np.uint8)).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer)).astype(np.float64)


def halved(hu: Picture) -> Picture:
    even = hu[: hu.shape[0] // 2 * 2, : hu.shape[1] // 2 * 2]
    blocks = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2)
    return np.asarray(blocks.mean((1, 3)).round() + 1024)


COPIES: tuple[Callable[[Picture], Picture], ...] = (
    lambda hu: windowed(hu, 500, 3100),
    lambda hu: windowed(hu, 40, 400),
    jpeg,
    halved,
)


def write_copy(
    source: Path, target: Path, patient: str, change: Callable[[Picture], Picture]
) -> None:
    """A scan as another patient's, with other pixels."""
    target.mkdir(parents=True)
    series, study = generate_uid(), generate_uid()
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.suffix != ".gz")):
        if not path.is_file():
            continue
        ds = dcmread(path)
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        values = change(hu)
        ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = patient, study, series
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.Rows, ds.Columns = values.shape
        ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 0, "1", "0"
        ds.PixelData = values.astype("<u2").tobytes()
        ds.save_as(target / f"{number:04d}")


@pytest.mark.timeout(600)
def test_copies_of_real_scans_are_found_and_nothing_else(data: Path, tmp_path: Path):
    create_key(tmp_path / "key", "public key of a public data set")
    key = load_key(tmp_path / "key")
    source = data / "seg3d" / "sts_dicom_rtstruct"
    patients = sorted(path.name for path in source.iterdir() if path.is_dir())
    for patient in patients:
        shutil.copytree(source / patient / "CT" / "image", tmp_path / "dicom" / patient)
    tree = {
        "archive": tmp_path / "dicom",
        "classes": ["background", "tumour"],
        "unlabelled": "keep",
        "key_file": tmp_path / "key",
        "split": {"val": 0.25, "test": 0.2},
        "modalities": ["CT"],
    }
    config = Config.model_validate({"out": tmp_path / "run", "data": tree})
    build_shards(config)
    splits = {row.split for row in read_index(config.shards)}
    assert splits == {"train", "val", "test"}
    assert list(check_shards(config.shards)) == []
    train = [name for name in patients if split_of(key, name, 0.25, 0.2) == "train"]
    names = (f"C{n}" for n in range(99) if split_of(key, f"C{n}", 0.25, 0.2) == "val")
    for patient, name, change in zip(train, names, COPIES, strict=False):
        write_copy(source / patient / "CT" / "image", tmp_path / "dicom" / name, name, change)
    build_shards(config)
    problems = list(check_shards(config.shards))
    assert [problem.kind for problem in problems] == ["copy"] * len(COPIES)
    rows = {(row.patient, row.split) for row in read_index(config.shards)}
    found = [sorted(p for p, _ in rows if p in problem.text) for problem in problems]
    assert len({patient for pair in found for patient in pair}) == 2 * len(COPIES)
