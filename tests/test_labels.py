"""NIfTI masks land on the right voxels, or are refused."""

from __future__ import annotations

import gzip
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from launch.phantom import Phantom, draw, write_mask, write_series
from medpsp.dicom import labels
from medpsp.dicom.labels import map_labels, mask_path, read_nifti_mask
from medpsp.dicom.names import LabelVolume
from medpsp.dicom.nifti import MaskWriter
from medpsp.dicom.placement import LPS_TO_RAS, Grid, grid_of, nearest_mask, place_mask, unsheared
from medpsp.errors import LabelError
from tests.labelled import ORIENTATIONS, PLAIN, SHAPE, Affine, series_of_files, slice_ref, turned

SEEDS = st.integers(0, 2**32 - 1)


def volume_of(
    path: Path, affine: Affine = PLAIN, shape: tuple[int, int, int] = SHAPE, **how: Any
) -> LabelVolume:
    return read_nifti_mask(path, Grid(shape=shape, affine=affine), **how)


def read(path: Path, affine: Affine = PLAIN, shape: tuple[int, int, int] = SHAPE) -> NDArray[Any]:
    found = volume_of(path, affine, shape)
    assert not found.notes
    return found.values


def classes(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.uint8]:
    return (np.arange(np.prod(shape)).reshape(shape) % 4).astype(np.uint8)


def random_grid(rng: np.random.Generator, at_least: int) -> tuple[Affine, tuple[int, int, int]]:
    """An oblique, anisotropic, in half the cases sheared grid, and its (N, H, W)."""
    affine = turned(rng.normal(size=3), rng.uniform(0, np.pi))
    affine[:3, :3] *= rng.uniform(0.4, 6, 3)
    affine[:3, 2] += affine[:3, 1] * (rng.uniform(-0.4, 0.4) if rng.random() < 0.5 else 0)
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    slices, rows, columns = (int(v) for v in rng.integers(at_least, at_least + 6, 3))
    return affine, (slices, rows, columns)


def saved_as(
    volume: NDArray[Any], affine_lps: Affine, order: Sequence[int], flips: Sequence[int]
) -> tuple[Any, Any]:
    """The same voxels as a mask whose axes are permuted and flipped, and its RAS affine."""
    mask, index = volume.transpose(2, 1, 0), np.eye(4)
    mask, index = mask.transpose(order), index[:, [*order, 3]]
    for axis in flips:
        index[:, 3] += index[:, axis] * (mask.shape[axis] - 1)
        index[:, axis] *= -1
        mask = np.flip(mask, axis)
    return mask, LPS_TO_RAS @ affine_lps @ index


def as_saved(volume: NDArray[Any], affine_lps: Affine, rng: np.random.Generator) -> tuple[Any, Any]:
    return saved_as(volume, affine_lps, rng.permutation(3), np.flatnonzero(rng.random(3) < 0.5))


def refusal_of(mask: NDArray[Any], ras: Affine, lps: Affine, shape: tuple[int, int, int]) -> str:
    with pytest.raises(LabelError) as caught:
        place_mask(mask, ras, lps, shape)
    return caught.value.code


@given(SEEDS)
@settings(max_examples=80)
def test_any_order_of_axes_is_placed_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    affine, shape = random_grid(rng, 2)
    volume = rng.integers(0, 5, shape)
    mask, ras = as_saved(volume, affine, rng)
    assert (place_mask(mask, ras, affine, shape) == volume).all()


@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_each_of_48_orientations(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    assert len(ORIENTATIONS) == 48
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    for affine in (PLAIN, random_grid(np.random.default_rng(5), 2)[0]):
        mask, ras = saved_as(volume, affine, order, flips)
        assert (place_mask(mask, ras, affine, SHAPE) == volume).all()


def test_240_other_grids_are_refused() -> None:
    refused = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        affine, shape = random_grid(rng, 8)
        mask, ras = as_saved(rng.integers(0, 5, shape), affine, rng)
        shifted, scaled = ras.copy(), ras.copy()
        shifted[:3, 3] += 0.4 * ras[:3, rng.integers(3)] * rng.choice([-1, 1])
        scaled[:3, :3] *= rng.choice([1 / 1.05, 1.05])
        centre = np.eye(4)
        centre[:3, 3] = (ras @ [*((np.array(mask.shape) - 1) / 2), 1])[:3]
        rotation = centre @ turned(rng.normal(size=3), 0.05) @ np.linalg.inv(centre)
        for wrong in (shifted, scaled, rotation @ ras):
            for grid in (affine, *unsheared(affine, shape[0])):
                assert refusal_of(mask, wrong, grid, shape) == "MASK_GRID_MISMATCH"
            refused += 1
    assert refused == 240


def test_equal_shape_is_no_argument() -> None:
    mask = classes().transpose(2, 1, 0).astype(np.int64)
    assert refusal_of(mask, np.eye(4), PLAIN, SHAPE) == "MASK_GRID_MISMATCH"


def test_rows_and_columns_swapped_is_refused() -> None:
    square = (3, 6, 6)
    swapped = np.diag([-2.0, -3.0, 5.0, 1.0])
    mask = np.ones((6, 6, 3), dtype=np.int64)
    assert refusal_of(mask, swapped, PLAIN, square) == "MASK_GRID_MISMATCH"


def test_flip_by_hand() -> None:
    # one row of three voxels at LPS x = 0, 3, 6, so RAS x = 0, -3, -6; the mask starts at RAS -6
    ras = np.diag([3.0, -2.0, 5.0, 1.0])
    ras[0, 3] = -6
    mask = np.array([7, 8, 9]).reshape(3, 1, 1)
    assert place_mask(mask, ras, PLAIN, (1, 1, 3)).tolist() == [[[9, 8, 7]]]


def test_cropped_mask_is_told(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", np.ones((6, 5, 3), np.uint8), RAS)
    assert volume_of(path).notes == {"MASK_PARTIAL_COVER": 30}


def test_cropped_mask_is_pasted() -> None:
    volume = np.zeros(SHAPE, dtype=np.int64)
    volume[1:3, 2:4, 1:5] = classes((2, 2, 4)) + 1
    ras = LPS_TO_RAS @ PLAIN
    ras[:3, 3] = (ras @ [1, 2, 1, 1])[:3]
    cropped = volume[1:3, 2:4, 1:5].transpose(2, 1, 0)
    assert (place_mask(cropped, ras, PLAIN, SHAPE) == volume).all()


def test_padded_mask_is_cropped_and_labels_outside_are_counted() -> None:
    volume = classes().astype(np.int64)
    padded = np.pad(volume, 2)
    ras = LPS_TO_RAS @ PLAIN
    ras[:3, 3] = (ras @ [-2, -2, -2, 1])[:3]
    assert (place_mask(padded.transpose(2, 1, 0), ras, PLAIN, SHAPE) == volume).all()
    padded[0, 0, :3] = padded[-1, -1, -1] = 1
    with pytest.raises(LabelError, match="MASK_OUTSIDE_IMAGE: 4 labelled voxels"):
        place_mask(padded.transpose(2, 1, 0), ras, PLAIN, SHAPE)


def test_mask_wholly_elsewhere() -> None:
    ras = LPS_TO_RAS @ PLAIN
    ras[2, 3] += 500
    assert refusal_of(np.ones((6, 5, 4), np.int64), ras, PLAIN, SHAPE) == "MASK_OUTSIDE_IMAGE"
    ones, notes = np.ones((6, 5, 4), np.int64), dict[str, int]()
    for mask, partial in ((np.zeros_like(ones), False), (ones, True)):
        with pytest.raises(LabelError, match="MASK_ELSEWHERE: the mask reaches no voxel"):
            place_mask(mask, ras, PLAIN, SHAPE, partial, notes)
        with pytest.raises(LabelError, match="MASK_ELSEWHERE"):
            nearest_mask(mask, ras, PLAIN, SHAPE, partial, notes)
    assert notes == {}
    ras[2, 3] = 15  # one slice of 5 x 6 is left
    placed = place_mask(ones, ras, PLAIN, SHAPE, True, notes)
    assert placed.any(axis=(1, 2)).tolist() == [False, False, False, True]
    assert (nearest_mask(ones, ras, PLAIN, SHAPE, True) == placed).all()
    assert notes == {"MASK_PARTIAL_COVER": 90}


GEOMETRIES = [
    Phantom(shape=(6, 40, 36)),
    Phantom(shape=(6, 40, 36), spacing=(4.0, 2.0, 0.7)),
    Phantom(shape=(6, 40, 36), oblique_deg=25),
    Phantom(shape=(6, 40, 36), tilt_deg=15),
    Phantom(shape=(6, 40, 36), spacing=(4.0, 1.0, 2.0), oblique_deg=-40, tilt_deg=-20),
]


@pytest.mark.parametrize("phantom", GEOMETRIES)
def test_mask_of_a_dicom_series(tmp_path: Path, phantom: Phantom) -> None:
    hu, label = draw(phantom, 3)
    write_series(tmp_path / "dicom", "P", hu, phantom)
    write_mask(tmp_path / "mask.nii.gz", label, phantom)
    series = series_of_files([p for p in (tmp_path / "dicom").rglob("*") if p.is_file()])
    placed = read_nifti_mask(tmp_path / "mask.nii.gz", grid_of(series))
    assert not placed.notes
    assert (placed.values == label).all()


def write_nifti_mask(path: Path, label: NDArray[np.uint8], affine: Affine) -> None:
    count, rows, columns = label.shape
    with MaskWriter(path, (count, rows, columns), affine) as out:
        for place, one in enumerate(label):
            out.add(place, one)


@pytest.mark.parametrize("phantom", GEOMETRIES)
@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_nifti_round_trip(tmp_path: Path, phantom: Phantom, name: str) -> None:
    label, affine = classes(phantom.shape), phantom.affine_lps()
    write_nifti_mask(tmp_path / name, label, affine)
    assert (read(tmp_path / name, affine, phantom.shape) == label).all()
    header: Any = nib.load(tmp_path / name).header
    assert int(header["sform_code"]) == 1
    assert int(header["qform_code"]) == (0 if phantom.tilt_deg else 1)


def nifti(
    path: Path, values: NDArray[Any], sform: Affine | None = None, qform: Affine | None = None
) -> Path:
    image = nib.Nifti1Image(values, None, dtype=values.dtype)
    image.set_sform(sform, code=0 if sform is None else 1)
    image.set_qform(qform, code=0 if qform is None else 1)
    nib.save(image, path)
    return path


RAS = LPS_TO_RAS @ PLAIN
FAR = RAS + np.array([[0, 0, 0, 300.0], [0] * 4, [0] * 4, [0] * 4])
NEAR = RAS + np.array([[0, 0, 0, 0.2], [0] * 4, [0] * 4, [0] * 4])  # 0.07 voxel


@pytest.mark.parametrize(
    ("sform", "qform"), [(RAS, None), (None, RAS), (RAS, RAS), (RAS, NEAR), (NEAR, RAS)]
)
def test_either_form_places_the_mask(
    tmp_path: Path, sform: Affine | None, qform: Affine | None
) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), sform, qform)
    assert (read(path) == classes()).all()


def test_sform_goes_first(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), NEAR, RAS)
    far_lps = LPS_TO_RAS @ (NEAR + (NEAR - RAS) * 0.45)  # 0.03 voxel from NEAR, 0.1 from RAS
    assert (read(path, far_lps, SHAPE) == classes()).all()


SINGULAR = np.diag([3.0, 2.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("sform", "qform", "code"),
    [
        (None, None, "MASK_NO_XFORM"),
        (SINGULAR, None, "MASK_NO_XFORM"),
        (RAS, FAR, "MASK_SQ_DISAGREE"),
        (FAR, RAS, "MASK_SQ_DISAGREE"),
    ],
)
def test_unusable_forms(
    tmp_path: Path, sform: Affine | None, qform: Affine | None, code: str
) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), sform, qform)
    with pytest.raises(LabelError, match=code):
        read(path)


def test_form_that_is_no_number(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), RAS)
    whole = bytearray(path.read_bytes())
    whole[280:284] = np.float32(np.nan).tobytes()  # first of srow_x
    path.write_bytes(whole)
    with pytest.raises(LabelError, match="MASK_NO_XFORM"):
        read(path)


def test_qform_that_straightens_a_shear_disagrees(tmp_path: Path) -> None:
    sheared = RAS.copy()
    sheared[1, 2] = 1.3
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), sheared, RAS)
    with pytest.raises(LabelError, match="MASK_SQ_DISAGREE"):
        read(path, LPS_TO_RAS @ sheared, SHAPE)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_whole_numbers_of_any_type(tmp_path: Path, dtype: type) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0).astype(dtype), RAS)
    placed = read(path)
    assert placed.dtype == np.uint8
    assert (placed == classes()).all()


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ([255, 7], np.uint8),
        ([255, 256], np.int16),
        ([3, -1], np.int16),
        ([40_000, -1], np.int32),
        ([-1, 40_000], np.int32),
        ([2**40, -(2**20)], np.int64),
        ([2**63, 1], np.uint64),
    ],
)
def test_values_take_the_smallest_type_that_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[int], dtype: type
) -> None:
    monkeypatch.setattr(labels, "_SLAB", 1)  # one slice at a time
    values = np.zeros((6, 5, 4), np.uint64 if max(found) > 2**62 else np.int64)
    values[0, 0, 1], values[0, 0, 3] = found
    for name in ("m.nii", "m.nii.gz"):
        placed = read(nifti(tmp_path / name, values[..., None], RAS))
        assert placed.dtype == dtype
        assert (placed == values.transpose(2, 1, 0)).all()


def test_scaled_values_are_scaled(tmp_path: Path) -> None:
    image = nib.Nifti1Image(classes().transpose(2, 1, 0), RAS)
    image.header.set_slope_inter(2, 1)
    nib.save(image, tmp_path / "m.nii")
    placed = read(tmp_path / "m.nii")
    assert (placed == 2 * classes() + 1).all()


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 1 + 2j])
def test_values_that_are_no_classes(tmp_path: Path, value: complex) -> None:
    values = classes().transpose(2, 1, 0).astype(np.result_type(value, np.float32))
    values[1, 2, 3] = value
    path = nifti(tmp_path / "m.nii", values, RAS)
    with pytest.raises(LabelError, match="MASK_NOT_INTEGRAL"):
        read(path)


def test_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0)[..., None], RAS)
    assert (read(path) == classes()).all()


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((6, 5, 4, 2), np.uint8),
        np.zeros((6, 5), np.uint8),
        np.zeros((6, 5, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])),
    ],
    ids=["4-D", "2-D", "RGB"],
)
@pytest.mark.parametrize("qform", [None, RAS], ids=["sform", "both"])
def test_masks_of_another_kind(tmp_path: Path, values: NDArray[Any], qform: Affine | None) -> None:
    path = nifti(tmp_path / "m.nii", values, RAS, qform)
    with pytest.raises(LabelError, match="MASK_NOT_3D"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.nii", b"no mask"),
        ("m.nii", b""),
        ("m.nii.gz", b"no mask"),
        ("m.nii.gz", gzip.compress(b"no mask")),
        ("m.png", b"\x89PNG"),
    ],
    ids=["text", "empty", "no gzip", "gzip of text", "png"],  # gzip writes the time down
)
def test_files_that_are_no_nifti(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabelError, match="MASK_UNREADABLE"):
        read(tmp_path / name)


def test_missing_mask(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="MASK_MISSING"):
        read(tmp_path / "m.nii")
    with pytest.raises(LabelError, match="MASK_MISSING"):
        read(tmp_path)


def test_damaged_headers_and_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.nii"
    write_nifti_mask(path, classes(), PLAIN)
    whole, rng, codes = path.read_bytes(), np.random.default_rng(1), set()
    for turn in range(400):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(352))] = int(rng.integers(256))
        path.write_bytes(damaged[: int(rng.integers(len(whole)))] if turn % 4 == 0 else damaged)
        try:
            read(path)
            codes.add("read")
        except LabelError as error:
            codes.add(error.code)
    assert {"read", "MASK_UNREADABLE", "MASK_SQ_DISAGREE"} <= codes


def test_cut_gzip(tmp_path: Path) -> None:
    path = tmp_path / "m.nii.gz"
    write_nifti_mask(path, classes((8, 20, 20)), PLAIN)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 8, 9):  # the last 8 bytes are a checksum
        path.write_bytes(whole[:length])
        with pytest.raises(LabelError, match="MASK_UNREADABLE"):
            read(path, PLAIN, (8, 20, 20))


def test_values_are_classes_without_a_map() -> None:
    mapped = map_labels(np.array([[0, 2], [255, 1]]), {}, 3)
    assert mapped.dtype == np.uint8
    assert mapped.tolist() == [[0, 2], [255, 1]]


def test_label_map() -> None:
    values = np.array([0, 500, -1, 7])
    assert map_labels(values, {0: 0, 500: 1, -1: 255, 7: 1}, 2).tolist() == [0, 1, 255, 1]


@pytest.mark.parametrize(
    ("values", "label_map", "named"),
    [
        ([0, 1, 3], {}, r"\[3\]"),
        ([0, -1], {}, r"\[-1\]"),
        ([0, 1], {1: 1}, r"\[0\]"),
        ([0, 255], {0: 0}, r"\[255\]"),
        ([10**12, 0], {}, r"\[1000000000000\]"),
    ],
)
def test_unknown_labels_are_named(values: list[int], label_map: dict[int, int], named: str) -> None:
    with pytest.raises(LabelError, match=f"MASK_LABEL_UNKNOWN: values {named}"):
        map_labels(np.array(values), label_map, 3)


REF = slice_ref(path="/archive/a/b/IM1", patient_id="p 7", series_uid="1.2.3")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{PatientID}.nii.gz", "/masks/p 7.nii.gz"),
        ("{Modality}/{SeriesInstanceUID}.nii", "/masks/CT/1.2.3.nii"),
        ("{folder}/mask.nii.gz", "/masks/a/b/mask.nii.gz"),
        ("all.nii", "/masks/all.nii"),
    ],
)
def test_label_pattern(pattern: str, expected: str) -> None:
    assert mask_path(Path("/masks"), pattern, REF, Path("/archive")) == Path(expected)


@pytest.mark.parametrize(
    ("patient", "code"),
    [
        ("../../etc/CANARY", "MASK_OUTSIDE_ROOT"),
        ("..", "MASK_OUTSIDE_ROOT"),
        ("a/../../CANARY", "MASK_OUTSIDE_ROOT"),
        ("/etc/CANARY", "MASK_OUTSIDE_ROOT"),
        ("CANARY\0", "LABEL_NONE"),
        ("CANARY" * 50, "LABEL_NONE"),
    ],
)
@pytest.mark.parametrize("pattern", ["{PatientID}", "{PatientID}/mask.nii.gz"])
def test_a_patient_id_leads_nowhere(patient: str, code: str, pattern: str) -> None:
    ref = replace(REF, patient_id=patient)
    with pytest.raises(LabelError) as caught:
        mask_path(Path("/masks"), pattern, ref, Path("/archive"))
    assert caught.value.code == code
    assert "CANARY" not in str(caught.value)


def test_masks_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    nifti(tmp_path / "elsewhere.nii", classes().transpose(2, 1, 0), RAS)
    (tmp_path / "masks" / "p 7.nii").symlink_to(tmp_path / "elsewhere.nii")
    path = mask_path(tmp_path / "masks", "{PatientID}.nii", REF, Path("/archive"))
    assert (read(path) == classes()).all()


TILTED = Phantom(shape=(8, 10, 12), spacing=(2.5, 0.8, 0.6), oblique_deg=20, tilt_deg=15)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("distance", [2.5 / np.cos(np.deg2rad(15)), 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_mask_made_on_a_straightened_series(
    tmp_path: Path, last: bool, distance: float, seed: int
) -> None:
    sheared, volume = TILTED.affine_lps(), classes(TILTED.shape)
    upright = sheared.copy()
    upright[:3, 2] = [0, 0, distance]  # ITK keeps the length of the step: 2.588 mm
    if last:
        upright[:3, 3] += 7 * (sheared[:3, 2] - upright[:3, 2])
    mask, ras = as_saved(volume, upright, np.random.default_rng(seed))
    placed = volume_of(nifti(tmp_path / "m.nii", mask, ras), sheared, TILTED.shape)
    assert placed.notes == {"MASK_MADE_ON_UNSHEARED": 1}
    assert (placed.values == volume).all()


def test_straightened_by_another_angle_is_refused(tmp_path: Path) -> None:
    other = Phantom(shape=TILTED.shape, spacing=TILTED.spacing, oblique_deg=20, tilt_deg=12)
    path = nifti(
        tmp_path / "m.nii",
        classes(TILTED.shape).transpose(2, 1, 0),
        LPS_TO_RAS @ other.affine_lps(),
    )
    with pytest.raises(LabelError, match="MASK_GRID_MISMATCH"):
        volume_of(path, TILTED.affine_lps(), TILTED.shape)


def test_index_order_is_trusted_on_demand_only(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), np.eye(4))
    with pytest.raises(LabelError, match="MASK_GRID_MISMATCH"):
        volume_of(path)
    found = volume_of(path, geometry="index")
    assert found.notes == {"MASK_BY_INDEX": 1}
    assert (found.values == classes()).all()
    with pytest.raises(LabelError, match="MASK_GRID_MISMATCH"):
        volume_of(path, shape=(5, 5, 6), geometry="index")


def test_index_order_needs_no_affine(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0))
    assert (volume_of(path, geometry="index").values == classes()).all()


@pytest.mark.parametrize(("flips", "notes"), [((), {}), ((0,), {"MASK_INDEX_NOT_AFFINE": 1})])
def test_index_order_against_a_good_affine_is_told(
    tmp_path: Path, flips: tuple[int, ...], notes: dict[str, int]
) -> None:
    mask, ras = saved_as(classes(), PLAIN, (0, 1, 2), flips)
    found = volume_of(nifti(tmp_path / "m.nii", mask, ras), geometry="index")
    assert found.notes == {"MASK_BY_INDEX": 1, **notes}
    assert (found.values == mask.transpose(2, 1, 0)).all()


def test_nearest_voxel_on_demand_only(tmp_path: Path) -> None:
    # columns of 3 mm under a mask of 1.5 mm: centres 0, 3, 6 mm lie on its voxels 0, 2, 4
    half = np.diag([-1.5, -2.0, 5.0, 1.0])
    mask = np.arange(6).reshape(6, 1, 1)
    path = nifti(tmp_path / "m.nii", mask.astype(np.uint8), half)
    with pytest.raises(LabelError, match="MASK_GRID_MISMATCH"):
        volume_of(path, shape=(1, 1, 3))
    found = volume_of(path, shape=(1, 1, 3), resample="nearest")
    assert found.notes == {"MASK_RESAMPLED": 1}
    assert found.values.tolist() == [[[0, 2, 4]]]
    with pytest.raises(LabelError, match="MASK_OUTSIDE_IMAGE: 3 labelled"):
        volume_of(path, shape=(1, 1, 1), resample="nearest")  # at 4.5, 6 and 7.5 mm
    # a mask that fits is not resampled
    fits = nifti(tmp_path / "fits.nii", classes().transpose(2, 1, 0), RAS)
    assert volume_of(fits, resample="nearest").notes == {}


def test_nearest_voxel_of_a_turned_mask(tmp_path: Path) -> None:
    # a ball of 12 mm on 2 mm voxels, turned by 30 degrees about its centre, keeps its place
    shape, affine = (24, 24, 24), np.diag([2.0, 2.0, 2.0, 1.0])
    z, y, x = np.indices(shape)
    ball = ((z - 11.5) ** 2 + (y - 11.5) ** 2 + (x - 11.5) ** 2 <= 36).astype(np.uint8)
    centre = np.eye(4)
    centre[:3, 3] = 23
    rotated = centre @ turned([1, 2, 3], np.pi / 6) @ np.linalg.inv(centre) @ affine
    path = nifti(tmp_path / "m.nii", ball.transpose(2, 1, 0), LPS_TO_RAS @ rotated)
    found = volume_of(path, affine, shape, resample="nearest").values
    assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > 0.92


def test_series_without_geometry(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), RAS)
    with pytest.raises(LabelError, match="MASK_GRID_MISMATCH"):
        read_nifti_mask(path, Grid(shape=SHAPE))
    single = {(f"1.2.{k}", 0): k for k in range(4)}
    frames = {("1.2", k): k for k in range(4)}
    for slots in ({}, single, {("", 0): 3}):  # in the order of their pseudonyms, if at all
        with pytest.raises(LabelError, match="MASK_GRID_MISMATCH: 4 single images"):
            read_nifti_mask(path, Grid(shape=SHAPE, slots=slots), geometry="index")
    placed = read_nifti_mask(path, Grid(shape=SHAPE, slots=frames), geometry="index")
    assert (placed.values == classes()).all()
    alone = nifti(tmp_path / "one.nii", classes((1, 5, 6)).transpose(2, 1, 0))
    placed = read_nifti_mask(alone, Grid(shape=(1, 5, 6), slots={("1.2", 0): 0}), "index")
    assert (placed.values == classes((1, 5, 6))).all()


def test_part_of_a_split_series(tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", classes().transpose(2, 1, 0), RAS)
    upper = PLAIN.copy()
    upper[2, 3] = 10
    with pytest.raises(LabelError, match="MASK_OUTSIDE_IMAGE: 45 labelled"):
        volume_of(path, upper, (2, 5, 6))
    part = read_nifti_mask(path, Grid(shape=(2, 5, 6), affine=upper, partial=True))
    assert (part.values == classes()[2:]).all()


def huge(sizes: tuple[int, int, int], offset: float = 352, datatype: int = 2) -> bytes:
    """A NIfTI-1 header of uint8 voxels that are not there."""
    header: Any = nib.Nifti1Header()
    header.set_data_shape((2, 2, 2))
    header.set_sform(RAS, code=1)
    header["dim"][1:4] = sizes
    header["vox_offset"], header["datatype"] = offset, datatype
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + b"\0" * 4


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (huge((32767, 32767, 32767)), "MASK_SIZE_LIMIT"),
        (huge((1000, 1000, 100), datatype=64), "MASK_SIZE_LIMIT"),
        (huge((100, 100, 100)), "MASK_UNREADABLE"),  # within the limit, but not in the file
        (huge((0, 5, 4)), "MASK_UNREADABLE"),
        (huge((6, 5, 4), offset=3e38), "MASK_SIZE_LIMIT"),
        (huge((6, 5, 4), offset=float("nan")), "MASK_SIZE_LIMIT"),
        (
            huge((6, 5, 4), offset=2e9)[:348] + b"\1\0\0\0" + struct.pack("<2i", 2**31 - 16, 6),
            "MASK_SIZE_LIMIT",
        ),
    ],
)
def test_absurd_sizes_are_refused_at_once(tmp_path: Path, head: bytes, code: str) -> None:
    path, started = tmp_path / "m.nii.gz", time.process_time()
    path.write_bytes(gzip.compress(head + b"\0" * 2000, 1))
    with pytest.raises(LabelError, match=code):
        volume_of(path)
    assert time.process_time() - started < 0.5


def test_deflated_zeros_are_refused_at_once(tmp_path: Path) -> None:
    path, started = tmp_path / "m.nii.gz", time.process_time()
    path.write_bytes(gzip.compress(huge((1000, 1000, 90)) + b"\0" * 90_000_000, 1))
    assert path.stat().st_size < 1_000_000
    written = time.process_time()
    with pytest.raises(LabelError, match=r"MASK_SIZE_LIMIT: 90000000 voxels, the image has 120"):
        volume_of(path)
    assert time.process_time() - written < 0.5 < 60 + written - started


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64, np.uint64])
def test_labels_of_any_integer_type(dtype: type) -> None:
    values = np.array([[[0, 2], [1, 100]]], dtype=dtype)
    mapped = map_labels(values, {0: 0, 1: 2, 2: 1, 100: 255}, 3)
    assert mapped.tolist() == [[[0, 1], [2, 255]]]
    far = np.array([[0, 100_000]])
    assert map_labels(far, {0: 0, 100_000: 1}, 2).tolist() == [[0, 1]]
    assert map_labels(np.zeros((0, 3), dtype), {}, 2).shape == (0, 3)
