"""Regular runs of slices: where they are cut, and what is put together again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medpsp.dicom.geometry import (
    axes_of,
    cut_runs,
    fill_gaps,
    irregular,
    is_tilted,
    joints,
    near_groups,
)


def at(*depths: float) -> NDArray[np.float64]:
    """(N, 3) u, v, d of slices on the normal."""
    return np.array([[0.0, 0.0, d] for d in depths])


def runs_of(*depths: float) -> list[list[float]]:
    return [list(depths[run.start : run.stop]) for run in cut_runs(at(*depths))]


@pytest.mark.parametrize(
    ("depths", "runs", "gaps"),
    [
        ((0, 5, 10), [[0, 5, 10]], []),
        ((0, 250), [[0, 250]], []),  # two slices have the one distance they have
        ((0, 5, 15, 20), [[0, 5], [15, 20]], [2]),
        ((0, 5, 15), [[0, 5], [15]], [2]),  # of two distances the smaller one is the spacing
        ((0, 5, 10, 25, 30), [[0, 5, 10], [25, 30]], [3]),
        ((0, 5, 7.5, 10, 12.5), [[0], [5, 7.5, 10, 12.5]], [2]),  # not 0 and 5 as a pair
        ((0, 5, 15, 20, 30, 35), [[0, 5], [15, 20], [30, 35]], [2, 2]),
        ((0, 5, 10, 17, 22), [[0, 5, 10], [17, 22]], [0]),
        ((0, 5, 10, 12, 17), [[0, 5, 10], [12, 17]], [0]),
        ((0, 5, 10, 15.1, 20), [[0, 5, 10], [15.1], [20]], [1, 1]),  # 2 % is no noise
        # the slice between two spacings goes to the longer run
        ((0, 2.5, 5, 10, 15, 20), [[0, 2.5], [5, 10, 15, 20]], [1]),
        ((0, 2.5, 5, 7.5, 12.5, 17.5), [[0, 2.5, 5, 7.5], [12.5, 17.5]], [2]),
        # one slice too many
        ((0, 2.5, 5, 6.25, 7.5, 10, 12.5), [[0, 2.5, 5], [6.25], [7.5, 10, 12.5]], [0, 0]),
        # no distance occurs twice
        ((0, 5, 7), [[0], [5], [7]], [0, 0]),
        ((0, 1, 3.5, 8), [[0], [1], [3.5], [8]], [0, 0, 0]),
    ],
)
def test_where_runs_are_cut(
    depths: tuple[float, ...], runs: list[list[float]], gaps: list[int]
) -> None:
    assert runs_of(*depths) == runs
    assert joints(at(*depths), cut_runs(at(*depths))) == gaps


def test_noise_of_decimal_strings_is_regular() -> None:
    assert len(runs_of(0, 5.02, 10.01, 14.99, 20)) == 1  # within 1 %
    assert len(runs_of(0, 0.31, 0.62, 0.94, 1.25)) == 1  # 0.3125 mm, written with two decimals


def test_slice_beside_the_line_stands_alone() -> None:
    coords = at(0, 5, 10, 15, 20, 25)
    coords[3, 0] = 3
    assert [(r.start, r.stop) for r in cut_runs(coords)] == [(0, 3), (3, 4), (4, 6)]


def test_small_differences_that_add_up_are_cut() -> None:
    # 50 steps of 2.50 and 50 of 2.52 mm: within 1 %, but 0.5 mm off a straight grid
    depths = np.concatenate([np.arange(51) * 2.5, 125 + np.arange(1, 51) * 2.52])
    runs = cut_runs(at(*depths))
    assert [(r.start, r.stop) for r in runs] == [(0, 51), (51, 101)]
    assert "straight line" in str(irregular(at(*depths), joints(at(*depths), runs)))


@pytest.mark.parametrize(
    ("depths", "grids"),
    [
        ((0, 5, 15, 20), [(0, 1, 3, 4)]),
        ((0, 5, 15), [(0, 1, 3)]),
        ((0, 5, 15, 20, 35, 40), [(0, 1, 3, 4, 7, 8)]),
        ((0, 5, 7.5, 10, 12.5), [(0, 2, 3, 4, 5)]),
        ((0, 5, 10, 20, 25, 32, 37), [(0, 1, 2, 4, 5), ()]),  # 7 mm is no whole number of slices
        ((0, 2.5, 5, 7.5, 12.5, 17.5), [(0, 1, 2, 3, 5, 7)]),
        ((0, 5, 10, 15.1, 20), [(), (), ()]),
        ((0, 5, 10, 1000), [(), ()]),  # 197 empty places for one slice
        ((0, 5, 10.0, 20.4, 25.4), [(), ()]),  # off the grid by 0.4 mm
        ((0, 2.5, 5, 10, 15, 20), [(), ()]),
    ],
)
def test_whole_gaps_are_filled(depths: tuple[float, ...], grids: list[tuple[int, ...]]) -> None:
    coords = at(*depths)
    assert [run.grid for run in fill_gaps(coords, cut_runs(coords))] == grids


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=60),
    st.floats(0.3, 8),
    st.floats(-1, 1),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_slice_is_in_one_run_on_a_grid_that_holds(
    gaps: list[int], step: float, shear: float, fill: bool
) -> None:
    depth = np.concatenate([[0], np.cumsum(gaps)]) * step
    coords = np.stack([shear * depth, 0 * depth, depth], axis=1)
    runs = cut_runs(coords)
    if fill:
        runs = fill_gaps(coords, runs)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(coords)))
    for run in runs:
        places = np.array(run.places)
        assert len(places) == run.stop - run.start
        along = (coords[run.stop - 1] - coords[run.start]) / max(1, places[-1])
        line = coords[run.start] + places[:, None] * along
        assert np.abs(coords[run.start : run.stop] - line).max() <= 0.1


def test_tilt_is_told_from_half_a_degree() -> None:
    # 10 mm along the normal and 10 tan(0.4) = 0.070, 10 tan(0.6) = 0.105 beside it
    assert not is_tilted(np.array([[0, 0, 0], [0, 0.070, 10]]))
    assert is_tilted(np.array([[0, 0, 0], [0, 0.105, 10]]))


def test_normal_is_row_cross_column() -> None:
    assert axes_of((0, 2, 0, 0, 0, -2)).tolist() == [[0, 1, 0], [0, 0, -1], [-1, 0, 0]]
    turned = axes_of((0.6, 0.8, 0, -0.8, 0.6, 0))
    assert turned[2] == pytest.approx([0, 0, 1])


def test_near_groups_do_not_part_neighbours() -> None:
    rows = [(0.0005001, 0.0), (0.5, 0.0), (0.0004999, 0.0), (0.5, 0.1), (0.5, 0.0)]
    assert near_groups(rows, 1e-3) == [0, 1, 0, 2, 1]
