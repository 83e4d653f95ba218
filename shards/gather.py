"""An archive to planned series: scan, masks, pseudonyms, splits. Nothing is written."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from medpsp.dataconfig import DataConfig
from medpsp.dicom.codes import refusal
from medpsp.dicom.labelref import LabelRef, match_series
from medpsp.dicom.labels import mask_path
from medpsp.dicom.sandbox import Sandbox, SandboxPool, shared_sandbox
from medpsp.dicom.scan import LabelFile, Scan, find_labels, label_head, scan_folder
from medpsp.dicom.voc import scan_voc
from medpsp.errors import ArchiveError, ConfigError, LabelError, SourceError
from medpsp.identity import pseudonym, shifted_day, split_of, unit_hash
from medpsp.progress import Bar
from medpsp.types import Place, ScanRow, Series, SliceRef
from shards.layout import PlannedSeries

log = logging.getLogger("medpsp")

LABELS = "labels//"
"""Before the names of the objects in a labels folder outside the archive: no path holds "//"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What will be written.

    Attributes:
        planned: Series with pseudonyms and splits.
        rows: Objects and frames that are in none of them.
        objects: Number of objects found.
    """

    planned: list[PlannedSeries]
    rows: list[ScanRow]
    objects: int


def gather(data: DataConfig, key: bytes) -> Gathered:
    """Find, group, label and split everything in the archive.

    Raises:
        ArchiveError: Missing, empty, or without anything usable.
        ConfigError: The training or validation split would be empty.
    """
    with SandboxPool(data.workers, data.decode_seconds, data.decode_memory_mib) as pool:
        scan = _with_masks(_scan(data, key, pool), data, key, pool)
    if not scan.series:
        raise ArchiveError(f"data.archive: nothing usable; found {tally(scan.rows)}")
    planned = [_planned(s, data, key) for s in scan.series]
    _require_splits(planned, data)
    return Gathered(planned=planned, rows=scan.rows, objects=scan.objects)


def file_id(key: bytes, name: str) -> str:
    """Pseudonym of an object from its name relative to the archive."""
    # a name that is not UTF-8 holds surrogates, which have no bytes
    return pseudonym(key, "file", name.encode("utf-8", "backslashreplace").decode())


def tally(rows: list[ScanRow]) -> str:
    """Counts of the codes, for messages."""
    codes = [row.code for row in rows]
    return ", ".join(f"{codes.count(c)} {c}" for c in sorted(set(codes))) or "no image"


def _scan(data: DataConfig, key: bytes, pool: SandboxPool) -> Scan:
    name = partial(file_id, key)
    if data.source == "voc":
        box = shared_sandbox(data.decode_seconds, data.decode_memory_mib)
        series, rows = scan_voc(
            data.archive,
            data.voc,
            name,
            grey=data.colour == "grey",
            read=lambda path: box.image(Place(str(path))),
        )
        objects = sum(len(s.slices) for s in series) + len(rows)
        return Scan(series=series, rows=rows, labels=[], objects=objects)
    with Bar("scan", 0, "files") as bar:
        return scan_folder(data.archive, data.policy, name, pool, bar.advance)


def _with_masks(scan: Scan, data: DataConfig, key: bytes, pool: SandboxPool) -> Scan:
    """Give each DICOM series its mask; one without is left out or kept, and counted either way."""
    if data.source == "voc" or (data.labels is None and data.label_format == "nifti"):
        return scan
    reasons: dict[int, tuple[str, str]] = {}
    if data.label_format == "nifti":
        series, reasons = _nifti_masks(scan.series, data)
        scan = replace(scan, series=series)
    else:
        scan = _dicom_masks(_with_labels(scan, data, key, pool), data, pool)
    if data.unlabelled == "keep":
        return scan
    rows = list(scan.rows)
    for number, item in enumerate(scan.series):
        if not item.masks:
            code, detail = reasons.get(number, ("LABEL_NONE", "no mask for this series"))
            rows += [refusal(r.file_id, code, detail, r.frame) for r in item.slices]
    return replace(scan, series=[item for item in scan.series if item.masks], rows=rows)


def _nifti_masks(
    series: list[Series], data: DataConfig
) -> tuple[list[Series], dict[int, tuple[str, str]]]:
    found, reasons = [], {}
    for number, item in enumerate(series):
        masks: tuple[Place, ...] = ()
        try:
            path = mask_path(
                data.labels or data.archive, data.label_pattern, item.first, data.archive
            )
            masks = (Place(str(path)),) if path.is_file() else ()
        except LabelError as error:
            reasons[number] = (error.code, error.detail)
        except OSError:  # ENAMETOOLONG: its text would hold the PatientID
            reasons[number] = ("LABEL_NONE", "a header value makes no file name")
        found.append(replace(item, masks=masks, mask_kind="nifti" if masks else ""))
    shared = Counter(item.masks for item in found)  # parts of a series that was split at a gap
    return [replace(item, mask_partial=shared[item.masks] > 1) for item in found], reasons


def _with_labels(scan: Scan, data: DataConfig, key: bytes, pool: SandboxPool) -> Scan:
    """The scan with the label objects of ``data.labels``; a folder of its own is counted too."""
    if data.labels is None:
        return scan
    root = data.labels.resolve()
    if root.is_relative_to(data.archive.resolve()):  # the scan has met all that is in it
        below = [f for f in scan.labels if Path(f.place.path).parent.resolve().is_relative_to(root)]
        return replace(scan, labels=below)
    found = find_labels(data.labels, lambda name: file_id(key, LABELS + name), pool)
    objects = scan.objects + found.objects
    return replace(scan, rows=scan.rows + found.rows, labels=found.labels, objects=objects)


def _dicom_masks(scan: Scan, data: DataConfig, pool: SandboxPool) -> Scan:
    """SEG or RTSTRUCT objects to the series that they belong to.

    One that cannot be used has its row, and marks the labelled series of its patient: what it
    labels may be background there.
    """
    files = [file for file in scan.labels if file.kind == data.label_format]
    masks: dict[int, list[Place]] = {}
    partial_masks: set[int] = set()
    fate: dict[str, ScanRow] = {}
    robbed: set[str] = set()
    for file, (target, patient) in pool.map(_target, files):
        try:
            if isinstance(target, SourceError):
                raise target
            match = match_series(target, scan.series)
        except SourceError as error:
            fate[file.file_id] = refusal(file.file_id, error.code, error.detail)
            robbed.add(patient)
            log.warning("label object %s: %s", file.file_id, error)
            continue
        for number in match.series:
            masks.setdefault(number, []).append(file.place)
        partial_masks.update(match.series if len(match.series) > 1 else ())
        fate[file.file_id] = ScanRow(file_id=file.file_id, status="kept", code="LABEL_USED")
    series = list(scan.series)
    for number, places in masks.items():
        item = series[number]
        known = item.first.patient_id in robbed - {""}
        series[number] = replace(
            item,
            masks=tuple(places),
            mask_kind=data.label_format,
            mask_partial=number in partial_masks,
            flags=item.flags + ("LABEL_INCOMPLETE",) * known,
        )
    return replace(scan, series=series, rows=[fate.get(row.file_id, row) for row in scan.rows])


def _target(box: Sandbox, file: LabelFile) -> tuple[LabelRef | SourceError, str]:
    """What a label object references, or why it cannot be used; and the patient, if it says so."""
    if file.code:
        return LabelError(file.code, file.detail), file.patient_id
    try:
        target = box.label_target(file.place)
    except SourceError as error:
        return error, label_head(box, file.place)[1]
    return target, target.patient_id


def _stamp(path: str) -> tuple[int, ...]:
    """What changes with a file; nothing for one that is gone, which its reader will say."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _series_parts(first: SliceRef) -> tuple[str, ...]:
    """What makes a series one; objects without UIDs are told apart by their names."""
    where = "" if first.series_uid and first.sop_uid else first.file_id
    return first.patient_id, first.series_uid, first.sop_uid, str(first.frame), where


def _planned(series: Series, data: DataConfig, key: bytes) -> PlannedSeries:
    first = series.first
    patient = first.patient_id
    split = series.split or split_of(key, patient, data.split.val, data.split.test)
    sources = {*(s.path for s in series.slices), *(m.path for m in series.masks)}
    stats = [_stamp(path) for path in sorted(sources)]
    day = shifted_day(key, patient, first.study_date) if data.dates == "shift" else -1
    return PlannedSeries(
        series=series,
        split=split,
        order=unit_hash(key, "stage", patient),
        patient=pseudonym(key, "patient", patient),
        # one SeriesInstanceUID may hold several series: planes, localizers, stacks of one object
        name=pseudonym(key, "series", "\0".join(_series_parts(first))),
        stamp=pseudonym(key, "stamp", json.dumps(stats)),
        study_day=day,
    )


def _require_splits(planned: list[PlannedSeries], data: DataConfig) -> None:
    patients: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for item in planned:
        patients[item.split].add(item.patient)
    counts = {split: len(found) for split, found in patients.items()}
    listed = any(item.series.split for item in planned)
    if not counts["train"] or not counts["val"]:
        raise ConfigError(
            f"data.split: patients fall to {counts}, train and val need at least one each; "
            + (
                "check the split lists"
                if listed
                else "raise data.split.val, add patients, or use another key"
            )
        )
    log.info("patients: %s", ", ".join(f"{n} {split}" for split, n in counts.items()))
