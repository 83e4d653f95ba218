"""Which labels an archive has, and what they would be in a configuration."""

from __future__ import annotations

from dataclasses import replace

from launch.new.labelfacts import TITLES, Candidate, Labels, Source, no_labels
from launch.new.labelmasks import mask_labels, masks_by_name
from launch.new.labelobjects import object_labels
from medpsp.dicom.nifti import SUFFIXES
from medpsp.dicom.sandbox import SandboxPool
from medpsp.types import MaskKind
from medpsp.words import listed, many
from shards.survey import Survey, match_labels

_OBJECTS: tuple[MaskKind, ...] = ("seg", "rtstruct")


def labels_of(archive: Survey, source: Source, pool: SandboxPool) -> Labels:
    """Look for labels of every kind, and take those that most patients have.

    Args:
        archive: Its series.
        source: Where labels are looked for.
        pool: Children that read.

    Returns:
        Of the best kind that can be used; with ``files`` 0 where nothing belongs to a series.
    """
    fault, files = _unfit(source), 0
    candidates = _candidates(archive, source, pool)
    for candidate in candidates:
        if candidate.kind == "nifti":
            labels = mask_labels(archive, source, candidate, pool)
        else:
            labels = object_labels(source, candidate, pool)
        if labels.kind:
            beside = (_told(other) for other in candidates if other is not candidate)
            return replace(labels, beside=tuple(beside))
        fault, files = labels.fault if not files else fault, files or labels.files
    return no_labels(fault, files)


def _unfit(source: Source) -> str:
    """What there is, for where nothing of it belongs to an image."""
    objects, masks = len(source.survey.labels), len(_nifti_names(source))
    some = [many(objects, "SEG or RTSTRUCT object")] if objects else []
    some += [many(masks, "NIfTI file")] if masks else []
    return f"{listed(some)} found, but none that belongs to the images" if some else ""


def _nifti_names(source: Source) -> list[str]:
    return [name for name in source.survey.others if name.lower().endswith(SUFFIXES)]


def _candidates(archive: Survey, source: Source, pool: SandboxPool) -> list[Candidate]:
    """Kinds that belong to some series, the best first."""
    found = []
    for kind in _OBJECTS:
        match = match_labels(archive.series, source.survey.labels, kind, pool)
        found.append(Candidate(kind, match.series, match.read))
    found.append(masks_by_name(archive, source, _nifti_names(source)))
    return [one for one in sorted(found, key=_worth, reverse=True) if any(_worth(one))]


def _told(candidate: Candidate) -> str:
    patients, _ = _worth(candidate)
    return f"{TITLES[candidate.kind]}s ({many(patients, 'patient')})"


def _worth(candidate: Candidate) -> tuple[int, int]:
    masked = [item for item in candidate.series if item.masks]
    return len({item.first.patient_id for item in masked}), len(masked)
