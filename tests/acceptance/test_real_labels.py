"""Real label objects on real scans: RTSTRUCT against supplied masks, DICOM SEG in its place.

Grids are made by pydicom and plain arithmetic, so that nothing here leans on the series reader.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from medpsp.dicom.decode import layout_of, stored_values
from medpsp.dicom.labelref import KINDS, label_target, match_series
from medpsp.dicom.labels import read_nifti_mask
from medpsp.dicom.names import NameRule
from medpsp.dicom.parse import parse
from medpsp.dicom.placement import Grid, grid_of
from medpsp.dicom.rtstruct import read_contours
from medpsp.dicom.seg import read_segments
from medpsp.dicom.segheader import read_frame, read_header
from medpsp.errors import LabelError
from medpsp.types import Place, Series
from tests.labelled import series_of_files

ANY = NameRule(classes=("background", "any"), names=(("*", "any"),))
TUMOUR = NameRule(classes=("background", "tumour"), names=(("gtv_mass_*", "tumour"),))
STS_FOLDERS = 17  # 8 CT, 8 T1, 1 PET


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def volumes(data: Path) -> dict[str, tuple[Path, Series]]:
    root = data / "seg3d" / "sts_dicom_rtstruct"
    folders = sorted(p.parent for p in root.glob("*/*/mask.nii.gz"))
    return {
        f"{folder.parent.name} {folder.name}": (
            folder,
            series_of_files(sorted((folder / "image").glob("*.dcm"))),
        )
        for folder in folders
    }


def test_sarcoma_rtstruct(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, worst = [], 1.0
    for name, (folder, series) in volumes(data).items():
        grid = grid_of(series)
        drawn = read_contours(pydicom.dcmread(folder / "mask" / "RS.dcm"), grid, TUMOUR)
        truth = read_nifti_mask(folder / "mask.nii.gz", grid)
        assert not truth.notes
        mine, theirs = drawn.values > 0, truth.values > 0
        score = dice(mine, theirs)
        if "PET" not in name:
            worst = min(worst, score)
        lines.append(
            f"{name:<16}{mine.sum():>8}{theirs.sum():>8}{(mine != theirs).sum():>6}{score:>9.4f}"
            f"  {drawn.notes or ''}"
        )
    with capsys.disabled():
        print(f"\n{'RTSTRUCT':<16}{'drawn':>8}{'mask':>8}{'diff':>6}{'Dice':>9}")
        print("\n".join(lines))
    assert len(lines) == STS_FOLDERS
    assert worst >= 0.92


def test_sarcoma_masks_find_their_series(data: Path) -> None:
    """By reference among all; without, by position, unless CT, T1 and PET share their slices."""
    found = volumes(data)
    series = [s for _, s in found.values()]
    for number, (name, (folder, own)) in enumerate(found.items()):
        ref = label_target(pydicom.dcmread(folder / "mask" / "RS.dcm"))
        assert match_series(ref, series) == (number,), name
        lost = replace(ref, series_uids=(), sop_uids=())
        with pytest.raises(LabelError, match="LABEL_AMBIGUOUS"):
            match_series(lost, series)
        alike = [s if s.first.modality == own.first.modality else at_sea(s) for s in series]
        assert match_series(lost, alike) == (number,), name


def at_sea(series: Series) -> Series:
    """The same without geometry."""
    return replace(series, affine=None)


def breast(data: Path) -> tuple[Dataset, Series]:
    root = data / "seg3d" / "breast_mr_dicom_seg" / "UCSF-BR-06"
    series = series_of_files(sorted((root / "image_dce_pe1").glob("*.dcm")))
    return pydicom.dcmread(root / "mask" / "1-1.dcm"), series


def test_breast_seg_frame_by_frame(data: Path) -> None:
    """Each labelled slice is the frame whose position is that of the image, pixel by pixel."""
    ds, series = breast(data)
    found = read_segments(ds, lambda i: ds.pixel_array[i], grid_of(series), ANY)
    assert found.notes == {}
    images = [pydicom.dcmread(r.path, stop_before_pixels=True) for r in series.slices]
    places = np.array([i.ImagePositionPatient for i in images], dtype=np.float64)
    taken = set()
    for frame, pixels in zip(ds.PerFrameFunctionalGroupsSequence, ds.pixel_array, strict=True):
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=np.float64)
        apart = np.linalg.norm(places - place, axis=1)
        slot = int(apart.argmin())
        assert apart[slot] < 1e-3  # mm; slices are 2 mm apart
        assert (found.values[slot] == (pixels >= 128)).all()
        taken.add(slot)
    assert len(taken) == len(ds.pixel_array) == 42
    assert not found.values[sorted(set(range(60)) - taken)].any()


def test_breast_seg_at_world_points(data: Path) -> None:
    """A labelled voxel of the SEG and the voxel of the image at the same mm agree."""
    ds, series = breast(data)
    values = read_segments(ds, lambda i: ds.pixel_array[i], grid_of(series), ANY).values
    header, rng = read_header(ds), np.random.default_rng(0)
    to_index = np.linalg.inv(np.array(series.affine))
    labelled = 0
    for _ in range(5000):
        number, row, column = (int(rng.integers(n)) for n in ds.pixel_array.shape)
        affine = read_frame(ds, header, number).affine
        assert affine is not None
        index = (to_index @ [*(affine @ [column, row, 1]), 1])[:3]
        assert np.abs(index - np.round(index)).max() < 1e-3
        i, j, k = np.round(index).astype(int)
        assert values[k, j, i] == (ds.pixel_array[number, row, column] >= 128)
        labelled += int(values[k, j, i])
    assert labelled > 100


def test_breast_seg_lies_on_tissue(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mask is brighter than any mirror image of it would be."""
    ds, series = breast(data)
    mask = read_segments(ds, lambda i: ds.pixel_array[i], grid_of(series), ANY).values > 0
    image = np.stack([pydicom.dcmread(ref.path).pixel_array for ref in series.slices])
    air = np.median(image)
    share = {
        axes: float((image[np.flip(mask, axes)] > air).mean())
        for count in range(4)
        for axes in itertools.combinations(range(3), count)
    }
    with capsys.disabled():
        print("\nbreast SEG, share of labelled voxels above the image's median, by flipped axes:")
        print("  ".join(f"{axes or 'as placed'} {value:.3f}" for axes, value in share.items()))
    assert share.pop(()) > 0.9 > max(share.values()) + 0.1


def whole_grid(ds: Dataset, step: float) -> Grid:
    """A grid that just holds the frames of an axial SEG."""
    header = read_header(ds)
    frames = [read_frame(ds, header, i).affine for i in range(header.frames)]
    first = min((f for f in frames if f is not None), key=lambda f: f[2, 2])
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = first[:, :2], [0, 0, step], first[:, 2]
    return Grid(shape=(header.frames, *header.shape), affine=affine)


def read_seg(path: Path, grid: Grid) -> NDArray[np.uint8]:
    parsed = parse(Place(str(path)))
    layout = layout_of(parsed)
    found = read_segments(
        parsed.header, lambda i: stored_values(parsed, layout, i).values, grid, ANY
    )
    assert found.notes == {}
    return found.values


def test_liver_seg_is_one_in_every_syntax(data: Path) -> None:
    """Frames of 510 x 510 bits end within a byte; they are the middle of those of 512 x 512."""
    folder = data / "decode" / "pydicom+pydicom-data" / "data_store" / "data"
    grid = whole_grid(pydicom.dcmread(folder / "liver_expb.dcm"), 1.0)
    truth = read_seg(folder / "liver_expb.dcm", grid)
    assert truth.sum(axis=(1, 2)).tolist() == [36233, 35645, 35220]
    paths = sorted(folder.glob("liver_*.dcm"))
    assert len(paths) == 8
    for path in paths:
        assert (read_seg(path, grid) == truth).all(), path.name


def test_highdicom_seg_on_its_images(data: Path) -> None:
    folder = data / "decode" / "ImagingDataCommons+highdicom" / "data" / "test_files"
    path = folder / "seg_image_ct_binary_single_frame.dcm"
    series = series_of_files([Path(str(get_testdata_file("CT_small.dcm")))])
    assert match_series(label_target(pydicom.dcmread(path)), [series]) == (0,)
    values = read_seg(path, grid_of(series))
    assert (values[0] == pydicom.dcmread(path).pixel_array).all()
    image = pydicom.dcmread(series.first.path).pixel_array
    inside, outside = (np.median(image[values[0] == v]) for v in (1, 0))
    assert inside > outside
    # a projection has no place in the patient: only the reference leads to it
    ds = pydicom.dcmread(folder / "seg_image_cr_binary.dcm")
    ref = replace(series.first, rows=16, columns=16, sop_uid=label_target(ds).sop_uids[0])
    flat = Series(slices=(ref,), affine=None, z_mm=())
    found = read_segments(ds, lambda i: ds.pixel_array, grid_of(flat), ANY)
    assert found.notes == {"SEG_BY_REFERENCE": 1}
    assert (found.values[0] == ds.pixel_array).all()


def test_ibsi_phantom(data: Path) -> None:
    """The grey levels of the digital phantom inside its mask are those that IBSI publishes."""
    folder = data / "decode" / "theibsi+data_sets" / "ibsi_1_digital_phantom" / "dicom_deprecated"
    image = pydicom.dcmread(folder / "image" / "phantom.deprecated")
    grid = Grid(
        shape=(4, 4, 5),
        affine=np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]),
    )
    values = read_seg(folder / "mask" / "mask.deprecated", grid)
    inside = image.pixel_array[::-1][values > 0]  # frames run from y = 3 to 0, the grid from 0
    assert len(inside) == 74
    assert inside.mean() == pytest.approx(2.15, abs=0.005)
    assert inside.var() == pytest.approx(3.05, abs=0.005)


def shoelace(points: NDArray[np.float64]) -> float:
    x, y = points[:, 0], points[:, 1]
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


@pytest.mark.parametrize("name", ["empty/dummy_rt.dcm", "mock_data/non_existent_reference_rt.dcm"])
def test_areas_of_other_rtstructs(data: Path, name: str) -> None:
    """Voxels of 0.1 mm add up to the area of the contours, which have no images here."""
    ds = pydicom.dcmread(data / "decode" / "qurit+rt-utils" / "tests" / name)
    affine = np.diag([0.1, 0.1, 5.0, 1.0])
    affine[:3, 3] = [-100, -100, 60]
    grid = Grid(shape=(3, 2000, 2000), affine=affine)
    for number in range(1, 5):
        rule = NameRule(classes=("background", "any"), names=((f"ROI-{number}", "any"),))
        drawn = read_contours(ds, grid, rule)
        assert drawn.notes == {"LABEL_NAME_UNMATCHED": 3}
        rings = ds.ROIContourSequence[number - 1].ContourSequence
        for ring in rings:
            points = np.array(ring.ContourData, dtype=np.float64).reshape(-1, 3)
            slot = int((points[0, 2] - 60) / 5)
            area = drawn.values[slot].sum() * 0.01
            assert area == pytest.approx(shoelace(points), rel=0.01)


def test_box_with_a_hole(data: Path) -> None:
    path = data / "decode" / "qurit+rt-utils" / "tests" / "mock_data" / "rt.dcm"
    ds: Any = pydicom.dcmread(path)
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    affine[:3, 3] = [-100, -100, 60]
    drawn = read_contours(ds, Grid(shape=(1, 400, 400), affine=affine), ANY)
    outer, inner = (
        shoelace(np.array(ring.ContourData, dtype=np.float64).reshape(-1, 3))
        for ring in ds.ROIContourSequence[0].ContourSequence
    )
    assert drawn.values.sum() * 0.25 == pytest.approx(outer - inner, rel=0.05)


def test_every_label_object_is_known(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SEG and RTSTRUCT among all files, in every syntax; headers only."""
    kinds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(p for p in (data / "decode").rglob("*") if p.is_file()):
            try:
                ds = pydicom.dcmread(path, stop_before_pixels=True)
            except (InvalidDicomError, ValueError, OSError):
                continue
            if ds.get("SOPClassUID") in KINDS:
                kinds.append(label_target(ds).kind)
    with capsys.disabled():
        print(f"\nlabel objects: {kinds.count('seg')} SEG, {kinds.count('rtstruct')} RTSTRUCT")
    assert kinds.count("seg") >= 11
    assert kinds.count("rtstruct") == 3
