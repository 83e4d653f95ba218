"""Names of mask files to a `data.label_pattern`: the one by which most masks find their series."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shards.survey import evenly

_NAMES, _SERIES = 200, 2000
"""Of each so many are put together for patterns; all of them say how good a pattern is."""
_LEAST = 3
"""Letters of an id that is looked for in what a pattern would show."""
Fields = dict[str, str]
"""What a pattern may name, of a series."""


class Pattern(NamedTuple):
    """A pattern, and what it would find.

    Attributes:
        text: As `data.label_pattern`.
        names: Files that are the mask of a series.
        patients: Of these series.
        shared: Further series that would get the mask of another one.
    """

    text: str
    names: frozenset[str]
    patients: int
    shared: int


def fields_of(patient: str, series: str, modality: str, path: str, archive: Path) -> Fields:
    """The fields of a series, as `labels.mask_path` fills them."""
    folder = Path(path).parent.relative_to(archive).as_posix()
    return {
        "folder": folder,
        "SeriesInstanceUID": series,
        "PatientID": patient,
        "Modality": modality,
    }


def patterns_of(names: Sequence[str], series: Sequence[Fields], *, told: bool) -> list[Pattern]:
    """Patterns that find masks, the best first; no text of them is one patient's alone.

    Args:
        names: Of the mask files, relative to their root.
        series: Fields of all series, those of parts of one series once.
        told: Who asks has named these masks: where there is one patient, one is enough.

    Returns:
        Those that find masks of several patients.
    """
    known = set(names)
    alone = len({fields["PatientID"] for fields in series}) == 1
    least = 1 if told and alone else 2
    ids = {fields["PatientID"] for fields in series if len(fields["PatientID"]) >= _LEAST}
    templates = {
        template
        for name in evenly(sorted(known), _NAMES)
        for template in _templates(name, evenly(series, _SERIES))
    }
    found = []
    for template in sorted(templates):
        pattern = _scored(template, series, known)
        literal = template.format(**dict.fromkeys(series[0], ""))
        if pattern.patients >= least and not any(one in literal for one in ids):
            found.append(pattern)
    return sorted(found, key=lambda p: (-p.patients, -len(p.names), p.shared, len(p.text), p.text))


def _templates(name: str, series: Sequence[Fields]) -> Iterator[str]:
    """The name with fields in place of what a series calls so."""
    plain = name.replace("{", "{{").replace("}", "}}")
    for fields in series:
        inside = [
            key for key in ("folder", "SeriesInstanceUID", "PatientID") if _in(fields[key], name)
        ]
        for first, key in enumerate(inside):
            text = _put(plain, fields, key)
            yield text
            yield from _with_modality(text, fields)
            for other in inside[first + 1 :]:
                both = _put(text, fields, other)
                yield both
                yield from _with_modality(both, fields)


def _in(value: str, name: str) -> bool:
    return value not in ("", ".") and value in name


def _put(text: str, fields: Fields, key: str) -> str:
    value = fields[key].replace("{", "{{").replace("}", "}}")
    return text.replace(value, f"{{{key}}}")


def _with_modality(text: str, fields: Fields) -> Iterator[str]:
    modality = fields["Modality"]
    if modality and modality in text.replace("{Modality}", ""):
        yield text.replace(modality, "{Modality}")


def _scored(template: str, series: Sequence[Fields], known: set[str]) -> Pattern:
    owners: dict[str, list[Fields]] = defaultdict(list)
    for fields in series:
        name = template.format(**fields)
        if name in known:
            owners[name].append(fields)
    patients = {fields["PatientID"] for some in owners.values() for fields in some}
    shared = sum(len(some) - 1 for some in owners.values())
    return Pattern(template, frozenset(owners), len(patients), shared)
