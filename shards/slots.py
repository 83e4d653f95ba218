"""``plan.parquet``: which series has which slots, so that the next run leaves it there.

It holds pseudonyms. The same plan gives the same bytes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.index import write_bytes_durably
from shards.layout import Ints
from shards.seriesfile import SeriesFile

log = logging.getLogger("medpsp")
PLAN = "plan.parquet"
Numbers = NDArray[Any]
Slots = dict[str, tuple[Numbers, Numbers, Numbers]]
"""Bucket to (names as numbers, first slots, lengths), ordered by name."""


def write_slots(path: Path, planned: SeriesFile, meaning: dict[str, str]) -> None:
    """Write the table, durably.

    Args:
        path: Of the file.
        planned: Laid out.
        meaning: What must be equal for slots to mean the same.

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
    table = pa.table(columns).replace_schema_metadata(meaning)
    pq.write_table(table, sink, compression="zstd")
    write_bytes_durably(path, sink.getvalue().to_pybytes())


def read_slots(path: Path, meaning: dict[str, str]) -> Slots:
    """The last plan; empty where there is none, or one that means something else or is damaged."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        found = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if any(found.get(name) != value for name, value in meaning.items()):
            return {}
        slots: Slots = {}
        for bucket in pc.unique(table["bucket"]).to_pylist():
            here = table.filter(pc.equal(table["bucket"], bucket))
            names = np.array([int(name, 16) for name in here["series"].to_pylist()], np.uint64)
            order = np.argsort(names)
            firsts, lengths = (here[name].to_numpy()[order] for name in ("first", "slices"))
            slots[str(bucket)] = names[order], firsts, lengths
        return slots
    except FileNotFoundError:
        return {}
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s): laid out anew", path.name, type(error).__name__)
        return {}


def stay(
    last: tuple[Numbers, Numbers, Numbers] | None, names: Numbers, lengths: Ints
) -> tuple[Ints, int]:
    """(S,) first slot of the series that stay, -1 for the others; and the end of the last plan."""
    kept = np.full(len(names), -1, dtype=np.int64)
    if last is None:
        return kept, 0
    known, firsts, old_lengths = last
    place = np.minimum(np.searchsorted(known, names), len(known) - 1)
    same = (known[place] == names) & (old_lengths[place] == lengths)
    # two series of one name: no two may have the same slots
    _, once = np.unique(names, return_index=True)
    unique = np.zeros(len(names), dtype=np.bool_)
    unique[once] = True
    kept = np.where(same & unique, firsts[place], kept)
    return kept, int((firsts + old_lengths).max())
