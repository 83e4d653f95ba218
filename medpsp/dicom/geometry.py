"""Where slices lie: plain geometry, numbers in and numbers out.

Positions are looked at in the coordinates of their plane, (u, v, d): mm along the row direction,
along the column direction and along the normal (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import GeometryError

Floats = NDArray[np.float64]

SPACING_RTOL, SPACING_ATOL_MM = 0.01, 0.01
"""Two slice distances are the same within max(1 %, 0.01 mm): decimal strings carry noise."""

LINE_TOL_MM = 0.1
"""A slice this far beside the line through its series, or beside its neighbour, is off it."""

MULTIPLE_TOL = 0.05
"""A gap is a whole number of slices within this share of one."""

ORTHOGONAL_TOL = 1e-3

TILT_TOL_DEG = 0.5

FAR_MM = 1e6
"""No coordinate is a kilometre away: numbers above are damage, and would overflow further on."""

LEAST_SPACING_MM = 1e-6


class Run(NamedTuple):
    """Slices ``start`` to before ``stop`` of an ordered stack, on one regular grid.

    ``grid`` holds the place of each on it where some places are empty; else it is empty itself.
    """

    start: int
    stop: int
    grid: tuple[int, ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """``grid``, spelt out."""
        return self.grid or tuple(range(self.stop - self.start))


def check_slice(
    position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]
) -> None:
    """Check what one slice says of itself.

    Args:
        position: (0020,0032), mm LPS; empty for an image without one.
        orientation: (0020,0037), six cosines; empty for an image without.
        spacing: (0028,0030), mm; empty for an image without.

    Raises:
        GeometryError: GEOM_NONFINITE, GEOM_BAD_IOP, GEOM_BAD_SPACING.
    """
    if not all(abs(v) < FAR_MM for v in (*position, *orientation, *spacing)):  # also for NaN
        raise GeometryError("GEOM_NONFINITE", "a number of the geometry is not finite, or absurd")
    if orientation:
        x, y = orientation[:3], orientation[3:]
        lengths = math.hypot(*x), math.hypot(*y)
        dot = abs(sum(a * b for a, b in zip(x, y, strict=True)))
        if not all(0.5 < v < 2 for v in lengths) or dot > ORTHOGONAL_TOL * lengths[0] * lengths[1]:
            raise GeometryError("GEOM_BAD_IOP", "row and column directions are not orthonormal")
    if spacing and min(spacing) < LEAST_SPACING_MM:
        raise GeometryError("GEOM_BAD_SPACING", "PixelSpacing must be above 0 mm")


def axes_of(orientation: Sequence[float]) -> Floats:
    """(3, 3): unit vectors of the row direction, the column direction and the normal, as rows."""
    x, y = orientation[:3], orientation[3:]
    long, wide = math.hypot(*x), math.hypot(*y)
    x, y = [v / long for v in x], [v / wide for v in y]
    # np.cross takes 40 times as long for a single pair
    normal = [x[i - 2] * y[i - 1] - x[i - 1] * y[i - 2] for i in range(3)]
    return np.array([x, y, normal])


def near_groups(rows: Sequence[tuple[float, ...]], tolerance: float) -> list[int]:
    """Number the rows so that those have one number that differ by at most ``tolerance``.

    By distance to the smallest row of a group, since rounding would part neighbours. The numbers
    do not depend on the order of the rows.
    """
    distinct = sorted(set(rows))
    if len(distinct) == 1:
        return [0] * len(rows)
    heads = np.empty((len(distinct), len(distinct[0])))
    number: dict[tuple[float, ...], int] = {}
    count = 0
    for row in distinct:
        near = (np.abs(heads[:count] - row) <= tolerance).all(axis=1)
        found = int(near.argmax()) if near.any() else count
        if found == count:
            heads[count] = row
            count += 1
        number[row] = found
    return [number[row] for row in rows]


def cut_runs(coords: Floats) -> list[Run]:
    """Cut a stack where the step from slice to slice changes; nothing is averaged.

    A run is as many equal steps in a row as there are. The slice between two runs goes to the
    one with more steps, else to that of the usual step, else to the lower. A step that occurs
    once makes no run, unless it is the usual one or the only one: its slices stay single.

    Args:
        coords: (N, 3) u, v, d in the order of d, no two slices at one place.
    """
    count = len(coords)
    if count == 1:
        return [Run(0, 1)]
    steps = np.diff(coords, axis=0)  # (N - 1, 3)
    usual = _alike(steps, _usual_step(steps))
    runs = [Run(0, count)] if usual.all() else _share_out(steps, usual)
    return [piece for run in runs for piece in _straight(coords, run)]


def joints(coords: Floats, runs: Sequence[Run]) -> list[int]:
    """How many slice distances lie between each run and the next; 0 if not a whole number.

    Counted in the smaller step of the two, of which the other must be a multiple. A stack of
    single slices has no slice distance: 0.
    """
    if len(runs) in (1, len(coords)):
        return [0] * (len(runs) - 1)
    usual = _usual_step(np.diff(coords, axis=0))
    found = []
    for pair in pairwise(runs):
        steps = sorted(_mean_steps(coords, pair), key=lambda step: float(step[2])) or [usual]
        gap = coords[pair[1].start] - coords[pair[0].stop - 1]
        times = _multiples(np.array([gap, *steps[1:]]), steps[0])
        found.append(int(times[0]) if times.all() else 0)
    return found


def fill_gaps(coords: Floats, runs: Sequence[Run]) -> list[Run]:
    """Join runs across gaps of a whole number of slices, on a grid with empty places.

    Not joined where more places would be empty than taken: one stray slice must not make a
    volume of thousands.
    """
    chains: list[list[Run]] = [[runs[0]]]
    for run, gap in zip(runs[1:], joints(coords, runs), strict=True):
        if gap > 1:
            chains[-1].append(run)
        else:
            chains.append([run])
    usual = _usual_step(np.diff(coords, axis=0))
    filled: list[Run] = []
    for chain in chains:
        start, stop = chain[0].start, chain[-1].stop
        unit = min(_mean_steps(coords, chain), key=lambda step: float(step[2]), default=usual)
        times = _multiples(np.diff(coords[start:stop], axis=0), unit)
        joined = Run(start, stop, (0, *np.cumsum(times).tolist()))
        dense = joined.places[-1] + 1 <= 2 * (stop - start)
        fits = bool(times.all()) and dense and len(list(_straight(coords, joined))) == 1
        filled += [joined] if len(chain) > 1 and fits else chain
    return filled


def irregular(coords: Floats, gaps: Sequence[int]) -> GeometryError:
    """Why a stack is no regular grid: MISSING_SLICES or UNEVEN_SPACING.

    Args:
        coords: (N, 3) u, v, d in order.
        gaps: The `joints` of its runs.
    """
    steps = np.diff(coords, axis=0)
    usual = _usual_step(steps)
    odd = np.flatnonzero(~_alike(steps, usual))
    detail = f"positions leave a straight line by more than {LINE_TOL_MM} mm"
    if odd.size:
        detail = (
            f"{odd.size} of {len(steps)} distances differ from {usual[2]:.3f} mm, "
            f"the first is {steps[odd[0], 2]:.3f} mm after slice {int(odd[0]) + 1}"
        )
    return GeometryError("MISSING_SLICES" if min(gaps) > 1 else "UNEVEN_SPACING", detail)


def affine_of(
    axes: Floats, spacing: Sequence[float], positions: Floats, last: int
) -> tuple[tuple[float, ...], ...]:
    """(4, 4) index (column, row, slice) to mm LPS, as nested tuples; sheared if so acquired.

    Args:
        axes: Of `axes_of`.
        spacing: PixelSpacing: between rows, between columns, mm.
        positions: (N, 3) mm LPS of the slices in order.
        last: Place of the last slice on the grid. For 0, a single slice, the distance to the
            next is not known; the column then holds the normal, 1 mm long.
    """
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[1]  # along a row the column index grows: PixelSpacing[1]
    affine[:3, 1] = axes[1] * spacing[0]
    affine[:3, 2] = (positions[-1] - positions[0]) / last if last else axes[2]
    affine[:3, 3] = positions[0]
    return tuple(tuple(float(v) for v in row) for row in affine)


def is_tilted(coords: Floats) -> bool:
    """Whether the line through the slices leaves the normal by more than 0.5 degrees.

    From positions: (0018,1120) is "not intended for mathematical computations".
    """
    u, v, d = (coords[-1] - coords[0]).tolist()
    return math.degrees(math.atan2(math.hypot(u, v), d)) > TILT_TOL_DEG


def _usual_step(steps: Floats) -> Floats:
    """(3,) the lower median: of two distances the smaller one is the spacing."""
    middle: Floats = np.sort(steps, axis=0)[(len(steps) - 1) // 2]
    return middle


def _alike(steps: Floats, step: Floats) -> NDArray[np.bool_]:
    """(N,) which of the (N, 3) steps are ``step``."""
    along = max(SPACING_RTOL * float(step[2]), SPACING_ATOL_MM)
    across = max(LINE_TOL_MM, along)
    return np.asarray(np.all(np.abs(steps - step) <= (across, across, along), axis=1))


def _multiples(steps: Floats, step: Floats) -> NDArray[np.int64]:
    """(N,) how often ``step`` fits into each of the (N, 3) steps; 0 if not a whole number."""
    times = np.round(steps[:, 2] / step[2])
    off = np.abs(steps - times[:, None] * step)
    along = max(MULTIPLE_TOL * float(step[2]), SPACING_ATOL_MM)
    across = max(LINE_TOL_MM, along)
    return np.where((off <= (across, across, along)).all(axis=1), times, 0).astype(np.int64)


def _mean_steps(coords: Floats, runs: Iterable[Run]) -> list[Floats]:
    """The step of each regular run; a single slice has none."""
    return [
        (coords[run.stop - 1] - coords[run.start]) / run.places[-1]
        for run in runs
        if run.stop - run.start > 1
    ]


def _share_out(steps: Floats, usual: NDArray[np.bool_]) -> list[Run]:
    """Give each slice to one run; slices that belong to no run stay single."""
    settled = int(usual.sum()) > 1 or bool(_multiples(steps, _usual_step(steps)).all())
    count = len(steps) + 1
    free = [True] * count
    runs: list[Run] = []
    ranges = sorted(_segments(steps, usual), key=lambda s: (s[0] - s[1], not usual[s[0]], s[0]))
    for first, stop in ranges:
        if stop - first == 1 and not (usual[first] and settled):
            continue
        start, end = first + (not free[first]), stop + 1 - (not free[stop])
        if start < end:
            free[start:end] = [False] * (end - start)
            runs.append(Run(start, end))
    return sorted([*runs, *(Run(i, i + 1) for i in range(count) if free[i])])


def _segments(steps: Floats, usual: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Ranges of equal steps that follow each other."""
    first = 0
    for i in range(1, len(steps)):
        if usual[i] != usual[first] or not (usual[i] or _alike(steps[i : i + 1], steps[first])[0]):
            yield first, i
            first = i
    yield first, len(steps)


def _straight(coords: Floats, run: Run) -> Iterator[Run]:
    """Cut a run where small differences have added up: after the slice farthest off the line."""
    todo = [run]
    while todo:
        run = todo.pop()
        start, stop, _ = run
        places = np.array(run.places)
        step = (coords[stop - 1] - coords[start]) / max(1, places[-1])
        off = np.abs(coords[start:stop] - coords[start] - places[:, None] * step).max(axis=1)
        worst = int(off.argmax())
        if off[worst] <= max(LINE_TOL_MM, SPACING_RTOL * step[2]):
            yield run
        else:
            todo += [Run(start + worst + 1, stop), Run(start, start + worst + 1)]
