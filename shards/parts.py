"""A part of an archive to planned series: nothing outside it has to do with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from medpsp.dataconfig import DataConfig
from medpsp.dicom.codes import refusal
from medpsp.dicom.rivals import SamePixels
from medpsp.dicom.series import group_series
from medpsp.dicom.walk import Stamp, file_stamp
from medpsp.identity import pseudonym, shifted_day, split_of, unit_hash
from medpsp.types import ScanRow, Series, SliceRef
from shards.layout import PlannedSeries
from shards.masks import Aim, Reasons, dicom_masks, nifti_masks
from shards.record import record_body

_LASTS = 2
"""Of a `Stamp`: size and mtime."""


def series_of_part(
    refs: Iterable[SliceRef],
    aims: Sequence[Aim],
    robbed: Iterable[str],
    data: DataConfig,
    same_pixels: SamePixels,
    key: bytes,
) -> tuple[list[Series], list[ScanRow]]:
    """Group slices and give each series its masks; one without is left out or kept.

    Args:
        refs: Frames in any order.
        aims: Label objects that may belong to them.
        robbed: See `Aims`.
        data: Of the configuration.
        same_pixels: See `group_series`.
        key: Of the project.

    Returns:
        The series, and rows of the frames in none of them and of the label objects.
    """
    series, refused = group_series(refs, data.policy, same_pixels)
    rows = [refusal(ref.file_id, e.code, e.detail, ref.frame) for ref, e in refused]
    if data.labels is None and data.label_format == "nifti":
        return series, rows
    reasons: Reasons = {}
    if data.label_format == "nifti":
        series, reasons = nifti_masks(series, data)
    else:
        name_of = partial(series_name, key)
        series, fate = dicom_masks(series, aims, robbed, data.label_format, name_of)
        rows += fate
    kept = []
    for number, item in enumerate(series):
        code, detail = reasons.get(number, ("LABEL_NONE", "no mask for this series"))
        # one that cannot be read may be there
        if item.masks or (data.unlabelled == "keep" and code != "FILE_UNREADABLE"):
            kept.append(item)
        else:
            rows += [refusal(r.file_id, code, detail, r.frame) for r in item.slices]
    return kept, rows


def planned_series(
    series: Series, data: DataConfig, key: bytes, stamps: Mapping[str, Stamp]
) -> PlannedSeries:
    """A series with its pseudonyms, its split and its stamp.

    Args:
        series: Of `series_of_part`.
        data: Of the configuration.
        key: Of the project.
        stamps: Of source files by path, as the scan met them; others are asked for here.
    """
    first = series.first
    patient = first.patient_id
    split = series.split or split_of(key, patient, data.split.val, data.split.test)
    day = shifted_day(key, patient, first.study_date) if data.dates == "shift" else -1
    item = PlannedSeries(
        series=series,
        split=split,
        order=unit_hash(key, "stage", patient),
        patient=pseudonym(key, "patient", patient),
        name=series_name(key, series),
        stamp="",
        study_day=day,
    )
    sources = tuple(stamps.get(path) or file_stamp(path) or () for path in item.source_paths)
    return replace(item, stamp=_stamp(item, key, sources), sources=sources)


def _stamp(item: PlannedSeries, key: bytes, sources: Sequence[tuple[int, ...]]) -> str:
    """Changes with what headers say, and with a file of slices or masks; not with their paths.

    Nor with their ctime: a restored copy of an archive is the same archive.
    """
    body = hashlib.sha256(record_body(item)).hexdigest()
    return pseudonym(key, "stamp", json.dumps([body, [found[:_LASTS] for found in sources]]))


def series_name(key: bytes, series: Series) -> str:
    """Pseudonym of a series; objects without UIDs are told apart by their names."""
    first = series.first
    where = "" if first.series_uid and first.sop_uid else first.file_id
    # one SeriesInstanceUID may hold several series: planes, localizers, stacks of one object
    parts = first.patient_id, first.series_uid, first.sop_uid, str(first.frame), where
    return pseudonym(key, "series", "\0".join(parts))
