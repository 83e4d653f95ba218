"""One shard against its commit, and both against the rows of the index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.commit import Commit, commit_name, read_commit
from shards.index import INDEX, SHARDS
from shards.problem import Problem
from shards.scanfile import Array, Place, Scanned, scan_file
from shards.tables import INDEX_SCHEMA

Row = dict[str, Any]
_WINDOW = frozenset({"window_center", "window_width", "window_function"})
"""Columns that a commit leaves to the whole series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard to be checked.

    Attributes:
        root: Folder of the shards.
        name, bucket, number: Of the shard.
        files: What the shard table says: path to SHA-256 and size; None where it is unknown.
        slices: As above.
        rows: Of the index, `INDEX_SCHEMA`; None where the index cannot be read.
        arrays: Of image and label; None where a zarr.json is damaged.
        quick: Leave the bytes of the shard files alone.
    """

    root: Path
    name: str
    bucket: str
    number: int
    files: dict[str, tuple[str, int]] | None
    slices: int
    rows: pa.Table | None
    arrays: tuple[Array | None, Array | None]
    quick: bool = False


def check_shard(task: ShardTask) -> list[Problem]:
    """All that is wrong with a shard."""
    return list(_problems(task))


def _problems(task: ShardTask) -> Iterator[Problem]:
    commit = read_commit(task.root, task.name)
    index = task.rows.to_pylist() if task.rows is not None else None
    path = commit_name(task.name)
    if commit is not None and commit.name != task.name:
        yield Problem(kind="damaged", path=path, text="is of another shard", shard=task.name)
        commit = None
    elif commit is None and (task.root / path).exists():
        text = "is not what was written"
        yield Problem(kind="damaged", path=path, text=text, shard=task.name)
    elif commit is None:
        yield Problem(kind="missing", path=path, text="missing", shard=task.name)
    rows: list[Row] | None = index
    if commit is not None:
        rows = _typed(commit.rows)
        yield from _against_tables(task, commit)
        if index is not None:
            yield from _against_index(task, rows, index)
    files = commit.files if commit else task.files or {}
    for file, (sha, size) in sorted(files.items()):
        label = "/label/" in file
        array = task.arrays[label]
        place = Place(task.root, file, task.name, task.number * (array.slots if array else 0))
        scanned = scan_file(place, size, sha, array, quick=task.quick)
        yield from scanned.problems
        if scanned.whole and rows is not None:
            yield from _against_rows(place, scanned, rows, "histogram" if label else "crc32c")


def _against_tables(task: ShardTask, commit: Commit) -> Iterator[Problem]:
    if task.files is not None and (task.files, task.slices) != (commit.files, len(commit.rows)):
        text = f"says something else of shard {task.name} than its commit"
        yield Problem(kind="rows", path=SHARDS, text=text, shard=task.name)


def _against_index(task: ShardTask, rows: list[Row], index: list[Row]) -> Iterator[Problem]:
    def problem(slot: int, text: str) -> Problem:
        return Problem(kind="rows", path=INDEX, text=text, shard=task.name, slot=slot)

    committed = {row["slot"]: row for row in rows}
    indexed: dict[int, Row] = {}
    for row in index:
        slot = row["slot"]
        if slot in indexed:
            yield problem(slot, f"two rows of {task.bucket} have this slot")
        indexed[slot] = row
    for slot in sorted(committed.keys() - indexed.keys()):
        yield problem(slot, f"{task.bucket} has a slice here in its commit, but no row")
    for slot in sorted(indexed.keys() - committed.keys()):
        yield problem(slot, f"{task.bucket} has a row here, but no slice in its commit")
    for slot in sorted(indexed.keys() & committed.keys()):
        here, there = indexed[slot], committed[slot]
        left = _WINDOW if there["window_center"] is None else frozenset()
        # repr: NaN is equal to itself
        names = [n for n in here if n not in left and repr(here[n]) != repr(there[n])]
        if names:
            text = f"{task.bucket}: {', '.join(names)} differ from the commit of {task.name}"
            yield problem(slot, text)


def _against_rows(
    place: Place, scanned: Scanned, rows: list[Row], column: str
) -> Iterator[Problem]:
    def problem(slot: int, text: str) -> Problem:
        return Problem(kind="rows", path=place.path, text=text, shard=place.shard, slot=slot)

    wanted = {row["slot"]: row[column] for row in rows}
    stored = scanned.found.keys() | scanned.damaged
    for slot in sorted(wanted.keys() - stored):
        yield problem(slot, "has a row, but no chunk")
    for slot in sorted(stored - wanted.keys()):
        yield problem(slot, "has a chunk, but no row")
    what = "CRC32C of the values differs" if column == "crc32c" else "class counts differ"
    for slot in sorted(wanted.keys() & scanned.found.keys()):
        found = scanned.found[slot]
        if (list(found) if isinstance(found, tuple) else found) != wanted[slot]:
            yield problem(slot, f"{what} from those of its row")


def _typed(rows: list[Row]) -> list[Row]:
    """Rows of a commit with the types of the index: JSON has other ones."""
    columns = [pa.array([row[f.name] for row in rows], f.type) for f in INDEX_SCHEMA]
    return list(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA).to_pylist())
