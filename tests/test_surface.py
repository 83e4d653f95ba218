"""Distances between surfaces, and the conventions for cases, on boxes that a person can count.

The box has 4 x 4 x 4 voxels, of which 64 - 8 = 56 are surface; the other is moved by one voxel.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import medpsp.train.surface as surfaces
from medpsp.train.cases import Scores, score_case
from medpsp.train.metrics import dice_per_class, iou_per_class
from medpsp.train.surface import Grid, surface, surface_scores

STEPS = np.diag([3.0, 1.0, 1.0])  # mm from slice to slice, row to row, column to column
PLACES = np.arange(9)
GRID = Grid(PLACES, STEPS)
NAN = float("nan")


def box(axis: int = 0, shift: int = 0) -> NDArray[np.bool_]:
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[2:6, 2:6, 2:6] = True
    return np.roll(mask, shift, axis)


def scores(
    truth: NDArray[np.bool_], found: NDArray[np.bool_], tolerance: float
) -> tuple[float, float]:
    return surface_scores(truth, found, np.ones_like(truth), GRID, tolerance)


@pytest.mark.parametrize(
    ("axis", "hd95", "nsd"),
    [
        # To the next slice, 3 mm. Of the 56: the first slice (16) is in no surface of the other,
        # which begins 3 mm on; in the last slice the inner 4 lie inside of it, 1 mm from its
        # sides; the other 36 are surface in both. NSD 36/56, (36 + 4)/56, 56/56.
        (0, 3.0, {0.5: 36 / 56, 2.0: 40 / 56, 4.0: 1.0}),
        # To the next column, 1 mm: all 20 are 1 mm away.
        (2, 1.0, {0.5: 36 / 56, 2.0: 1.0, 4.0: 1.0}),
    ],
)
def test_a_box_moved_by_a_voxel(axis: int, hd95: float, nsd: dict[float, float]) -> None:
    truth, found = box(), box(axis, 1)
    assert [int(surface(m, np.ones_like(m), PLACES).sum()) for m in (truth, found)] == [56, 56]
    for tolerance, expected in nsd.items():
        assert scores(truth, found, tolerance) == pytest.approx((hd95, expected))
    counts = case(truth, found).counts
    assert dice_per_class(counts)[1] == 2 * 48 / (64 + 64)
    assert iou_per_class(counts)[1] == 48 / 80


def case(
    truth: NDArray[np.bool_], found: NDArray[np.bool_], grid: Grid | None = GRID, ignore: int = 0
) -> Scores:
    """Scores of class 1 of 2; the first ``ignore`` columns are not known."""
    label = truth.astype(np.uint8)
    label[:, :, :ignore] = 255
    return score_case(label, found.astype(np.uint8), 2, grid, 2.0)


@pytest.mark.parametrize("tolerance", [1.0, 2.9, 3.0, 4.0])
def test_single_voxels(tolerance: float) -> None:
    truth, found = np.zeros((2, 9, 9, 9), dtype=bool)
    truth[4, 4, 4] = found[5, 4, 4] = True
    assert scores(truth, found, tolerance) == (3.0, float(tolerance >= 3))
    found[4, 4, 6] = True  # 2 mm: the two distances back are 3 and 2, 95 % of the way 2.95
    hd95, nsd = scores(truth, found, tolerance)
    assert hd95 == pytest.approx(2.95)
    assert nsd == pytest.approx({1.0: 0, 2.9: 2 / 3}.get(tolerance, 1))


def test_equal_masks() -> None:
    assert scores(box(), box(), 0.001) == (0.0, 1.0)


def test_the_axes_may_be_sheared() -> None:
    """A gantry tilt: the next slice is 3 mm up and 4 mm along the rows, 5 mm in all."""
    grid = Grid(PLACES, np.array([[3.0, 4.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 10.0]]))
    truth, found = np.zeros((2, 9, 9, 9), dtype=bool)
    truth[4, 4, 4] = found[5, 4, 4] = True
    known = np.ones_like(truth)
    assert surface_scores(truth, found, known, grid, 4.9) == pytest.approx((5.0, 0.0))


def test_as_monai_does() -> None:
    """Numbers of MONAI 1.6.1: compute_hausdorff_distance(percentile=95), compute_surface_dice."""
    z, y, x = np.mgrid[:24, :40, :40]
    truth = ((z - 12) / 9) ** 2 + ((y - 20) / 14) ** 2 + ((x - 19) / 16) ** 2 < 1
    found = ((z - 13) / 7) ** 2 + ((y - 18) / 15) ** 2 + ((x - 20) / 13) ** 2 < 1
    grid = Grid(np.arange(24), np.diag([2.5, 0.7, 0.9]))
    seen = surface_scores(truth, found, np.ones_like(truth), grid, 2.0)
    assert seen == pytest.approx((7.5, 0.46456438), rel=1e-6)


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5])
def test_both_ways_to_a_distance_are_one(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree, and the transform for masks that are mostly surface."""
    masks = np.random.default_rng(1).random((2, 12, 20, 16)) < share
    grid, known = Grid(np.arange(12), np.diag([2.5, 0.7, 0.9])), np.ones(masks.shape[1:], bool)
    seen = []
    for dense in (0, 10**9):
        monkeypatch.setattr(surfaces, "DENSE", dense)
        seen.append(surface_scores(*masks, known, grid, 1.0))
    assert seen[0] == pytest.approx(seen[1], rel=1e-12)
    assert seen[0].hd95 > 0


def test_a_mask_has_a_surface_at_the_edge_of_the_image() -> None:
    whole = np.ones((3, 4, 5), dtype=bool)
    expected = whole.copy()
    expected[1, 1:3, 1:4] = False
    np.testing.assert_array_equal(surface(whole, whole, np.arange(3)), expected)


def test_there_is_no_surface_on_what_is_not_known() -> None:
    """A rod of five slices; of the one after it nothing is known, so that end is no surface."""
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[2:7, 3:6, 3:6] = True
    known = np.ones_like(mask)
    ends = [int(surface(mask, known, PLACES)[n, 4, 4]) for n in range(2, 7)]
    assert ends == [1, 0, 0, 0, 1]
    known[7] = False
    assert [int(surface(mask, known, PLACES)[n, 4, 4]) for n in (2, 6)] == [1, 0]
    gap = np.array([0, 1, 2, 3, 4, 5, 6, 9, 10])  # the same for slices that are missing
    assert [int(surface(mask, np.ones_like(mask), gap)[n, 4, 4]) for n in (2, 6)] == [1, 0]


def test_a_gap_is_as_long_as_it_is() -> None:
    truth, found = np.zeros((2, 3, 9, 9), dtype=bool)
    truth[1, 4, 4] = found[2, 4, 4] = True
    known = np.ones_like(truth)
    near = surface_scores(truth, found, known, Grid(np.array([0, 1, 2]), STEPS), 1.0)
    far = surface_scores(truth, found, known, Grid(np.array([0, 1, 5]), STEPS), 1.0)
    assert (near.hd95, far.hd95) == (3.0, 12.0)


def test_conventions_for_empty_masks() -> None:
    none = np.zeros((9, 9, 9), dtype=bool)
    for truth, found, dice, nsd in (
        (none, none, NAN, NAN),  # absent
        (box(), none, 0.0, 0.0),  # missed
        (none, box(), 0.0, 0.0),  # invented
    ):
        seen = case(truth, found)
        assert np.isnan(seen.hd95[1])
        for value, expected in (
            (seen.nsd[1], nsd),
            (dice_per_class(seen.counts)[1], dice),
            (iou_per_class(seen.counts)[1], dice),
        ):
            assert value == pytest.approx(expected, nan_ok=True)


def test_ignored_voxels_are_in_neither_mask() -> None:
    truth, found = box(), box(2, 1)
    # columns 0 to 3 are not known: truth is 2 wide (columns 4, 5), found 3 (4, 5, 6)
    seen = case(truth, found, ignore=4)
    assert seen.counts.sum() == 9 * 9 * 5
    assert dice_per_class(seen.counts)[1] == 2 * 32 / (32 + 48)
    # surfaces in slice 3 of the box: columns 4, 5 of truth have the face at 5 alone
    assert seen.hd95[1] == 1.0
    only_there = np.zeros((9, 9, 9), dtype=bool)
    only_there[2:6, 2:6, :3] = True
    assert np.isnan(case(only_there, only_there, ignore=4).nsd[1])  # absent, once it is ignored


def test_without_geometry_there_are_no_distances() -> None:
    seen = case(box(), box(0, 1), grid=None)
    assert dice_per_class(seen.counts)[1] == 0.75
    assert np.isnan([seen.hd95, seen.nsd]).all()


def test_a_case_is_what_its_whole_volume_is() -> None:
    """The boxes that are cut out of the volume for speed do not show."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, found = rng.integers(0, 3, (2, 5, 6, 7)).astype(np.uint8)
        for labels in (truth, found):
            labels[:, : rng.integers(0, 4)] = 0
            labels[: rng.integers(0, 2)] = 0
        truth[rng.random(truth.shape) < 0.1] = 255
        grid, known = Grid(np.array([0, 1, 3, 4, 5]), STEPS), truth != 255
        seen = score_case(truth, found, 3, grid, 1.0)
        for k in (1, 2):
            whole = surface_scores(truth == k, (found == k) & known, known, grid, 1.0)
            assert (seen.hd95[k], seen.nsd[k]) == pytest.approx(whole, nan_ok=True)
