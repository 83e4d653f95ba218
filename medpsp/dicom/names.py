"""Names of segments and regions to class indices, and what happens where they overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medpsp.dataconfig import DataConfig
from medpsp.errors import LabelError

LONGEST_NAME = 256
"""Characters of a name that are looked at; the standard allows 64."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelVolume:
    """Labels on the grid of a series, and what is worth a line in the report.

    Attributes:
        values: (N, H, W); class indices from SEG and RTSTRUCT, stored values from NIfTI.
        notes: Code to how often, for example RT_CLIPPED: contours that leave the image.
    """

    values: NDArray[Any]
    notes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """How SegmentLabel, ROIName and SegmentNumber become classes.

    Attributes:
        classes: Names of the classes; the index is the place.
        names: (shell pattern, class name); the first that fits decides, case is ignored. Empty:
            the class names themselves.
        numbers: (SegmentNumber, class index or 255), used where ``names`` is empty.
        overlap: What happens to voxels of two classes; priority: the later class wins.
        threshold: Share from which a voxel of a FRACTIONAL segment counts.
    """

    classes: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()
    numbers: tuple[tuple[int, int], ...] = ()
    overlap: Literal["reject", "priority"] = "reject"
    threshold: float = 0.5

    def class_of(self, name: str, number: int | None = None) -> int | None:
        """Class index of a region.

        Args:
            name: SegmentLabel or ROIName.
            number: SegmentNumber; None for RTSTRUCT, whose ROI numbers mean nothing.

        Returns:
            Class index or 255 (ignore); None if nothing fits.
        """
        if not self.names and self.numbers and number is not None:
            return dict(self.numbers).get(number)
        plain = name[:LONGEST_NAME].strip(" \0").casefold()
        for pattern, known in self.names:
            if fnmatchcase(plain, pattern.strip().casefold()):
                return self.classes.index(known)
        folded = [known.casefold() for known in self.classes]
        return folded.index(plain) if not self.names and plain in folded else None


def name_rule(data: DataConfig) -> NameRule:
    """The rule that a configuration asks for."""
    return NameRule(
        classes=data.classes,
        names=tuple(data.label_names.items()),
        numbers=tuple(data.label_map.items()),
        overlap=data.label_overlap,
        threshold=data.seg_threshold,
    )


def classes_of(
    regions: dict[int, str], rule: NameRule, numbered: bool, notes: dict[str, int]
) -> dict[int, int]:
    """Class index of every region that has one; the others are counted in ``notes``.

    Args:
        regions: Number to name.
        rule: Names to classes.
        numbered: The numbers may be in ``rule.numbers``.
        notes: LABEL_NAME_UNMATCHED is added.

    Raises:
        LabelError: LABEL_NO_CLASS if no region has a class.
    """
    found = {n: rule.class_of(name, n if numbered else None) for n, name in regions.items()}
    known = {number: index for number, index in found.items() if index is not None}
    if not known:
        raise LabelError(
            "LABEL_NO_CLASS",
            f"none of {len(regions)} names is a class; see data.label_names",
        )
    count(notes, "LABEL_NAME_UNMATCHED", len(found) - len(known))
    return known


def count(notes: dict[str, int], code: str, number: int = 1) -> None:
    """Add to the count of a code; zero leaves no trace."""
    if number:
        notes[code] = notes.get(code, 0) + number


def paint(target: NDArray[np.uint8], region: NDArray[np.bool_], index: int) -> int:
    """Write a class where the region is, in place; the later class wins, whatever the order.

    Args:
        target: Any shape; usually a view into the volume.
        region: The same shape.
        index: Class index; 0 changes nothing.

    Returns:
        The number of voxels where another class lay.
    """
    under = target[region]
    clash = int(np.count_nonzero((under != 0) & (under != index))) if index else 0
    target[region] = np.maximum(under, np.uint8(index))
    return clash


def settle(clashes: int, code: str, rule: NameRule, notes: dict[str, int]) -> None:
    """Refuse overlapping classes, or count them where the rule has a priority.

    Raises:
        LabelError: ``code``, where ``rule.overlap`` is reject.
    """
    if clashes and rule.overlap == "reject":
        raise LabelError(
            code,
            f"{clashes} voxels belong to two classes; data.label_overlap=priority keeps the later",
        )
    count(notes, code, clashes)


def merge_labels(volumes: Sequence[LabelVolume], rule: NameRule) -> LabelVolume:
    """Lay the labels of several objects of one series over each other.

    Objects that draw one class in different ways are most often versions: their union is what
    nobody drew. Equal copies, and classes that are spread over objects, are fine.

    Args:
        volumes: At least one; (N, H, W) uint8 class indices.
        rule: Says what happens where they overlap, or draw one class in different ways.

    Raises:
        LabelError: LABEL_SEVERAL, LABEL_OVERLAP.
    """
    first, *others = volumes
    values, notes, clashes = first.values.copy() if others else first.values, dict(first.notes), 0
    drawn = dict.fromkeys(_classes_in(first.values), first.values) if others else {}
    for volume in others:
        for index in _classes_in(volume.values):
            region = volume.values == index
            known = drawn.setdefault(index, volume.values)
            several = known is not volume.values and not np.array_equal(known == index, region)
            count(notes, "LABEL_SEVERAL", int(several))
            clashes += paint(values, region, index)
        for code, number in volume.notes.items():
            count(notes, code, number)
    if "LABEL_SEVERAL" in notes and rule.overlap == "reject":
        raise LabelError(
            "LABEL_SEVERAL",
            f"{len(volumes)} objects draw one class in different ways; take the outdated ones "
            "out, or unite them by data.label_overlap=priority",
        )
    settle(clashes, "LABEL_OVERLAP", rule, notes)
    return LabelVolume(values, notes)


def _classes_in(values: NDArray[np.uint8]) -> list[int]:
    """The class indices that occur, without 0."""
    seen = np.zeros(256, dtype=np.bool_)
    for plane in values:  # np.unique would sort the volume
        seen[plane] = True
    return [int(index) for index in np.flatnonzero(seen) if index]
