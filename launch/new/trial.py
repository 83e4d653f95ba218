"""Masks of a few series, laid on as `medpsp shards` does it: what they hold, what goes wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.names import NameRule
from medpsp.dicom.placement import grid_of, grid_tree
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.errors import SourceError
from medpsp.types import IGNORE, Series
from shards.survey import evenly

MOST_SERIES = 12
"""Of each modality."""
MOST_VOXELS = 2**28
"""Of the series of a modality together: seconds of reading."""
OVERLAPS = ("RT_OVERLAP", "SEG_OVERLAP", "LABEL_OVERLAP")
MOST_VALUES = 255
_SLICES, _PIXELS = 6, 500
"""Of a series, and of a structure in a slice: whose modality values are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Of one series.

    Attributes:
        code: Why its masks cannot be laid on; empty where they can.
        overlap: Two classes lie on one voxel.
        voxels: Stored value, or class index, to number of voxels; of a mask with more than
            `MOST_VALUES` values nothing.
        slices, labelled: How many there are, and with anything but background.
        inside: Stored value, or class index, to modality values of such voxels, a few.
    """

    modality: str
    code: str = ""
    overlap: bool = False
    voxels: dict[int, int] = field(default_factory=dict)
    slices: int = 0
    labelled: int = 0
    inside: dict[int, tuple[float, ...]] = field(default_factory=dict)


def chosen(series: Sequence[Series]) -> list[Series]:
    """Series with masks to try: of each modality a few, of different patients where it can be."""
    often = Counter(place for item in series for place in item.masks)
    kinds: dict[str, dict[str, list[Series]]] = defaultdict(lambda: defaultdict(list))
    for item in series:
        if item.masks:
            kinds[item.first.modality][item.first.patient_id].append(item)
    found = []
    for patients in kinds.values():
        firsts = [some[0] for _, some in sorted(patients.items())]
        rest = [item for _, some in sorted(patients.items()) for item in some[1:]]
        some = evenly(firsts, MOST_SERIES)
        some += evenly(rest, MOST_SERIES - len(some))
        found += list(_few_voxels(some))
    # as `SeriesFile.finish`: what lies outside one part of a series is no error
    return [replace(s, mask_partial=s.mask_partial or often[s.masks[0]] > 1) for s in found]


def try_masks(series: Iterable[Series], rule: NameRule | None, pool: SandboxPool) -> list[Tried]:
    """Lay masks on.

    Args:
        series: Of `chosen`.
        rule: Names to classes; None for NIfTI, whose stored values are looked at.
        pool: Children that read.
    """
    return [found for _, found in pool.map(partial(_try, rule=rule), series)]


def class_sizes(series: Iterable[Series], rule: NameRule, pool: SandboxPool) -> Counter[str]:
    """Voxels of each class, each drawn alone: so nothing lies over it."""
    found: Counter[str] = Counter()
    pairs = [(item, name) for item in series for name in rule.classes[1:]]
    for (_, name), voxels in pool.map(partial(_size, rule=rule), pairs):
        found[name] += voxels
    return found


def _few_voxels(series: Sequence[Series]) -> Iterator[Series]:
    left = MOST_VOXELS
    for number, item in enumerate(series):
        left -= int(np.prod(item.shape))
        if left >= 0 or number == 0:
            yield item


def _try(box: Sandbox, item: Series, rule: NameRule | None) -> Tried:
    tried = Tried(modality=item.first.modality)
    try:
        if rule is None:
            values, overlap = _stored(box, item), False
        else:
            values, overlap = _drawn(box, item, rule)
    except SourceError as error:
        return replace(tried, code=error.code)
    voxels = _voxels(values)
    nothing = (0, IGNORE) if set(voxels) - {0, IGNORE} else (0,)
    labelled = np.flatnonzero((~np.isin(values, nothing)).any(axis=(1, 2))).tolist()
    return replace(
        tried,
        overlap=overlap,
        voxels=voxels,
        slices=len(item.slices),
        labelled=len(labelled),
        inside=_inside(box, item, (values, nothing), [n for n in labelled if voxels]),
    )


def _stored(box: Sandbox, item: Series) -> NDArray[Any]:
    grid = grid_tree(grid_of(item, item.mask_partial))
    return box.call("mask_values", place=item.masks[0], grid=grid)[1][0]


def _drawn(box: Sandbox, item: Series, rule: NameRule) -> tuple[NDArray[Any], bool]:
    options = ("affine", "never")
    try:
        return box.labels(item, rule, *options).values, False
    except SourceError as error:
        if error.code not in OVERLAPS:
            raise
    return box.labels(item, replace(rule, overlap="priority"), *options).values, True


def _voxels(values: NDArray[Any]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for plane in values:  # sorting a volume takes seconds
        known, counts = np.unique(plane, return_counts=True)
        found.update(dict(zip(known.tolist(), counts.tolist(), strict=True)))
        if len(found) > MOST_VALUES:
            return {}
    return dict(found)


def _inside(
    box: Sandbox,
    item: Series,
    mask: tuple[NDArray[Any], tuple[int, ...]],
    labelled: Sequence[int],
) -> dict[int, tuple[float, ...]]:
    """Modality values of labelled voxels; a slice that does not decode gives none.

    Args:
        box: Decodes.
        item: The series.
        mask: (N, H, W), and which of its values are no structure.
        labelled: Places of slices.
    """
    values, nothing = mask
    places = dict(zip(item.grid_index, item.slices, strict=True))
    found: dict[int, tuple[float, ...]] = defaultdict(tuple)
    for number in evenly([n for n in labelled if n in places], _SLICES):
        try:
            image = box.frame(places[number]).values
        except SourceError:
            continue
        marks = np.unique(values[number]).tolist() if image.ndim == 2 else []
        for mark in (mark for mark in marks if mark not in nothing):
            some = image[values[number] == mark].astype(float).tolist()
            found[mark] += tuple(evenly(some, _PIXELS))
    return dict(found)


def _size(box: Sandbox, pair: tuple[Series, str], rule: NameRule) -> int:
    item, name = pair
    names = tuple(each for each in rule.names if each[1] == name)
    alone = replace(rule, classes=(rule.classes[0], name), names=names, overlap="priority")
    try:
        return int(np.count_nonzero(box.labels(item, alone, "affine", "never").values))
    except SourceError:
        return 0
