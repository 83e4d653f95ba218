"""What one written shard holds: a small sealed file beside the shards, the proof that it is whole.

It is written after the files of the shard are durable, so where it is, they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from medpsp.errors import ShardError
from shards.index import SliceRow, write_bytes_durably
from shards.layout import SHARD
from shards.sealed import read_sealed, sealed_bytes

COMMITS = "commits"
PASSING = frozenset({"DEC_OOM", "DEC_TIMEOUT", "DEC_CRASH", "FILE_UNREADABLE", "SOURCE_CHANGED"})
"""Codes of failures that may be gone the next time: their shard is written anew."""

Counts = list[tuple[float, int]]
_COLUMNS = [field.name for field in fields(SliceRow)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One shard.

    Attributes:
        name: Of the shard.
        digest: `ShardPlan.digest` of what it was made from.
        layout: What must be equal for slots to mean the same, as in ``plan.parquet``.
        series: Names of the series in it, first slot and number of slices here of each; those that
            were refused count.
        files: Path relative to the root -> SHA-256 and size in bytes.
        columns: `SliceRow` by column; the window is None where it is that of the series.
        refused: `ScanRow` as dictionaries.
        values: Series -> how often each modality value occurs in its slices of this shard, for
            those whose window depends on it.
    """

    name: str
    digest: str
    layout: dict[str, str]
    series: list[tuple[str, int, int]]
    files: dict[str, tuple[str, int]]
    columns: dict[str, list[Any]]
    refused: list[dict[str, Any]]
    values: dict[str, Counts]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The slices, made anew from the columns."""
        values = zip(*self.columns.values(), strict=True)
        return [dict(zip(self.columns, row, strict=True)) for row in values]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """`Commit.columns` of rows."""
    return {name: [row[name] for row in rows] for name in _COLUMNS}


def committed_names(root: Path) -> list[str]:
    """Of shards that have a commit, whole or not, in alphabetical order."""
    return sorted(p.stem for p in (root / COMMITS).glob("*.json") if SHARD.fullmatch(p.stem))


def commit_name(shard: str) -> str:
    """Path of a commit relative to the root."""
    return f"{COMMITS}/{shard}.json"


def write_commit(root: Path, commit: Commit) -> None:
    """Put it in place, durably."""
    tree = {field.name: getattr(commit, field.name) for field in fields(Commit)}
    write_bytes_durably(root / commit_name(commit.name), sealed_bytes(tree))


def read_commit(root: Path, name: str) -> Commit | None:
    """The commit of a shard; None without one, or where a byte of it is not what was written."""
    try:
        tree = read_sealed(root / commit_name(name))
        files = {path: (sha, size) for path, (sha, size) in tree.pop("files").items()}
        found = Commit(files=files, **tree)
        same = list(found.columns) == _COLUMNS and len({*map(len, found.columns.values())}) == 1
        return found if same else None
    except (FileNotFoundError, ShardError, KeyError, TypeError, ValueError, AttributeError):
        return None


def committed(root: Path, name: str, digest: str, *, final: bool = False) -> bool:
    """Whether a shard was written from this plan and its files are there.

    Their bytes are left to `check`: a rerun of a large archive would read all of it.

    Args:
        root: Folder of the shards.
        name: Of the shard.
        digest: Of its plan.
        final: Also with slices that are missing for what may pass: nobody will try again.
    """
    commit = read_commit(root, name)
    if commit is None or commit.digest != digest:
        return False
    if not final and any(may_pass(row["code"], row["detail"]) for row in commit.refused):
        return False
    return files_there(root, commit)


def may_pass(code: str, detail: str) -> bool:
    """Whether what was refused may be readable the next time."""
    return bool({code, detail.split(":", maxsplit=1)[0]} & PASSING)


def files_there(root: Path, commit: Commit) -> bool:
    """Whether the files of a shard have the sizes that they were written with."""
    return all(_size(root / path) == size for path, (_, size) in commit.files.items())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
