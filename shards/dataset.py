"""Shards to batches of the training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medpsp.channels import channels_first
from medpsp.intensity import to_unit
from medpsp.train.augment import AugmentOptions, build_transforms
from medpsp.train.batch import Batch, crop_or_pad
from medpsp.types import FloatArray, World
from shards.crops import Crops, check_classes, network_channels
from shards.loader import run_task
from shards.loadworker import Spec
from shards.order import batch_positions
from shards.reader import ShardReader
from shards.samples import Sample, Sampler, Stream, Wanted, stage_rows

if TYPE_CHECKING:
    from torch import Tensor

    from medpsp.config import Config
    from shards.index import SliceRow

__all__ = [
    "Inputs",
    "Stream",
    "example_batch",
    "read_unit",
    "stage_rows",
    "train_batches",
    "whole_slices",
]
EVAL_BATCH = 8
WHOLE = (slice(None), slice(None))


def read_unit(reader: ShardReader, row: SliceRow) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One slice in [0, 1], (H, W) or in colour (H, W, 3), and its label (H, W)."""
    image, label = reader.read(row.bucket, row.slot)
    return to_unit(image, row.window, row.inverted).astype(np.float32, copy=False), label


class Inputs:
    """Whole slices as the network takes them.

    Args:
        reader: Of the shards.
        config: Channels, windows and context of the network; classes.
        rows: Among which neighbours are looked for.
    """

    def __init__(self, reader: ShardReader, config: Config, rows: Sequence[SliceRow]) -> None:
        self._reader, self._channels = reader, config.model.channels
        self._classes = len(config.data.classes)
        self._sampler = Sampler(config.model, rows)

    def read(self, row: SliceRow) -> tuple[FloatArray, NDArray[np.uint8]]:
        """(H, W, C) float32 in [0, 1], and label (H, W).

        Grey is (H, W) for a network of one channel, and may be so for one of three, which repeats
        it.

        Raises:
            ShardError: The label holds what is no class.
        """
        image, label = self._reader.read(row.bucket, row.slot)
        sample: Sample = self._sampler.sample(row)
        check_classes(label, self._classes, row.bucket, row.slot)
        return network_channels(self._reader, sample, image, WHOLE), label

    def batch(self, rows: Sequence[SliceRow]) -> Batch:
        """Slices of one size."""
        images, labels = zip(*(self.read(row) for row in rows), strict=True)
        return _collate(images, labels, tuple(row.patient for row in rows), self._channels)


def train_batches(
    root: Path, rows: Sequence[SliceRow], config: Config, world: World, place: tuple[int, int]
) -> Iterator[Batch]:
    """Batches of one rank from a step of a stage to the stage's end.

    Neither ``train.loader_workers`` nor the ranks change any value. Micro-batches follow one
    another in a batch.

    Args:
        root: Folder of the shards.
        rows: The whole index.
        config: Of the run.
        world: Rank and number of ranks; the global batch does not depend on them.
        place: Stage index and first step within it.
    """
    index, first = place
    train = config.train
    stage = train.stages[index]
    reader = ShardReader(root)
    stream = Stream(reader, stage_rows(rows, stage.fraction), config, index)
    micro = train.batch_size // train.accumulate
    share = len(batch_positions(0, micro, world.rank, world.size)) * train.accumulate
    task = Crops(
        reader=reader,
        size=train.size,
        classes=len(config.data.classes),
        channels=config.model.channels,
        level=stage.augment,
        options=AugmentOptions(
            flips=train.flips,
            transforms=build_transforms(train.transforms, train.size, _channels(rows, config)),
        ),
        jitter=train.window_jitter,
        draws_only=train.augment_on == "device",
    )
    specs = (
        Spec((share, config.model.channels, *train.size), "<f4"),
        Spec((share, *train.size), "|u1"),
    )

    def items() -> Iterator[tuple[Wanted, tuple[str, ...]]]:
        for step in range(first, stage.steps):
            numbers = range(step * train.accumulate, (step + 1) * train.accumulate)
            parts = [
                stream.at(batch_positions(number, micro, world.rank, world.size))
                for number in numbers
            ]
            samples = tuple(sample for wanted, _ in parts for sample in wanted.samples)
            soon = tuple(shard for wanted, _ in parts for shard in wanted.soon)
            yield Wanted(samples, soon), tuple(name for _, names in parts for name in names)

    return _made(task, specs, items(), train.loader_workers)


def _channels(rows: Sequence[SliceRow], config: Config) -> list[int]:
    """What crops of these slices have before grey ones are repeated for a network of colours."""
    near, windows = 2 * config.model.context + 1, len(config.model.windows) or 1
    return sorted({near * (3 if r.bucket.endswith("_uint8") else windows) for r in rows})


def _made(
    task: Crops,
    specs: Sequence[Spec],
    stream: Iterator[tuple[Wanted, tuple[str, ...]]],
    workers: int,
) -> Iterator[Batch]:
    import torch  # not in loader workers

    waiting: deque[tuple[Wanted, tuple[str, ...]]] = deque()

    def wanted() -> Iterator[Wanted]:
        for item, names in stream:
            waiting.append((item, names))
            yield item

    for (image, label), draws in run_task(task, specs, wanted(), workers):
        item, names = waiting.popleft()
        yield Batch(
            image=_own(image),
            label=_own(label),
            patients=names,
            keys=torch.tensor([key_number(sample.key) for sample in item.samples]),
            samples=tuple(sample.name for sample in item.samples),
            draws=draws,
        )


def _own(array: NDArray[Any]) -> Tensor:
    """A copy, as the memory of the loader is used again; pinned where a GPU is in use.

    From pinned memory alone it can fetch the copy while we go on.
    """
    import torch

    theirs = torch.from_numpy(array)
    pinned: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.empty(theirs.shape, dtype=theirs.dtype, pin_memory=pinned).copy_(theirs)


def key_number(key: tuple[int, ...]) -> int:
    """63 bits of a key."""
    (word,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(word) >> 1


def _collate(
    images: Sequence[FloatArray],
    labels: Sequence[NDArray[np.uint8]],
    patients: tuple[str, ...],
    channels: int,
) -> Batch:
    import torch

    stack = np.stack([channels_first(image, channels) for image in images])
    return Batch(
        image=torch.from_numpy(stack), label=torch.from_numpy(np.stack(labels)), patients=patients
    )


def whole_slices(
    root: Path, rows: Sequence[SliceRow], world: World, config: Config
) -> Iterator[Batch]:
    """Whole slices of the rows, one rank's share, batched where sizes agree.

    Args:
        root: Folder of the shards.
        rows: Of the index.
        world: Rank and number of ranks.
        config: Of the run.
    """
    inputs = Inputs(ShardReader(root), config, rows)
    mine = sorted(rows, key=lambda row: (row.bucket, row.slot))[world.rank :: world.size]
    for _, group in groupby(mine, key=lambda row: row.bucket):
        members = list(group)
        for start in range(0, len(members), EVAL_BATCH):
            yield inputs.batch(members[start : start + EVAL_BATCH])


def example_batch(root: Path, rows: Sequence[SliceRow], config: Config, count: int = 4) -> Batch:
    """The slices with the most foreground, one a patient, cropped to the training size."""
    best: dict[str, SliceRow] = {}
    for row in rows:
        if row.patient not in best or _foreground(row) > _foreground(best[row.patient]):
            best[row.patient] = row
    chosen = sorted(best.values(), key=_foreground, reverse=True)[:count]
    inputs = Inputs(ShardReader(root), config, rows)
    rng = np.random.default_rng(config.seed)
    cuts = [crop_or_pad(*inputs.read(row), config.train.size, rng) for row in chosen]
    images, labels = zip(*cuts, strict=True)
    return _collate(images, labels, tuple(row.patient for row in chosen), config.model.channels)


def _foreground(row: SliceRow) -> int:
    return sum(row.histogram[1:-1])
