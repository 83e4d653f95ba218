"""What goes into which shard: pure arithmetic over series, nothing is read or written.

A bucket holds slices of one matrix size and dtype, ``<H>x<W>_<dtype>``; uint8 is RGB. Within a
bucket series follow one another in a fixed order and are cut every ``shard_slices`` slots; what
was laid out once stays where it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from medpsp.dataconfig import DataConfig
from medpsp.types import PixelDtype, Series, Split

FORMAT = 4
"""Version of manifest and index; a reader refuses others."""
BUCKET = re.compile(rf"(\d+)x(\d+)_({'|'.join(get_args(PixelDtype))})")
"""Name of a bucket."""
SHARD = re.compile(rf"(?P<bucket>{BUCKET.pattern})-(?P<number>\d+)")
"""Name of a shard."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSeries:
    """A series with its pseudonyms and its place among the splits.

    Attributes:
        patient: Pseudonym.
        name: Pseudonym of the series.
        order: Keyed hash of the patient in [0, 1); stages take patients below their fraction.
        stamp: Keyed hash of all that decides its slices: headers, masks, and size and times of
            every source file, so that a changed file is converted anew.
        study_day: See `SliceRow`.
        sources: Size and times of the source files, those of slices and then of masks, each file
            once; empty where nobody looked.
    """

    series: Series
    patient: str
    name: str
    split: Split
    order: float
    stamp: str
    study_day: int = -1
    sources: tuple[tuple[int, ...], ...] = ()

    @property
    def source_paths(self) -> list[str]:
        """The files of ``sources``."""
        places = [*(ref.place for ref in self.series.slices), *self.series.masks]
        return list(dict.fromkeys(place.path for place in places))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Slices ``start:stop`` of a series, laid into a shard from ``slot`` (of the bucket) on."""

    planned: PlannedSeries
    start: int
    stop: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One shard of a bucket.

    Attributes:
        first: Its first slot, counted in the bucket.
        count: Slots that hold a slice; the others are empty.
    """

    bucket: str
    number: int
    first: int
    count: int
    rows: int
    columns: int
    dtype: PixelDtype
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """For messages and file names, for example ``512x512_int16-3``."""
        return f"{self.bucket}-{self.number}"

    def digest(self, settings: str) -> str:
        """`shard_digest` of its parts."""
        return shard_digest(
            settings,
            (
                (p.planned.stamp, p.planned.series.mask_partial, p.start, p.stop, p.slot)
                for p in self.parts
            ),
        )


def shard_digest(settings: str, parts: Iterable[tuple[str, bool, int, int, int]]) -> str:
    """Hash of everything that decides the bytes of a shard, besides the source pixels.

    Args:
        settings: ``WriteSettings.text``.
        parts: Stamp of a series, whether its masks cover others too, start, stop, slot.
    """
    text = json.dumps([FORMAT, settings, list(parts)])
    return hashlib.sha256(text.encode()).hexdigest()


def data_settings(data: DataConfig) -> dict[str, Any]:
    """What of the configuration decides slices, labels, windows and splits, as JSON values."""
    keep = {
        *("source", "classes", "modalities", "window", "header_window", "split", "unlabelled"),
        *("label_format", "label_map", "label_names", "label_overlap", "seg_threshold"),
        *("mask_geometry", "mask_resample"),
        *("gaps", "burned_in", "non_volumes", "colour", "padding", "dates"),
    }
    return data.model_dump(mode="json", include=keep)


def changed_settings(data: DataConfig, made: Mapping[str, Any]) -> list[str]:
    """Keys of the configuration that shards were made with other values of."""
    wanted = data_settings(data)
    return [f"data.{key}" for key in wanted if made.get(key) != wanted[key]]


def data_id(data: DataConfig, key_fingerprint: str, splits: set[tuple[str, str]]) -> str:
    """Hash that is equal only where no patient can have changed its split; see `Manifest`.

    Args:
        data: Of the configuration.
        key_fingerprint: Thresholds of one key never move a patient; ...
        splits: ... split lists of a VOC archive may: pairs of patient and split.
    """
    parts: list[Any] = [data_settings(data), key_fingerprint]
    if data.source == "voc":
        parts.append(sorted(splits))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def bucket_of(series: Series) -> str:
    """Name of the bucket of a series."""
    first = series.first
    return f"{first.rows}x{first.columns}_{first.dtype}"


def bucket_parts(bucket: str) -> tuple[int, int, PixelDtype]:
    """Rows, columns and dtype of a bucket.

    Raises:
        ValueError: It is no name of a bucket.
    """
    found = BUCKET.fullmatch(bucket)
    if found is None:
        raise ValueError(f"bucket {bucket}: expected <rows>x<columns>_<dtype>")
    return int(found[1]), int(found[2]), cast(PixelDtype, found[3])


def lay_out(lengths: Ints, kept: Ints, shard_slices: int, end: int) -> Ints:
    """First slot of every series of a bucket.

    A series stays where it was; new ones follow each other from a fresh shard on, so that no
    shard that is written changes. A bucket where none stays begins at 0.

    Args:
        lengths: Slices of each series, in the order of the bucket.
        kept: First slot of each in the last plan, -1 for a new one.
        shard_slices: Slots of a shard.
        end: One beyond the last slot of the last plan.
    """
    new = kept < 0
    start = 0 if new.all() else -(-end // shard_slices) * shard_slices
    behind = np.cumsum(np.where(new, lengths, 0))
    return np.where(new, start + behind - lengths, kept)


def cut_parts(firsts: Ints, lengths: Ints, shard_slices: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Cut series at the borders of shards.

    Args:
        firsts: First slot of each series.
        lengths: Slices of each, at least 1.
        shard_slices: Slots of a shard.

    Returns:
        Of every part, in the order of the slots: number of the series, its first slice, one
        beyond its last, and the slot of the first.
    """
    low, high = firsts // shard_slices, (firsts + lengths - 1) // shard_slices
    pieces = high - low + 1
    series = np.repeat(np.arange(len(firsts)), pieces)
    within = np.arange(len(series)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    border = (low[series] + within) * shard_slices
    slot = np.maximum(firsts[series], border)
    stop = np.minimum((firsts + lengths)[series], border + shard_slices)
    order = np.argsort(slot, kind="stable")
    start, stop = slot - firsts[series], stop - firsts[series]
    return series[order], start[order], stop[order], slot[order]


def plan_shards(planned: Iterable[PlannedSeries], shard_slices: int) -> tuple[ShardPlan, ...]:
    """The shards of series that nothing was written of before.

    The order within a bucket is that of the pseudonyms, so it does not depend on file order.
    """
    buckets: dict[str, list[PlannedSeries]] = defaultdict(list)
    for item in planned:
        buckets[bucket_of(item.series)].append(item)
    plans: list[ShardPlan] = []
    for bucket, members in sorted(buckets.items()):
        members.sort(key=lambda m: (m.patient, m.name, m.series.z_mm, m.series.first.file_id))
        lengths = np.array([len(m.series.slices) for m in members], dtype=np.int64)
        firsts = lay_out(lengths, np.full_like(lengths, -1), shard_slices, 0)
        cuts: dict[int, list[Part]] = defaultdict(list)
        for number, start, stop, slot in zip(
            *(column.tolist() for column in cut_parts(firsts, lengths, shard_slices)), strict=True
        ):
            part = Part(planned=members[number], start=start, stop=stop, slot=slot)
            cuts[slot // shard_slices].append(part)
        plans += [shard_of(bucket, n, parts, shard_slices) for n, parts in cuts.items()]
    return tuple(plans)


def shard_of(bucket: str, number: int, parts: Sequence[Part], shard_slices: int) -> ShardPlan:
    """A shard from its parts."""
    rows, columns, dtype = bucket_parts(bucket)
    return ShardPlan(
        bucket=bucket,
        number=number,
        first=number * shard_slices,
        count=sum(part.stop - part.start for part in parts),
        rows=rows,
        columns=columns,
        dtype=dtype,
        parts=tuple(parts),
    )
