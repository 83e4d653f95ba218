"""Which slices a step trains on: rows of the index to samples, by their position in the stream."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.channels import neighbours
from medpsp.errors import ShardError
from medpsp.types import Window
from shards.order import (
    Permutation,
    epoch_permutation,
    ordered,
    remembered,
    shard_permutation,
    shares,
)

if TYPE_CHECKING:  # a loader worker needs none of it
    from medpsp.config import Config
    from medpsp.modelconfig import ModelConfig
    from shards.index import SliceRow
    from shards.reader import ShardReader

log = logging.getLogger("medpsp")
Shard = tuple[str, int]
"""Bucket and number."""


class Sample(NamedTuple):
    """A slice as the network takes it.

    Attributes:
        bucket: Where it lies.
        slots: Of the neighbours before it, its own, and of those behind; see
            `medpsp.channels.neighbours`.
        windows: A channel each.
        inverted: True for MONOCHROME1.
        spacing: mm between rows and between columns; NaN where unknown.
        key: Decides alone what is random about it.
        name: In messages.
    """

    bucket: str
    slots: tuple[int, ...]
    windows: tuple[Window, ...]
    inverted: bool
    spacing: tuple[float, float] = (float("nan"), float("nan"))
    key: tuple[int, ...] = ()
    name: str = ""

    @property
    def slot(self) -> int:
        """Of the slice itself."""
        return self.slots[len(self.slots) // 2]


class Wanted(NamedTuple):
    """Samples of one rank's share of a batch, and shards that will come soon."""

    samples: tuple[Sample, ...]
    soon: tuple[Shard, ...] = ()


class Sampler:
    """Rows to samples.

    Args:
        model: Windows and context of the network.
        rows: Among which neighbours are looked for.
    """

    def __init__(self, model: ModelConfig, rows: Sequence[SliceRow]) -> None:
        self._fixed = tuple(Window(center=w.center, width=w.width) for w in model.windows)
        self._context = model.context
        self._repeats = model.in_channels if self._context else 1
        self._places: dict[str, dict[int, int]] = defaultdict(dict)
        if self._context:
            for row in rows:
                self._places[row.series][row.slice_index] = row.slot

    def sample(self, row: SliceRow, key: tuple[int, ...] = ()) -> Sample:
        """A slice with its neighbours; where there is none, the nearest one stands for it."""
        grey = not row.bucket.endswith("_uint8")
        windows = self._fixed or (row.window,)
        return Sample(
            bucket=row.bucket,
            slots=self._slots(row),
            windows=windows * self._repeats if grey else windows,
            inverted=row.inverted,
            spacing=(row.spacing[0], row.spacing[1]),
            key=key,
            name=f"{row.file_id}/{row.frame}",
        )

    def _slots(self, row: SliceRow) -> tuple[int, ...]:
        if not self._context:
            return (row.slot,)
        return neighbours(self._places[row.series], row.slice_index, self._context)


def stage_rows(rows: Sequence[SliceRow], fraction: float) -> list[SliceRow]:
    """Labelled slices of the training patients that take part at ``fraction``.

    A set too small to have a patient below the threshold uses its first one.

    Raises:
        ShardError: No labelled training slice at all.
    """
    from medpsp.stages import in_stage

    train = [row for row in rows if row.split == "train" and row.labelled]
    if not train:
        raise ShardError("shards: no labelled training slice; check data.labels and data.split")
    chosen = [row for row in train if in_stage(row.order, fraction)]
    if not chosen:
        lowest = min(row.order for row in train)
        log.warning("fraction %g holds no patient; using the one of lowest hash", fraction)
        chosen = [row for row in train if row.order == lowest]
    return chosen


class Stream:
    """The samples of a stage by their position.

    Args:
        reader: Tells which shard a slice lies in.
        rows: Of the stage.
        config: Of the run.
        stage: Its index.
    """

    def __init__(
        self, reader: ShardReader, rows: Sequence[SliceRow], config: Config, stage: int
    ) -> None:
        train, seed = config.train, config.seed * 1009 + stage
        self._foreground = train.foreground
        self._sampler = Sampler(config.model, rows)
        self._all = _Pool(reader, rows, config, (config.seed, stage), seed)
        self._some: _Pool | None = None
        if train.foreground:
            full = [row for row in rows if any(row.histogram[1:-1])]
            if full:
                key = (config.seed, stage, 1)  # another augmentation than of the same slice in all
                self._some = _Pool(reader, full, config, key, seed + 2**40)

    def at(self, positions: range) -> tuple[Wanted, tuple[str, ...]]:
        """Samples of some positions, and their patients."""
        if self._some is None:
            found, soon = self._all.at(positions)
        else:
            some, rest, turns = shares(positions, self._foreground)
            (first, near), (second, far) = self._some.at(some), self._all.at(rest)
            parts = iter(first), iter(second)
            found = [next(parts[0 if turn else 1]) for turn in turns]
            soon = tuple(dict.fromkeys((*near, *far)))
        samples = tuple(self._sampler.sample(row, key) for row, key in found)
        return Wanted(samples, soon), tuple(row.patient for row, _ in found)


class _Pool:
    """Rows in random order, again and again."""

    def __init__(
        self,
        reader: ShardReader,
        rows: Sequence[SliceRow],
        config: Config,
        key: tuple[int, ...],
        seed: int,
    ) -> None:
        train = config.train
        self._rows, self._key, self._ahead = rows, key, 0
        self._hinted: deque[Shard] = deque(maxlen=2 * train.shuffle_shards)
        draw: Permutation = partial(epoch_permutation, len(rows), seed)
        if train.shuffle == "shard":
            slots = {bucket: reader.shard_slots(bucket) for bucket in {r.bucket for r in rows}}
            self._shards = [(row.bucket, row.slot // slots[row.bucket]) for row in rows]
            numbers = {shard: n for n, shard in enumerate(sorted(set(self._shards)))}
            together = train.shuffle_shards
            draw = _by_shard(np.array([numbers[shard] for shard in self._shards]), seed, together)
            self._ahead = -(-len(rows) * together // len(numbers))  # samples of a group
        self._permutation = remembered(draw)

    def at(
        self, positions: range
    ) -> tuple[list[tuple[SliceRow, tuple[int, ...]]], tuple[Shard, ...]]:
        """Rows and keys of some positions, and shards that were not named before."""
        found = []
        for epoch, number in ordered(len(self._rows), positions, self._permutation):
            row = self._rows[number]
            name = int(row.file_id, 16) + row.frame  # frames of one object share its pseudonym
            found.append((row, (*self._key, epoch, name)))
        return found, self._soon(positions)

    def _soon(self, positions: range) -> tuple[Shard, ...]:
        """Shards of the next group."""
        if not self._ahead:
            return ()
        later = range(positions.start + self._ahead, positions.stop + self._ahead)
        found = dict.fromkeys(
            self._shards[n] for _, n in ordered(len(self._rows), later, self._permutation)
        )
        new = tuple(shard for shard in found if shard not in self._hinted)
        self._hinted.extend(new)
        return new


def _by_shard(shards: NDArray[np.int64], seed: int, together: int) -> Permutation:
    return lambda epoch: shard_permutation(shards, seed, epoch, together)
