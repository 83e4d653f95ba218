"""Shard table and index, a shard at a time, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.index import INDEX, SHARDS
from shards.layout import SHARD
from shards.problem import Problem
from shards.tables import INDEX_SCHEMA, ROWS, SHARDS_SCHEMA

Key = tuple[str, int]
"""Bucket and number of a shard; shards and index follow their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A shard of the shard table.

    Attributes:
        files: Path to SHA-256 and size; None without the table.
    """

    key: Key
    files: dict[str, tuple[str, int]] | None
    slices: int

    @property
    def bucket(self) -> str:
        """Name of its bucket."""
        return self.key[0]

    @property
    def number(self) -> int:
        """Within the bucket."""
        return self.key[1]

    @property
    def name(self) -> str:
        """Of the shard."""
        return f"{self.key[0]}-{self.key[1]}"


def shard_key(name: str) -> Key | None:
    """Of a name; None where it is none."""
    found = SHARD.fullmatch(name)
    return (found["bucket"], int(found["number"])) if found else None


def shard_records(root: Path, problems: list[Problem]) -> Iterator[ShardRecord]:
    """The shard table, in its order; what is wrong with it is added to ``problems``."""
    last: Key | None = None
    for name, rows in groupby(_rows(root, problems), key=itemgetter("name")):
        found = list(rows)
        key = shard_key(name)
        if key is None or (last is not None and key <= last):
            text = f"shard {name} is out of order, or there twice"
            problems.append(Problem(kind="rows", path=SHARDS, text=text))
            continue
        last = key
        files = {row["path"]: (row["sha256"], row["bytes"]) for row in found}
        yield ShardRecord(key=key, files=files, slices=found[0]["slices"])


def _rows(root: Path, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    for batch in _batches(root, SHARDS, SHARDS_SCHEMA, problems):
        yield from batch.to_pylist()


def _batches(
    root: Path, name: str, schema: pa.Schema, problems: list[Problem]
) -> Iterator[pa.RecordBatch]:
    try:
        table = pq.ParquetFile(root / name)
        if not table.schema_arrow.equals(schema):
            problems.append(Problem(kind="rows", path=name, text="has other columns than expected"))
            return
        yield from table.iter_batches(batch_size=ROWS)
    except (OSError, pa.ArrowException) as error:
        text = f"cannot be read ({type(error).__name__})"
        problems.append(Problem(kind="damaged", path=name, text=text))


class IndexRuns:
    """Rows of the index, a shard at a time.

    Args:
        root: Folder of the shards.
        slots: Slots of a shard of a bucket; 0 where unknown, its rows are passed over.
        problems: What is wrong with the order is added here.
    """

    def __init__(self, root: Path, slots: Callable[[str], int], problems: list[Problem]) -> None:
        self._slots, self._problems = slots, problems
        self._known = len(problems)
        self._runs = self._ordered(_batches(root, INDEX, INDEX_SCHEMA, problems))
        self._next = next(self._runs, None)

    def take(self, key: Key) -> pa.Table | None:
        """The rows of a shard; keys must rise. None where the index cannot be read."""
        while self._next is not None and self._next[0] < key:
            self._lost(*self._next)
            self._next = next(self._runs, None)
        if any(p.path == INDEX for p in self._problems[self._known :] if p.slot < 0):
            return None
        if self._next is None or self._next[0] != key:
            return INDEX_SCHEMA.empty_table()
        rows, self._next = self._next[1], next(self._runs, None)
        return rows

    def finish(self) -> None:
        """Rows behind those of the last shard belong to none."""
        while self._next is not None:
            self._lost(*self._next)
            self._next = next(self._runs, None)

    def _lost(self, key: Key, rows: pa.Table) -> None:
        text = f"{rows.num_rows} rows of {key[0]} from here on belong to no shard"
        slot = int(rows["slot"][0].as_py())
        self._problems.append(Problem(kind="rows", path=INDEX, text=text, slot=slot))

    def _ordered(self, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[Key, pa.Table]]:
        last: Key | None = None
        for key, pieces in groupby(self._pieces(batches), key=itemgetter(0)):
            rows = pa.Table.from_batches([piece for _, piece in pieces])
            if last is not None and key < last:
                text = f"{rows.num_rows} rows of {key[0]} from here on are out of order"
                slot = int(rows["slot"][0].as_py())
                self._problems.append(Problem(kind="rows", path=INDEX, text=text, slot=slot))
                continue
            last = key
            yield key, rows

    def _pieces(self, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[Key, pa.RecordBatch]]:
        for batch in batches:
            coded = batch["bucket"].dictionary_encode()
            names = coded.dictionary.to_pylist()
            codes = coded.indices.to_numpy()
            slots = np.array([self._slots(name) for name in names], np.int64)[codes]
            numbers = batch["slot"].to_numpy() // np.maximum(slots, 1)
            new = (np.diff(codes, prepend=-1) != 0) | (np.diff(numbers, prepend=-1) != 0)
            begins = np.flatnonzero(new)
            for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(codes)], strict=True):
                if slots[begin]:
                    key = names[codes[begin]], int(numbers[begin])
                    yield key, batch.slice(begin, end - begin)
