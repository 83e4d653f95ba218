"""Files that hold what need not be in memory: appended once, read by offset.

Without a folder they have no name: whatever ends this process, nothing real stays on the disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from medpsp.errors import ShardError
from medpsp.types import ScanRow
from shards.codec import checked, with_crc

ROWS_AT_ONCE = 65536


class Span(NamedTuple):
    """Where a piece lies in a spool."""

    offset: int
    size: int


class Spool:
    """Compressed pieces of bytes, one after another.

    Args:
        path: Mode 0600; None for a file without a name.
        write: Begin anew; else read what is there.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path | None = None, *, write: bool = True) -> None:
        self._file: IO[bytes]
        if path is None:
            self._file = tempfile.TemporaryFile()
        elif write:
            path.unlink(missing_ok=True)  # who still reads the old one keeps it
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            self._file = os.fdopen(os.open(path, flags, 0o600), "w+b")
        else:
            self._file = path.open("rb")
        self._end, self._flushed = 0, 0

    def append(self, data: bytes | pa.Buffer) -> Span:
        """Add a piece."""
        size = len(memoryview(data)).to_bytes(8, "little")
        piece = with_crc(size + pa.compress(data, codec="zstd", asbytes=True))
        self._file.write(piece)
        span = Span(self._end, len(piece))
        self._end += span.size
        return span

    def read(self, span: Span) -> bytes:
        """A piece.

        Raises:
            ShardError: It is not whole.
        """
        if span.offset + span.size > self._flushed:
            self._file.flush()
            self._flushed = self._end
        data = os.pread(self._file.fileno(), span.size, span.offset)
        try:
            whole = checked(data).tobytes()
            size = int.from_bytes(whole[:8], "little")
            found = pa.decompress(whole[8:], size, codec="zstd", asbytes=True)
        except (pa.ArrowException, OSError, MemoryError, OverflowError, ValueError) as error:
            raise ShardError(
                f"plan: a record cannot be read ({type(error).__name__}); plan again"
            ) from None
        return bytes(found)

    def sync(self) -> None:
        """Make it durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End it; a file without a name is gone."""
        self._file.close()


def packed(batch: pa.RecordBatch) -> pa.Buffer:
    """A batch as bytes for a spool."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def unpacked(data: bytes) -> pa.RecordBatch:
    """What `packed` was given."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()


ROW_SCHEMA = pa.schema(
    [
        ("file_id", pa.string()),
        ("status", pa.string()),
        ("code", pa.string()),
        ("detail", pa.string()),
        ("frame", pa.int32()),
    ]
)


class RowSpool:
    """`ScanRow`s in the order in which they came; as many as there are objects, so on disk."""

    def __init__(self, path: Path | None = None, spans: Sequence[Span] | None = None) -> None:
        self._spool = Spool(path, write=spans is None)
        self._spans = list(spans or ())
        self._waiting: list[ScanRow] = []

    @property
    def spans(self) -> list[Span]:
        """Of everything added, for opening it again; call it after the last."""
        self._flush()
        self._spool.sync()
        return self._spans

    def extend(self, rows: Iterable[ScanRow]) -> None:
        """Add rows."""
        self._waiting.extend(rows)
        if len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, by column."""
        self._flush()
        for span in self._spans:
            yield unpacked(self._spool.read(span))

    def __iter__(self) -> Iterator[ScanRow]:
        for batch in self.batches():
            columns: list[list[Any]] = [column.to_pylist() for column in batch.columns]
            for file_id, status, code, detail, frame in zip(*columns, strict=True):
                yield ScanRow(file_id=file_id, status=status, code=code, detail=detail, frame=frame)

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            columns = [[getattr(row, name) for row in rows] for name in ROW_SCHEMA.names]
            batch = pa.RecordBatch.from_arrays(
                [pa.array(c, f.type) for c, f in zip(columns, ROW_SCHEMA, strict=True)],
                schema=ROW_SCHEMA,
            )
            self._spans.append(self._spool.append(packed(batch)))
