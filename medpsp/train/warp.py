"""What a level draws for one sample, and the map of the plane that comes of it. numpy only.

A map says where in the source an output pixel comes from: ``centre + turn (output + grid +
elastic - centre)``. Lengths are drawn in mm and kept in pixels. The map is a part by column,
plus a part by row, plus a spline of few nodes; `warpcv` and `warptorch` add them up,
so both deform alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, floor, isfinite, radians, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.train.augmentextra import Transforms

Floats = NDArray[np.float64]
Matrix = tuple[tuple[float, float], tuple[float, float]]

CHANCE = {"rotate": 0.5, "brightness": 0.5, "grid": 0.3, "elastic": 0.3}
LEVELS = {
    "low": ("rotate", "brightness"),
    "mid": ("rotate", "brightness", "grid"),
    "high": ("rotate", "brightness", "grid", "elastic"),
}
"""What a level may draw; ``none`` draws nothing."""

DEGREES = 15.0
BRIGHTNESS = 0.1  # gain within 1 +- this, offset within +- this
GRID_MM = 64.0
GRID_SHIFT = 0.1  # of the distance of two lines: a cell grows or shrinks by a fifth at most
ELASTIC_MM = 32.0
ELASTIC_SHIFT = (0.125, 0.1875)
"""Least and largest amplitude over the distance of two nodes: 4 to 6 mm at 32 mm, which is 1.6 to
2.3 mm rms. A cubic B-spline of nodes in [-a, a], h apart, has slopes up to 2 a / h, its Jacobian a
norm up to 4 a / h = 0.75; with the 0.2 of the grid that stays below 1, so nothing ever folds."""

UNIT_PIXELS = 0.65  # least length of a drawn mm: the weakest elastic still moves by 1 px rms
UNIT_SMALL, UNIT_LARGE = 128.0, 1024.0  # mm of a side; beyond, lengths scale with the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentOptions:
    """What a data set decides about its augmentation.

    Attributes:
        flips: Mirror rows and columns, each in half of the samples; loses left and right.
        spacing: mm between rows, between columns; NaN or 0, not known, counts as 1.
        transforms: Of albumentations, after ours.
        always: All of a level in every sample, for tests and benchmarks.
    """

    flips: bool = False
    spacing: tuple[float, float] = (1.0, 1.0)
    transforms: Transforms | None = None
    always: bool = False


class Lines(NamedTuple):
    """Grid lines across one axis, in px: the first, their distance, and how far each moves."""

    first: float
    step: float
    moved: Floats

    def at(self, length: int) -> Floats:
        """Displacement of every pixel; linear between lines."""
        places = self.first + self.step * np.arange(len(self.moved))
        return np.interp(np.arange(length), places, self.moved)


class Nodes(NamedTuple):
    """Cubic B-spline nodes, in px: their distance, and how far each moves.

    Of both, the part along columns comes first; ``moved`` is (2, rows, columns) of nodes.
    """

    steps: tuple[float, float]
    moved: Floats


class Bend(NamedTuple):
    """The elastic displacement: row h is ``sum over k of weights[k, h] * along[first[h] + k]``.

    Attributes:
        first: (H,) ascending; the first row of nodes that moves a row of pixels.
        weights: (4, H).
        along: (K, 2, W) columns and rows, in px; rows of nodes, at every column of pixels.
    """

    first: NDArray[np.intp]
    weights: Floats
    along: Floats

    def dense(self) -> Floats:
        """``first`` and ``weights`` as a matrix (H, K)."""
        rows = np.arange(len(self.first))
        matrix = np.zeros((len(rows), len(self.along)))
        matrix[rows, self.first + np.arange(4)[:, None]] = self.weights
        return matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """All that is random about one sample.

    Attributes:
        shape: Rows and columns.
        turn: From an output pixel's offset (columns, rows) from the centre to its source's.
        grid: Lines across the columns and across the rows.
        elastic: Smooth displacement.
        gain, offset: Of brightness, for every channel; nothing is clipped.
    """

    shape: tuple[int, int]
    turn: Matrix = ((1.0, 0.0), (0.0, 1.0))
    grid: tuple[Lines, Lines] | None = None
    elastic: Nodes | None = None
    gain: float = 1.0
    offset: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether any pixel moves."""
        still = self.turn == ((1.0, 0.0), (0.0, 1.0))
        return not still or self.grid is not None or self.elastic is not None

    @property
    def brightens(self) -> bool:
        """Whether any value changes."""
        return (self.gain, self.offset) != (1.0, 0.0)

    def axes(self) -> tuple[Floats, Floats]:
        """The part by column (2, W) and by row (2, H) of the source's column and row."""
        rows, columns = self.shape
        middle = np.array([(columns - 1) / 2, (rows - 1) / 2])
        x, y = np.arange(columns) - middle[0], np.arange(rows) - middle[1]
        if self.grid is not None:
            x, y = x + self.grid[0].at(columns), y + self.grid[1].at(rows)
        turn = np.array(self.turn)
        return middle[:, None] + turn[:, :1] * x, turn[:, 1:] * y

    def bend(self) -> Bend | None:
        """The elastic part; None where there is none."""
        if self.elastic is None:
            return None
        (across, down), moved = self.elastic
        turned = np.einsum("ij,jkl->kil", np.array(self.turn), moved)
        first, weights = _splines(self.shape[1], across)
        along = sum(w * turned[..., first + k] for k, w in enumerate(weights))
        return Bend(*_splines(self.shape[0], down), np.asarray(along))


def draw(
    level: str, rng: np.random.Generator, shape: tuple[int, int], options: AugmentOptions
) -> Draw:
    """Draw for one sample; equal arguments give an equal draw.

    Coins come first and in one order, so a higher level turns a sample as a lower one does.

    Args:
        level: ``none``, ``low``, ``mid`` or ``high``.
        rng: Keyed on (seed, epoch, sample); not touched at level ``none``.
        shape: Rows and columns.
        options: Of the data set.
    """
    if level == "none":
        return Draw(shape=shape)
    coins = rng.random(len(CHANCE))
    numbers = rng.uniform(-1, 1, size=3)
    rows, columns = rng.random(2) < 0.5 if options.flips else (False, False)
    mirrored = bool(rows), bool(columns)
    on = {
        name
        for name, coin in zip(CHANCE, coins, strict=True)
        if name in LEVELS[level] and (options.always or coin < CHANCE[name])
    }
    angle, gain, offset = numbers * (DEGREES, BRIGHTNESS, BRIGHTNESS)
    bright = "brightness" in on
    spacing = _known(options.spacing)
    mm = _unit(shape, spacing)
    return Draw(
        shape=shape,
        turn=_turn(radians(angle) if "rotate" in on else 0.0, mirrored, spacing),
        grid=_grid(rng, shape, spacing, mm) if "grid" in on else None,
        elastic=_elastic(rng, shape, spacing, mm) if "elastic" in on else None,
        gain=1 + float(gain) if bright else 1.0,
        offset=float(offset) if bright else 0.0,
    )


def _known(spacing: tuple[float, float]) -> tuple[float, float]:
    return spacing if all(isfinite(s) and s > 0 for s in spacing) else (1.0, 1.0)


def _unit(shape: tuple[int, int], spacing: tuple[float, float]) -> float:
    """Length in mm of a drawn mm: shorter in small pictures, longer where pixels are coarse."""
    sides = [n * s for n, s in zip(shape, spacing, strict=True)]
    wanted = min(1.0, min(sides) / UNIT_SMALL)
    return max(wanted, UNIT_PIXELS * max(spacing), max(sides) / UNIT_LARGE)


def _turn(angle: float, mirrored: tuple[bool, bool], spacing: tuple[float, float]) -> Matrix:
    """A rotation in mm, so that a body does not shear where pixels are not square."""
    down, across = (-1.0 if flip else 1.0 for flip in mirrored)
    aspect = spacing[0] / spacing[1]
    return (
        (cos(angle) * across, -sin(angle) * down * aspect),
        (sin(angle) * across / aspect, cos(angle) * down),
    )


def _grid(
    rng: np.random.Generator, shape: tuple[int, int], spacing: tuple[float, float], mm: float
) -> tuple[Lines, Lines]:
    lines = []
    for length, pixel in zip(reversed(shape), reversed(spacing), strict=True):
        step = GRID_MM * mm / pixel
        first = -rng.random() * step  # the lines lie elsewhere in every sample
        moved = rng.uniform(-GRID_SHIFT, GRID_SHIFT, size=floor(length / step) + 3) * step
        lines.append(Lines(first, step, moved))
    return lines[0], lines[1]


def _elastic(
    rng: np.random.Generator, shape: tuple[int, int], spacing: tuple[float, float], mm: float
) -> Nodes:
    across, down = ELASTIC_MM * mm / spacing[1], ELASTIC_MM * mm / spacing[0]
    rows, columns = floor((shape[0] - 1) / down) + 4, floor((shape[1] - 1) / across) + 4
    size = rng.uniform(*ELASTIC_SHIFT)
    shifts = rng.uniform(-size, size, size=(2, rows, columns))
    return Nodes((across, down), shifts * np.array([across, down])[:, None, None])


def _splines(length: int, step: float) -> tuple[NDArray[np.intp], Floats]:
    """First of the four nodes that move a pixel, and the weights of the four, (4, length)."""
    place = np.arange(length) / step
    first = np.floor(place).astype(np.intp)
    t = place - first
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)
    return first, np.stack(weights) / 6
