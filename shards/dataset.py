"""Shards to batches of the training loop."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import ShardError
from medpsp.intensity import planes, to_unit
from medpsp.train.augment import augment
from medpsp.train.batch import Batch, crop_or_pad, crop_parts, padded
from medpsp.types import Window, World
from shards.loader import run_task
from shards.loadworker import Spec
from shards.order import (
    Permutation,
    batch_positions,
    epoch_permutation,
    ordered,
    remembered,
    shard_permutation,
)
from shards.reader import ShardReader

if TYPE_CHECKING:  # a loader worker needs none of it
    from medpsp.config import Config
    from shards.index import SliceRow

log = logging.getLogger("medpsp")
EVAL_BATCH = 8
Shard = tuple[str, int]
"""Bucket and number."""


class Sample(NamedTuple):
    """A training slice, and the key that alone decides its crop and its augmentation."""

    bucket: str
    slot: int
    window: Window
    inverted: bool
    key: tuple[int, ...]


class Wanted(NamedTuple):
    """Samples of one rank's share of a batch, and shards that will come soon."""

    samples: tuple[Sample, ...]
    soon: tuple[Shard, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """The task of the loader: crops of slices, in [0, 1] and augmented.

    Attributes:
        size: Rows and columns of a crop.
        channels: ``model.in_channels``; grey slices are repeated to 3.
        level: Of `augment`.
    """

    reader: ShardReader
    size: tuple[int, int]
    channels: int
    level: str
    _space: dict[str, tuple[NDArray[Any], NDArray[np.uint8]]] = field(default_factory=dict)

    def __call__(self, item: Wanted, arrays: Sequence[NDArray[Any]]) -> None:
        """Fill (N, C, H, W) float32 images and (N, H, W) uint8 labels."""
        for bucket, shard in item.soon:
            self.reader.will_need(bucket, [shard])
        for image, label, sample in zip(*arrays, item.samples, strict=True):
            unit, mask = self._crop(sample)
            image[...] = planes(unit, self.channels)
            label[...] = mask

    def _crop(self, sample: Sample) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        rng = np.random.default_rng(sample.key)
        image, label = self._read(sample.bucket, sample.slot)
        source, target = crop_parts(label.shape, self.size, rng)
        # the window looks at single values, so it may as well come after the cut
        unit = to_unit(image[source], sample.window, sample.inverted)
        cut = padded(unit.astype(np.float32, copy=False), label[source], self.size, target)
        return augment(*cut, self.level, rng)

    def _read(self, bucket: str, slot: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if bucket not in self._space:  # the same memory for every slice
            shape, dtype = self.reader.frame(bucket)
            self._space[bucket] = np.empty(shape, dtype), np.empty(shape[:2], np.uint8)
        self.reader.read_into(bucket, slot, *self._space[bucket])
        return self._space[bucket]


def read_unit(reader: ShardReader, row: SliceRow) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One slice in [0, 1], (H, W) or in colour (H, W, 3), and its label (H, W)."""
    image, label = reader.read(row.bucket, row.slot)
    return to_unit(image, row.window, row.inverted).astype(np.float32, copy=False), label


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


def train_batches(
    root: Path, rows: Sequence[SliceRow], config: Config, world: World, place: tuple[int, int]
) -> Iterator[Batch]:
    """Batches of one rank from a step of a stage to the stage's end.

    Neither ``train.loader_workers`` nor the ranks change any value.

    Args:
        root: Folder of the shards.
        rows: The whole index.
        config: Of the run.
        world: Rank and number of ranks; the global batch does not depend on them.
        place: Stage index and first step within it.
    """
    index, first = place
    stage = config.train.stages[index]
    chosen = stage_rows(rows, stage.fraction)
    reader, size, channels = ShardReader(root), config.train.size, config.model.in_channels
    stream = Stream(reader, chosen, config, index)
    share = len(batch_positions(0, config.train.batch_size, world.rank, world.size))
    steps = range(first, stage.steps)
    shares = (batch_positions(s, config.train.batch_size, world.rank, world.size) for s in steps)
    task = Crops(reader=reader, size=size, channels=channels, level=stage.augment)
    specs = (Spec((share, channels, *size), "<f4"), Spec((share, *size), "|u1"))
    return _made(task, specs, map(stream.at, shares), config.train.loader_workers)


def _made(
    task: Crops,
    specs: Sequence[Spec],
    stream: Iterator[tuple[Wanted, tuple[str, ...]]],
    workers: int,
) -> Iterator[Batch]:
    patients: deque[tuple[str, ...]] = deque()

    def wanted() -> Iterator[Wanted]:
        for item, names in stream:
            patients.append(names)
            yield item

    for (image, label), _ in run_task(task, specs, wanted(), workers):
        yield _batch(image.copy(), label.copy(), patients.popleft())  # theirs is used again


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
        self._rows, self._key = rows, (config.seed, stage)
        seed = config.seed * 1009 + stage
        self._ahead = 0
        self._hinted: deque[Shard] = deque(maxlen=2 * config.train.shuffle_shards)
        draw: Permutation = partial(epoch_permutation, len(rows), seed)
        if config.train.shuffle == "shard":
            slots = {bucket: reader.shard_slots(bucket) for bucket in {r.bucket for r in rows}}
            self._shards = [(row.bucket, row.slot // slots[row.bucket]) for row in rows]
            numbers = {shard: n for n, shard in enumerate(sorted(set(self._shards)))}
            together = config.train.shuffle_shards
            draw = _by_shard(np.array([numbers[shard] for shard in self._shards]), seed, together)
            self._ahead = -(-len(rows) * together // len(numbers))  # samples of a group
        self._permutation = remembered(draw)

    def at(self, positions: range) -> tuple[Wanted, tuple[str, ...]]:
        """Samples of some positions, and their patients."""
        samples, names = [], []
        for epoch, number in ordered(len(self._rows), positions, self._permutation):
            row = self._rows[number]
            name = int(row.file_id, 16) + row.frame  # frames of one object share its pseudonym
            key = (*self._key, epoch, name)
            samples.append(Sample(row.bucket, row.slot, row.window, row.inverted, key))
            names.append(row.patient)
        return Wanted(tuple(samples), self._soon(positions)), tuple(names)

    def _soon(self, positions: range) -> tuple[Shard, ...]:
        """Shards of the next group that were not named before."""
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


def _collate(
    items: list[tuple[NDArray[np.float32], NDArray[np.uint8], str]], channels: int
) -> Batch:
    images, labels, patients = zip(*items, strict=True)
    image = np.stack([planes(image, channels) for image in images])
    return _batch(image, np.stack(labels), tuple(patients))


def _batch(
    image: NDArray[np.float32], label: NDArray[np.uint8], patients: tuple[str, ...]
) -> Batch:
    import torch  # not in loader workers

    return Batch(image=torch.from_numpy(image), label=torch.from_numpy(label), patients=patients)


def whole_slices(
    root: Path, rows: Sequence[SliceRow], world: World, channels: int = 1
) -> Iterator[Batch]:
    """Whole slices of the rows, one rank's share, batched where sizes agree.

    Args:
        root: Folder of the shards.
        rows: Of the index.
        world: Rank and number of ranks.
        channels: ``model.in_channels``; grey slices are repeated to 3.
    """
    reader = ShardReader(root)
    mine = sorted(rows, key=lambda row: (row.bucket, row.slot))[world.rank :: world.size]
    for _, group in groupby(mine, key=lambda row: row.bucket):
        members = list(group)
        for start in range(0, len(members), EVAL_BATCH):
            part = members[start : start + EVAL_BATCH]
            items = [(*read_unit(reader, row), row.patient) for row in part]
            yield _collate(items, channels)


def example_batch(root: Path, rows: Sequence[SliceRow], config: Config, count: int = 4) -> Batch:
    """The slices with the most foreground, one a patient, cropped to the training size."""
    best: dict[str, SliceRow] = {}
    for row in rows:
        if row.patient not in best or _foreground(row) > _foreground(best[row.patient]):
            best[row.patient] = row
    chosen = sorted(best.values(), key=_foreground, reverse=True)[:count]
    reader = ShardReader(root)
    rng = np.random.default_rng(config.seed)
    return _collate(
        [
            (*crop_or_pad(*read_unit(reader, row), config.train.size, rng), row.patient)
            for row in chosen
        ],
        config.model.in_channels,
    )


def _foreground(row: SliceRow) -> int:
    return sum(row.histogram[1:-1])
