"""Are the shards what the manifest says? Every byte is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from medpsp.errors import ShardError
from shards.index import Manifest, SliceRow, file_sha256, read_index, read_manifest
from shards.reader import ShardReader


def check_shards(root: Path, advance: Callable[[], None] = lambda: None) -> list[str]:
    """Verify digests, decode every slice, compare class counts, look for leaks across splits.

    Args:
        root: Folder of the shards.
        advance: Called once a slice, for progress.

    Returns:
        Problems, one line each; empty where all is well.

    Raises:
        ShardError: No manifest or no index.
    """
    manifest, rows = read_manifest(root), read_index(root)
    problems = _damaged_files(root, manifest) + _leaks(rows)
    if len(rows) != manifest.slices:
        problems.append(f"index has {len(rows)} rows, manifest says {manifest.slices}")
    reader = ShardReader(root)
    for row in rows:
        try:
            _, label = reader.read(row.bucket, row.slot)
        except ShardError as error:
            problems.append(str(error))
            continue
        finally:
            advance()
        counts = np.bincount(label.ravel(), minlength=256)
        classes = len(manifest.classes)
        if (*counts[:classes], counts[255]) != row.histogram:
            problems.append(f"{row.bucket} slot {row.slot}: class counts differ from the index")
    return problems


def _damaged_files(root: Path, manifest: Manifest) -> list[str]:
    problems = []
    for files in (*(shard["files"] for shard in manifest.shards), manifest.tables):
        for name, sha in files.items():
            path = root / name
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif file_sha256(path) != sha:
                problems.append(f"{name}: SHA-256 differs from the manifest")
    return problems


def _leaks(rows: tuple[SliceRow, ...]) -> list[str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.patient].add(row.split)
    return [
        f"patient {patient} is in {sorted(found)}"
        for patient, found in splits.items()
        if len(found) > 1
    ]
