"""The plan of a conversion: which slices go to which slot; its series lie in a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.dataconfig import DataConfig
from medpsp.identity import fingerprint
from medpsp.types import PixelDtype
from shards.layout import (
    FORMAT,
    Ints,
    Part,
    ShardPlan,
    bucket_parts,
    cut_parts,
    lay_out,
    shard_digest,
    shard_of,
)
from shards.seriesfile import SeriesFile
from shards.slots import PLAN, Slots, read_slots, slots_of_commits, stay
from shards.spool import RowSpool

log = logging.getLogger("medpsp")


class EntryPart(NamedTuple):
    """`layout.Part` by the number of its series in the plan."""

    record: int
    start: int
    stop: int
    slot: int
    stamp: str
    partial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A shard of a plan without its series; `Plan.load` adds them.

    Attributes as of `ShardPlan`, and ``goes_on``: its last series continues in the next shard.
    """

    bucket: str
    number: int
    first: int
    count: int
    rows: int
    columns: int
    dtype: PixelDtype
    parts: tuple[EntryPart, ...]
    goes_on: bool

    @property
    def name(self) -> str:
        """As ``ShardPlan.name``."""
        return f"{self.bucket}-{self.number}"

    def digest(self, settings: str) -> str:
        """As `ShardPlan.digest`."""
        return shard_digest(settings, ((p.stamp, p.partial, *p[1:4]) for p in self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What an archive gives.

    Attributes:
        planned: Series with pseudonyms and splits.
        rows: Objects and frames that are in none of them.
        objects: Number of objects found.
    """

    planned: SeriesFile
    rows: RowSpool
    objects: int


class Plan:
    """Series laid out in shards.

    Args:
        gathered: Its heads know their first slots.
        shard_slices: Slots of a shard.

    Attributes:
        gathered: What is laid out.
        shards: Of every bucket in turn.
        slots: Bucket to slots of all its shards, whole ones.
    """

    def __init__(self, gathered: Gathered, shard_slices: int) -> None:
        self.gathered, self.shard_slices = gathered, shard_slices
        self.shards = Entries(gathered.planned, shard_slices)
        self.slots = {
            bucket: (1 + last) * shard_slices for bucket, last in self.shards.last.items()
        }

    def load(self, entry: ShardEntry) -> ShardPlan:
        """A shard with its series.

        Raises:
            ShardError: The plan is damaged.
        """
        parts = [
            Part(
                planned=self.gathered.planned.load(part.record),
                start=part.start,
                stop=part.stop,
                slot=part.slot,
            )
            for part in entry.parts
        ]
        return shard_of(entry.bucket, entry.number, parts, self.shard_slices)


class Entries(Sequence[ShardEntry]):
    """The shards of a plan, made when asked for: there may be a million."""

    def __init__(self, planned: SeriesFile, shard_slices: int) -> None:
        self._planned, self._shard_slices = planned, shard_slices
        heads = planned.heads
        self.last: dict[str, int] = {}
        cuts: list[tuple[Ints, ...]] = []
        for number, bucket in enumerate(planned.buckets):
            members = np.flatnonzero(heads["bucket"] == number)
            firsts, lengths = (
                heads[name][members].astype(np.int64) for name in ("first", "length")
            )
            series, *rest = cut_parts(firsts, lengths, shard_slices)
            cuts.append((np.full(len(series), number), members[series], *rest))
            self.last[bucket] = int(rest[-1][-1]) // shard_slices
        columns = [np.concatenate(c) for c in zip(*cuts, strict=True)] or [
            np.zeros(0, np.int64)
        ] * 5
        self._bucket, self._series, self._start, self._stop, self._slot = columns
        shard = self._slot // shard_slices
        new = (np.diff(shard, prepend=-1) != 0) | (np.diff(self._bucket, prepend=-1) != 0)
        self._bounds = np.append(np.flatnonzero(new), len(shard))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, place: int) -> ShardEntry:  # type: ignore[override]
        place = range(len(self))[place]
        return self._entry(int(self._bounds[place]), int(self._bounds[place + 1]))

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[place] for place in range(len(self)))

    def _entry(self, begin: int, end: int) -> ShardEntry:
        here = slice(begin, end)
        series = self._series[here]
        columns = [c.tolist() for c in (series, self._start[here], self._stop[here])]
        heads = self._planned.heads[series]
        stamps = [f"{stamp:016x}" for stamp in heads["stamp"].tolist()]
        slots = self._slot[here].tolist()
        bucket = self._planned.buckets[int(self._bucket[begin])]
        rows, width, dtype = bucket_parts(bucket)
        number = slots[0] // self._shard_slices
        return ShardEntry(
            bucket=bucket,
            number=number,
            first=number * self._shard_slices,
            count=sum(columns[2]) - sum(columns[1]),
            rows=rows,
            columns=width,
            dtype=dtype,
            parts=tuple(
                EntryPart(*part)
                for part in zip(*columns, slots, stamps, heads["partial"].tolist(), strict=True)
            ),
            goes_on=columns[2][-1] < int(heads["length"][-1]),
        )


def make_plan(gathered: Gathered, data: DataConfig, key: bytes, root: Path) -> Plan:
    """Lay series out; those that the last plan at ``root`` has stay where they are.

    A plan of another key or shard size holds nothing; for one that is lost the commits stand in.
    """
    planned = gathered.planned
    heads = planned.heads
    layout = meaning(data, key)
    last = read_slots(root / PLAN, layout)
    if last is None:
        last = slots_of_commits(root, layout)
    _tell_the_missing(heads, last)
    for number, bucket in enumerate(planned.buckets):
        members = np.flatnonzero(heads["bucket"] == number)
        lengths, names = heads["length"][members].astype(np.int64), heads["name"][members]
        kept, end = stay(last.get(bucket), names, lengths)
        heads["first"][members] = lay_out(lengths, kept, data.shard_slices, end)
    return Plan(gathered, data.shard_slices)


def _tell_the_missing(heads: NDArray[Any], last: Slots) -> None:
    names = np.concatenate([names for names, _, _ in last.values()] or [np.zeros(0, np.uint64)])
    if missing := int((~np.isin(names, heads["name"])).sum()):
        log.warning(
            "plan: %d series of the last run are gone, or begin with another image", missing
        )


def meaning(data: DataConfig, key: bytes) -> dict[str, str]:
    """What must be equal for slots to mean the same."""
    return {
        "format": str(FORMAT),
        "shard_slices": str(data.shard_slices),
        "key_fingerprint": fingerprint(key),
    }
