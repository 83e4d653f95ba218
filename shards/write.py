"""One shard from source files to disk: its sandbox makes the chunks, here they become a shard.

No slice and no shard is ever whole in the memory of this process.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import zarr
from zarr.abc.codec import ArrayBytesCodec
from zarr.codecs import BloscCodec, BloscShuffle, BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from medpsp.dicom.codes import refusal
from medpsp.dicom.sandbox import shared_sandbox
from medpsp.errors import SourceError
from medpsp.intensity import ValueCounts, needs_series_values, series_window
from medpsp.types import IGNORE, ScanRow, Series, Window
from shards.codec import LABEL, Codec, image_codec
from shards.commit import COMMITS, Commit, commit_name, write_commit
from shards.encode import Encoded
from shards.index import write_bytes_durably
from shards.layout import Part, ShardPlan
from shards.record import record_text
from shards.settings import WriteSettings
from shards.shardfile import ShardWriter
from shards.zarrcodec import FrameCodec

BUCKET = re.compile(r"(\d+)x(\d+)_(int16|float32|uint8)")
CHILD = "shards.encode"


class Named(Protocol):
    """A shard of a plan, as far as its files go."""

    @property
    def bucket(self) -> str:
        """Name of its bucket."""

    @property
    def number(self) -> int:
        """Within the bucket."""

    @property
    def name(self) -> str:
        """Of the shard."""


def write_shard(root: Path, plan: ShardPlan, settings: WriteSettings) -> Commit:
    """Decode, label, encode and commit one shard; a bad source becomes a row, not an error.

    Raises:
        OSError: The shard cannot be written (disk full, no permission).
    """
    paths = shard_files(plan.bucket, plan.number)
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
                rows.append(_row(plan.bucket, part, item, flags, settings))
                if _by_values(part, item.number, settings):
                    name = part.planned.name
                    values.setdefault(name, ValueCounts()).add_counts(item.values)
        files = {path: writer.commit() for path, writer in zip(paths, writers, strict=True)}
    finally:
        for writer in writers:
            writer.abort()
    commit = Commit(
        name=plan.name,
        digest=plan.digest(settings.text),
        files=files,
        rows=rows,
        refused=[asdict(row) for row in refused],
        values={name: counts.pairs for name, counts in values.items()},
    )
    write_commit(root, commit)
    return commit


def _slices(
    part: Part, settings: WriteSettings, writers: Sequence[ShardWriter], refused: list[ScanRow]
) -> Iterator[tuple[Encoded, tuple[str, ...]]]:
    """Every readable slice of a part with flags of its labels, when its chunks are written.

    A child that dies costs the slice that it was at, and is started again behind it; one that
    dies over the masks costs the part.

    Raises:
        OSError: A file takes no more.
    """
    box = shared_sandbox(settings.decode_seconds, settings.decode_memory_mib, CHILD)
    series = part.planned.series
    request = {
        "record": record_text(part.planned).decode(),
        "stop": part.stop,
        "settings": settings.text,
        "files": [str(writer.partial) for writer in writers],
    }
    number = part.start
    while number < part.stop:
        flags: tuple[str, ...] | None = None
        for writer in writers:
            writer.trim()
        try:
            for (kind, found), _ in box.stream("encode", start=number, **request):
                if kind == "labels":
                    flags = tuple(found)
                    continue
                if kind == "failed":
                    raise OSError(found, os.strerror(found))
                if kind == "refused":
                    refused.append(_refused(series, number, *found[1:]))
                else:
                    yield Encoded(*found), flags or ()
                number += 1
        except SourceError as error:
            stop = part.stop if flags is None else number + 1
            lost = range(number, stop)
            refused += [_refused(series, n, error.code, error.detail) for n in lost]
            number = stop


def _refused(series: Series, number: int, code: str, detail: str) -> ScanRow:
    ref = series.slices[number]
    return refusal(ref.file_id, code, detail, ref.frame)


def _by_values(part: Part, number: int, settings: WriteSettings) -> bool:
    """Whether the window of a slice comes from the values of its whole series."""
    ref = part.planned.series.slices[number]
    own = settings.header_window and ref.window
    return not own and needs_series_values(ref.modality, settings.window, ref.channels)


def _row(
    bucket: str, part: Part, item: Encoded, flags: tuple[str, ...], settings: WriteSettings
) -> dict[str, Any]:
    """A `SliceRow`; its window is None where only the whole series tells it."""
    planned, series = part.planned, part.planned.series
    number, ref = item.number, series.slices[item.number]
    nan = float("nan")
    affine = tuple(v for row in series.affine or () for v in row)
    known = affine and "SINGLE_SLICE" not in series.flags
    step = math.hypot(*affine[2:12:4]) if known else nan
    window: Window | None = ref.window if settings.header_window else None
    if window is None and not _by_values(part, number, settings):
        window = series_window(ref.modality, settings.window, ValueCounts(), ref.channels)
    return {
        "bucket": bucket,
        "slot": part.slot + number - part.start,
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


def create_bucket(root: Path, bucket: str, slots: int, settings: WriteSettings) -> None:
    """Write the zarr.json files of a bucket of ``slots`` slots; shards that lie there stay."""
    store = MemoryStore()  # on disk, zarr empties the folder of an array before it makes one
    zarr.open_group(store, mode="a")
    zarr.open_group(store, path=bucket, mode="a")
    rows, columns, dtype = _parts(bucket)
    shape = (rows, columns, 3) if dtype == "uint8" else (rows, columns)  # uint8 is RGB
    sizes = (slots, settings.shard_slices)
    _create(store, f"{bucket}/image", (dtype, image_codec(settings.profile, dtype)), shape, sizes)
    _create(store, f"{bucket}/label", ("uint8", LABEL), (rows, columns), sizes)
    for key in metadata_files(bucket):
        buffer = sync(store.get(key, default_buffer_prototype()))
        if buffer is None:
            raise OSError(f"zarr wrote no {key}")
        write_bytes_durably(root / key, buffer.to_bytes())


def _create(
    store: MemoryStore,
    path: str,
    kind: tuple[str, Codec],
    frame: tuple[int, ...],
    sizes: tuple[int, int],
) -> None:
    (slots, shard_slices), (dtype, codec) = sizes, kind
    blosc = BloscCodec(
        cname=codec.cname,  # type: ignore[arg-type]
        clevel=codec.level,
        typesize=codec.typesize,
        shuffle=BloscShuffle[codec.shuffle],
    )
    plain = codec.kind == "blosc"
    serializer: ArrayBytesCodec = BytesCodec() if plain else FrameCodec(codec.kind)
    zarr.create_array(
        store,
        name=path,
        shape=(slots, *frame),
        dtype=dtype,
        chunks=(1, *frame),
        shards=(shard_slices, *frame),
        serializer=serializer,
        compressors=[blosc, Crc32cCodec()] if plain else [Crc32cCodec()],
        fill_value=IGNORE if path.endswith("label") else 0,
        zarr_format=3,
        dimension_names=("slice", "row", "column", "channel")[: 1 + len(frame)],
    )


def metadata_files(bucket: str) -> tuple[str, ...]:
    """Paths of the zarr.json files that a reader of one bucket needs."""
    folders = ("", f"{bucket}/", f"{bucket}/image/", f"{bucket}/label/")
    return tuple(f"{folder}zarr.json" for folder in folders)


def shard_files(bucket: str, number: int) -> tuple[str, str]:
    """Paths of a shard's image and label, relative to the root: one number for each axis."""
    axes = 3 if _parts(bucket)[2] == "uint8" else 2
    return f"{bucket}/image/c/{number}" + "/0" * axes, f"{bucket}/label/c/{number}/0/0"


def _parts(bucket: str) -> tuple[int, int, str]:
    found = BUCKET.fullmatch(bucket)
    if found is None:
        raise ValueError(f"bucket {bucket}: expected <rows>x<columns>_<dtype>")
    return int(found[1]), int(found[2]), found[3]


def clear_stale(root: Path, plans: Iterable[Named]) -> None:
    """Delete what earlier runs left: shards of no plan, their commits, half-written files.

    A patient taken out of the archive is gone from the shards after the next run.
    """
    keep: dict[str, set[str]] = {}
    commits: set[str] = set()
    for plan in plans:
        keep.setdefault(plan.bucket, set()).update(shard_files(plan.bucket, plan.number))
        commits.add(commit_name(plan.name))
    for folder in [f for f in root.iterdir() if BUCKET.fullmatch(f.name) and f.is_dir()]:
        if folder.name not in keep:
            shutil.rmtree(folder)
            continue
        for name in ("image", "label"):
            _clear(root, folder / name, "c/*/0/**/*", keep[folder.name])
            _clear(root, folder / name, "**/.*.partial", set())
    _clear(root, root / COMMITS, "*", commits)
    for place in (root, root / COMMITS):
        _clear(root, place, ".*.partial", set())


def _clear(root: Path, folder: Path, pattern: str, keep: set[str]) -> None:
    for path in list(folder.glob(pattern)):
        if path.relative_to(root).as_posix() not in keep and path.is_file():
            path.unlink()
