"""An archive to planned series: scan, cut into parts, plan each.

Memory does not grow with the archive, and the result does not depend on how it is cut.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from os import fsdecode
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medpsp.dataconfig import DataConfig
from medpsp.dicom.codes import is_no_dicom, told_codes
from medpsp.dicom.sandbox import SandboxPool, shared_sandbox
from medpsp.dicom.scan import LabelFile, find_labels
from medpsp.dicom.voc import scan_voc
from medpsp.errors import ArchiveError, ConfigError
from medpsp.progress import Bar
from medpsp.types import SPLITS, Place, ScanRow
from medpsp.words import ends_of, many
from shards.catalog import SCANNER, Catalog
from shards.components import LeftOut, PartSpool, cut_catalog
from shards.headers import FILE, FRAME, KEYS, LABEL, REFUSED, file_id
from shards.masks import Aims
from shards.parts import planned_series
from shards.planfile import Gathered
from shards.planner import Planner, Task, planned_parts
from shards.planstate import new_files, plan_folder
from shards.seriesfile import SeriesFile, entry_of

log = logging.getLogger("medpsp")
PART_ROWS = 50_000
LABELS = "labels//"
"""Before the names of the objects in a labels folder outside the archive: no path holds "//"."""


def gather(data: DataConfig, key: bytes) -> Gathered:
    """Find, group, label and split everything in the archive.

    Raises:
        ArchiveError: Missing, empty, or without anything usable.
        ConfigError: The training or validation split would be empty.
    """
    listed = False
    limits = data.decode_seconds, data.decode_memory_mib
    with SandboxPool(data.workers, *limits, SCANNER) as pool:
        if data.source == "voc":
            found, listed = _gather_voc(data, key)
        else:
            with Bar("scan", 0, "files") as bar:
                catalog = Catalog.scan(data, key, pool, bar.advance)
            found = gather_dicom(catalog, data, key, pool)
            _require_dicom(catalog, found, data)
    if not len(found.planned):
        codes = told_codes(Counter(row.code for row in found.rows))
        raise ArchiveError(f"data.archive: nothing usable; found {codes or 'no image'}")
    _require_splits(found.planned, listed=listed)
    return found


def _require_dicom(catalog: Catalog, found: Gathered, data: DataConfig) -> None:
    """A folder of something else says what that is."""
    if len(found.planned) or not all(is_no_dicom(row.code) for row in found.rows):
        return
    names = (n for b in catalog.batches(REFUSED, [FILE]) for n in b[FILE].to_pylist())
    raise ArchiveError(
        f"data.archive {data.archive}: nothing DICOM in it, {many(found.objects, 'file')}: "
        f"{ends_of(map(fsdecode, names))}; give the root of the DICOM files"
    )


def gather_dicom(
    catalog: Catalog, data: DataConfig, key: bytes, pool: SandboxPool, part_rows: int = PART_ROWS
) -> Gathered:
    """Group, label and split what a scan found.

    Args:
        catalog: Of the archive.
        data: Of the configuration.
        key: Of the project.
        pool: Children that read label objects, and images that claim one place.
        part_rows: Frames that are in memory at a time, but for what cannot be taken apart.
    """
    planned, rows = new_files(plan_folder(data))
    objects = catalog.objects
    labels = [f for batch in catalog.batches(LABEL) for f in catalog.labels_of(batch)]
    if data.labels is not None and data.label_format != "nifti":
        labels, other = _labels_of_folder(labels, data, key, pool)
        objects += len(other)
    else:
        other = []
    wanted = [file for file in labels if file.kind == data.label_format]
    aims = Aims(wanted, pool, catalog.left_out() if wanted else LeftOut.of((), ()))
    used = {file.file_id for file in wanted}  # their rows say what became of them
    rows.extend(row for row in other if row.file_id not in used)
    rows.extend(aims.fate)
    spool, of_link, count = _cut(catalog, aims, part_rows)
    for batch in catalog.batches(REFUSED):
        rows.extend(row for row in catalog.rows_of(batch) if row.file_id not in used)
    tasks = (
        Task(spool.packed(part), list(aims.some(np.flatnonzero(of_link == part).tolist())))
        for part in range(count)
    )
    with Bar("plan", count, "parts") as bar:
        planner = Planner(data, key, aims.robbed)
        for made in planned_parts(planner, tasks, min(data.workers, count) or 1):
            rows.extend(made.rows)
            for entry in made.series:
                planned.add(entry)
            bar.advance()
    spool.close()
    planned.finish()
    return Gathered(planned=planned, rows=rows, objects=objects)


def _cut(catalog: Catalog, aims: Aims, part_rows: int) -> tuple[PartSpool, NDArray[np.int64], int]:
    """Frames by part, the part of each label object, and the number of parts."""
    parts, of_link = cut_catalog(catalog.batches(FRAME, KEYS), aims.links, part_rows)
    spool, done = PartSpool(), 0
    for batch in catalog.batches(FRAME):
        spool.add(batch, parts[done : done + len(batch)])
        done += len(batch)
    return spool, of_link, int(max(parts.max(initial=-1), of_link.max(initial=-1))) + 1


def _labels_of_folder(
    labels: list[LabelFile], data: DataConfig, key: bytes, pool: SandboxPool
) -> tuple[list[LabelFile], list[ScanRow]]:
    """The label objects of ``data.labels``; and rows of all there, if it is a folder of its own."""
    if data.labels is None:
        return labels, []
    root = data.labels.resolve()
    if root.is_relative_to(data.archive.resolve()):  # the scan has met all that is in it
        below = [f for f in labels if Path(f.place.path).parent.resolve().is_relative_to(root)]
        return below, []
    found = find_labels(data.labels, lambda name: file_id(key, LABELS + name), pool)
    return found.labels, found.rows


def _gather_voc(data: DataConfig, key: bytes) -> tuple[Gathered, bool]:
    """A VOC-style archive, and whether split lists name patients."""
    planned, rows = new_files(plan_folder(data))
    box = shared_sandbox(data.decode_seconds, data.decode_memory_mib)
    series, refused = scan_voc(
        data.archive,
        data.voc,
        partial(file_id, key),
        grey=data.colour == "grey",
        read=lambda path: box.image(Place(str(path))),
    )
    for item in series:
        planned.add(entry_of(planned_series(item, data, key, {})))
    planned.finish()
    rows.extend(refused)
    objects = sum(len(item.slices) for item in series) + len(refused)
    found = Gathered(planned=planned, rows=rows, objects=objects)
    return found, any(item.split for item in series)


def _require_splits(planned: SeriesFile, *, listed: bool) -> None:
    heads = planned.heads
    counts = {
        split: len(np.unique(heads["patient"][heads["split"] == number]))
        for number, split in enumerate(SPLITS)
    }
    if not counts["train"] or not counts["val"]:
        shares = "raise data.split.val" if counts["train"] else "lower data.split.val and .test"
        todo = f"{shares}, add patients, or use another key"
        if sum(counts.values()) == 1:
            todo = "add patients"
        raise ConfigError(
            f"data.split: patients fall to {counts}, train and val need at least one each; "
            + ("check the split lists" if listed else todo)
        )
    log.info("patients: %s", ", ".join(f"{n} {split}" for split, n in counts.items()))
