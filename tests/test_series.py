"""Slices in the order of the body, and a grid that is right in the world."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from launch.phantom import Phantom, write_series
from medpsp.dicom.read import read_pixels
from medpsp.dicom.series import group_series
from medpsp.errors import GeometryError
from medpsp.types import ReadPolicy, Series, SliceRef
from tests.factory import grouped, headers, ramp

SMALL = Phantom(shape=(5, 6, 8), spacing=(5.0, 2.0, 3.0))
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def world(series: Series, column: int, row: int, number: int) -> list[float]:
    assert series.affine is not None
    point = np.array(series.affine) @ [column, row, number, 1]
    return [round(float(v), 4) + 0.0 for v in point[:3]]


def slices_at(
    *depths: float | None, directions: tuple[float, ...] = AXIAL, **fields: Any
) -> list[SliceRef]:
    """Slices whose corners lie ``depths`` mm along the normal, in that order; None: nowhere."""
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
            "position": None if depth is None else tuple(float(v) for v in depth * normal),
            "orientation": directions,
            "pixel_spacing": (2.0, 3.0),
        }
        made.append(SliceRef(**{**base, **fields}))
    return made


def group(
    refs: list[SliceRef], gaps: Any = "split", same: bool = False
) -> tuple[list[Series], list[tuple[SliceRef, GeometryError]]]:
    """Group slices without files; ``same`` is the answer to every question about pixels."""
    return group_series(refs, ReadPolicy(gaps=gaps), lambda rivals: same)


def codes(refs: list[SliceRef], gaps: Any = "split") -> Counter[str]:
    return Counter(error.code for _, error in group(refs, gaps)[1])


def depths(refs: list[SliceRef], gaps: Any = "split") -> list[list[float]]:
    """Positions of the slices of each series."""
    series, refused = group(refs, gaps)
    assert not refused
    return [[round(z, 3) for z in item.z_mm] for item in series]


def only(refs: list[SliceRef]) -> Series:
    series, refused = grouped(refs)
    assert not refused
    assert len(series) == 1
    return series[0]


def numbered(refs: list[SliceRef], sop: str, **fields: Any) -> list[SliceRef]:
    """The same slices as other objects."""
    return [
        replace(
            ref,
            sop_uid=f"{sop}{ref.sop_uid}",
            file_id=f"{sop}{ref.file_id}",
            path=f"{sop}{ref.path}",
            **fields,
        )
        for ref in refs
    ]


def frames_at(*depths: float | None, **fields: Any) -> list[SliceRef]:
    """The frames of one object."""
    refs = slices_at(*depths, frames=len(depths), **fields)
    return [
        replace(ref, path="/p0", file_id="f0", sop_uid="1.2.0", frame=number)
        for number, ref in enumerate(refs)
    ]


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


@given(st.permutations(range(23)), st.sampled_from(["split", "fill", "reject"]))
@settings(max_examples=60, deadline=None)
def test_order_of_the_input_is_no_matter(order: list[int], gaps: str) -> None:
    refs = slices_at(0, 5, 10, 20, 22, 25, 25.001, 30)
    refs += slices_at(0, 5, series_uid="1.3", sop_uid="x")  # one UID twice
    refs += numbered(slices_at(0, 5, 10, series_uid="1.4"), sop="e", collision_key=("1",))
    refs += numbered(slices_at(0, 5, 10, series_uid="1.4"), sop="f", collision_key=("2",))
    refs += frames_at(*[None] * 4, series_uid="1.5")
    refs += slices_at(0, 5, 10, orientation=(0.0, 0.0, 1.0, 0.0, 1.0, 0.0), series_uid="1.6")
    assert len(refs) == 23
    one = itertools.count()
    refs = [r if r.frames > 1 else replace(r, file_id=f"g{next(one)}", path="") for r in refs]
    refs = [replace(r, path=r.file_id) for r in refs]
    expected, found = group(refs, gaps), group([refs[i] for i in order], gaps)
    assert found[0] == expected[0]
    assert [(r, str(e)) for r, e in found[1]] == [(r, str(e)) for r, e in expected[1]]


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
    assert series.flags == ("GANTRY_TILT",)
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


def test_single_slice_knows_no_distance() -> None:
    series = only(slices_at(7))
    assert world(series, 1, 1, 0) == [3, 2, 7]
    assert series.z_mm == (7,)
    assert series.flags == ("SINGLE_SLICE",)


def test_copied_file_is_a_duplicate_and_the_series_is_whole(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "made", "P", ramp(SMALL.shape), SMALL)
    (tmp_path / "made" / "zcopy").write_bytes(paths[2].read_bytes())
    series, refused = grouped(headers(tmp_path / "made"))
    assert [len(item.slices) for item in series] == [5]
    assert [(ref.file_id, error.code) for ref, error in refused] == [("zcopy", "DUP_IDENTICAL")]


def test_files_of_one_uid_with_other_pixels_are_all_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "made", "P", ramp(SMALL.shape), SMALL)
    ds = pydicom.dcmread(paths[4])
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "made" / "zcopy")
    series, refused = grouped(headers(tmp_path / "made"))
    assert [len(item.slices) for item in series] == [4]
    assert sorted((ref.file_id, error.code) for ref, error in refused) == [
        ("IM0001", "DUP_CONFLICT"),
        ("zcopy", "DUP_CONFLICT"),
    ]


def test_files_of_one_uid_with_other_headers_are_all_refused() -> None:
    refs = slices_at(0, 5, 10, 15)
    moved = replace(refs[3], path="/q", file_id="q", position=(0.0, 0.0, 99.0))
    series, refused = group([*refs, moved], same=True)
    assert [len(item.slices) for item in series] == [3]
    assert [(ref.file_id, error.code) for ref, error in refused] == [
        ("f3", "DUP_CONFLICT"),
        ("q", "DUP_CONFLICT"),
    ]


def test_copies_of_a_multi_frame_object_are_compared_as_a_whole() -> None:
    first = frames_at(0, 5, 10)
    copy = [replace(ref, path="/z", file_id="z") for ref in first]
    series, refused = group([*first, *copy], same=True)
    assert [len(item.slices) for item in series] == [3]
    assert [(r.file_id, r.frame, e.code) for r, e in refused] == [
        ("z", number, "DUP_IDENTICAL") for number in range(3)
    ]
    assert codes([*first, *copy[:2]]) == {"DUP_CONFLICT": 5}  # a frame less: no copy


def test_pixels_are_only_asked_for_where_images_compete() -> None:
    def refuse(rivals: Sequence[SliceRef]) -> bool:
        raise AssertionError("asked for")

    refs = numbered(slices_at(0, 5, 10), sop="a", collision_key=("1",))
    refs += numbered(slices_at(0, 5, 10), sop="b", collision_key=("2",))
    series, refused = group_series(refs, ReadPolicy(), refuse)
    assert ([len(item.slices) for item in series], refused) == ([3, 3], [])


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["1 0 x", "2 0 x"], 2),  # by echo
        (["1 0 x", "1 1 x", "1 2 x"], 3),  # by time
        (["1 0 x", "1 1 x", "2 0 x", "2 1 x"], 4),  # by both
        (["1 0 x", "2 0 #"], 2),  # the acquisition differs from slice to slice: echo will do
    ],
)
def test_images_of_one_position_are_told_apart_by_their_keys(keys: list[str], parts: int) -> None:
    refs: list[SliceRef] = []
    for key in keys:
        for i, ref in enumerate(numbered(slices_at(0, 5, 10), sop=key)):
            own = tuple(key.replace("#", str(i)).split())
            refs.append(replace(ref, collision_key=own))
    series, refused = group(refs)
    assert not refused
    assert [item.z_mm for item in series] == [(0, 5, 10)] * parts
    assert all(len({r.collision_key[:2] for r in item.slices}) == 1 for item in series)


def test_keys_that_change_within_a_volume_do_not_split_it() -> None:
    refs = [
        replace(ref, collision_key=(str(i // 2), str(i)))
        for i, ref in enumerate(slices_at(0, 5, 10))
    ]
    assert depths(refs) == [[0, 5, 10]]


def test_a_slice_taken_again_is_a_series_of_its_own() -> None:
    refs = [replace(r, collision_key=("1",)) for r in slices_at(0, 5, 10, 15)]
    (again,) = numbered(slices_at(5), sop="again", collision_key=("2",))
    assert depths([*refs, again]) == [[0, 5, 10, 15], [5]]


def test_stations_side_by_side_are_two_volumes() -> None:
    low, high = (
        [
            replace(ref, position=(0.0, shift, ref.position[2] if ref.position else 0.0))
            for ref in numbered(slices_at(0, 5, 10), sop=f"s{shift}")
        ]
        for shift in (0.0, 300.0)
    )
    series, refused = group([*low, *high])
    assert not refused
    assert [world(item, 0, 0, 1) for item in series] == [[0, 0, 5], [0, 300, 5]]


def test_rivals_with_equal_pixels_are_one_image() -> None:
    refs = slices_at(0, 5, 5, 10)
    series, refused = group(refs, same=True)
    assert [[r.file_id for r in item.slices] for item in series] == [["f0", "f1", "f3"]]
    assert [(ref.file_id, error.code) for ref, error in refused] == [("f2", "DUP_IDENTICAL")]


def test_rivals_that_differ_are_refused_and_the_rest_lives_on() -> None:
    series, refused = group(slices_at(0, 5, 10, 10.005, 15, 20))
    assert [item.z_mm for item in series] == [(0, 5), (15, 20)]
    assert {item.flags for item in series} == {("MISSING_SLICES",)}
    assert [(ref.file_id, error.code) for ref, error in refused] == [
        ("f2", "DUP_POSITION"),
        ("f3", "DUP_POSITION"),
    ]


def test_a_place_where_nothing_is_left() -> None:
    assert codes(slices_at(5, 5)) == {"DUP_POSITION": 2}


def test_missing_slice_of_real_files(tmp_path: Path) -> None:
    write_series(tmp_path, "P", ramp(SMALL.shape), SMALL)[2].unlink()
    refs = headers(tmp_path)
    assert depths(refs) == [[-700, -695], [-685, -680]]
    assert codes(refs, "reject") == {"MISSING_SLICES": 4}
    (series,), _ = group(refs, "fill")
    assert (series.grid, series.shape, series.flags) == (
        (0, 1, 3, 4),
        (5, 6, 8),
        ("MISSING_SLICES",),
    )
    assert world(series, 0, 0, 4) == [-12, -6, -680]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"pixel_spacing": (0.0, 3.0)}, "GEOM_BAD_SPACING"),
        ({"pixel_spacing": (2.0, -3.0)}, "GEOM_BAD_SPACING"),
        ({"orientation": (1.0, 0.0, 0.0, 0.01, 1.0, 0.0)}, "GEOM_BAD_IOP"),
        ({"orientation": (0.0,) * 6}, "GEOM_BAD_IOP"),
        ({"orientation": (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)}, "GEOM_BAD_IOP"),
        ({"orientation": (9.0, 0.0, 0.0, 0.0, 9.0, 0.0)}, "GEOM_BAD_IOP"),
        ({"position": (0.0, math.nan, 0.0)}, "GEOM_NONFINITE"),
        ({"position": (0.0, 0.0, 1e300)}, "GEOM_NONFINITE"),
        ({"orientation": (math.inf, 0.0, 0.0, 0.0, 1.0, 0.0)}, "GEOM_NONFINITE"),
        ({"pixel_spacing": (math.nan, 1.0)}, "GEOM_NONFINITE"),
    ],
)
def test_unusable_geometry_costs_only_its_slice(fields: dict[str, Any], code: str) -> None:
    bad = replace(slices_at(10)[0], sop_uid="bad", file_id="bad", **fields)
    series, refused = group([*slices_at(0, 5), bad])
    assert [item.z_mm for item in series] == [(0, 5)]
    assert [(ref.file_id, error.code) for ref, error in refused] == [("bad", code)]


def test_flipped_slice_and_odd_matrix_cost_only_themselves() -> None:
    refs = slices_at(*range(0, 40, 5))
    refs[1] = replace(refs[1], orientation=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
    refs[5] = replace(refs[5], rows=7)
    assert depths(refs) == [[0], [5], [10, 15, 20], [25], [30, 35]]


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("missing", ["position", "orientation", "pixel_spacing"])
def test_slice_without_place_is_a_picture(missing: str, modality: str) -> None:
    first, *rest = slices_at(0, 0, 5, modality=modality)
    series, refused = group([replace(first, **{missing: None}), *rest])
    assert not refused
    assert [(len(s.slices), s.affine is None, s.flags) for s in series] == [
        (1, True, ("GEOM_MISSING",)),
        (2, False, ()),
    ]
    assert series[0].z_mm == ()


def test_spacing_at_the_detector_places_nothing() -> None:
    (series,), _ = group(slices_at(0, 5, spacing_source="detector", modality="XA"))
    assert (series.affine, series.z_mm, series.flags) == (None, (), ())


def test_cine_is_a_series_of_its_frames_and_single_pictures_are_one_series() -> None:
    clip = frames_at(*[None] * 12, modality="US")
    other = [replace(r, path="/d", file_id="d", sop_uid="d") for r in clip[:2]]
    other = [replace(r, frames=2) for r in other]
    single = numbered(slices_at(None, None, modality="US"), sop="s")
    series, refused = group([*reversed(clip), *single, *other])
    assert not refused
    assert sorted([(r.file_id, r.frame) for r in s.slices] for s in series) == [
        [("d", 0), ("d", 1)],
        [("f0", number) for number in range(12)],
        [("sf0", 0), ("sf1", 0)],
    ]
    assert {(s.affine, s.flags) for s in series} == {(None, ())}


@pytest.mark.parametrize("count", [2, 3])
def test_frames_of_one_place_that_nothing_tells_apart_are_a_cine(count: int) -> None:
    (series,), refused = group(frames_at(*[5] * count, modality="MR"))
    assert not refused
    assert [r.frame for r in series.slices] == list(range(count))
    assert (series.affine, series.flags) == (None, ())  # a place is there


def test_frames_of_one_object_are_ordered_by_position() -> None:
    series = only(frames_at(10, 0, 15, 5))
    assert [r.frame for r in series.slices] == [1, 3, 0, 2]
    assert series.z_mm == (0, 5, 10, 15)


def test_slope_of_one_in_a_series_of_floats_is_no_gap() -> None:
    refs = slices_at(0, 5, 10, dtype="float32")
    refs[1] = replace(refs[1], dtype="int16")
    assert [r.dtype for r in only(refs).slices] == ["float32"] * 3
    assert [r.dtype for r in only(slices_at(0, 5)).slices] == ["int16"] * 2


def test_many_slices_take_no_more_than_seconds() -> None:
    refs = [
        replace(ref, series_uid=str(i // 100)) for i, ref in enumerate(slices_at(*range(20_000)))
    ]
    start = time.process_time()
    assert len(group(refs)[0]) == 200
    assert time.process_time() - start < 5  # 0.3 s measured


def test_two_series_in_one_folder_stay_apart(tmp_path: Path) -> None:
    first, second = ramp(SMALL.shape), ramp(SMALL.shape) + np.int16(1000)
    paths = write_series(tmp_path / "a", "P", first, SMALL)
    for path in write_series(tmp_path / "b", "P", second, SMALL):
        path.rename(paths[0].parent / f"b{path.name}")
    series, refused = grouped(headers(tmp_path / "a"))
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
    series, refused = grouped(headers(tmp_path / "made", ReadPolicy(non_volumes="keep")))
    assert not refused
    assert sorted(len(item.slices) for item in series) == [1, 5]


def test_frames_of_reference_of_one_series_stay_apart(tmp_path: Path) -> None:
    paths = write_series(tmp_path, "P", ramp(SMALL.shape), SMALL)
    other = generate_uid()
    edit_files(paths[3:], lambda ds, i: setattr(ds, "FrameOfReferenceUID", other))
    series, refused = grouped(headers(tmp_path))
    assert not refused
    assert sorted(len(item.slices) for item in series) == [2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"study_uid": "1.8"},
        {"series_uid": "1.3"},
        {"modality": "MR"},
        {"rows": 7},
        {"columns": 6},
        {"dtype": "uint8"},
        {"frame_of_reference": "1.9"},
        {"series_split_key": "LOCALIZER"},
        {"spacing_source": "calibrated"},
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
    series, refused = group([*slices_at(0, 5), *other])
    assert not refused
    assert sorted(len(item.slices) for item in series) == [2, 3]


def test_spacings_within_a_thousandth_are_one_grid_with_that_of_the_first() -> None:
    def second(spacing: float) -> list[SliceRef]:
        first, other = slices_at(0, 5)
        return [first, replace(other, pixel_spacing=(2.0, spacing))]

    assert world(only(second(3.0024)), 1, 1, 0) == [3, 2, 0]
    assert depths(second(3.0036)) == [[0], [5]]


def test_axes_are_those_of_the_middle_direction() -> None:
    turned = slices_at(0, 5, 10)
    for number, angle in enumerate((0.0008, 0.0, 0.0003)):
        directions = (math.cos(angle), math.sin(angle), 0.0, -math.sin(angle), math.cos(angle), 0.0)
        turned[number] = replace(turned[number], orientation=directions)
    assert world(only(turned), 1, 0, 0)[:2] == [3, 0.0009]


def test_series_are_sorted_by_their_first_place_then_by_name() -> None:
    refs = [*slices_at(0, 5, 10), *numbered(slices_at(0, 4, 8, rows=7), sop="x")]
    refs += numbered(slices_at(-1, 4, 9, rows=8), sop="y")
    assert depths(refs) == [[-1, 4, 9], [0, 5, 10], [0, 4, 8]]


def test_every_piece_of_a_stack_says_how_it_was_cut() -> None:
    """Twice the distance after f2, no whole number of distances after f5, the double after f8."""
    series, refused = group(slices_at(0, 5, 10, 20, 25, 30, 37, 42, 47, 57, 62))
    assert not refused
    assert [("".join(r.file_id for r in s.slices), s.flags) for s in series] == [
        ("f0f1f2", ("MISSING_SLICES",)),
        ("f3f4f5", ("MISSING_SLICES", "UNEVEN_SPACING")),
        ("f6f7f8", ("MISSING_SLICES", "UNEVEN_SPACING")),
        ("f9f10", ("MISSING_SLICES",)),
    ]
    uneven, single = ("UNEVEN_SPACING",), ("SINGLE_SLICE", "UNEVEN_SPACING")
    three, _ = group(slices_at(0, 5, 10, 15.1, 20))  # once a whole distance, and not that
    assert [s.flags for s in three] == [uneven, single, single]


def test_a_bad_frame_costs_no_other_frame_of_its_object() -> None:
    first, *rest = frames_at(0, 5, 10)
    series, refused = group([replace(first, position=(0.0, 0.0, math.nan)), *rest])
    assert [item.z_mm for item in series] == [(5, 10)]
    assert [(ref.frame, error.code) for ref, error in refused] == [(0, "GEOM_NONFINITE")]


def test_jitter_of_the_direction_does_not_split_a_series() -> None:
    low, high = np.arcsin(0.7004999), np.arcsin(0.7005001)  # either side of a third decimal
    refs = slices_at(0, 5, 10, 15)
    for number, angle in enumerate((low, high, low, high)):
        across, down = (np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))
        refs[number] = replace(refs[number], orientation=(*across, 0.0, *down, 0.0))
    assert len(only(refs).slices) == 4


def test_reasons_hold_numbers_and_no_identity() -> None:
    refs = slices_at(0, 5, 15, 25, 30, patient_id="CANARY", series_uid="CANARY", path="/CANARY")
    refs += [replace(refs[0], file_id="z", path="/z"), replace(refs[1], sop_uid="x")]
    told = [str(error) for _, error in group(refs, "reject")[1]]
    assert sorted(set(told)) == [
        "DUP_CONFLICT: 2 objects of one SOPInstanceUID differ, or are damaged",
        "DUP_POSITION: 2 images of one position differ, or are damaged",
        "MISSING_SLICES: 1 of 2 distances differ from 5.000 mm, "
        "the first is 10.000 mm after slice 1",
    ]


# S1, S3: what a series must not mix


def with_keys(refs: list[SliceRef], name: str, *values: Any) -> list[SliceRef]:
    """The slices with the values of one field, again and again."""
    return [replace(r, **{name: values[i % len(values)]}) for i, r in enumerate(refs)]


def test_contrasts_between_each_others_places_are_two_volumes() -> None:
    refs = with_keys(slices_at(0, 5, 10, 15, 20), "contrast_key", ("10", ""), ("30", ""))
    series, refused = group(refs)
    assert not refused
    assert [(item.z_mm, item.flags) for item in series] == [((0, 10, 20), ()), ((5, 15), ())]


def test_contrasts_one_after_another_are_two_volumes() -> None:
    """A neck of 100 kV and a chest of 120 kV; the tube voltage of a third is not told."""
    refs = slices_at(0, 5, 10, 15, 20, 25)
    refs = [replace(r, contrast_key=("", ("100", "120", "")[i // 2])) for i, r in enumerate(refs)]
    assert depths(refs) == [[0, 5], [10, 15], [20, 25]]


@pytest.mark.parametrize("values", ["11112111", "12345678", "11212211", "12222222"])
def test_a_contrast_that_leaves_no_volumes_is_flagged(values: str) -> None:
    refs = with_keys(slices_at(*range(0, 40, 5)), "contrast_key", *[(v, "B30") for v in values])
    assert only(refs).z_mm == tuple(range(0, 40, 5))
    assert only(refs).flags == ("MIXED_CONTRAST",)


def test_the_kernel_splits_where_the_echo_time_only_trembles() -> None:
    kernels = [(str(10 + i), ("B30", "B70")[i % 2]) for i in range(8)]
    series, _ = group(with_keys(slices_at(*range(0, 40, 5)), "contrast_key", *kernels))
    assert [item.z_mm for item in series] == [(0, 10, 20, 30), (5, 15, 25, 35)]
    assert {item.flags for item in series} == {("MIXED_CONTRAST",)}


def test_acquisitions_and_times_between_each_others_places_are_one_volume() -> None:
    refs = with_keys(slices_at(0, 5, 10, 15), "collision_key", ("1",), ("2",))
    refs = with_keys(refs, "times", ("1000", ""), ("1001", ""))
    assert only(refs).flags == ()


def test_contrasts_at_one_place_are_two_volumes() -> None:
    refs = [
        replace(ref, contrast_key=(echo,))
        for echo in "ab"
        for ref in numbered(slices_at(0, 5, 10), sop=echo)
    ]
    assert depths(refs) == [[0, 5, 10], [0, 5, 10]]


def dynamic(time: Callable[[int, int], tuple[str, str]], *counts: int) -> list[SliceRef]:
    """So many slices of each moment; ``time`` is of moment and slice."""
    return [
        replace(ref, times=time(moment, i))
        for moment, count in enumerate(counts)
        for i, ref in enumerate(numbered(slices_at(*range(0, 5 * count, 5)), sop=f"m{moment}"))
    ]


def moments(refs: list[SliceRef]) -> list[tuple[str, tuple[float, ...], tuple[str, ...]]]:
    """The object numbers, places and flags of each series."""
    series, refused = group(refs)
    assert not refused
    return [
        ("".join(sorted({r.sop_uid[:2] for r in item.slices})), item.z_mm, item.flags)
        for item in series
    ]


@pytest.mark.parametrize(
    "time",
    [
        lambda moment, i: (f"10000{moment}", ""),
        lambda moment, i: ("100000", f"10000{moment}"),
        lambda moment, i: (f"1000{10 * moment + i:02}", ""),  # slice after slice
        lambda moment, i: ("", f"1000{3 * i + moment:02}.5"),  # moment after moment, each slice
    ],
)
def test_moments_that_only_the_time_tells_apart(time: Callable[[int, int], Any]) -> None:
    assert moments(dynamic(time, 4, 4, 4)) == [
        (f"m{n}", (0, 5, 10, 15), ("BY_TIME",)) for n in range(3)
    ]


def test_a_moment_that_broke_off() -> None:
    found = moments(dynamic(lambda moment, i: (f"10000{moment}", ""), 4, 2))
    assert found == [("m0", (0, 5, 10, 15), ("BY_TIME",)), ("m1", (0, 5), ("BY_TIME",))]


def test_echo_and_time_together() -> None:
    refs = [
        replace(ref, contrast_key=(echo,), sop_uid=f"{echo}{ref.sop_uid}", file_id=echo + ref.path)
        for echo in "ab"
        for ref in dynamic(lambda moment, i: (f"1000{10 * moment + i:02}", ""), 3, 3)
    ]
    refs = [replace(ref, path=ref.file_id) for ref in refs]
    assert [z for _, z, _ in moments(refs)] == [(0, 5, 10)] * 4


@pytest.mark.parametrize(
    "time",
    [
        lambda moment, i: ("", ""),
        lambda moment, i: ("100000", "100001"),
        lambda moment, i: (f"10000{moment}", "") if i else ("", ""),  # not of all
    ],
)
def test_without_a_time_that_differs_rivals_are_refused(time: Callable[[int, int], Any]) -> None:
    assert codes(dynamic(time, 2, 2)) == {"DUP_POSITION": 4}


def test_times_that_leave_the_moment_open() -> None:
    """One slice again, and every slice has a time of its own."""
    refs = dynamic(lambda moment, i: (f"1000{10 * moment + i:02}", ""), 4, 1)
    assert codes(refs) == {"DUP_POSITION": 2}


# S1: patients


def test_a_series_of_two_patients_is_refused() -> None:
    other = numbered(slices_at(15, 20, 25), sop="x", patient_id="q", study_uid="9")
    third = numbered(slices_at(0, 5), sop="y", patient_id="q", series_uid="7")
    nobody = numbered(slices_at(30), sop="z", patient_id="")
    series, refused = group([*slices_at(0, 5, 10), *other, *third, *nobody])
    assert [item.first.series_uid for item in series] == ["7"]
    assert {str(error) for _, error in refused} == {
        "PATIENT_CONFLICT: 2 values of PatientID in one SeriesInstanceUID"
    }
    assert len(refused) == 7


def test_a_slice_without_a_patient_belongs_to_that_of_its_series() -> None:
    refs = slices_at(0, 5, 10)
    refs[1] = replace(refs[1], patient_id="")
    assert {ref.patient_id for ref in only(refs).slices} == {"p"}


@pytest.mark.parametrize(
    ("fields", "others", "patients"),
    [
        ({"study_uid": "5", "series_uid": "6"}, {"study_uid": "5", "series_uid": "7"}, ["study:5"]),
        (
            {"study_uid": "5", "series_uid": "6"},
            {"study_uid": "8", "series_uid": "7"},
            ["study:5", "study:8"],
        ),
        ({"series_uid": "6"}, {"series_uid": "7"}, ["series:6", "series:7"]),
        (
            {"series_uid": "", "frame_of_reference": "6"},
            {"series_uid": "", "frame_of_reference": "7"},
            ["frame:6", "frame:7"],
        ),
        (
            {"series_uid": "", "path": "/a/0"},
            {"series_uid": "", "path": "/b/0"},
            ["folder:/a", "folder:/b"],
        ),
        (
            {"series_uid": "", "path": "/a.zip", "member": "x/0"},
            {"series_uid": "", "path": "/a.zip", "member": "y/0"},
            ["folder:/a.zip/x", "folder:/a.zip/y"],
        ),
    ],
)
def test_nobody_is_pooled_with_nobody_else(
    fields: dict[str, str], others: dict[str, str], patients: list[str]
) -> None:
    nobody = slices_at(0, patient_id="", **fields)
    (other,) = numbered(slices_at(5, patient_id=""), sop="x")
    series, _ = group([*nobody, replace(other, **others)])
    assert sorted({item.first.patient_id for item in series}) == patients


def test_a_volume_with_emptied_headers_is_a_volume_still() -> None:
    refs = slices_at(0, 5, 10, patient_id="", series_uid="", sop_uid="")
    assert only(refs).z_mm == (0, 5, 10)


def test_studies_of_one_series_uid_are_not_joined() -> None:
    more = numbered(slices_at(15, 20), sop="x", study_uid="9")
    assert depths([*slices_at(0, 5, 10), *more]) == [[0, 5, 10], [15, 20]]
