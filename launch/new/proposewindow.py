"""The window of a proposal: what labelled voxels hold decides, else the part of the body."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from launch.new.choices import Choice, Evidence, Line, Open
from launch.new.facts import Kind
from medpsp.intensity import CT_WINDOW
from medpsp.words import listed

Range = tuple[float, float]
SOFT: Range = (
    CT_WINDOW.center - CT_WINDOW.width / 2,
    CT_WINDOW.center + CT_WINDOW.width / 2,
)
_BRAIN: Range = (0.0, 80.0)
_HEADS = ("BRAIN", "HEAD", "SKULL")
_BESIDE = 40.0
"""HU on either side of what labelled voxels hold, at least."""
_CUT = 0.25
"""Share of a structure that the usual window may show as white."""
_FEW = 50
"""Voxels of a structure that say nothing yet."""


def window_lines(found: Evidence) -> Iterator[Line]:
    """One window, one for each kind of tissue, or why the usual one stays."""
    kind = found.kept.get("CT")
    if kind is None:
        grey = "Percentiles of each series: the values have no scale of their own."
        yield Choice("data.window", None, "As it is stored." if found.used.colour else grey)
        return
    bright, soft = _structures(found)
    values = [value for some in bright or soft for value in some]
    held = f"98 % of the voxels looked at hold {_said(_range(values))} HU." if values else ""
    low, high = _wanted(kind, bright, values)
    if (low, high) == SOFT:
        yield Choice("data.window", None, f"40/400 for CT. {held or _unknown(kind)}")
    elif len(found.kept) > 1:
        names = listed(sorted(found.kept))
        yield Choice("data.window", None, f"40/400 for CT; another would be for {names} alike.")
        yield Open(
            "data",
            f"data.window: {_said((low, high))} HU would suit the CT better, but {names} "
            "would all be shown in it. With CT alone it can be set.",
        )
    elif bright and soft:
        both = [_window(SOFT), _window((low, high))]
        why = f"Some structures leave 40/400: of these {held} The others keep it: a channel each."
        yield Choice("model.windows", both, why)
    else:
        why = f"40/400 would cut them off: {held}" if bright else f"{held} {_unknown(kind)}".strip()
        yield Choice("data.window", _window((low, high)), why)


def _structures(found: Evidence) -> tuple[list[list[float]], list[list[float]]]:
    """Values of the structures of CT that leave the usual window, and of those that do not.

    What lies below it counts by the median: outlines of bodies hold air, and ask for nothing.
    """
    values: dict[int, list[float]] = defaultdict(list)
    for one in found.labels.tried:
        if one.modality == "CT" and not one.code:
            for mark, held in one.inside.items():
                values[mark] += held
    bright: list[list[float]] = []
    soft: list[list[float]] = []
    for some in (some for some in values.values() if len(some) >= _FEW):
        median, high = np.percentile(some, (50, 100 - 100 * _CUT))
        leaves = median < SOFT[0] or high > SOFT[1]
        (bright if leaves else soft).append(some)
    return bright, soft


def _wanted(kind: Kind, bright: Sequence[object], values: Sequence[float]) -> Range:
    """Lowest and highest value to show."""
    head = _is_head(kind)
    if not values:
        return _BRAIN if head else SOFT
    low, high = _range(values)
    if bright:
        beside = max(_BESIDE, (high - low) / 10)
        return _tens(low - beside, math.floor), _tens(high + beside, math.ceil)
    if head and low >= _BRAIN[0] - _BESIDE and high <= _BRAIN[1] + _BESIDE:
        return _tens(min(low, _BRAIN[0]), math.floor), _tens(max(high, _BRAIN[1]), math.ceil)
    return SOFT


def _is_head(kind: Kind) -> bool:
    return sum(kind.parts.get(part, 0) for part in _HEADS) > kind.slices / 2


def _unknown(kind: Kind) -> str:
    if _is_head(kind):
        return "Heads: the window of the brain; for bone take 600/2800."
    return "Soft tissue; for lungs take -600/1500, for bone 400/1800."


def _range(values: Sequence[float]) -> Range:
    low, high = np.percentile(values, (1, 99))
    return float(low), float(high)


def _said(found: Range) -> str:
    return f"{found[0]:.0f} to {found[1]:.0f}"


def _window(found: Range) -> dict[str, float]:
    return {"center": (found[0] + found[1]) / 2, "width": found[1] - found[0]}


def _tens(value: float, turn: Any) -> float:
    return float(turn(value / 10) * 10)
