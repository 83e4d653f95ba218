"""``plan.parquet``: which series has which slots, so that the next run leaves it there.

It holds pseudonyms. The same plan gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.commit import committed_names, read_commit
from shards.index import write_bytes_durably
from shards.layout import Ints
from shards.seriesfile import SeriesFile

log = logging.getLogger("medpsp")
PLAN = "plan.parquet"
_DIGEST, _UNREAD = "sha256", "unread"
Numbers = NDArray[Any]
Slots = dict[str, tuple[Numbers, Numbers, Numbers]]
"""Bucket to (names as numbers, first slots, lengths), ordered by name."""


def write_slots(
    path: Path, planned: SeriesFile, meaning: dict[str, str], unread: Iterable[str] = ()
) -> None:
    """Write the table, durably.

    Args:
        path: Of the file.
        planned: Laid out.
        meaning: What must be equal for slots to mean the same.
        unread: ``file_id`` of what could not be read.

    Raises:
        OSError: It cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    heads = planned.heads[np.lexsort([planned.heads[name] for name in ("first", "bucket")])]
    buckets = pa.DictionaryArray.from_arrays(
        pa.array(heads["bucket"].astype(np.int32)), pa.array(list(planned.buckets), pa.string())
    )
    columns = {
        "bucket": buckets.cast(pa.string()),
        "series": pa.array([f"{name:016x}" for name in heads["name"].tolist()], pa.string()),
        "first": pa.array(heads["first"]),
        "slices": pa.array(heads["length"].astype(np.int64)),
    }
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    said = {**meaning, _UNREAD: json.dumps(sorted(unread))}
    table = table.replace_schema_metadata({**said, _DIGEST: _digest(table, said)})
    pq.write_table(table, sink, compression="zstd")
    write_bytes_durably(path, sink.getvalue().to_pybytes())


def _digest(table: Any, meaning: dict[str, str]) -> str:
    """SHA-256 of all that is said: Parquet itself takes many a flipped bit for another word."""
    values = {name: table[name].to_pylist() for name in table.column_names}
    text = json.dumps([values, meaning], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_slots(path: Path, meaning: dict[str, str]) -> Slots | None:
    """The last plan; empty where it means something else, None where none is there or whole.

    Args:
        path: Of the file.
        meaning: As `write_slots` was given it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        found = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if found.pop(_DIGEST, "") != _digest(table, found):
            raise ValueError("not what was written")
        if {key: value for key, value in found.items() if key != _UNREAD} != meaning:
            return {}
        slots: Slots = {}
        for bucket in pc.unique(table["bucket"]).to_pylist():
            here = table.filter(pc.equal(table["bucket"], bucket))
            names = np.array([int(name, 16) for name in here["series"].to_pylist()], np.uint64)
            order = np.argsort(names)
            firsts, lengths = (here[name].to_numpy()[order] for name in ("first", "slices"))
            slots[str(bucket)] = names[order], firsts, lengths
        return slots
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s)", path.name, type(error).__name__)
        return None


def read_unread(path: Path) -> set[str] | None:
    """What could not be read for the last plan; None where it does not say."""
    try:
        return set(json.loads(_metadata(path)[_UNREAD.encode()]))
    except (KeyError, ValueError, TypeError):
        return None


def is_plan(path: Path) -> bool:
    """Whether a file is a plan, whatever it means."""
    return _DIGEST.encode() in _metadata(path)


def _metadata(path: Path) -> dict[bytes, bytes]:
    """What a table says of itself; nothing where there is none that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return (pq.read_schema(path).metadata or {}) if path.is_file() else {}
    except (OSError, pa.ArrowException):
        return {}


def slots_of_commits(root: Path, meaning: dict[str, str]) -> Slots:
    """The last plan as far as the commits tell it: all of it, where none is lost.

    Args:
        root: Folder of the shards.
        meaning: As of `write_slots`; commits of another layout say nothing.
    """
    ranges: dict[str, dict[int, list[int]]] = {}
    for name in committed_names(root):
        commit = read_commit(root, name)
        if commit is None or commit.layout != meaning:
            continue
        here = ranges.setdefault(commit.name.rpartition("-")[0], {})
        for series, first, count in commit.series:
            known = here.setdefault(int(series, 16), [first, first + count])
            known[:] = min(known[0], first), max(known[1], first + count)
    found: Slots = {}
    for bucket, series_of in ranges.items():
        names = np.array(sorted(series_of), np.uint64)
        ends = np.array([series_of[int(name)] for name in names], np.int64)
        found[bucket] = names, ends[:, 0], ends[:, 1] - ends[:, 0]
    count = sum(len(names) for names, _, _ in found.values())
    if count:
        log.warning("places of %d series are taken from the commits", count)
    return found


def _overlap(firsts: Numbers, lengths: Numbers) -> bool:
    """Whether two ranges share a slot."""
    order = np.argsort(firsts)
    return bool((firsts[order][1:] < (firsts + lengths)[order][:-1]).any())


def stay(
    last: tuple[Numbers, Numbers, Numbers] | None, names: Numbers, lengths: Ints
) -> tuple[Ints, int]:
    """(S,) first slot of the series that stay, -1 for the others; and the end of the last plan."""
    kept = np.full(len(names), -1, dtype=np.int64)
    if last is None:
        return kept, 0
    known, firsts, old_lengths = last
    if _overlap(firsts, old_lengths):  # commits of layouts that were never finished
        log.warning("the last plan has slots of two series; all is laid out anew")
        return kept, 0
    place = np.minimum(np.searchsorted(known, names), len(known) - 1)
    same = (known[place] == names) & (old_lengths[place] == lengths)
    # two series of one name: no two may have the same slots
    _, once = np.unique(names, return_index=True)
    unique = np.zeros(len(names), dtype=np.bool_)
    unique[once] = True
    kept = np.where(same & unique, firsts[place], kept)
    return kept, int((firsts + old_lengths).max())
