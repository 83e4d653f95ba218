"""DICOM SEG and RTSTRUCT: names of segments and regions to classes, tried on some series."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from launch.new.labelfacts import (
    BACKGROUND,
    Candidate,
    Labels,
    Source,
    codes_of,
    laid,
    mostly,
    names_hidden,
    no_labels,
    series_of,
)
from launch.new.regions import Seen, classes_of_names
from launch.new.trial import chosen, class_sizes, try_masks
from medpsp.dicom.names import NameRule
from medpsp.dicom.sandbox import Sandbox, SandboxPool, or_error
from medpsp.errors import SourceError
from medpsp.types import Place, Series
from shards.survey import evenly, match_labels

MOST_NAMED = 60
"""Label objects whose names are read."""
_SIZED = 2
"""Series of which the classes are measured."""


def object_labels(source: Source, candidate: Candidate, pool: SandboxPool) -> Labels:
    """Classes of the names in label objects, in an order in which small ones win.

    Args:
        source: Where they lie.
        candidate: The series that they belong to.
        pool: Children that read.
    """
    kinds = mostly(candidate.series)
    # among these alone, as `medpsp shards` will: objects of other images may fit them, too
    files = source.survey.labels
    others = [item for item in candidate.series if item.first.modality not in kinds]
    own = series_of(candidate.series, kinds)
    match = match_labels(own, files, candidate.kind, pool, others)
    series = list(match.series)
    found = classes_of_names(_names(series, pool), told=source.told)
    labels = replace(
        no_labels(files=candidate.files),
        folder=source.folder,
        classes=(BACKGROUND, *found.names),
        spelt=found.spelt,
        found=found,
        unmatched=sum(match.codes.values()),
        codes=match.codes,
        modalities=kinds,
        series=(*series, *others),
    )
    if not found.names:
        return replace(labels, fault=names_hidden(found.hidden))
    rule = NameRule(classes=labels.classes, names=tuple(found.spelt.items()))
    some = chosen(series)
    tried = try_masks(some, rule, pool)
    if kinds := laid(kinds, tried):
        labels = replace(labels, kind=candidate.kind, modalities=kinds, tried=tuple(tried))
        return _ordered(labels, [s for s, t in zip(some, tried, strict=True) if t.overlap], pool)
    what = f"no {candidate.kind.upper()} could be laid on its images: {codes_of(tried)}"
    return replace(labels, fault=what)


def _ordered(labels: Labels, overlapping: Sequence[Series], pool: SandboxPool) -> Labels:
    """Where classes lie over each other the smaller ones come later, so that they win."""
    if not overlapping:
        return labels
    rule = NameRule(classes=labels.classes, names=tuple(labels.spelt.items()))
    sizes = class_sizes(overlapping[:_SIZED], rule, pool)
    names = sorted(labels.classes[1:], key=lambda name: (-sizes[name], name.casefold()))
    return replace(labels, overlap=True, classes=(BACKGROUND, *names))


def _names(series: Sequence[Series], pool: SandboxPool) -> Iterator[Seen]:
    """Names in the label objects of these series."""
    owners: dict[Place, list[Series]] = defaultdict(list)
    for item in series:
        for place in item.masks:
            owners[place].append(item)
    read = or_error(_read_names)
    for place, names in pool.map(read, evenly(list(owners), MOST_NAMED)):
        if isinstance(names, SourceError):
            continue
        for item in owners[place]:
            for name, own in names:
                yield Seen(name, item.first.patient_id, item.first.modality, own)


def _read_names(box: Sandbox, place: Place) -> list[tuple[str, bool]]:
    tree, _ = box.call("region_names", place=place)
    return [(str(name), bool(own)) for name, own in tree]
