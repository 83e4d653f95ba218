"""A partition of the catalogue: rows of a contiguous range of the walk, as Parquet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medpsp.dicom.walk import NO_STAMP, Entry, Stamp, order_key
from medpsp.errors import ShardError
from shards.commit import PASSING
from shards.headers import FILE, FRAME, LABEL, REFUSED, STAMP, TEXTS, Packed

_TYPES = {name: pa.binary() if name == "member" else pa.string() for name in TEXTS}
SCHEMA = pa.schema(
    [
        (FILE, pa.binary()),
        *((name, pa.int64()) for name in STAMP),
        *_TYPES.items(),
        ("frame", pa.int32()),
    ]
)
KINDS = {kind: pa.scalar(kind) for kind in (FRAME, REFUSED, LABEL)}
"""Arrow looks for pandas whenever it meets a Python value: 80 us."""
_FIRST = pa.scalar(0, pa.int32())
_ALL_DIFFER = ("sop_uid", "value")
_ROW_GROUP = 16384


class Part(NamedTuple):
    """What the catalogue knows of a partition without opening it.

    Attributes:
        name: SHA-256 of its bytes, hex.
        last: Name of its last file.
        rows: All.
        objects: Objects, each of one row or several.
        frames, refused, labels: Rows of these kinds.
    """

    name: str
    last: str
    rows: int
    objects: int
    frames: int
    refused: int
    labels: int


class Files:
    """The files of a partition, to compare a walk with.

    Attributes:
        keys: `order_key` of each.
        starts: First row of each, and the end of the last.
    """

    def __init__(self, table: pa.Table | None = None) -> None:
        self.keys: list[str] = []
        self.starts: list[int] = [0]
        self._stamps: list[tuple[int, ...]] = []
        self._listed: dict[int, tuple[str, str]] = {}
        self._passing: set[int] = set()
        if table is not None and len(table):
            self._fill(table)

    def same(self, number: int, entry: Entry) -> bool:
        """Whether a file is what it was, so that it need not be opened."""
        if self._stamps[number] != entry.stamp or number in self._passing:
            return False
        return not entry.code or self._listed.get(number) == (entry.code, entry.detail)

    def _fill(self, table: pa.Table) -> None:
        starts = file_starts(table)
        self.starts = [*starts.tolist(), len(table)]
        firsts = table.take(pa.array(starts))
        self.keys = [order_key(os.fsdecode(name)) for name in firsts[FILE].to_pylist()]
        self._stamps = list(zip(*(firsts[name].to_pylist() for name in STAMP), strict=True))
        listed = np.flatnonzero(firsts["size"].to_numpy() == NO_STAMP.size)
        texts = [firsts[name].take(pa.array(listed)).to_pylist() for name in ("common", "value")]
        self._listed = dict(zip(listed.tolist(), zip(*texts, strict=True), strict=True))
        codes = pc.is_in(table["common"], pa.array(sorted(PASSING)))
        again = pc.and_(codes, pc.equal(table["kind"], KINDS[REFUSED])).to_numpy()
        files = np.searchsorted(starts, np.flatnonzero(again), "right") - 1
        self._passing = set(files.tolist())


def packed_batch(entries: Sequence[Entry], packed: Packed) -> pa.RecordBatch:
    """Rows of a child, with the names and stamps of their files.

    Raises:
        ShardError: They are not what a child packs.
    """
    file, frame, lengths, text = packed
    rows = len(file)
    _require(
        tuple(array.dtype.str for array in packed) == ("<i4", "<i4", "<i4", "|u1")
        and (file.shape, frame.shape) == ((rows,), (rows,))
        and lengths.shape == (len(TEXTS), rows)
        and text.ndim == 1
    )
    _require(
        bool((lengths >= 0).all() and lengths.sum(dtype=np.int64) == len(text) < 2**31)
        and bool((np.diff(file, prepend=0) >= 0).all() and (file < len(entries)).all())
    )
    names = pa.array([os.fsencode(entry.name) for entry in entries], pa.binary())
    stamps = np.array([entry.stamp for entry in entries], np.int64).reshape(-1, len(Stamp._fields))
    columns = [names.take(pa.array(file)), *(pa.array(column) for column in stamps[file].T)]
    start = 0
    for kind, sizes in zip(_TYPES.values(), lengths, strict=True):
        offsets = np.zeros(rows + 1, np.int32)
        np.cumsum(sizes, out=offsets[1:])
        stop = start + int(offsets[-1])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text[start:stop])]
        columns.append(pa.Array.from_buffers(kind, rows, buffers))
        start = stop
    columns.append(pa.array(frame))
    try:
        batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ShardError(f"rows of a child cannot be read ({type(error).__name__})") from None
    return batch


def _require(good: bool) -> None:
    if not good:
        raise ShardError("rows of a child do not add up")


def file_starts(table: pa.Table) -> NDArray[np.int64]:
    """First row of each file."""
    names = table[FILE]
    new = pc.not_equal(names[1:], names[:-1]).to_numpy() if len(names) > 1 else np.zeros(0, bool)
    return np.flatnonzero(np.concatenate([[len(names) > 0], new]))


class Counts(NamedTuple):
    """Objects in some rows, and rows of each kind."""

    objects: int
    frames: int
    refused: int
    labels: int


def count_rows(table: pa.Table) -> Counts:
    """Count what is in rows; they are of whole objects."""
    kinds = [pc.equal(table["kind"], kind) for kind in KINDS.values()]
    frames, refused, labels = (_sum(found) for found in kinds)
    images = _sum(pc.and_(kinds[0], pc.equal(table["frame"], _FIRST)))
    return Counts(images + refused, frames, refused, labels)


def write_part(table: pa.Table) -> tuple[Part, pa.Buffer]:
    """A partition of these rows; equal rows give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=_ROW_GROUP,
        compression="zstd",
        use_dictionary=[name for name in SCHEMA.names if name not in _ALL_DIFFER],
        write_statistics=False,
    )
    data = sink.getvalue()
    part = Part(
        name=sha256(data),
        last=os.fsdecode(table[FILE][-1].as_py()),
        rows=len(table),
        **count_rows(table)._asdict(),
    )
    return part, data


def read_part(data: pa.Buffer | bytes, columns: Iterable[str] | None = None) -> pa.Table:
    """Rows of a partition.

    Raises:
        ShardError: No such rows in it.
    """
    try:
        return pq.read_table(pa.BufferReader(data), columns=columns and list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"catalogue: cannot be read ({type(error).__name__})") from None


def sha256(data: pa.Buffer | bytes) -> str:
    """The name of a partition."""
    return hashlib.sha256(data).hexdigest()


def _sum(found: pa.ChunkedArray) -> int:
    return int(pc.sum(found).as_py() or 0)


def lists(batch: pa.RecordBatch) -> dict[str, list[Any]]:
    """The columns of a batch as `headers.RowReader` takes them."""
    return {name: batch[name].to_pylist() for name in batch.schema.names}
