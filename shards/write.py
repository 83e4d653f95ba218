"""One shard from source files to disk: its sandbox makes the chunks, here they become a shard.

No slice and no shard is ever whole in the memory of this process.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medpsp.dicom.codes import refusal, told_codes
from medpsp.dicom.sandbox import Answer, shared_sandbox
from medpsp.errors import SourceError, Unreachable
from medpsp.intensity import ValueCounts, needs_series_values, series_window
from medpsp.types import ScanRow, Series, Window
from shards.bucket import shard_files
from shards.commit import Commit, columns_of, files_there, may_pass, read_commit, write_commit
from shards.encode import Encoded
from shards.layout import Part, PlannedSeries, ShardPlan
from shards.record import record_text
from shards.settings import WriteSettings
from shards.shardfile import ShardWriter

CHILD = "shards.encode"
AT_ONCE = 16
"""Slices of one answer of a child."""

_DEATHS = frozenset({"DEC_CRASH", "DEC_OOM"})
_REFUSAL = 3  # values of a refused slice: number, code, detail


def write_shard(
    root: Path, plan: ShardPlan, settings: WriteSettings, layout: Mapping[str, str] | None = None
) -> Commit:
    """Decode, label, encode and commit one shard; a bad source becomes a row, not an error.

    Args:
        root: Folder of the shards.
        plan: Of the shard.
        settings: Of the conversion.
        layout: See `Commit`.

    Returns:
        What is written now; the commit that was there stays where the new one would lose slices.

    Raises:
        OSError: The shard cannot be written (disk full, no permission).
        Unreachable: As `_kept`.
    """
    paths, digest = shard_files(plan.bucket, plan.number), plan.digest(settings.text)
    writers = [ShardWriter(root / path, settings.shard_slices) for path in paths]
    rows: list[dict[str, Any]] = []
    refused: list[ScanRow] = []
    values: dict[str, ValueCounts] = {}
    try:
        for part in plan.parts:
            for item, flags in _slices(part, settings, writers, refused):
                slot = part.slot + item.number - part.start
                for writer, size in zip(writers, item.sizes, strict=True):
                    writer.adopt(slot - plan.first, size)
                rows.append(slice_row((plan.bucket, slot), part.planned, item, flags, settings))
                if _by_values(part.planned, item.number, settings):
                    name = part.planned.name
                    values.setdefault(name, ValueCounts()).add_counts(item.values)
        if kept := _kept(root, plan, digest, refused, {row["slot"] for row in rows}):
            return kept
        files = {path: writer.commit() for path, writer in zip(paths, writers, strict=True)}
    finally:
        for writer in writers:
            writer.abort()
    commit = Commit(
        name=plan.name,
        digest=digest,
        layout=dict(layout or {}),
        series=[(part.planned.name, part.slot, part.stop - part.start) for part in plan.parts],
        files=files,
        columns=columns_of(rows),
        refused=[asdict(row) for row in refused],
        values={name: counts.pairs for name, counts in values.items()},
    )
    write_commit(root, commit)
    return commit


def _kept(
    root: Path, plan: ShardPlan, digest: str, refused: Sequence[ScanRow], full: Container[int]
) -> Commit | None:
    """The shard that is there, if slices that it holds cannot be read now, but may be again.

    They are known by their file. In a series of which a file is gone names may have shifted: there
    it counts whether a slot that it fills would be empty.

    Args:
        root, plan, digest: As of `write_shard`.
        refused: Slices that cannot be read.
        full: Slots of the others.

    Raises:
        Unreachable: It cannot stay: it is of another plan, or damaged.
    """
    passing = {(r.file_id, r.frame): r for r in refused if may_pass(r.code, r.detail)}
    old = read_commit(root, plan.name) if passing else None
    if old is None:
        return None
    series_of = {
        (ref.file_id, ref.frame): part.planned.name
        for part in plan.parts
        for ref in part.planned.series.slices
    }
    keys = zip(old.columns["file_id"], old.columns["frame"], strict=True)
    places = zip(old.columns["series"], old.columns["slot"], strict=True)
    held = dict(zip(keys, places, strict=True))
    renamed = {series for key, (series, _) in held.items() if key not in series_of}
    fewer = {series for series, slot in held.values() if series in renamed and slot not in full}
    lost = [row for key, row in passing.items() if key in held or series_of.get(key) in fewer]
    if not lost:
        return None
    if old.digest == digest and files_there(root, old):
        return old
    codes = told_codes(Counter(row.code for row in lost))
    raise Unreachable(
        f"must be made anew, and slices of series that it holds cannot be read now ({codes}; "
        f"{lost[0].file_id}); make them readable and run again (DEC_*: with more "
        "data.decode_seconds or decode_memory_mib; SOURCE_CHANGED: with a new plan), or move them "
        "out of the archive; data.crosswalk tells their names"
    )


def _slices(
    part: Part, settings: WriteSettings, writers: Sequence[ShardWriter], refused: list[ScanRow]
) -> Iterator[tuple[Encoded, tuple[str, ...]]]:
    """Every readable slice of a part with flags of its labels, when its chunks are written.

    A child that dies over some slices gets them one by one, and the one that it dies over twice
    then is lost; one that dies over the masks twice costs the part. So whatever kills children now
    and then costs nothing.

    Raises:
        OSError: A file takes no more.
    """
    box = shared_sandbox(settings.decode_seconds, settings.decode_memory_mib, CHILD)
    series = part.planned.series
    request = {
        "record": record_text(part.planned).decode(),
        "settings": settings.text,
        "files": [str(writer.partial) for writer in writers],
    }
    number = careful = part.start
    blamed = -1  # the slice that a child died over; all of them for the masks
    while number < part.stop:
        alone = number < careful
        span = [number, careful if alone else part.stop]
        flags: tuple[str, ...] | None = None
        for writer in writers:
            writer.trim()
        try:
            answers = box.stream("encode", span=span, at_once=1 if alone else AT_ONCE, **request)
            for kind, found in _unfailed(answers):
                if kind == "labels":
                    flags = tuple(found)
                    continue
                for item in found:
                    if len(item) == _REFUSAL:
                        refused.append(_refused(series, *item))
                    else:
                        yield Encoded(*item), flags or ()
                    number += 1
        except SourceError as error:
            if flags is not None and not alone:
                careful = min(number + AT_ONCE, part.stop)
                continue
            culprit = part.stop if flags is None else number
            if error.code in _DEATHS and culprit != blamed:
                blamed = culprit
                continue
            stop = part.stop if flags is None else number + 1
            lost = range(number, stop)
            refused += [_refused(series, n, error.code, error.detail) for n in lost]
            number = stop


def _unfailed(answers: Iterable[Answer]) -> Iterator[tuple[str, Any]]:
    """Kind and content of each; OSError where the child could not write."""
    for (kind, found), _ in answers:
        if kind == "failed":
            raise OSError(found, os.strerror(found))
        yield kind, found


def _refused(series: Series, number: int, code: str, detail: str) -> ScanRow:
    ref = series.slices[number]
    return refusal(ref.file_id, code, detail, ref.frame)


def _by_values(planned: PlannedSeries, number: int, settings: WriteSettings) -> bool:
    """Whether the window of a slice comes from the values of its whole series."""
    ref = planned.series.slices[number]
    own = settings.header_window and ref.window
    return not own and needs_series_values(ref.modality, settings.window, ref.channels)


def slice_row(
    where: tuple[str, int],
    planned: PlannedSeries,
    item: Encoded,
    flags: tuple[str, ...],
    settings: WriteSettings,
) -> dict[str, Any]:
    """A `SliceRow`; its window is None where only the whole series tells it.

    Args:
        where: Bucket and slot.
        planned: Its series.
        item: What its child says.
        flags: Of its labels.
        settings: Of the conversion.
    """
    series = planned.series
    number, ref = item.number, series.slices[item.number]
    nan = float("nan")
    affine = tuple(v for row in series.affine or () for v in row)
    known = affine and "SINGLE_SLICE" not in series.flags
    step = math.hypot(*affine[2:12:4]) if known else nan
    window: Window | None = ref.window if settings.header_window else None
    if window is None and not _by_values(planned, number, settings):
        window = series_window(ref.modality, settings.window, ValueCounts(), ref.channels)
    return {
        "bucket": where[0],
        "slot": where[1],
        "patient": planned.patient,
        "series": planned.name,
        "slice_index": series.grid_index[number],
        "modality": ref.modality,
        "photometric": ref.photometric,
        "z_mm": series.z_mm[number] if series.z_mm else nan,
        "spacing": (*(ref.pixel_spacing or (nan, nan)), step),
        "spacing_source": ref.spacing_source,
        "affine": affine,
        "window_center": window and window.center,
        "window_width": window and window.width,
        "window_function": window and window.function,
        "voi_center": ref.window.center if ref.window else nan,
        "voi_width": ref.window.width if ref.window else nan,
        "voi_function": ref.window.function if ref.window else "",
        "split": planned.split,
        "order": planned.order,
        "labelled": item.labelled,
        "histogram": item.histogram,
        "file_id": ref.file_id,
        "frame": ref.frame,
        "flags": sorted({*ref.flags, *series.flags, *flags}),
        "padding": item.padding,
        "study_day": planned.study_day,
        "manufacturer": ref.manufacturer,
        "body_part": ref.body_part,
        "crc32c": item.crc32c,
        "dhash": item.dhash,
    }
