"""Planned series in a file; of each, memory holds 80 bytes that decide where it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.types import SPLITS, Place
from shards.layout import PlannedSeries, bucket_of
from shards.record import read_record, record_text
from shards.spool import Span, Spool

HEAD = np.dtype(
    [
        ("bucket", "<u4"),  # number of its name, in alphabetical order once all are known
        ("length", "<u4"),
        ("patient", "<u8"),  # pseudonyms as numbers
        ("name", "<u8"),
        ("z", "<f8"),
        ("file_id", "<u8"),
        ("stamp", "<u8"),
        ("masks", "<u8"),  # hash of the mask objects, 0 without
        ("first", "<i8"),  # slot, once it is laid out
        ("offset", "<u8"),
        ("size", "<u4"),
        ("split", "u1"),
        ("partial", "?"),
    ]
)
Heads = NDArray[Any]
"""(S,) of `HEAD`."""

_AT_ONCE = 16384


class Entry(NamedTuple):
    """A planned series on its way into a file: its record, and values of its head."""

    text: bytes
    bucket: str
    head: tuple[float, ...]
    tail: tuple[int, bool]


def entry_of(item: PlannedSeries) -> Entry:
    """What `SeriesFile.add` needs of a series."""
    series = item.series
    whole = series.mask_kind == "nifti"  # the others know which of them cover several
    return Entry(
        record_text(item),
        bucket_of(series),
        (
            len(series.slices),
            int(item.patient, 16),
            int(item.name, 16),
            series.z_mm[0] if series.z_mm else 0.0,
            int(series.first.file_id, 16),
            int(item.stamp, 16),
            _masks_number(series.masks) if series.masks and whole else 0,
        ),
        (SPLITS.index(item.split), series.mask_partial),
    )


def _masks_number(masks: tuple[Place, ...]) -> int:
    """Not 0; equal ones of unequal masks would only loosen a check."""
    text = repr([tuple(place) for place in masks]).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


class SeriesFile:
    """`PlannedSeries` in the order of the shards.

    Pseudonyms and stamps must be the 16 hex digits that `medpsp.identity.pseudonym` gives.

    Args:
        path: See `Spool`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._spool = Spool(path)
        self._numbers: dict[str, int] = {}
        self._waiting: list[tuple[Any, ...]] = []
        self._done: list[Heads] = []
        self.buckets: tuple[str, ...] = ()
        self.heads: Heads = np.zeros(0, HEAD)

    @classmethod
    def reopen(cls, path: Path, heads: Heads, buckets: tuple[str, ...]) -> SeriesFile:
        """One that another process has finished.

        Raises:
            OSError: No such file.
        """
        found = cls.__new__(cls)
        found._spool = Spool(path, write=False)
        found.heads, found.buckets = heads, buckets
        return found

    def add(self, entry: Entry) -> None:
        """Write a series down."""
        span = self._spool.append(entry.text)
        number = self._numbers.setdefault(entry.bucket, len(self._numbers))
        self._waiting.append((number, *entry.head, -1, *span, *entry.tail))
        if len(self._waiting) >= _AT_ONCE:
            self._flush()

    def finish(self) -> None:
        """Put the series in order, when all are there: bucket, patient, name, position, object.

        Parts of a series that was cut at a gap share a mask: it covers more than each of them.
        """
        self._flush()
        heads = np.concatenate(self._done) if self._done else np.zeros(0, HEAD)
        self._done = []
        names = sorted(self._numbers)
        ranks = np.array([names.index(name) for name in self._numbers], dtype=np.uint32)
        if len(heads):
            heads["bucket"] = ranks[heads["bucket"]]
            _, which, counts = np.unique(heads["masks"], return_inverse=True, return_counts=True)
            heads["partial"] |= (heads["masks"] > 0) & (counts[which] > 1)
        keys = [heads[name] for name in ("file_id", "z", "name", "patient", "bucket")]
        self.heads, self.buckets = heads[np.lexsort(keys)], tuple(names)

    def sync(self) -> None:
        """Make the records durable."""
        self._spool.sync()

    def load(self, number: int) -> PlannedSeries:
        """One series.

        Raises:
            ShardError: Its record is damaged.
        """
        head = self.heads[number]
        item = read_record(self._spool.read(Span(int(head["offset"]), int(head["size"]))))
        partial = bool(head["partial"])
        if item.series.mask_partial == partial:
            return item
        return replace(item, series=replace(item.series, mask_partial=partial))

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[PlannedSeries]:
        return (self.load(number) for number in range(len(self)))

    def _flush(self) -> None:
        self._done.append(np.array(self._waiting, dtype=HEAD))
        self._waiting = []
