"""Cine, colour and slide tiles: objects of many frames become slices of the shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from launch.phantom import Phantom, write_archive
from medpsp.config import Config
from medpsp.errors import ArchiveError
from medpsp.types import Window
from shards.build import build_shards
from shards.check import check_shards
from shards.dataset import read_unit
from shards.index import read_index, read_objects
from shards.reader import ShardReader

ULTRASOUND, SLIDE = "1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.77.1.6"
Make = Callable[..., Config]


def colours(frames: int, rows: int = 12, columns: int = 16) -> NDArray[np.uint8]:
    """(N, H, W, 3): red is the row, green the column, blue ten times the frame."""
    z, y, x = np.indices((frames, rows, columns))
    return np.stack([y, x, 10 * z], axis=-1).astype(np.uint8)


def write_cine(path: Path, patient: str, pixels: NDArray[np.uint8], **elements: object) -> None:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = ULTRASOUND
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID = generate_uid(), generate_uid()
    ds.PatientID, ds.Modality = patient, "US"
    ds.NumberOfFrames, ds.Rows, ds.Columns = pixels.shape[:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def region(top: int, left: int, bottom: int, right: int) -> Dataset:
    """A calibrated region of 2-D tissue, 0.05 cm a pixel down and 0.02 cm across."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = 1, 1
    item.RegionLocationMinY0, item.RegionLocationMinX0 = top, left
    item.RegionLocationMaxY1, item.RegionLocationMaxX1 = bottom, right
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX, item.PhysicalDeltaY = 0.02, 0.05
    return item


@pytest.fixture
def cines(tmp_path: Path) -> Path:
    """Eight patients with a cine of three frames each; their names are in train, val and test."""
    for number in range(8):
        name = f"PHANTOM{number:03d}"
        path = tmp_path / "dicom" / f"{name}.dcm"
        write_cine(path, name, colours(3), SequenceOfUltrasoundRegions=[region(2, 4, 9, 13)])
    return tmp_path


def make_shards(root: Path, make_config: Make, **data: object) -> Config:
    config = make_config(root, root / "out", labels=None, modalities=["US", "SM"], **data)
    build_shards(config)
    assert list(check_shards(config.shards)) == []
    return config


def test_colour_cine_is_blanked_and_kept_as_rgb(
    cines: Path, make_config: Make, ray_once: None
) -> None:
    config = make_shards(cines, make_config, burned_in="blank")
    rows = read_index(config.shards)
    assert {row.bucket for row in rows} == {"12x16_uint8"}
    assert len(rows) == 24
    assert {(o.status, o.frames, o.kept) for o in read_objects(config.shards)} == {("kept", 3, 3)}
    expected = np.zeros((3, 12, 16, 3), np.uint8)
    expected[:, 2:10, 4:14] = colours(3)[:, 2:10, 4:14]
    reader = ShardReader(config.shards)
    for row in rows:
        image, label = reader.read(row.bucket, row.slot)
        np.testing.assert_array_equal(image, expected[row.frame])
        assert row.slice_index == row.frame
        assert (label == 255).all()
        assert row.spacing[:2] == (0.5, 0.2)
        assert row.spacing_source == "ultrasound"
        assert np.isnan(row.spacing[2])


def test_colour_may_become_grey(cines: Path, make_config: Make, ray_once: None) -> None:
    config = make_shards(cines, make_config, burned_in="keep", colour="grey")
    row = read_index(config.shards)[0]
    image, _ = ShardReader(config.shards).read(row.bucket, row.slot)
    red, green, blue = np.moveaxis(colours(3)[row.frame].astype(float), -1, 0)
    np.testing.assert_array_equal(image, np.rint(0.299 * red + 0.587 * green + 0.114 * blue))
    assert row.bucket == "12x16_int16"


def test_names_in_pixels_are_quarantined_unless_said_otherwise(
    cines: Path, make_config: Make, ray_once: None
) -> None:
    with pytest.raises(ArchiveError, match=r"nothing usable; found 8 PHI_BURNED_IN$"):
        make_shards(cines, make_config)


def test_tiles_of_a_slide_are_slices_and_its_label_never_is(
    tmp_path: Path, make_config: Make, ray_once: None
) -> None:
    for number in range(8):
        name = f"PHANTOM{number:03d}"
        slide = {"SOPClassUID": SLIDE, "Modality": "SM", "DimensionOrganizationType": "TILED_FULL"}
        path = tmp_path / "dicom" / name
        kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        write_cine(path / "volume.dcm", name, colours(4), ImageType=kind, **slide)
        kind = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
        write_cine(path / "label.dcm", name, colours(1), ImageType=kind, **slide)
    config = make_shards(tmp_path, make_config, burned_in="keep")
    rows = read_index(config.shards)
    assert len(rows) == 32
    assert {row.flags for row in rows} == {("TILED",)}
    codes = [(o.status, o.code) for o in read_objects(config.shards)]
    assert sorted(codes) == [("kept", "")] * 8 + [("quarantined", "PHI_BURNED_IN")] * 8


def test_the_network_may_be_shown_the_window_of_each_header(
    tmp_path: Path, make_config: Make, ray_once: None
) -> None:
    dicom, _ = write_archive(tmp_path, 8, Phantom(shape=(2, 16, 16)))
    paths = sorted(path for path in dicom.rglob("*") if path.name.startswith("IM"))
    for number, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        ds.WindowCenter, ds.WindowWidth = ["", 100 + number], ["", 51]  # VM 1-n, an empty value
        ds.VOILUTFunction = ("LINEAR", "SIGMOID", "CANARY")[number % 3]
        ds.save_as(path)
    config = make_config(tmp_path, tmp_path / "out", header_window=True)
    build_shards(config)
    rows = read_index(config.shards)
    functions = {row.window_function: row for row in rows}
    assert set(functions) == {"LINEAR", "SIGMOID", "LINEAR_EXACT"}
    shown = functions["LINEAR_EXACT"]  # nobody's function: as if nothing were configured
    assert (shown.window_center, shown.window_width) == (40, 400)
    assert "VOI_INVALID" in shown.flags
    linear = functions["LINEAR"]
    assert linear.window == Window(center=linear.voi_center, width=51, function="LINEAR")
    assert 100 <= linear.window_center < 116
    unit, _ = read_unit(ShardReader(config.shards), linear)
    image, _ = ShardReader(config.shards).read(linear.bucket, linear.slot)
    expected = (image - (linear.window_center - 0.5)) / 50 + 0.5  # C.11.2.1.2.1
    np.testing.assert_allclose(unit, expected.clip(0, 1), atol=1e-6)
