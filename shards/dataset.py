"""Shards to batches of the training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.intensity import planes, to_unit
from medpsp.stages import in_stage
from medpsp.train.augment import augment
from medpsp.train.batch import Batch, crop_or_pad
from medpsp.types import World
from shards.index import SliceRow
from shards.order import batch_positions, sample_order
from shards.reader import ShardReader

log = logging.getLogger("medpsp")
EVAL_BATCH = 8
Key = tuple[int, int]  # epoch, sample


class TrainDataset(Dataset[Any]):
    """Crops of training slices, keyed by (epoch, sample): the key alone decides the result."""

    def __init__(self, root: Path, rows: Sequence[SliceRow], config: Config, stage: int) -> None:
        self.reader, self.rows = ShardReader(root), rows
        self.size, self.seed, self.stage = config.train.size, config.seed, stage
        self.level = config.train.stages[stage].augment

    def __getitem__(self, key: Key) -> tuple[NDArray[np.float32], NDArray[np.uint8], str]:
        epoch, sample = key
        row = self.rows[sample]
        name = int(row.file_id, 16) + row.frame  # frames of one object share its pseudonym
        rng = np.random.default_rng([self.seed, self.stage, epoch, name])
        image, label = read_unit(self.reader, row)
        image, label = crop_or_pad(image, label, self.size, rng)
        image, label = augment(image, label, self.level, rng)
        return image, label, row.patient


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
) -> Iterable[Batch]:
    """Batches of one rank from a step of a stage to the stage's end.

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
    dataset = TrainDataset(root, chosen, config, index)

    def keys() -> Iterator[list[Key]]:
        for step in range(first, stage.steps):
            positions = batch_positions(step, config.train.batch_size, world.rank, world.size)
            yield sample_order(len(chosen), config.seed * 1009 + index, positions)

    workers = config.train.loader_workers
    return DataLoader(
        dataset,
        batch_sampler=_Keys(keys),
        num_workers=workers,
        collate_fn=partial(_collate, channels=config.model.in_channels),
        multiprocessing_context="spawn" if workers else None,  # zarr's threads survive no fork
    )


class _Keys:
    """A batch sampler over a generator function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __iter__(self) -> Iterator[list[Key]]:
        return self.function()  # type: ignore[no-any-return]


def _collate(
    items: list[tuple[NDArray[np.float32], NDArray[np.uint8], str]], channels: int
) -> Batch:
    images, labels, patients = zip(*items, strict=True)
    return Batch(
        image=torch.from_numpy(np.stack([planes(image, channels) for image in images])),
        label=torch.from_numpy(np.stack(labels)),
        patients=tuple(patients),
    )


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
