"""Ranks, engines and checkpoints: the same numbers whoever computes them.

Real gloo processes; see `rankmain` for what they do. Measured where these limits come from: in
float64 4e-16 for 2 ranks and 2e-15 for 4 (loss, gradient, Dice; relative), in float32 7e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medpsp.train.checkpoint import load_checkpoint
from tests.rankmain import ENGINES, LONG_STEPS, MOVE_AT, MOVE_STEPS, result, run_ranks
from tests.squares import CPU, names

SIZES = (1, 2, 4)
TARGETS = {
    # engine that wrote with two ranks: who goes on, and with how many
    "ddp": (("ddp", 1), ("ddp", 4), ("zero1", 1), ("zero2", 4), ("zero3", 2)),
    "zero1": (("ddp", 4), ("zero2", 1), ("zero3", 2)),
    "zero2": (("ddp", 1), ("zero1", 4), ("zero2", 2)),
    "zero3": (("ddp", 2), ("zero1", 1), ("zero3", 4)),
}
METRICS = ("train/loss", "train/dice_loss", "train/focal_loss", "train/grad_norm", "val/dice_mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    exact = ["exact:fp64", "exact:fp32"]
    run_ranks(folder, 2, [*exact, "long", *(f"curve:{engine}" for engine in ENGINES)])
    run_ranks(folder, 2, [f"start:{engine}" for engine in ENGINES])
    for size in SIZES:
        moves = [
            f"move:{engine}:{source}"
            for source, targets in TARGETS.items()
            for engine, ranks in targets
            if ranks == size
        ]
        run_ranks(folder, size, moves if size == 2 else [*exact, "again", *moves])
    return folder


def worst(one: dict[str, Any], other: dict[str, Any], first: int = 0) -> float:
    """Largest relative difference of what both reported, from step ``first`` on."""
    pairs = [
        (value, other["seen"][name][step])
        for name in METRICS
        for step, value in one["seen"][name].items()
        if step >= first
    ]
    assert len(pairs) > 3
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)


@pytest.mark.parametrize(("precision", "limit"), [("fp64", 1e-6), ("fp32", 1e-4)])
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_computes_the_same(
    folder: Path, precision: str, limit: float, size: int
) -> None:
    """Loss, norm of the gradient and Dice of every step; see `exact` for what is on."""
    alone = result(folder, f"exact:{precision}", 1)
    for rank in range(size):
        found = result(folder, f"exact:{precision}", size, rank)
        if rank == 0:
            assert worst(alone, found) < limit
        for name, tensor in alone["weights"].items():
            same = result(folder, f"exact:{precision}", size, 0)["weights"][name]
            assert torch.equal(found["weights"][name], same), name
            if precision == "fp64":
                torch.testing.assert_close(same, tensor, rtol=1e-6, atol=1e-9)
    assert alone["step"] == 8


def test_dropout_and_augmentation_are_on() -> None:
    """Or the test above would show less than it says."""
    from tests.rankmain import exact
    from tests.squares import augmented, squares

    config, batch = exact("fp64"), squares(0)
    assert config.model.dropout == 0.2
    assert config.train.accumulate == 2
    levels = [stage.augment for stage in config.train.stages]
    assert levels == ["low", "mid", "high"]
    assert not any(torch.equal(augmented(batch, level).image, batch.image) for level in levels)


@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_ranks_goes_on_alike(folder: Path, size: int) -> None:
    """The 20 steps after a checkpoint that two ranks wrote, in float64."""
    straight, moved = result(folder, "long", 2), result(folder, "again", size)
    losses = [
        [run["seen"]["train/loss"][step] for step in range(MOVE_AT, LONG_STEPS)]
        for run in (straight, moved)
    ]
    assert len(losses[0]) == 20
    assert min(moved["seen"]["train/loss"]) == MOVE_AT
    assert max(abs(a - b) / a for a, b in zip(*losses, strict=True)) < 1e-5


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_every_engine_has_the_same_curve(folder: Path, engine: str) -> None:
    """50 steps in two stages; measured 2e-7 for ZeRO-1 and 2, 3e-5 for ZeRO-3."""
    ddp, found = (result(folder, f"curve:{name}", 2) for name in ("ddp", engine))
    losses = [list(r["seen"]["train/loss"].values()) for r in (ddp, found)]
    assert len(losses[0]) == 50
    assert np.mean(losses[0][-5:]) < 0.6 * np.mean(losses[0][:5])
    assert max(abs(a - b) / a for a, b in zip(*losses, strict=True)) < 1e-3
    assert found["score"] == pytest.approx(ddp["score"], abs=1e-3)


@pytest.mark.parametrize(
    ("source", "engine", "size"),
    [(source, *target) for source, targets in TARGETS.items() for target in targets],
)
def test_any_checkpoint_goes_on_with_any_engine(
    folder: Path, source: str, engine: str, size: int
) -> None:
    """From step 6 as if nothing had happened: moments and their counts came along."""
    straight, moved = (
        result(folder, f"start:{source}", 2),
        result(folder, f"move:{engine}:{source}", size),
    )
    steps = list(moved["seen"]["train/loss"])
    assert steps == list(range(MOVE_AT, MOVE_STEPS))
    assert worst(moved, straight) < 1e-3


def test_checkpoints_of_all_engines_are_alike(folder: Path) -> None:
    found = [
        load_checkpoint(
            folder / f"start-{engine}" / "2/checkpoints" / f"step-{MOVE_STEPS:08d}", CPU
        )
        for engine in ENGINES
    ]
    reference, _ = found[0]
    for tensors, state in found:
        assert state.step == MOVE_STEPS
        assert tensors["model"].keys() == reference["model"].keys()
        assert tensors["optimizer"]["step"] == reference["optimizer"]["step"]
        for name, moment in reference["optimizer"]["exp_avg"].items():
            assert tensors["optimizer"]["exp_avg"][name].shape == moment.shape
            assert moment.abs().max() > 0
    assert "best" in names(folder / "start-ddp/2/checkpoints")
