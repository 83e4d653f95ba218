"""Bring the partitions of a catalogue up to date with a walk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medpsp.dicom.container import Found, objects_of
from medpsp.dicom.sandbox import Answer, Sandbox, SandboxPool
from medpsp.dicom.scan import read_object
from medpsp.dicom.walk import Entry
from medpsp.errors import ShardError, SourceError
from medpsp.types import Place, ReadPolicy
from medpsp.words import many
from shards.headers import FILE, STAMP, TEXTS, Packed, RowBuffer
from shards.merge import Piece, merged
from shards.partition import (
    Files,
    Part,
    count_rows,
    file_starts,
    packed_batch,
    read_part,
    write_part,
)
from shards.partstore import PartStore

log = logging.getLogger("medpsp")
Advance = Callable[[int, str], None]
"""Called with a number of objects and a remark."""
_AHEAD = 4  # requests for each child: what they bring waits in memory


class BatchReader:
    """Reads the files of a piece in a child.

    Args:
        root: Of the archive, ends in a slash.
        policy: What to keep.
    """

    def __init__(self, root: str, policy: ReadPolicy) -> None:
        self._root, self._policy = root, policy

    def __call__(self, box: Sandbox, piece: Piece) -> list[pa.RecordBatch]:
        """Rows of its entries, in their order.

        Where the child ends, the files that it has not answered for are read one by one, so that
        it costs only the object that it was at.
        """
        entries = piece.entries
        if not entries:
            return []
        answers: list[Answer] = []
        files = [(entry.name, entry.code, entry.detail) for entry in entries]
        request = {"root": self._root, "files": files, "policy": asdict(self._policy)}
        try:
            answers.extend(box.stream("scan", **request))
        except SourceError as error:
            log.info("scan: %s; its files are read one by one", error.code)
        done, batches = 0, []
        try:
            done = _number(answers[-1][0], len(entries)) if answers else 0
            rows = [_before(done, arrays) for _, arrays in answers]
            if len({n for packed in rows for n in packed.file.tolist()}) != done:
                raise ShardError("a child leaves files out")
            batches = [packed_batch(entries, packed) for packed in rows]
        except ShardError:  # a child that decoders have got the better of
            done, batches = 0, []
        return batches + [self._one_by_one(box, entries, n) for n in range(done, len(entries))]

    def _one_by_one(self, box: Sandbox, entries: Sequence[Entry], number: int) -> pa.RecordBatch:
        entry, rows = entries[number], RowBuffer()
        listed = Found(entry.name, Place(entry.path), entry.code, entry.detail)
        for found in [listed] if entry.code else objects_of(entry.name, entry.path):
            rows.add(number, found.place.member, read_object(box, found, "", self._policy))
        return packed_batch(entries, rows.take())


def _number(found: object, most: int) -> int:
    if not isinstance(found, int) or not 0 <= found <= most:
        raise ShardError("a child counts files that it was not given")
    return found


def _before(done: int, arrays: Sequence[NDArray[Any]]) -> Packed:
    """What a child packed, without the rows of a file that it did not finish."""
    if len(arrays) != len(Packed._fields):
        raise ShardError("rows of a child are not as many arrays as they should be")
    packed = Packed(*arrays)
    if not packed.file.size or packed.file.flat[-1] < done:
        return packed
    if packed.lengths.shape != (len(TEXTS), len(packed.file)):
        raise ShardError("rows of a child do not add up")
    stop = int(np.searchsorted(packed.file, done))
    ends = np.cumsum(packed.lengths, dtype=np.int64).reshape(packed.lengths.shape)
    kept = packed.lengths[:, :stop]
    begins = ends[:, 0] - packed.lengths[:, 0]
    texts = [
        packed.text[begin : begin + size]
        for begin, size in zip(begins, kept.sum(axis=1), strict=True)
    ]
    return Packed(packed.file[:stop], packed.frame[:stop], kept, np.concatenate(texts))


class Rescan:
    """Partitions as they become: those that are done, and those that still wait.

    Args:
        store: Of the partitions.
        full: Rows of a partition.
        advance: For progress.
    """

    def __init__(self, store: PartStore, full: int, advance: Advance) -> None:
        self._store, self._full, self._advance = store, full, advance
        self._old = store.parts()
        self._waiting = deque(self._old)
        self._done: list[Part] = []
        self._made: list[Part] = []
        self._rows: list[pa.Table] = []
        self._count = 0
        self._table: tuple[Part, pa.Table] | None = None
        self._known = self._images = 0

    def run(self, entries: Iterator[Entry], read: BatchReader, pool: SandboxPool) -> list[Part]:
        """Read what is new or changed; the partitions of all.

        Args:
            entries: Of the walk.
            read: For the children.
            pool: Of the children.

        Raises:
            ShardError: The catalogue cannot be written, or is damaged while it is read.
        """
        pieces = merged(entries, self._old, self._files_of, self._full)
        for piece, batches in pool.map(read, pieces, _AHEAD):
            if piece.unchanged:
                self._stays(piece)
            else:
                self._take(piece, batches)
        return self._done

    def _files_of(self, part: Part) -> Files:
        columns = (*STAMP, FILE, "kind", "common", "value")
        try:
            return Files(read_part(self._store.get(part), columns))
        except ShardError:
            log.warning(
                "catalogue: a partition of %d objects is damaged; they are read again",
                part.objects,
            )
            return Files()

    def _stays(self, piece: Piece) -> None:
        part = self._waiting.popleft()
        self._done.append(part)
        self._known += part.objects
        self._images += part.objects - part.refused
        self._tell(part.objects)

    def _take(self, piece: Piece, batches: Sequence[pa.RecordBatch]) -> None:
        part = piece.part
        if part and piece.keep:
            start, stop = piece.keep
            kept = self._rows_of(part).slice(start, stop - start)
            self._known += self._add(kept)
        for batch in batches:
            self._add(pa.Table.from_batches([batch]))
        tail = part is None or (part is self._old[-1] and part.rows < self._full)
        self._cut(self._full if tail else 2 * self._full, rest=piece.last)
        if piece.last or (piece.past and self._made):
            self._commit(part)

    def _add(self, table: pa.Table) -> int:
        """Add rows; the number of their objects."""
        counts = count_rows(table)
        self._rows.append(table)
        self._count += len(table)
        self._images += counts.objects - counts.refused
        self._tell(counts.objects)
        return counts.objects

    def _cut(self, limit: int, *, rest: bool) -> None:
        """Finish partitions while there are so many rows, and one of the rest if asked to."""
        if not self._count or (self._count < limit and not rest):
            return
        table, begin = pa.concat_tables(self._rows), 0
        ends = np.append(file_starts(table)[1:], len(table))
        while len(table) - begin >= limit:
            place = int(np.searchsorted(ends, begin + self._full))
            stop = int(ends[min(place, len(ends) - 1)])
            self._make(table.slice(begin, stop - begin))
            begin = stop
        if rest and begin < len(table):
            self._make(table.slice(begin))
            begin = len(table)
        self._rows, self._count = [table.slice(begin)], len(table) - begin

    def _make(self, table: pa.Table) -> None:
        part, data = write_part(table)
        self._store.put(part, data)
        self._made.append(part)

    def _commit(self, part: Part | None) -> None:
        """Let what was made count in place of a partition."""
        replaced = part is not None and bool(self._waiting) and self._waiting[0] is part
        if replaced:
            self._waiting.popleft()
        made, self._made = self._made, []
        self._done += made
        if made != ([part] if replaced else []):
            self._store.commit([*self._done, *self._waiting])

    def _rows_of(self, part: Part) -> pa.Table:
        if self._table is None or self._table[0] is not part:
            self._table = part, read_part(self._store.get(part))
        return self._table[1]

    def _tell(self, objects: int) -> None:
        known = f", {self._known} known" if self._known else ""
        self._advance(objects, f"{many(self._images, 'image')}{known}")
