"""Ways to damage shards, and to make tables that lie but carry the right digest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.check import check_shards
from shards.commit import Commit, read_commit, write_commit
from shards.index import (
    INDEX,
    SliceRow,
    file_sha256,
    read_index,
    read_manifest,
    write_manifest,
)
from shards.tables import INDEX_SCHEMA, TableWriter

Found = list[tuple[str, str, int]]


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file, counted from its first byte; from its end where negative."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def random_flips(root: Path, count: int, seed: int) -> Iterator[tuple[str, int, list[str]]]:
    """One flipped bit at a time: its file, the bit, and where `check` says something is wrong.

    A file is drawn first and then a bit of it, so that small ones have their share.
    """
    rng = random.Random(seed)
    files = files_below(root)
    for _ in range(count):
        path = rng.choice(files)
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        found = [problem.path for problem in check_shards(root)]
        flip(path, bit)
        yield path.relative_to(root).as_posix(), bit, found


def found_in(root: Path, **options: Any) -> Found:
    """Kind, path and slot of every problem."""
    return [(p.kind, p.path, p.slot) for p in check_shards(root, **options)]


def seal_table(root: Path, name: str, **changes: Any) -> None:
    """Put the digest of a table as it is now, and other changes, into the manifest."""
    manifest = read_manifest(root)
    tables = {**manifest.tables, name: file_sha256(root / name)}
    write_manifest(root, replace(manifest, tables=tables, **changes))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write a table at once."""
    with TableWriter(path, schema) as table:
        table.add_rows(rows)


def rewrite_index(root: Path, change: Callable[[list[SliceRow]], Iterable[SliceRow]]) -> None:
    """Put other rows into the index, and its new digest into the manifest."""
    rows = [asdict(row) for row in change(list(read_index(root)))]
    write_rows(root / INDEX, rows, INDEX_SCHEMA)
    seal_table(root, INDEX)


def rewrite_commit(root: Path, name: str, change: Callable[[Commit], None]) -> None:
    """Change a commit and seal it again."""
    commit = read_commit(root, name)
    assert commit is not None
    change(commit)
    write_commit(root, commit)
