"""An archive to shards: scan, plan, one Ray task a shard, manifest. The only file with Ray."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from medpsp import __version__
from medpsp.config import Config, DataConfig
from medpsp.dicom.labels import mask_path
from medpsp.dicom.scan import refusal, scan_folder, walk_files
from medpsp.dicom.voc import scan_voc
from medpsp.errors import ArchiveError, ConfigError, LabelError, ShardError
from medpsp.identity import fingerprint, load_key, pseudonym, split_of, unit_hash
from medpsp.progress import Bar
from medpsp.types import ScanRow, Series, Window
from shards.index import (
    INDEX,
    MANIFEST,
    REJECTS,
    Manifest,
    SliceRow,
    file_sha256,
    write_bytes_durably,
    write_table,
)
from shards.layout import FORMAT, PlannedSeries, ShardPlan, data_id, data_settings, plan_shards
from shards.write import (
    Commit,
    WriteSettings,
    clear_stale,
    create_bucket,
    metadata_files,
    read_commit,
    write_shard,
)

log = logging.getLogger("medpsp")


def build_shards(config: Config) -> Manifest:
    """Convert the archive of ``config.data``; a second run repeats only what is missing.

    Raises:
        ArchiveError: Archive missing, empty, or without usable slices for training and
            validation.
        ConfigError: A split would be empty, the labels folder is missing, or something would be
            written where it must not be.
        ShardError: A shard could not be written.
    """
    data, root = config.data, config.shards
    _require_places(data, root)
    key = load_key(data.key_file)
    series, rows = _scan(data, key)
    series, unlabelled = _attach_masks(series, data)
    rows += unlabelled
    if not series:
        raise ArchiveError(f"archive {data.archive}: nothing usable; found {_tally(rows)}")
    planned = [_planned(s, data, key) for s in series]
    _require_splits(planned, data)
    plans = plan_shards(planned, data.shard_slices)
    settings = WriteSettings(
        source=data.source,
        classes=len(data.classes),
        label_map=tuple(sorted(data.label_map.items())),
        window=Window(center=data.window.center, width=data.window.width) if data.window else None,
        shard_slices=data.shard_slices,
    )
    root.mkdir(parents=True, exist_ok=True)
    (root / MANIFEST).unlink(missing_ok=True)  # no manifest while shards change below it
    clear_stale(root, plans)
    for plan in {p.bucket: p for p in plans}.values():
        slots = sum(p.count for p in plans if p.bucket == plan.bucket)
        create_bucket(root, plan, slots, data.shard_slices)
    commits = _convert(root, plans, settings, data.workers)
    if data.crosswalk:
        _write_crosswalk(data, key)
    return _publish(config, key, commits, rows)


def _require_places(data: DataConfig, root: Path) -> None:
    """Nothing of ours into the archive, where it would be scanned; no real path into shards."""
    archive, shards = data.archive.resolve(), root.resolve()
    if data.source == "dicom" and shards.is_relative_to(archive):
        raise ConfigError(f"out: {root} lies inside data.archive; take a folder outside it")
    if data.source == "dicom" and data.labels and not data.labels.is_dir():
        raise ConfigError(f"data.labels {data.labels}: no such folder")
    if data.crosswalk:
        if data.crosswalk.is_dir():
            raise ConfigError(
                f"data.crosswalk {data.crosswalk}: a folder, expected a file to write"
            )
        for name, place in (("the shards", shards), ("data.archive", archive)):
            if data.crosswalk.resolve().is_relative_to(place):
                raise ConfigError(
                    f"data.crosswalk {data.crosswalk}: lies inside {name}; take a path outside"
                )


def _file_id(key: bytes, relative: str) -> str:
    # a name that is not UTF-8 holds surrogates, which have no bytes
    return pseudonym(key, "file", relative.encode("utf-8", "backslashreplace").decode())


def _scan(data: DataConfig, key: bytes) -> tuple[list[Series], list[ScanRow]]:
    file_id = partial(_file_id, key)
    if data.source == "voc":
        return scan_voc(data.archive, data.voc, file_id)
    with Bar("scan", 0, "files") as bar:
        return scan_folder(data.archive, data.modalities, file_id, bar.advance)


def _attach_masks(series: list[Series], data: DataConfig) -> tuple[list[Series], list[ScanRow]]:
    """Give each DICOM series its NIfTI mask; one without is left out, and counted."""
    if data.source == "voc" or data.labels is None:
        return series, []
    labelled: list[Series] = []
    rows: list[ScanRow] = []
    for item in series:
        code, detail = "LABEL_NONE", "no mask where data.label_pattern points"
        try:
            path = mask_path(data.labels, data.label_pattern, item.first, data.archive)
            if path.is_file():
                labelled.append(replace(item, masks=(str(path),)))
                continue
        except LabelError as error:
            code, detail = error.code, error.detail
        except OSError:  # ENAMETOOLONG: its text would hold the PatientID
            detail = "a header value makes no file name"
        rows += [refusal(ref.file_id, code, detail) for ref in item.slices]
    return labelled, rows


def _planned(series: Series, data: DataConfig, key: bytes) -> PlannedSeries:
    first = series.first
    patient = first.patient_id
    split = series.split or split_of(key, patient, data.split.val, data.split.test)
    sources = (*(s.path for s in series.slices), *series.masks)
    stats = [os.stat(p) for p in sources if Path(p).is_file()]
    return PlannedSeries(
        series=series,
        split=split,
        order=unit_hash(key, "stage", patient),
        patient=pseudonym(key, "patient", patient),
        # one SeriesInstanceUID may hold several series: planes, localizers
        name=pseudonym(key, "series", f"{first.series_uid} {first.sop_uid}"),
        stamp=pseudonym(key, "stamp", json.dumps([(s.st_size, s.st_mtime_ns) for s in stats])),
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


def _convert(
    root: Path, plans: tuple[ShardPlan, ...], settings: WriteSettings, workers: int
) -> list[Commit]:
    done = {p.name: c for p in plans if (c := read_commit(root, p, p.digest(settings.text)))}
    missing = [p for p in plans if p.name not in done]
    with Bar("shards", len(plans), "shards") as bar:
        bar.resume_at(len(done))
        if missing:
            done.update(_convert_with_ray(root, missing, settings, workers, bar))
    return [done[plan.name] for plan in plans]


def _convert_with_ray(
    root: Path, plans: list[ShardPlan], settings: WriteSettings, workers: int, bar: Bar
) -> dict[str, Commit]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )
    done: dict[str, Commit] = {}
    try:
        task = ray.remote(num_cpus=1, max_retries=2)(write_shard)
        queue, refused = list(plans), 0
        running: dict[Any, ShardPlan] = {}
        while queue or running:
            while queue and len(running) < 2 * workers:  # bounded: plans stay in the driver
                plan = queue.pop(0)
                running[task.remote(root.absolute(), plan, settings)] = plan
            ready, _ = ray.wait(list(running), num_returns=1)
            plan = running.pop(ready[0])
            try:
                commit = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                raise ShardError(
                    f"shard {plan.name}: {_cause(error)}; mend it and run again"
                ) from None
            done[plan.name] = commit
            refused += len(commit.refused)
            bar.advance(note=f"{refused} refused" if refused else "")
    finally:
        if started:
            ray.shutdown()
    return done


def _cause(error: Exception) -> str:
    """The kind of a task's error; its text may hold source paths, so an OSError's number only."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OSError):
        return f"{os.strerror(cause.errno) if cause.errno else 'I/O error'}"
    return f"worker failed ({type(cause).__name__})"


def _publish(config: Config, key: bytes, commits: list[Commit], rows: list[ScanRow]) -> Manifest:
    data, root = config.data, config.shards
    kept = [row for commit in commits for row in commit.rows]
    if empty := {"train", "val"} - {row["split"] for row in kept}:
        codes = _tally([ScanRow(**r) for c in commits for r in c.refused])
        raise ArchiveError(
            f"archive {data.archive}: no usable slice for {' and '.join(sorted(empty))}; "
            f"found {codes}"
        )
    refused = [asdict(row) for row in rows] + [r for commit in commits for r in commit.refused]
    refused.sort(key=lambda r: r["file_id"])
    write_table(root / INDEX, kept, [f.name for f in fields(SliceRow)])
    write_table(root / REJECTS, refused, [f.name for f in fields(ScanRow)])
    buckets = {commit.name.rsplit("-", 1)[0] for commit in commits}
    tables = {INDEX, REJECTS, *(name for b in buckets for name in metadata_files(b))}
    counts = Counter({"kept": len(kept), "skipped": 0, "quarantined": 0, "duplicate": 0})
    counts.update(str(row["status"]) for row in refused)
    manifest = Manifest(
        version=FORMAT,
        tool=f"medpsp {__version__}",
        classes=data.classes,
        key_fingerprint=fingerprint(key),
        settings=data_settings(data),
        data_id=data_id(data, fingerprint(key), {(r["patient"], r["split"]) for r in kept}),
        shards=tuple({"name": c.name, "digest": c.digest, "files": c.files} for c in commits),
        counts=dict(counts),
        codes=dict(sorted(Counter(r["code"] for r in refused).items())),
        tables={name: file_sha256(root / name) for name in sorted(tables)},
    )
    _conserve(data, manifest)
    write_bytes_durably(root / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def _conserve(data: DataConfig, manifest: Manifest) -> None:
    """Every file found is in exactly one row: kept + skipped + quarantined + duplicate."""
    if data.source == "dicom":
        found, told = sum(1 for _ in walk_files(data.archive)), sum(manifest.counts.values())
        if found != told:
            raise ShardError(
                f"archive {data.archive}: {found} files, but {told} accounted for; the archive "
                "changed during the conversion: run again"
            )


def _tally(rows: list[ScanRow]) -> str:
    counts: dict[str, Any] = Counter(row.code for row in rows)
    return ", ".join(f"{n} {code}" for code, n in sorted(counts.items())) or "no image"


def _write_crosswalk(data: DataConfig, key: bytes) -> None:
    """file_id to real path, for the data owner only: mode 0600, outside the shards."""
    if data.crosswalk is None:
        return
    files = walk_files(data.archive)
    names = sorted(path.relative_to(data.archive).as_posix() for path in files)
    text = "".join(f"{_file_id(key, name)}\t{name!r}\n" for name in names)
    write_bytes_durably(data.crosswalk, text.encode(), mode=0o600)
