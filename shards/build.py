"""An archive to shards: scan, plan, one Ray task a shard, manifest. The only file with Ray."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from medpsp import __version__
from medpsp.config import Config
from medpsp.dataconfig import DataConfig
from medpsp.dicom.container import walk_objects
from medpsp.dicom.names import name_rule
from medpsp.errors import ArchiveError, ConfigError, ShardError
from medpsp.identity import fingerprint, load_key
from medpsp.progress import Bar
from medpsp.types import ScanRow
from shards.gather import LABELS, Gathered, file_id, gather, tally
from shards.index import (
    INDEX,
    MANIFEST,
    OBJECTS,
    REPORT,
    Manifest,
    ObjectRow,
    SliceRow,
    file_sha256,
    object_rows,
    write_bytes_durably,
    write_table,
)
from shards.layout import FORMAT, ShardPlan, data_id, data_settings, plan_shards
from shards.source import WriteSettings
from shards.write import (
    Commit,
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
    gathered = gather(data, key)
    plans = plan_shards(gathered.planned, data.shard_slices)
    settings = _settings(data)
    root.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, REPORT):  # neither while shards change below them
        (root / name).unlink(missing_ok=True)
    clear_stale(root, plans)
    for plan in {p.bucket: p for p in plans}.values():
        slots = sum(p.count for p in plans if p.bucket == plan.bucket)
        create_bucket(root, plan, slots, data.shard_slices)
    commits = _convert(root, plans, settings, data.workers)
    if data.crosswalk:
        _write_crosswalk(data, key)
    return _publish(config, key, commits, gathered)


def _settings(data: DataConfig) -> WriteSettings:
    return WriteSettings(
        source=data.source,
        labels=name_rule(data),
        label_map=tuple(sorted(data.label_map.items())),
        mask_geometry=data.mask_geometry,
        mask_resample=data.mask_resample,
        window=data.fixed_window,
        header_window=data.header_window,
        padding=data.padding,
        shard_slices=data.shard_slices,
        decode_seconds=data.decode_seconds,
        decode_memory_mib=data.decode_memory_mib,
    )


def _require_places(data: DataConfig, root: Path) -> None:
    """Nothing of ours into the archive, where it would be scanned; nothing of theirs into ours.

    What lies in the folder of the shards and is in no plan is deleted.
    """
    archive, shards = data.archive.resolve(), root.resolve()
    if data.source == "dicom" and shards.is_relative_to(archive):
        raise ConfigError(f"out: {root} lies inside data.archive; take a folder outside it")
    for name in ("archive", "labels", "key_file"):
        place = getattr(data, name)
        if place and place.resolve().is_relative_to(shards):
            raise ConfigError(f"data.{name} {place}: lies inside the shards; move it out of {root}")
    if root.is_dir() and any(root.iterdir()) and not (root / "zarr.json").is_file():
        raise ConfigError(
            f"out: {root} holds something that is no shards of medpsp; take an empty folder"
        )
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


def _publish(config: Config, key: bytes, commits: list[Commit], gathered: Gathered) -> Manifest:
    data, root = config.data, config.shards
    kept = [row for commit in commits for row in commit.rows]
    refused = [*gathered.rows, *(ScanRow(**r) for commit in commits for r in commit.refused)]
    if empty := {"train", "val"} - {row["split"] for row in kept}:
        raise ArchiveError(
            f"data.archive: no usable slice for {' and '.join(sorted(empty))}; "
            f"found {tally(refused)}"
        )
    objects = object_rows(Counter(str(row["file_id"]) for row in kept), refused)
    if len(objects) != gathered.objects:
        raise ShardError(
            f"data.archive: {gathered.objects} objects found, but {len(objects)} accounted for; "
            "this is a fault of medpsp, please report it"
        )
    write_table(root / INDEX, kept, [f.name for f in fields(SliceRow)])
    write_table(root / OBJECTS, [asdict(o) for o in objects], [f.name for f in fields(ObjectRow)])
    buckets = {commit.name.rsplit("-", 1)[0] for commit in commits}
    tables = {INDEX, OBJECTS, *(name for b in buckets for name in metadata_files(b))}
    counts = Counter({"kept": 0, "skipped": 0, "quarantined": 0, "duplicate": 0})
    counts.update(row.status for row in objects)
    manifest = Manifest(
        version=FORMAT,
        tool=f"medpsp {__version__}",
        classes=data.classes,
        key_fingerprint=fingerprint(key),
        settings=data_settings(data),
        data_id=data_id(data, fingerprint(key), {(r["patient"], r["split"]) for r in kept}),
        shards=tuple({"name": c.name, "digest": c.digest, "files": c.files} for c in commits),
        slices=len(kept),
        torn=sum(o.status == "kept" and o.kept < o.frames for o in objects),
        counts=dict(counts),
        codes=dict(sorted(Counter(row.code for row in objects if row.code).items())),
        deid=_deid(data, key),
        tables={name: file_sha256(root / name) for name in sorted(tables)},
    )
    write_bytes_durably(root / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def _deid(data: DataConfig, key: bytes) -> dict[str, Any]:
    """How the shards were de-identified, in the terms of PS3.15 Annex E (D10)."""
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


def _write_crosswalk(data: DataConfig, key: bytes) -> None:
    """file_id to real path, for the data owner only: mode 0600, outside the shards."""
    if data.crosswalk is None:
        return
    names = sorted({found.name for found in walk_objects(data.archive)})
    labels = data.labels if data.source == "dicom" and data.label_format != "nifti" else None
    if labels and not labels.resolve().is_relative_to(data.archive.resolve()):
        names += sorted({LABELS + found.name for found in walk_objects(labels)})
    text = "".join(f"{file_id(key, name)}\t{name!r}\n" for name in names)
    write_bytes_durably(data.crosswalk, text.encode(), mode=0o600)
