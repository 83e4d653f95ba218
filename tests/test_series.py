"""Slices in the order of the body, and a grid that is right in the world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from launch.phantom import Phantom, write_series
from medpsp.dicom.read import read_pixels
from medpsp.dicom.series import group_series
from medpsp.types import Series, SliceRef
from tests.factory import headers, ramp

SMALL = Phantom(shape=(5, 6, 8), spacing=(5.0, 2.0, 3.0))
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def world(series: Series, column: int, row: int, number: int) -> list[float]:
    assert series.affine is not None
    point = np.array(series.affine) @ [column, row, number, 1]
    return [round(float(v), 4) + 0.0 for v in point[:3]]


def slices_at(
    *depths: float, directions: tuple[float, ...] = AXIAL, **fields: Any
) -> list[SliceRef]:
    """Slices whose corners lie ``depths`` mm along the normal, in the order given."""
    normal = np.cross(directions[:3], directions[3:])
    made = []
    for number, depth in enumerate(depths):
        base: dict[str, Any] = {
            "path": f"/p{number}",
            "file_id": f"f{number}",
            "patient_id": "p",
            "series_uid": "1.2",
            "sop_uid": f"1.2.{number}",
            "modality": "CT",
            "rows": 6,
            "columns": 8,
            "dtype": "int16",
            "photometric": "MONOCHROME2",
            "position": tuple(float(v) for v in depth * normal),
            "orientation": directions,
            "pixel_spacing": (2.0, 3.0),
        }
        made.append(SliceRef(**{**base, **fields}))
    return made


def codes(refs: list[SliceRef]) -> Counter[str]:
    return Counter(error.code for _, error in group_series(refs)[1])


def only(refs: list[SliceRef]) -> Series:
    series, refused = group_series(refs)
    assert not refused
    assert len(series) == 1
    return series[0]


def edit_files(paths: list[Path], edit: Callable[[Dataset, int], object]) -> None:
    for number, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        edit(ds, number)
        ds.save_as(path)


def test_order_is_by_position_whatever_the_names_and_numbers_say(tmp_path: Path) -> None:
    source = ramp(SMALL.shape)
    paths = write_series(tmp_path / "made", "P", source, SMALL)
    numbers = [3, 1, 5, 2, 4]
    edit_files(paths, lambda ds, i: setattr(ds, "InstanceNumber", numbers[i]))
    for path, name in zip(paths, "dbeac", strict=True):
        path.rename(tmp_path / "made" / name)
    series = only(headers(tmp_path / "made"))
    assert (np.stack([read_pixels(ref) for ref in series.slices]) == source).all()
    assert [ref.file_id for ref in series.slices] == list("dbeac")
    assert series.z_mm == (-700, -695, -690, -685, -680)


def test_empty_instance_number_is_no_matter(tmp_path: Path) -> None:
    paths = write_series(tmp_path, "P", ramp(SMALL.shape), SMALL)
    edit_files(paths, lambda ds, i: setattr(ds, "InstanceNumber", None))
    assert len(only(headers(tmp_path)).slices) == 5


def test_order_of_the_input_is_no_matter() -> None:
    refs = slices_at(0, 5, 10, 15, 20, 25) + slices_at(0, 5, series_uid="1.3", sop_uid="x")
    expected = group_series(refs)
    rng = np.random.default_rng(0)
    for _ in range(5):
        shuffled = [refs[i] for i in rng.permutation(len(refs))]
        series, refused = group_series(shuffled)
        assert series == expected[0]
        assert [ref for ref, _ in refused] == [ref for ref, _ in expected[1]]


def test_axial_grid_in_the_world(tmp_path: Path) -> None:
    write_series(tmp_path, "P", ramp(SMALL.shape), SMALL)
    series = only(headers(tmp_path))
    # 8 columns of 3 mm and 6 rows of 2 mm around 0, slices of 5 mm from -700
    assert world(series, 0, 0, 0) == [-12, -6, -700]
    assert world(series, 2, 0, 0) == [-6, -6, -700]  # a column step is PixelSpacing[1]
    assert world(series, 0, 2, 0) == [-12, -2, -700]  # a row step is PixelSpacing[0]
    assert world(series, 2, 1, 3) == [-6, -4, -685]


def test_oblique_grid_in_the_world(tmp_path: Path) -> None:
    phantom = replace(SMALL, oblique_deg=30)
    write_series(tmp_path, "P", ramp(SMALL.shape), phantom)
    series = only(headers(tmp_path))
    # 2 columns: 6 mm along (cos 30, sin 30) = (5.1962, 3)
    assert world(series, 2, 0, 0) == pytest.approx([-6.8038, -3, -700], abs=1e-4)
    # 3 rows: 6 mm along (-sin 30, cos 30) = (-3, 5.1962)
    assert world(series, 0, 3, 1) == pytest.approx([-15, -0.8038, -695], abs=1e-4)


def test_tilted_gantry_gives_a_sheared_grid(tmp_path: Path) -> None:
    phantom = replace(SMALL, tilt_deg=20)
    source = ramp(SMALL.shape)
    write_series(tmp_path, "P", source, phantom)
    series = only(headers(tmp_path))
    # each slice 5 mm further up lies 5 * tan 20 = 1.8199 mm further back
    assert world(series, 0, 0, 1) == pytest.approx([-12, -4.1801, -695], abs=1e-4)
    assert world(series, 2, 1, 4) == pytest.approx([-6, -4 + 4 * 1.8199, -680], abs=1e-3)
    assert series.z_mm == pytest.approx((-700, -695, -690, -685, -680), abs=1e-4)
    assert (np.stack([read_pixels(ref) for ref in series.slices]) == source).all()


@pytest.mark.parametrize(
    ("directions", "slice_step"),
    [
        ((1, 0, 0, 0, -1, 0), [0, 0, -5]),  # rows run to the front: the normal points down
        ((0, 1, 0, 0, 0, -1), [-5, 0, 0]),  # sagittal
        ((1, 0, 0, 0, 0, -1), [0, 5, 0]),  # coronal
    ],
)
def test_slices_advance_along_row_cross_column(
    directions: tuple[float, ...], slice_step: list[float]
) -> None:
    series = only(slices_at(10, 0, 5, directions=directions))
    assert [ref.file_id for ref in series.slices] == ["f1", "f2", "f0"]
    assert world(series, 0, 0, 1) == slice_step
    assert world(series, 1, 0, 0) == [3 * v for v in directions[:3]]
    assert world(series, 0, 1, 0) == [2 * v for v in directions[3:]]


def test_direction_cosines_are_normalised() -> None:
    series = only(slices_at(0, 5, directions=(1.0004, 0, 0, 0, 0.9996, 0)))
    assert world(series, 1, 1, 0) == [3, 2, 0]


def test_single_slice() -> None:
    series = only(slices_at(7))
    assert world(series, 1, 1, 0) == [3, 2, 7]
    assert series.z_mm == (7,)


def test_copied_file_is_a_duplicate_and_the_series_is_whole(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "made", "P", ramp(SMALL.shape), SMALL)
    (tmp_path / "made" / "zcopy").write_bytes(paths[2].read_bytes())
    series, refused = group_series(headers(tmp_path / "made"))
    assert [len(item.slices) for item in series] == [5]
    assert [(ref.file_id, error.code) for ref, error in refused] == [("zcopy", "DUP_SOP_UID")]


def test_files_of_one_uid_that_differ_are_all_refused() -> None:
    refs = slices_at(0, 5, 10, 15)
    moved = replace(refs[3], path="/q", file_id="q", position=(0.0, 0.0, 99.0))
    series, refused = group_series([*refs, moved])
    assert [len(item.slices) for item in series] == [3]
    assert [(ref.file_id, error.code) for ref, error in refused] == [
        ("f3", "DUP_CONFLICT"),
        ("q", "DUP_CONFLICT"),
    ]


@pytest.mark.parametrize(
    ("depths", "code"),
    [
        ((0, 5, 5, 10), "DUP_POSITION"),
        ((0, 5, 5.005, 10), "DUP_POSITION"),
        ((0, 5, 15, 20), "MISSING_SLICES"),
        ((0, 5, 15), "MISSING_SLICES"),  # of two distances the smaller one is the spacing
        ((0, 5, 10, 25, 30), "MISSING_SLICES"),  # two in a row
        ((0, 5, 10, 17, 22), "UNEVEN_SPACING"),
        ((0, 5, 10, 15.1, 20), "UNEVEN_SPACING"),  # 2 % is no missing slice
        ((0, 5, 10, 12, 17), "UNEVEN_SPACING"),
    ],
)
def test_irregular_positions_are_refused(depths: tuple[float, ...], code: str) -> None:
    assert codes(slices_at(*depths)) == {code: len(depths)}


def test_noise_of_decimal_strings_is_regular() -> None:
    series = only(slices_at(0, 5.02, 10.01, 14.99, 20))
    assert world(series, 0, 0, 4) == [0, 0, 20]


def test_missing_slice_of_real_files(tmp_path: Path) -> None:
    write_series(tmp_path, "P", ramp(SMALL.shape), SMALL)[2].unlink()
    assert codes(headers(tmp_path)) == {"MISSING_SLICES": 4}


def test_slice_beside_the_line_is_refused() -> None:
    refs = slices_at(0, 5, 10, 15)
    refs[2] = replace(refs[2], position=(3.0, 0.0, 10.0))
    assert codes(refs) == {"UNEVEN_SPACING": 4}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"position": None}, "GEOM_MISSING"),
        ({"orientation": None}, "GEOM_MISSING"),
        ({"pixel_spacing": None}, "GEOM_MISSING"),
        ({"pixel_spacing": (0.0, 3.0)}, "GEOM_BAD_SPACING"),
        ({"pixel_spacing": (2.0, -3.0)}, "GEOM_BAD_SPACING"),
        ({"orientation": (1.0, 0.0, 0.0, 0.01, 1.0, 0.0)}, "GEOM_BAD_IOP"),
        ({"orientation": (0.0,) * 6}, "GEOM_BAD_IOP"),
        ({"orientation": (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)}, "GEOM_BAD_IOP"),
    ],
)
def test_unusable_geometry(fields: dict[str, Any], code: str) -> None:
    assert codes([replace(ref, **fields) for ref in slices_at(0, 5)]) == {code: 2}


def test_one_slice_without_position_costs_only_itself() -> None:
    series, refused = group_series([*slices_at(0, 5), *slices_at(0, position=None, sop_uid="x")])
    assert [len(item.slices) for item in series] == [2]
    assert [error.code for _, error in refused] == ["GEOM_MISSING"]


def test_two_series_in_one_folder_stay_apart(tmp_path: Path) -> None:
    first, second = ramp(SMALL.shape), ramp(SMALL.shape) + np.int16(1000)
    paths = write_series(tmp_path / "a", "P", first, SMALL)
    for path in write_series(tmp_path / "b", "P", second, SMALL):
        path.rename(paths[0].parent / f"b{path.name}")
    series, refused = group_series(headers(tmp_path / "a"))
    assert not refused
    volumes = [np.stack([read_pixels(ref) for ref in item.slices]) for item in series]
    assert sorted(int(v[0, 0, 0]) for v in volumes) == [-900, 100]
    assert all((v - v[0, 0, 0] == first + 900).all() for v in volumes)


def test_localizer_of_the_same_series_stays_apart(tmp_path: Path) -> None:
    write_series(tmp_path / "made", "P", ramp(SMALL.shape), SMALL)
    path = write_series(tmp_path / "scout", "P", ramp((1, 6, 8)), replace(SMALL, shape=(1, 6, 8)))[
        0
    ]
    ds = pydicom.dcmread(path)
    ds.SeriesInstanceUID = headers(tmp_path / "made")[0].series_uid
    ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ds.save_as(tmp_path / "made" / "scout")
    series, refused = group_series(headers(tmp_path / "made"))
    assert not refused
    assert sorted(len(item.slices) for item in series) == [1, 5]


def test_frames_of_reference_of_one_series_stay_apart(tmp_path: Path) -> None:
    paths = write_series(tmp_path, "P", ramp(SMALL.shape), SMALL)
    other = generate_uid()
    edit_files(paths[3:], lambda ds, i: setattr(ds, "FrameOfReferenceUID", other))
    series, refused = group_series(headers(tmp_path))
    assert not refused
    assert sorted(len(item.slices) for item in series) == [2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"patient_id": "q"},
        {"series_uid": "1.3"},
        {"modality": "MR"},
        {"rows": 7},
        {"columns": 6},
        {"dtype": "float32"},
        {"photometric": "MONOCHROME1"},
        {"orientation": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)},
        {"pixel_spacing": (3.0, 2.0)},
        {"pixel_spacing": (2.0, 3.1)},
    ],
)
def test_what_differs_is_another_series(fields: dict[str, Any]) -> None:
    other = [
        replace(ref, sop_uid=f"9.{ref.sop_uid}", file_id=f"g{i}", **fields)
        for i, ref in enumerate(slices_at(0, 5, 10))
    ]
    series, refused = group_series([*slices_at(0, 5), *other])
    assert not refused
    assert sorted(len(item.slices) for item in series) == [2, 3]


def test_jitter_of_the_direction_does_not_split_a_series() -> None:
    low, high = np.arcsin(0.7004999), np.arcsin(0.7005001)  # either side of a third decimal
    refs = slices_at(0, 5, 10, 15)
    for number, angle in enumerate((low, high, low, high)):
        across, down = (np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))
        refs[number] = replace(refs[number], orientation=(*across, 0.0, *down, 0.0))
    assert len(only(refs).slices) == 4


def test_reasons_hold_numbers_and_no_identity() -> None:
    refs = slices_at(0, 5, 15, 20, patient_id="CANARY", series_uid="CANARY", path="/CANARY")
    refs += [replace(refs[0], file_id="z"), replace(refs[1], sop_uid="x", position=None)]
    told = [str(error) for _, error in group_series(refs)[1]]
    gap = "1 of 3 distances differ from 5.000 mm, the first is 10.000 mm after slice 2"
    assert sum(f"MISSING_SLICES: {gap}" == text for text in told) == 4
    assert len(told) == 6
    assert not [text for text in told if "CANARY" in text]
