"""Labels of an archive as figures and names, with the series that they belong to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch.new.facts import IMAGES
from launch.new.maskpattern import Pattern
from launch.new.regions import Classes
from launch.new.trial import Tried
from medpsp.types import MaskKind, Series
from medpsp.words import many
from shards.survey import MOST_LABELS, Survey

BACKGROUND = "background"
TITLES = {"nifti": "NIfTI mask", "seg": "SEG object", "rtstruct": "RTSTRUCT object"}
"""What one of a kind is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels that could be used, or why there are none.

    Attributes:
        kind: Empty where none can be used; then ``fault`` says why, if there were any.
        folder: For `data.labels`; None for objects that lie in the archive.
        pattern: Of NIfTI masks; ``others`` find other masks of such series.
        classes: With the background.
        named: The names stand in the labels; else they are numbered.
        spelt: For `data.label_names`; ``numbers`` for `data.label_map`.
        rare_values: That one of the masks tried has, and no class is made of.
        found: What the names became, of label objects.
        beside: Labels of other kinds, in words.
        overlap: Classes lie over each other in some of those tried.
        files: Label objects, or masks, that were looked at; ``unmatched`` belong to no series, for
            the reasons ``codes``.
        modalities: Of the series to be used.
        series: All, those of other modalities too, with their masks.
        tried: Masks that were laid on.
        fault: A word for people.
    """

    kind: MaskKind = ""
    folder: Path | None = None
    pattern: str = ""
    others: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    named: bool = True
    spelt: dict[str, str]
    numbers: dict[int, int]
    rare_values: tuple[int, ...] = ()
    found: Classes = field(default_factory=Classes)
    overlap: bool = False
    files: int = 0
    unmatched: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    modalities: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()
    tried: tuple[Tried, ...] = ()
    beside: tuple[str, ...] = ()
    fault: str = ""

    @property
    def complete(self) -> bool:
        """Whether all label objects were looked at."""
        return self.kind == "nifti" or self.files < MOST_LABELS


class Source(NamedTuple):
    """Where labels are looked for.

    Attributes:
        root: Names of NIfTI files are relative to it.
        told: It was named as the folder of the labels.
        survey: Of what lies there: its label objects, and names of other files.
    """

    root: Path
    told: bool
    survey: Survey

    @property
    def folder(self) -> Path | None:
        """For `data.labels`."""
        return self.root if self.told else None


class Candidate(NamedTuple):
    """Labels of one kind, and the series of the archive with them; not read yet."""

    kind: MaskKind
    series: tuple[Series, ...]
    files: int
    patterns: tuple[Pattern, ...] = ()


def names_hidden(count: int) -> str:
    """That names were found which may be somebody's."""
    return (
        f"{many(count, 'name')} of segments or regions not shown: of one patient alone, or with a "
        "word of a person's name in it"
    )


def no_labels(fault: str = "", files: int = 0) -> Labels:
    """Where nothing can be used."""
    return Labels(spelt={}, numbers={}, fault=fault, files=files)


def labelled_patients(series: Iterable[Series]) -> dict[str, set[str]]:
    """Patients with masks, by modality."""
    found: dict[str, set[str]] = defaultdict(set)
    for item in series:
        if item.masks and item.first.modality in IMAGES:
            found[item.first.modality].add(item.first.patient_id)
    return dict(found)


def mostly(series: Iterable[Series]) -> tuple[str, ...]:
    """Modalities that at least half as many patients have labels of as of the first one."""
    found = {modality: len(who) for modality, who in labelled_patients(series).items()}
    most = max(found.values(), default=0)
    return tuple(sorted(modality for modality, count in found.items() if 2 * count >= most))


def series_of(series: Iterable[Series], modalities: Sequence[str]) -> list[Series]:
    """Those of some modalities."""
    return [item for item in series if item.first.modality in modalities]


def laid(kinds: Sequence[str], tried: Sequence[Tried]) -> tuple[str, ...]:
    """Modalities of which at least one mask could be laid on."""
    return tuple(k for k in kinds if any(t.modality == k and not t.code for t in tried))


def codes_of(tried: Iterable[Tried]) -> str:
    """Reason codes and how many there are of each."""
    counts = Counter(one.code for one in tried if one.code)
    return ", ".join(f"{counts[code]} {code}" for code in sorted(counts))
