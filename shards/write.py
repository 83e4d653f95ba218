"""One shard from source files to disk, in one process: decode, label, encode, commit.

The shard is encoded in memory by zarr itself, so that any Zarr v3 reader opens it, and put in
place by us with fsync and rename, which zarr's LocalStore does not do.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from medpsp.types import IGNORE, ScanRow
from shards.index import SliceRow, file_sha256, write_bytes_durably
from shards.layout import Part, ShardPlan
from shards.source import Slice, WriteSettings, read_part

COMMITS = "commits"
BUCKET = re.compile(r"\d+x\d+_(int16|float32|uint8)")
PASSING = frozenset({"DEC_OOM", "DEC_TIMEOUT", "DEC_CRASH", "FILE_UNREADABLE"})
"""Codes of failures that may be gone the next time: their shard is written anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What one written shard holds; stored beside it and small enough to travel."""

    name: str
    digest: str
    files: dict[str, str]  # path relative to the root -> sha256
    rows: tuple[dict[str, Any], ...]
    refused: tuple[dict[str, Any], ...]


def create_bucket(root: Path, plan: ShardPlan, slots: int, shard_slices: int) -> None:
    """Write the zarr.json files of a bucket of ``slots`` slots; shards that lie there stay."""
    store = MemoryStore()  # on disk, zarr empties the folder of an array before it makes one
    zarr.open_group(store, mode="a")
    zarr.open_group(store, path=plan.bucket, mode="a")
    for name in ("image", "label"):
        _create(store, f"{plan.bucket}/{name}", name, plan, (slots, shard_slices))
    for key in metadata_files(plan.bucket):
        write_bytes_durably(root / key, _stored(store, key))


def metadata_files(bucket: str) -> tuple[str, ...]:
    """Paths of the zarr.json files that a reader of one bucket needs."""
    folders = ("", f"{bucket}/", f"{bucket}/image/", f"{bucket}/label/")
    return tuple(f"{folder}zarr.json" for folder in folders)


def clear_stale(root: Path, plans: Iterable[ShardPlan]) -> None:
    """Delete what earlier runs left: shards of no plan, their commits, half-written files.

    A patient taken out of the archive is gone from the shards after the next run.
    """
    keep = {root / name for plan in plans for name in (*_files(plan), _commit_name(plan))}
    planned = {plan.bucket for plan in plans}
    for folder in (f for f in root.iterdir() if BUCKET.fullmatch(f.name) and f.is_dir()):
        if folder.name not in planned:
            shutil.rmtree(folder)
            continue
        for name in ("image", "label"):
            _clear(folder / name, "c/*/0/**/*", keep)
            _clear(folder / name, "**/.*.partial", keep)
    _clear(root / COMMITS, "*", keep)
    for folder in (root, root / COMMITS):
        _clear(folder, ".*.partial", keep)


def _clear(folder: Path, pattern: str, keep: set[Path]) -> None:
    for path in list(folder.glob(pattern)):
        if path not in keep and path.is_file():
            path.unlink()


def _create(
    store: MemoryStore, path: str, name: str, plan: ShardPlan, sizes: tuple[int, int]
) -> zarr.Array[Any]:
    slots, shard_slices = sizes
    frame = _frame(plan, name)
    image = name == "image"
    dtype = plan.dtype if image else "uint8"
    # level above 1 buys under 1 % on CT noise; labels are runs, where shuffling only costs
    blosc = BloscCodec(
        cname="zstd",
        clevel=1 if image else 3,
        typesize=np.dtype(dtype).itemsize,
        shuffle=BloscShuffle.shuffle if image else BloscShuffle.noshuffle,
    )
    return zarr.create_array(
        store,
        name=path,
        shape=(slots, *frame),
        dtype=dtype,
        chunks=(1, *frame),
        shards=(shard_slices, *frame),
        compressors=[blosc, Crc32cCodec()],
        fill_value=0 if image else IGNORE,
        overwrite=True,
        zarr_format=3,
        config={"write_empty_chunks": True},  # so that a missing chunk is always a fault
        dimension_names=("slice", "row", "column", "channel")[: 1 + len(frame)],
    )


def read_commit(root: Path, plan: ShardPlan, digest: str) -> Commit | None:
    """The commit of a shard that was written before from the same plan, files whole; else None."""
    try:
        tree = json.loads((root / _commit_name(plan)).read_text(encoding="utf-8"))
        commit = Commit(**{**tree, "rows": tuple(tree["rows"]), "refused": tuple(tree["refused"])})
        if commit.digest != digest:
            return None
        if any({row["code"], row["detail"].split(":")[0]} & PASSING for row in commit.refused):
            return None
        whole = all(file_sha256(root / name) == sha for name, sha in commit.files.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return commit if whole else None


def write_shard(root: Path, plan: ShardPlan, settings: WriteSettings) -> Commit:
    """Decode, label, encode and commit one shard; a bad source becomes a row, not an error.

    Raises:
        OSError: The shard cannot be written (disk full, no permission).
    """
    images = np.zeros((plan.count, *_frame(plan, "image")), dtype=plan.dtype)
    labels = np.full((plan.count, *_frame(plan, "label")), IGNORE, dtype=np.uint8)
    rows: list[SliceRow] = []
    refused: list[ScanRow] = []
    for part in plan.parts:
        for item in read_part(part, settings, refused):
            row = _row(plan, part, item, settings.classes)
            images[row.slot - plan.first], labels[row.slot - plan.first] = item.image, item.label
            rows.append(row)
    digest = plan.digest(settings.text)
    files: dict[str, str] = {}
    for relative, name, block in zip(
        _files(plan), ("image", "label"), (images, labels), strict=True
    ):
        data = _encode(plan, name, block, settings.shard_slices)
        write_bytes_durably(root / relative, data)
        files[relative] = hashlib.sha256(data).hexdigest()
    commit = Commit(
        name=plan.name,
        digest=digest,
        files=files,
        rows=tuple(asdict(row) for row in rows),
        refused=tuple(asdict(row) for row in refused),
    )
    write_bytes_durably(root / _commit_name(plan), json.dumps(asdict(commit)).encode())
    return commit


def _frame(plan: ShardPlan, name: str) -> tuple[int, ...]:
    """Shape of one image or label; an image of uint8 is RGB."""
    colour = name == "image" and plan.dtype == "uint8"
    return (plan.rows, plan.columns, 3) if colour else (plan.rows, plan.columns)


def _chunk(plan: ShardPlan, name: str, number: int) -> str:
    """Name of a shard within its array: one number for each axis."""
    return f"c/{number}" + "/0" * len(_frame(plan, name))


def _files(plan: ShardPlan) -> tuple[str, str]:
    image, label = (
        f"{plan.bucket}/{name}/{_chunk(plan, name, plan.number)}" for name in ("image", "label")
    )
    return image, label


def _commit_name(plan: ShardPlan) -> str:
    return f"{COMMITS}/{plan.name}.json"


def _encode(plan: ShardPlan, name: str, block: NDArray[Any], shard_slices: int) -> bytes:
    store = MemoryStore()
    array = _create(store, name, name, plan, (len(block), shard_slices))
    array[:] = block
    return _stored(store, f"{name}/{_chunk(plan, name, 0)}")


def _stored(store: MemoryStore, key: str) -> bytes:
    buffer = sync(store.get(key, default_buffer_prototype()))
    if buffer is None:
        raise OSError(f"zarr wrote no {key}")
    return buffer.to_bytes()


def _row(plan: ShardPlan, part: Part, item: Slice, classes: int) -> SliceRow:
    planned, series = part.planned, part.planned.series
    number, ref = item.number, series.slices[item.number]
    counts = np.bincount(item.label.ravel(), minlength=256)
    nan = float("nan")
    affine = series.affine or ()
    known = affine and "SINGLE_SLICE" not in series.flags
    step = float(np.linalg.norm([row[2] for row in affine[:3]])) if known else nan
    return SliceRow(
        bucket=plan.bucket,
        slot=part.slot + number - part.start,
        patient=planned.patient,
        series=planned.name,
        slice_index=series.grid_index[number],
        modality=ref.modality,
        photometric=ref.photometric,
        z_mm=series.z_mm[number] if series.z_mm else nan,
        spacing=(*(ref.pixel_spacing or (nan, nan)), step),
        spacing_source=ref.spacing_source,
        affine=tuple(v for row in affine for v in row),
        window_center=item.window.center,
        window_width=item.window.width,
        window_function=item.window.function,
        voi_center=ref.window.center if ref.window else nan,
        voi_width=ref.window.width if ref.window else nan,
        voi_function=ref.window.function if ref.window else "",
        split=planned.split,
        order=planned.order,
        labelled=item.labelled,
        histogram=(*(int(c) for c in counts[:classes]), int(counts[IGNORE])),
        file_id=ref.file_id,
        frame=ref.frame,
        flags=tuple(sorted({*ref.flags, *series.flags, *item.flags})),
        padding=item.padding,
        study_day=planned.study_day,
        manufacturer=ref.manufacturer,
        body_part=ref.body_part,
    )
