"""Commits of shards to index, object table, shard table and manifest, one commit at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medpsp import __version__
from medpsp.config import Config
from medpsp.dataconfig import DataConfig
from medpsp.dicom.codes import told_codes
from medpsp.dicom.container import walk_objects
from medpsp.errors import ArchiveError, ShardError
from medpsp.identity import fingerprint
from medpsp.intensity import ValueCounts, series_window
from medpsp.progress import Bar
from medpsp.types import Window
from shards.bucket import metadata_files
from shards.commit import Commit, read_commit
from shards.gather import LABELS
from shards.headers import file_id
from shards.index import (
    INDEX,
    OBJECTS,
    SHARDS,
    Manifest,
    file_sha256,
    write_bytes_durably,
    write_manifest,
)
from shards.layout import FORMAT, data_id, data_settings
from shards.objects import Fates
from shards.planfile import Plan, ShardEntry
from shards.slots import PLAN
from shards.tables import INDEX_SCHEMA, OBJECTS_SCHEMA, SHARDS_SCHEMA, TableWriter

log = logging.getLogger("medpsp")
Slices = dict[str, list[Any]]
"""`SliceRow` by column."""


def publish(config: Config, key: bytes, plan: Plan) -> Manifest:
    """Join what all shards hold: tables, and the manifest as the last thing.

    Args:
        config: Of the shards.
        key: Of the project.
        plan: Of which every shard is committed.

    Raises:
        ArchiveError: No usable slice for training or validation.
        ShardError: A commit is gone or damaged, or objects are not accounted for.
    """
    data, root = config.data, config.shards
    fates, seen = Fates(), _Seen(patients=data.source == "voc")
    for batch in plan.gathered.rows.batches():
        fates.refuse(batch)
    with (
        TableWriter(root / INDEX, INDEX_SCHEMA) as index,
        TableWriter(root / SHARDS, SHARDS_SCHEMA) as files,
    ):
        commits = _commits(root, plan, files, fates)
        for columns in _with_windows(commits, data):
            index.add(columns)
            fates.keep(columns["file_id"])
            seen.add(columns)
        _require_splits(seen, fates)
    totals, pieces = fates.finish()
    if totals.objects != plan.gathered.objects:
        raise ShardError(
            f"data.archive: {plan.gathered.objects} objects found, but {totals.objects} accounted "
            "for; this is a fault of medpsp, please report it"
        )
    with TableWriter(root / OBJECTS, OBJECTS_SCHEMA) as objects:
        for piece in pieces:
            objects.add(piece)
    tables = {INDEX: index.sha256, SHARDS: files.sha256, OBJECTS: objects.sha256}
    for name in {PLAN, *(name for bucket in plan.slots for name in metadata_files(bucket))}:
        tables[name] = file_sha256(root / name)
    manifest = Manifest(
        version=FORMAT,
        tool=f"medpsp {__version__}",
        classes=data.classes,
        key_fingerprint=fingerprint(key),
        settings=data_settings(data),
        data_id=data_id(data, fingerprint(key), seen.pairs),
        shards=len(plan.shards),
        slices=index.rows,
        torn=totals.torn,
        counts=totals.counts,
        codes=totals.codes,
        deid=_deid(data, key),
        tables=dict(sorted(tables.items())),
    )
    write_manifest(root, manifest)
    return manifest


def _require_splits(seen: _Seen, fates: Fates) -> None:
    if empty := {"train", "val"} - seen.splits:
        found = told_codes(fates.codes())
        raise ArchiveError(
            f"data.archive: no usable slice for {' and '.join(sorted(empty))}; "
            f"found {found or 'no image'}"
        )


class _Seen:
    """Splits that occur, and who is in which where split lists say so."""

    def __init__(self, *, patients: bool) -> None:
        self._patients = patients
        self.splits: set[str] = set()
        self.pairs: set[tuple[str, str]] = set()

    def add(self, columns: Slices) -> None:
        self.splits.update(columns["split"])
        if self._patients:
            self.pairs.update(zip(columns["patient"], columns["split"], strict=True))


def _commits(
    root: Path, plan: Plan, files: TableWriter, fates: Fates
) -> Iterator[tuple[ShardEntry, Commit]]:
    """Every shard of the plan and its commit; their files and refused frames are noted."""
    with Bar("publish", len(plan.shards), "shards") as bar:
        for entry in plan.shards:
            commit = read_commit(root, entry.name)
            if commit is None:
                raise ShardError(
                    f"shard {entry.name}: its commit is gone or damaged; run `medpsp shards` again"
                )
            names = ("file_id", "status", "code", "detail", "frame")
            fates.refuse_columns({name: [row[name] for row in commit.refused] for name in names})
            files.add_rows(
                {
                    "name": commit.name,
                    "slices": len(commit.columns["slot"]),
                    "path": path,
                    "sha256": sha,
                    "bytes": size,
                }
                for path, (sha, size) in commit.files.items()
            )
            yield entry, commit
            bar.advance()


def _with_windows(
    commits: Iterator[tuple[ShardEntry, Commit]], data: DataConfig
) -> Iterator[Slices]:
    """Slices in the order of the shards, with the windows that only whole series tell.

    A series goes on in the next shards of its bucket: its slices wait until the last of these.
    """
    waiting: list[Slices] = []
    values: dict[str, ValueCounts] = {}
    for entry, commit in commits:
        waiting.append(commit.columns)
        for name, pairs in commit.values.items():
            values.setdefault(name, ValueCounts()).add_counts(pairs)
        if not entry.goes_on:
            for columns in waiting:
                _fill_windows(columns, values, data)
                yield columns
            waiting, values = [], {}
    if waiting:
        raise ShardError("plan: its last series is not whole; plan again")


def _fill_windows(columns: Slices, values: dict[str, ValueCounts], data: DataConfig) -> None:
    windows: dict[str, Window] = {}
    for number, center in enumerate(columns["window_center"]):
        if center is not None:
            continue
        name, modality = columns["series"][number], columns["modality"][number]
        if name not in windows:
            counts = values.get(name, ValueCounts())
            windows[name] = series_window(modality, data.fixed_window, counts)
        for field in ("center", "width", "function"):
            columns[f"window_{field}"][number] = getattr(windows[name], field)


def _deid(data: DataConfig, key: bytes) -> dict[str, Any]:
    """How the shards were de-identified, in the terms of PS3.15 Annex E."""
    return {
        "profile": "allow-list over the Basic Application Level Confidentiality Profile",
        "options": ["Clean Pixel Data"] if data.burned_in == "blank" else [],
        "pixel": {"quarantine": "flagged", "blank": "cleaned", "keep": "not_checked"}[
            data.burned_in if data.source == "dicom" else "keep"
        ],
        "temporal": "REMOVED" if data.dates == "none" else "MODIFIED",
        "tool": f"medpsp {__version__}",
        "key": fingerprint(key),
    }


def write_crosswalk(plan: Plan, data: DataConfig, key: bytes) -> None:
    """Every object, for the data owner only: mode 0600, outside the shards.

    A line is file_id and real path, and for an image in the plan pseudonyms of its patient and
    series, and its split.
    """
    if data.crosswalk is None:
        return
    owners: dict[str, str] = {}
    for item in plan.gathered.planned:
        owner = f"\t{item.patient}\t{item.name}\t{item.split}"
        owners.update((ref.file_id, owner) for ref in item.series.slices)
    names = sorted({found.name for found in walk_objects(data.archive)})
    labels = data.labels if data.source == "dicom" and data.label_format != "nifti" else None
    if labels and not labels.resolve().is_relative_to(data.archive.resolve()):
        names += sorted({LABELS + found.name for found in walk_objects(labels)})
    known = ((file_id(key, name), name) for name in names)
    text = "".join(f"{number}\t{name!r}{owners.get(number, '')}\n" for number, name in known)
    write_bytes_durably(data.crosswalk, text.encode(), mode=0o600)
