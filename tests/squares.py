"""Squares that are brighter than their surroundings: something to train on in a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medpsp.config import Config
from medpsp.model.psp import PSPNet, build_model
from medpsp.train.augment import augment
from medpsp.train.batch import Batch
from medpsp.train.board import Board
from medpsp.train.loop import Run
from medpsp.types import World

CPU = torch.device("cpu")
SIZE, BATCH = 64, 4
torch.set_num_threads(1)


def make_config(
    *stages: dict[str, Any], model: dict[str, Any] | None = None, **train: Any
) -> Config:
    plan = [{"augment": "none", "lr": 3e-3, **stage} for stage in stages]
    train = {"warmup_steps": 2, "eval_every": 1000, "log_every": 1, "batch_size": BATCH, **train}
    return Config.model_validate(
        {
            "data": {"archive": "none", "classes": ["background", "square"]},
            "model": {
                "backbone": "timm/test_resnet",
                "psp_channels": 16,
                "decoder_channels": 16,
                **(model or {}),
            },
            "train": {"stages": plan, "size": [SIZE, SIZE], **train},
        }
    )


def squares(seed: int, count: int = BATCH) -> Batch:
    rng = np.random.default_rng(seed)
    image = rng.normal(0.3, 0.05, (count, 1, SIZE, SIZE)).astype(np.float32)
    label = np.zeros((count, SIZE, SIZE), dtype=np.uint8)
    for index in range(count):
        row, column = rng.integers(2, SIZE - 26, 2)
        image[index, 0, row : row + 24, column : column + 24] += 0.5
        label[index, row : row + 24, column : column + 24] = 1
    names = tuple(f"p{i}" for i in range(count))
    return Batch(
        image=torch.from_numpy(image),
        label=torch.from_numpy(label),
        patients=names,
        keys=torch.from_numpy(rng.integers(0, 2**62, count)),
        samples=tuple(f"{seed}/{i}" for i in range(count)),
    )


def share(batch: Batch, world: World, accumulate: int = 1) -> Batch:
    """This rank's part of every micro-batch, one after another."""
    part = len(batch.label) // accumulate // world.size
    mine = [n for n in range(len(batch.label)) if n % (part * world.size) // part == world.rank]
    return replace(
        batch,
        image=batch.image[mine],
        label=batch.label[mine],
        patients=tuple(batch.patients[n] for n in mine),
        keys=None if batch.keys is None else batch.keys[mine],
        samples=tuple(batch.samples[n] for n in mine),
    )


def augmented(batch: Batch, level: str) -> Batch:
    """Each sample by its own key, as the shards have it."""
    if level == "none" or batch.keys is None:
        return batch
    done = [
        augment(image[0].numpy(), label.numpy(), level, np.random.default_rng(int(key)))
        for image, label, key in zip(batch.image, batch.label, batch.keys, strict=True)
    ]
    image = torch.from_numpy(np.stack([image for image, _ in done])[:, None])
    return replace(batch, image=image, label=torch.from_numpy(np.stack([mask for _, mask in done])))


def make_run(config: Config, folder: Path, world: World | None = None, **more: Any) -> Run:
    """Batches depend on the stage and the step alone, as they do with shards."""
    world, train = world or World(), config.train

    def batches(stage: int, first: int) -> Iterator[Batch]:
        for step in range(first, train.stages[stage].steps + 3):  # three too many
            whole = squares(1000 * stage + step, train.batch_size)
            mine = share(whole, world, train.accumulate)
            yield augmented(mine, train.stages[stage].augment)

    weights = torch.ones(2, dtype=torch.float64 if train.precision == "fp64" else torch.float32)
    return Run(
        config=config,
        world=world,
        device=CPU,
        checkpoints=folder / "checkpoints",
        board=Board(folder / "tensorboard" if world.rank == 0 else None, 0),
        batches=batches,
        val_batches=lambda: [share(squares(99), world)],
        examples=squares(98, 2),
        weights=weights,
        **more,
    )


def network(config: Config, seed: int = 0) -> PSPNet:
    torch.manual_seed(seed)
    model = build_model(config.model, 2)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.double() if config.train.precision == "fp64" else model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
