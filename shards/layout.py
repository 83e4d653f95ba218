"""What goes into which shard: pure arithmetic over series, nothing is read or written.

A bucket holds slices of one matrix size and dtype, ``<H>x<W>_<dtype>``; uint8 is RGB. Within a
bucket series follow one another in a fixed order and are cut every ``shard_slices`` slots.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from medpsp.dataconfig import DataConfig
from medpsp.types import PixelDtype, Series, Split

FORMAT = 2
"""Version of manifest and index; a reader refuses others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSeries:
    """A series with its pseudonyms and its place among the splits.

    Attributes:
        patient: Pseudonym.
        name: Pseudonym of the series.
        order: Keyed hash of the patient in [0, 1); stages take patients below their fraction.
        stamp: Size and time of every source file, so that a changed file is converted anew.
        study_day: See `SliceRow`.
    """

    series: Series
    patient: str
    name: str
    split: Split
    order: float
    stamp: str
    study_day: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Slices ``start:stop`` of a series, laid into a shard from ``slot`` (of the bucket) on."""

    planned: PlannedSeries
    start: int
    stop: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One shard: slots ``first : first + count`` of a bucket."""

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
        """Hash of everything that decides the bytes of this shard, besides the source pixels."""
        text = json.dumps([FORMAT, settings, [asdict(p) for p in self.parts]], sort_keys=True)
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


def plan_shards(planned: Iterable[PlannedSeries], shard_slices: int) -> tuple[ShardPlan, ...]:
    """Lay series end to end in their buckets and cut every ``shard_slices`` slots.

    The order within a bucket is that of the pseudonyms, so it does not depend on file order.
    """
    buckets: dict[str, list[PlannedSeries]] = defaultdict(list)
    for item in planned:
        buckets[bucket_of(item.series)].append(item)
    plans: list[ShardPlan] = []
    for bucket, members in sorted(buckets.items()):
        members.sort(key=lambda m: (m.patient, m.name, m.series.z_mm, m.series.first.file_id))
        cuts: dict[int, list[Part]] = defaultdict(list)
        slot = 0
        for item in members:
            done, length = 0, len(item.series.slices)
            while done < length:
                room = shard_slices - slot % shard_slices
                take = min(room, length - done)
                part = Part(planned=item, start=done, stop=done + take, slot=slot)
                cuts[slot // shard_slices].append(part)
                done, slot = done + take, slot + take
        first_ref = members[0].series.first
        for number, parts in sorted(cuts.items()):
            plans.append(
                ShardPlan(
                    bucket=bucket,
                    number=number,
                    first=number * shard_slices,
                    count=sum(p.stop - p.start for p in parts),
                    rows=first_ref.rows,
                    columns=first_ref.columns,
                    dtype=first_ref.dtype,
                    parts=tuple(parts),
                )
            )
    return tuple(plans)
