"""Parquet tables of a set of shards, written a row group at a time: no table is ever in memory.

The same rows give the same bytes, however they come in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from medpsp.durable import sync
from shards.index import file_sha256

ROWS = 65536
"""Of a row group."""

_TEXTS = pa.list_(pa.string())
_REALS, _WHOLES = pa.list_(pa.float64()), pa.list_(pa.int64())

INDEX_SCHEMA = pa.schema(
    {
        "bucket": pa.string(),
        "slot": pa.int64(),
        "patient": pa.string(),
        "series": pa.string(),
        "slice_index": pa.int64(),
        "modality": pa.string(),
        "photometric": pa.string(),
        "z_mm": pa.float64(),
        "spacing": _REALS,
        "affine": _REALS,
        "window_center": pa.float64(),
        "window_width": pa.float64(),
        "voi_center": pa.float64(),
        "voi_width": pa.float64(),
        "split": pa.string(),
        "order": pa.float64(),
        "labelled": pa.bool_(),
        "histogram": _WHOLES,
        "file_id": pa.string(),
        "frame": pa.int64(),
        "window_function": pa.string(),
        "voi_function": pa.string(),
        "spacing_source": pa.string(),
        "flags": _TEXTS,
        "padding": pa.float64(),
        "study_day": pa.int64(),
        "manufacturer": pa.string(),
        "body_part": pa.string(),
        "crc32c": pa.int64(),
        "dhash": pa.string(),
    }
)
"""Of ``index.parquet``: the fields of `shards.index.SliceRow`."""

OBJECTS_SCHEMA = pa.schema(
    {
        "file_id": pa.string(),
        "status": pa.string(),
        "code": pa.string(),
        "detail": pa.string(),
        "frames": pa.int64(),
        "kept": pa.int64(),
    }
)
"""Of ``objects.parquet``: the fields of `shards.index.ObjectRow`."""

SHARDS_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "slices": pa.int64(),
        "path": pa.string(),
        "sha256": pa.string(),
        "bytes": pa.int64(),
    }
)
"""Of ``shards.parquet``, one row a file: name of its shard, slices in it, path relative to the
root, and what it must be. Nothing of when it was made: the same slices give the same table."""


class TableWriter:
    """Writes a table to a temporary file; leaving the block without an error puts it in place.

    Args:
        path: Of the table.
        schema: Its columns.

    Attributes:
        sha256: Of the file, once it is in place.
        rows: Number of rows so far.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.sha256, self.rows = path, schema, "", 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._waiting: dict[str, list[Any]] = {name: [] for name in schema.names}

    def __enter__(self) -> Self:
        self._writer = pq.ParquetWriter(self._partial, self.schema, compression="zstd")
        return self

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add rows, by column."""
        for name, values in columns.items():
            self._waiting[name].extend(values)
        self.rows += len(next(iter(columns.values())))
        while len(self._waiting[self.schema.names[0]]) >= ROWS:
            self._flush()

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, one by one."""
        found = list(rows)
        self.add({name: [row[name] for row in found] for name in self.schema.names})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._waiting[self.schema.names[0]]:
                self._flush()
            self._writer.close()
            if error is None:
                self._place()
        finally:
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        arrays = [pa.array(self._waiting[f.name][:ROWS], f.type) for f in self.schema]
        for values in self._waiting.values():
            del values[:ROWS]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))

    def _place(self) -> None:
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        self.sha256 = file_sha256(self._partial)
        self._partial.replace(self.path)
        sync(self.path.parent)
