"""Files below the folder of the shards that nothing owns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from shards.bucket import files_below, is_partial
from shards.commit import COMMITS
from shards.layout import BUCKET
from shards.problem import Problem

_BUCKET = rf"(?P<bucket>{BUCKET.pattern})"
_SHARD = re.compile(rf"{_BUCKET}/(?:image|label)/c/(?P<number>\d+)/0/0(?:/0)?")
_ARRAY = re.compile(rf"{_BUCKET}/(?:(?:image|label)/)?zarr\.json")
_COMMIT = re.compile(rf"{COMMITS}/(?P<name>[^/]+)\.json")


def shard_of_path(path: str) -> str:
    """Name of the shard that a file or commit belongs to by its path; empty for another."""
    if found := _SHARD.fullmatch(path):
        return f"{found['bucket']}-{found['number']}"
    found = _COMMIT.fullmatch(path)
    return found["name"] if found else ""


def surplus_files(root: Path, shards: set[str], known: set[str]) -> Iterator[Problem]:
    """Files that are neither of a shard nor known, and links to folders.

    Args:
        root: Folder of the shards.
        shards: Names of all there should be.
        known: Paths of tables and such.
    """
    buckets = {name.rpartition("-")[0] for name in shards}
    for place in files_below(root):
        path = place.relative_to(root).as_posix()
        array = _ARRAY.fullmatch(path)
        if path in known or path == "zarr.json" or (array and array["bucket"] in buckets):
            continue
        if place.is_symlink() and place.is_dir():
            yield Problem(kind="surplus", path=path, text="a link to a folder; delete it")
        elif is_partial(path):
            yield Problem(kind="partial", path=path, text="a half-written file")
        elif shard_of_path(path) not in shards:
            yield Problem(
                kind="surplus",
                path=path,
                text="belongs to no shard; delete it if it is nothing of yours",
            )
