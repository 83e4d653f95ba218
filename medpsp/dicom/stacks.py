"""Slices of one plane to stacks: at most one slice a place, one contrast each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from medpsp.dicom.geometry import LINE_TOL_MM, SPACING_ATOL_MM, Floats, cut_runs, near_groups
from medpsp.dicom.patients import Refused
from medpsp.dicom.rivals import SamePixels, settle
from medpsp.types import SliceRef


class Stack(NamedTuple):
    """Slices of one plane in the order of their depth.

    Attributes:
        axes: (3, 3) row direction, column direction, normal.
        coords: (N, 3) u, v, d, mm.
        flags: Codes of what is unusual about it.
    """

    refs: list[SliceRef]
    axes: Floats
    coords: Floats
    flags: frozenset[str] = frozenset()

    def take(self, wanted: Iterable[int]) -> Stack:
        """Some of the slices."""
        index = list(wanted)
        return Stack([self.refs[i] for i in index], self.axes, self.coords[index], self.flags)


def apart(stack: Stack, same_pixels: SamePixels, refused: Refused) -> Iterator[Stack]:
    """Split slices that lie where others lie, into as few stacks as will do.

    By the first of these that works: place within the plane, `SliceRef.contrast_key`,
    `SliceRef.collision_key`, then pairs of them and so on. Scanners change some of these within
    one volume, so none counts where fewer stacks do without it, or where no two positions
    collide. Where all of them leave rivals, the time may tell: BY_TIME.
    """
    coords = stack.coords
    higher = np.diff(coords[:, 2]) > SPACING_ATOL_MM
    if higher.all():
        yield stack
        return
    places = [0, *np.cumsum(higher).tolist()]
    beside = near_groups([tuple(c) for c in coords[:, :2].tolist()], LINE_TOL_MM)
    keys = _keys(stack.refs, beside)
    claims = _grouped(zip(places, keys, strict=True))
    order = _by_time(stack.refs, claims)
    if order:
        stack = stack._replace(flags=stack.flags | {"BY_TIME"})
        keys = [(*key, place) for key, place in zip(keys, order, strict=True)]
        claims = _grouped(zip(places, keys, strict=True))
    kept = sorted(i for rivals in claims for i in settle(stack.refs, rivals, same_pixels, refused))
    for members in _grouped(_labels([places[i] for i in kept], [keys[i] for i in kept])):
        yield stack.take([kept[n] for n in members])


def by_contrast(stack: Stack) -> Iterator[Stack]:
    """Split slices of unlike contrast that lie between each other's places.

    By echo, b-value, kernel or tube voltage, where the slices of each value are two or more at
    equal steps. Values that leave less than that change within a volume: MIXED_CONTRAST.
    """
    keys = [ref.contrast_key for ref in stack.refs]
    for column in zip(*keys, strict=False):
        parts = [stack.take(members) for members in _grouped(column)]
        if len(parts) > 1 and all(
            len(part.refs) > 1 and len(cut_runs(part.coords)) == 1 for part in parts
        ):
            for part in parts:
                yield from by_contrast(part)
            return
    mixed = {"MIXED_CONTRAST"} if len(set(keys)) > 1 else set()
    yield stack._replace(flags=stack.flags | mixed)


def _grouped(labels: Iterable[Hashable]) -> list[list[int]]:
    """Indices of the elements of each value."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        groups[label].append(i)
    return list(groups.values())


def _keys(refs: Sequence[SliceRef], beside: Sequence[int]) -> list[tuple[object, ...]]:
    """What tells slices of one depth apart; what is the same in all tells nothing."""
    parts = [(*ref.contrast_key, *ref.collision_key) for ref in refs]
    width = max(map(len, parts))
    rows = [
        (number, *part, *[""] * (width - len(part)))
        for number, part in zip(beside, parts, strict=True)
    ]
    columns = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
    return list(zip(*columns, strict=True)) if columns else [() for _ in rows]


def _by_time(refs: Sequence[SliceRef], claims: list[list[int]]) -> Sequence[object]:
    """What of the time tells rivals apart, for each slice; empty where it does not.

    A time of acquisition or of content that is the same all over each of as many stacks as there
    are rivals. Else, with as many slices at each place, the first of each, the second and so on.
    """
    most = max(map(len, claims))
    columns = [c for c in zip(*(ref.times for ref in refs), strict=False) if all(c)]
    if most == 1 or not columns:
        return []
    for column in columns:
        told = all(len({column[i] for i in rivals}) == len(rivals) for rivals in claims)
        if told and len(set(column)) == most:
            return column
    times = list(zip(*columns, strict=True))
    if any(len({times[i] for i in rivals}) < most for rivals in claims):
        return []
    ranks = [0] * len(refs)
    for rivals in claims:
        for rank, i in enumerate(sorted(rivals, key=lambda i: times[i])):
            ranks[i] = rank
    return ranks


def _labels(places: list[int], keys: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Parts of the keys that differ wherever places agree, with the fewest values."""
    columns = list(zip(*keys, strict=True))
    labels, fewest = keys, len(set(keys))
    least = max(Counter(places).values(), default=0)
    for size in range(len(columns)):
        for chosen in combinations(columns, size):
            tried = [tuple(column[i] for column in chosen) for i in range(len(keys))]
            parts = len(set(tried))
            if parts < fewest and len(set(zip(places, tried, strict=True))) == len(places):
                labels, fewest = tried, parts
            if fewest <= least:
                return labels
    return labels
