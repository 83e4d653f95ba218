"""NIfTI masks: which pattern finds them, and what their values would be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from launch.new.labelfacts import (
    BACKGROUND,
    Candidate,
    Labels,
    Source,
    codes_of,
    laid,
    mostly,
    no_labels,
    series_of,
)
from launch.new.maskpattern import Pattern, fields_of, patterns_of
from launch.new.regions import MOST_CLASSES
from launch.new.trial import Tried, chosen, try_masks
from medpsp.dataconfig import DataConfig
from medpsp.dicom.sandbox import SandboxPool
from medpsp.types import IGNORE, Series
from medpsp.words import many
from shards.masks import nifti_masks
from shards.survey import Survey

_PATTERNS = 3
"""That are tried, one after another."""
_SEVERAL = 4
"""Masks from which on a value that only one has is more likely a slip than a structure."""


def masks_by_name(archive: Survey, source: Source, names: Sequence[str]) -> Candidate:
    """The pattern by which most of these files are masks of series.

    Args:
        archive: Its series.
        source: Where the files lie.
        names: Of NIfTI files, relative to its root.
    """
    known = {
        tuple(fields.items()): fields
        for item in archive.series
        for ref in (item.first,)
        for fields in (
            fields_of(ref.patient_id, ref.series_uid, ref.modality, ref.path, archive.root),
        )
    }
    patterns = patterns_of(names, list(known.values()), told=source.told) if names else []
    if not patterns:
        return Candidate("nifti", (), len(names))
    series = _masked(archive, source, patterns[0].text)
    return Candidate("nifti", series, len(names), tuple(patterns))


def _masked(archive: Survey, source: Source, pattern: str) -> tuple[Series, ...]:
    """Series with the masks that a pattern finds, as `medpsp shards` does it."""
    data = DataConfig(
        archive=archive.root,
        labels=source.root,
        label_pattern=pattern,
        classes=(BACKGROUND, "any"),
    )
    return tuple(nifti_masks(archive.series, data)[0])


def mask_labels(archive: Survey, source: Source, candidate: Candidate, pool: SandboxPool) -> Labels:
    """Look into masks that a pattern finds; where they are none, into those of the next one.

    Args:
        archive: Its series.
        source: Where the files lie.
        candidate: Of `masks_by_name`.
        pool: Children that read.
    """
    fault = ""
    for place, pattern in enumerate(candidate.patterns[:_PATTERNS]):
        series = _masked(archive, source, pattern.text) if place else candidate.series
        kinds = mostly(series)
        tried = try_masks(chosen(series_of(series, kinds)), None, pool)
        kinds = laid(kinds, tried)
        tried = [one for one in tried if one.modality in kinds] or tried
        marks, rare, why = _marks(tried)
        if not why:
            names = tuple(f"structure_{number}" for number in range(1, len(marks) + 1))
            return Labels(
                kind="nifti",
                folder=source.root,
                pattern=pattern.text,
                others=_beside(pattern, candidate.patterns),
                classes=(BACKGROUND, *names),
                named=False,
                spelt={},
                numbers=_numbers(marks, tried),
                rare_values=tuple(sorted(rare)),
                files=candidate.files,
                unmatched=candidate.files - len(pattern.names),
                modalities=kinds,
                series=series,
                tried=tuple(_refused(one, rare) for one in tried),
            )
        fault = fault or why
    return no_labels(fault, candidate.files)


def _beside(pattern: Pattern, patterns: Sequence[Pattern]) -> tuple[str, ...]:
    """Patterns that find other masks of about as many patients."""
    apart = (one for one in patterns if not one.names & pattern.names)
    return tuple(one.text for one in apart if 2 * one.patients >= pattern.patients)[:3]


def _marks(tried: Sequence[Tried]) -> tuple[list[int], set[int], str]:
    """Values that are classes, values of one mask alone, or why there can be no classes."""
    whole = [one for one in tried if not one.code]
    if not whole:
        return [], set(), f"no NIfTI mask could be laid on its images: {codes_of(tried)}"
    if not all(one.voxels for one in whole):
        return [], set(), "the NIfTI files found hold more values than a mask has: they are images"
    often = Counter(value for one in whole for value in one.voxels if value)
    rare = {value for value, count in often.items() if count == 1 and len(whole) >= _SEVERAL}
    values = set(often) - rare or set(often)
    marks = sorted(values - {IGNORE}) or sorted(values)
    if not marks or len(marks) > MOST_CLASSES:
        return [], set(), f"the NIfTI masks tried hold {many(len(marks), 'value')} besides 0"
    return marks, rare - values, ""


def _numbers(marks: Sequence[int], tried: Sequence[Tried]) -> dict[int, int]:
    """For `data.label_map`; empty where each value is the place of its class."""
    if list(marks) == list(range(1, len(marks) + 1)):
        return {}
    ignored = {IGNORE} - set(marks) if any(IGNORE in one.voxels for one in tried) else set()
    places = {value: place for place, value in enumerate(marks, 1)}
    return {0: 0, **places, **dict.fromkeys(ignored, IGNORE)}


def _refused(one: Tried, rare: set[int]) -> Tried:
    """A mask with values that are no classes is what `medpsp shards` will refuse."""
    return replace(one, code="MASK_LABEL_UNKNOWN") if rare & set(one.voxels) else one
