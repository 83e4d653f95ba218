"""The training loop on squares that are brighter than their surroundings.

Run as a program, this file is one of two ranks.
"""

from __future__ import annotations

import io
import logging
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from medpsp.config import TrainConfig
from medpsp.errors import CheckpointError, ConfigError, NonFiniteLossError, TrainError
from medpsp.model.psp import PSPNet, build_model
from medpsp.tiles import Tiling
from medpsp.train.batch import Batch
from medpsp.train.board import Board
from medpsp.train.checkpoint import (
    TrainState,
    load_checkpoint,
    read_state,
    rewrite_state,
    save_checkpoint,
)
from medpsp.train.ema import Average
from medpsp.train.loop import Run, fit
from medpsp.train.memory import memory_note
from medpsp.train.metrics import dice_per_class
from medpsp.train.optimizer import no_moments
from medpsp.train.resume import restore
from medpsp.train.same import identify, schedule_of
from medpsp.train.stop import StopRequest
from medpsp.train.validate import evaluate, shown_channels, validate
from medpsp.types import World
from tests.squares import BATCH, CPU, SIZE, make_config, make_run, names, network, squares


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


class Killed(RuntimeError):
    """Stands for the end of the process."""


def interrupt(run: Run, at: int) -> Run:
    """The same run, whose batches end the process before the n-th one it asks for."""
    asked = 0

    def batches(stage: int, first: int) -> Iterable[Batch]:
        nonlocal asked
        for batch in run.batches(stage, first):
            if asked == at:
                raise Killed
            asked += 1
            yield batch

    return replace(run, batches=batches)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, PSPNet, TrainState]:
    """Forty steps in two stages."""
    stages = ({"name": "warm", "steps": 15}, {"name": "full", "steps": 25, "lr": 2e-3})
    config = make_config(*stages, eval_every=10)
    run, model = make_run(config, tmp_path_factory.mktemp("run")), network(config)
    state = fit(run, model)
    run.board.close()
    return run, model, state


def events(run: Run) -> EventAccumulator:
    found = EventAccumulator(str(run.checkpoints.parent / "tensorboard"))
    found.Reload()
    return found


def test_it_learns(trained: tuple[Run, PSPNet, TrainState]) -> None:
    run, model, state = trained
    losses = [event.value for event in events(run).Scalars("train/loss")]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.65 * np.mean(losses[:5])
    assert state.step == 40
    assert state.best >= state.score > 0.7
    assert state.best > 0.8
    counts = evaluate(model, [squares(99)], 2, Tiling((SIZE, SIZE)))
    assert counts.sum() == BATCH * SIZE * SIZE
    assert dice_per_class(counts)[1] == pytest.approx(state.score, abs=1e-12)


class AboveTheMean(nn.Module):
    """Class 1 is what is above the mean of all that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        one = self.scale * (x - x.mean((2, 3), keepdim=True))
        return torch.cat([-one, one], 1), None


def test_validation_shows_the_network_as_much_as_training(tmp_path: Path) -> None:
    config = make_config({"name": "a", "steps": 1}, size=[32, 32])
    run = make_run(config, tmp_path)
    batch = squares(5)
    image = torch.zeros_like(batch.image)
    image[..., :32, :32], image[..., 40:50, 40:50] = 1.0, 0.2
    label = torch.zeros_like(batch.label)
    label[..., 40:50, 40:50] = 1
    seen = replace(batch, image=image, label=label)
    run = replace(run, val_batches=lambda: [seen], examples=None)
    assert config.tiling == Tiling((32, 32), 0.5)
    by_tiles = validate(run, AboveTheMean(), 1)
    counts = evaluate(AboveTheMean(), [seen], 2, Tiling((64, 64)))
    assert dice_per_class(counts)[1] == 0  # in the whole slice it is below the mean
    assert by_tiles > 0.1
    run.board.close()


def test_what_a_run_leaves(trained: tuple[Run, PSPNet, TrainState]) -> None:
    run, model, state = trained
    kept = names(run.checkpoints)
    assert {"best", "stage-0-warm", "stage-1-full", "step-00000030", "step-00000040"} <= set(kept)
    assert len(kept) <= 6  # the best may be a third step
    assert read_state(run.checkpoints / "stage-0-warm").step == 15
    best = read_state(run.checkpoints / "best")
    assert best.score == best.best == state.best
    tensors, newest = load_checkpoint(run.checkpoints / "step-00000040", CPU)
    assert newest == state
    assert_equal(tensors["model"], model.state_dict())
    board = events(run)
    assert [event.step for event in board.Scalars("val/dice_mean")] == [10, 15, 20, 30, 40]
    assert board.Scalars("val/dice/square")[-1].value == pytest.approx(state.score)
    assert [event.value for event in board.Scalars("stage/index")] == [0] * 15 + [1] * 25
    image = board.Images("val/overlay (image, truth, prediction)")[-1]
    assert (image.width, image.height) == (3 * SIZE, 2 * SIZE)
    rates = [event.value for event in board.Scalars("train/lr/head")]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3], rel=0.02)  # two steps of warm-up
    assert rates[15] == pytest.approx(2e-3)


def test_overlays_in_colour(tmp_path: Path) -> None:
    """One image, red at the left and blue at the right, whose right half is class 1 in truth."""
    image = np.zeros((1, 3, 2, 4), dtype=np.float32)
    image[0, 0, :, :2] = image[0, 2, :, 2:] = 1
    truth = np.zeros((1, 2, 4), dtype=np.uint8)
    truth[:, :, 2:] = 1
    board = Board(tmp_path, 0)
    board.overlays(0, image, truth, np.zeros_like(truth))
    board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    (event,) = found.Images("val/overlay (image, truth, prediction)")
    drawn = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    red, blue, tinted = [255, 0, 0], [0, 0, 255], [103, 71, 140]  # 0.55 blue + 0.45 (230, 159, 0)
    assert (
        drawn[0].tolist()
        == [red] * 2 + [blue] * 2 + [red] * 2 + [tinted] * 2 + [red] * 2 + [blue] * 2
    )


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ({}, [0]),
        ({"context": 2}, [2]),
        ({"context": 1, "in_channels": 3}, [3, 4, 5]),
        ({"in_channels": 3}, [0, 1, 2]),
        ({"context": 1, "windows": [{"center": 0, "width": 1}] * 2}, [2]),
    ],
)
def test_the_slice_itself_is_drawn(model: dict[str, Any], shown: list[int]) -> None:
    config = make_config({"name": "a", "steps": 1}, model=model).model
    images = np.arange(config.channels, dtype=np.float32)[None, :, None, None]
    assert shown_channels(images, config)[0, :, 0, 0].tolist() == shown


def test_a_finished_run_is_not_trained_again(trained: tuple[Run, PSPNet, TrainState]) -> None:
    run, model, state = trained
    again = network(run.config, seed=5)
    assert fit(interrupt(run, 0), again) == state
    assert_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(("stop", "saved"), [(5, 4), (7, 6)])
def test_resuming_equals_never_having_stopped(tmp_path: Path, stop: int, saved: int) -> None:
    config = make_config(
        {"name": "warm", "steps": 4}, {"name": "full", "steps": 4, "lr": 1e-3}, eval_every=3
    )
    straight = network(config)
    fit(make_run(config, tmp_path / "straight"), straight)
    stopped, run = network(config), make_run(config, tmp_path / "stopped")
    with pytest.raises(Killed):
        fit(interrupt(run, stop), stopped)
    assert names(run.checkpoints)[-1] == f"step-{saved:08d}"  # a stage's end, or within a stage
    fresh = network(config, seed=1)  # a new process knows nothing but the files
    state = fit(run, fresh)
    assert state.step == 8
    assert_equal(fresh.state_dict(), straight.state_dict())
    pair = [
        load_checkpoint(tmp_path / name / "checkpoints" / "step-00000008", CPU)
        for name in ("straight", "stopped")
    ]
    assert pair[0][1] == pair[1][1]
    first, second = (tensors["optimizer"] for tensors, _ in pair)
    assert first["step"] == second["step"]
    assert set(first["step"].values()) == {8}
    for key in ("exp_avg", "exp_avg_sq"):
        assert_equal(first[key], second[key])


def test_a_kill_between_saving_and_marking_the_best_is_made_good(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 3}, eval_every=1)
    run, model = make_run(config, tmp_path), network(config)
    with pytest.raises(Killed):
        fit(interrupt(run, 1), model)
    (run.checkpoints / "best").unlink()
    state = restore(run, model).state
    assert read_state(run.checkpoints / "best") == state
    tensors, _ = load_checkpoint(run.checkpoints / "best", CPU)
    worse = replace(state, step=2, score=state.best - 0.1)
    save_checkpoint(run.checkpoints, "step-00000002", tensors, worse)
    assert restore(run, model).state == worse
    assert read_state(run.checkpoints / "best").step == 1  # the newest is not the best
    unscored = replace(state, step=3, scored=False)  # its score is of the evaluation before
    save_checkpoint(run.checkpoints, "step-00000003", tensors, unscored)
    assert restore(run, model).state == unscored
    assert read_state(run.checkpoints / "best").step == 1


@pytest.mark.parametrize(
    ("wish", "there", "kind", "reason"),
    [
        ("must", False, CheckpointError, "none, and train.resume is must"),
        ("never", True, ConfigError, "train.resume=never refuses to go on"),
    ],
)
def test_what_resume_forbids(
    tmp_path: Path, wish: str, there: bool, kind: type[Exception], reason: str
) -> None:
    config = make_config({"name": "full", "steps": 1}, resume=wish)
    run = make_run(config, tmp_path)
    if there:
        fit(make_run(make_config({"name": "full", "steps": 1}), tmp_path), network(config))
    with pytest.raises(kind, match=reason):
        fit(run, network(config))


def test_another_model_is_refused(trained: tuple[Run, PSPNet, TrainState]) -> None:
    run = trained[0]
    model = run.config.model.model_copy(update={"bins": (1, 2), "psp_channels": 24})
    other = run.config.model_copy(update={"model": model})
    words = r": model\.bins: made with .*, now \[1, 2\]; model\.psp_channels: made with \d+, now"
    with pytest.raises(CheckpointError, match=words):
        fit(replace(run, config=other), build_model(model, 2))
    dropout = run.config.model.model_copy(update={"dropout": 0.5})  # changes no weight
    assert identify(run.config.model_copy(update={"model": dropout})) == identify(run.config)


@pytest.mark.parametrize(("trains", "still"), [("head", "backbone"), ("backbone", "head")])
def test_what_does_not_train_does_not_change(tmp_path: Path, trains: str, still: str) -> None:
    config = make_config({"name": "only", "steps": 2, "trains": trains})
    model = network(config)
    other = {"head": "backbone", "backbone": "head"}[still]
    before = {part: [p.clone() for p in model.part_parameters(part)] for part in (still, other)}
    buffers = {n: b.clone() for n, b in model.backbone.named_buffers()}
    fit(make_run(config, tmp_path), model)
    pairs = zip(before[still], model.part_parameters(still), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)
    pairs = zip(before[other], model.part_parameters(other), strict=True)
    assert sum(not torch.equal(old, new) for old, new in pairs) > 0.9 * len(before[other])
    fixed = [torch.equal(buffers[n], b) for n, b in model.backbone.named_buffers()]
    assert all(fixed) == (trains == "head")


def test_a_part_thaws_in_the_next_stage(tmp_path: Path) -> None:
    config = make_config({"name": "a", "steps": 1, "trains": "head"}, {"name": "b", "steps": 1})
    model = network(config)
    before = [p.clone() for p in model.part_parameters("backbone")]
    fit(make_run(config, tmp_path), model)
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before, model.part_parameters("backbone"), strict=True)
    ]
    assert sum(changed) > 0.7 * len(changed)  # gains of 0 keep gradients from some at first


def broken(run: Run, *steps: int) -> Run:
    """The same run, with NaN in the batches of some steps."""

    def batches(stage: int, first: int) -> Iterator[Batch]:
        for step, batch in enumerate(run.batches(stage, first), start=first):
            if step in steps:
                batch.image[0, 0, 0, 0] = float("nan")
            yield batch

    return replace(run, batches=batches)


@pytest.mark.parametrize("model", [{}, {"norm": "group"}])
def test_a_bad_step_is_left_out(tmp_path: Path, model: dict[str, Any]) -> None:
    """Weights, moments, norm statistics: as if step 2 had not been; but its rate is used up."""
    config = make_config({"name": "full", "steps": 3, "shape": "constant"}, model=model)
    run, left = make_run(config, tmp_path / "a"), network(config)
    fit(broken(run, 1), left)
    shorter = make_config({"name": "full", "steps": 2, "shape": "constant"}, model=model)
    plain = make_run(shorter, tmp_path / "b")

    def without(stage: int, first: int) -> Iterator[Batch]:
        yield squares(0)
        yield squares(2)

    missing = network(shorter)
    fit(replace(plain, batches=without), missing)
    assert_equal(
        {k: v for k, v in left.state_dict().items() if not k.endswith("num_batches_tracked")},
        {k: v for k, v in missing.state_dict().items() if not k.endswith("num_batches_tracked")},
    )
    assert [event.value for event in events(run).Scalars("train/bad_steps")] == [0, 1, 1]


def test_too_many_bad_steps_end_training(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 9}, save_every=1, most_bad_steps=3)
    run = broken(make_run(config, tmp_path), 1, 3, 4, 5)
    with pytest.raises(NonFiniteLossError, match=r"step 5: .* 3 times in a row; .* 5/0, 5/1"):
        fit(run, network(config))
    tensors, state = load_checkpoint(run.checkpoints / "step-00000005", CPU)
    assert (state.step, state.bad) == (5, 2)
    assert all(torch.isfinite(t).all() for t in tensors["model"].values() if t.is_floating_point())
    with pytest.raises(NonFiniteLossError, match=r"step 5: .* 3 times in a row"):
        fit(broken(run, 5), network(config))  # a restart does not forget them


def test_bad_steps_before_a_restart_do_not_end_good_ones(tmp_path: Path) -> None:
    """As many as may be, saved by a signal before anybody looked."""
    config = make_config({"name": "full", "steps": 9}, log_every=20, most_bad_steps=3)
    run = make_run(config, tmp_path)
    with pytest.raises(NonFiniteLossError):  # saving looks, so nothing is saved
        fit(broken(replace(run, stop=StopAt(4)), 1, 2, 3), network(config))
    assert not list(run.checkpoints.glob("step-*"))
    state = TrainState(step=4, stage="full", best=-1, score=0, model=identify(config), bad=3)
    state = replace(state, scored=False, schedule=schedule_of(config))
    model = network(config)
    tensors = {"model": model.state_dict(), "optimizer": no_moments()}
    save_checkpoint(run.checkpoints, "step-00000004", tensors, state)
    assert fit(run, model).step == 9


class StopAt(StopRequest):
    """Asked to end after some steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._left = step

    @property
    def code(self) -> int:
        self._left -= 1
        return signal.SIGTERM if self._left <= 0 else 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A gradient may be finite, and the step all the same too long for a float."""
    shape = {"name": "full", "steps": 6, "shape": "constant"}
    config = make_config({**shape, "lr": 3e-3}, save_every=1, warmup_steps=0)
    run = make_run(config, tmp_path)
    with pytest.raises(Killed):
        fit(interrupt(run, 2), network(config))
    worse = make_config({**shape, "lr": 1e39}, save_every=1, warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"step 3: weights became .* from step 2$"):
        fit(make_run(worse, tmp_path), network(worse))
    assert fit(run, network(config)).step == 6  # as the message says


def test_a_checkpoint_is_there_before_it_is_scored(tmp_path: Path) -> None:
    """A kill while the validation runs costs nothing, and the score comes after the restart."""
    config = make_config({"name": "full", "steps": 6}, eval_every=3, ema=0.9)
    straight = make_run(config, tmp_path / "a")
    fit(straight, network(config))
    run = make_run(config, tmp_path / "b")

    def dies() -> Iterable[Batch]:
        raise Killed

    with pytest.raises(Killed):
        fit(replace(run, val_batches=dies), network(config))
    assert not read_state(run.checkpoints / "step-00000003").scored
    assert not (run.checkpoints / "best").exists()
    fit(run, network(config))
    assert names(run.checkpoints) == names(straight.checkpoints)
    for name in names(run.checkpoints):
        (first, one), (second, two) = (
            load_checkpoint(r.checkpoints / name, CPU) for r in (straight, run)
        )
        assert one == two
        assert_equal(first["model"], second["model"])


def test_the_best_one_left_is_marked_where_the_best_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config({"name": "full", "steps": 4}, eval_every=1)
    run, model = make_run(config, tmp_path), network(config)
    fit(run, model)
    for number, path in enumerate(sorted(run.checkpoints.glob("st*"))):
        state = read_state(path)
        rewrite_state(path, replace(state, best=0.9, score=0.1 * number, scored=True))
    (run.checkpoints / "best").unlink()
    caplog.set_level("WARNING", logger="medpsp")
    logging.getLogger("medpsp").addHandler(caplog.handler)
    restored = restore(run, model)
    logging.getLogger("medpsp").removeHandler(caplog.handler)
    left = read_state(run.checkpoints / "best")
    assert restored.state.best == left.score < 0.9
    assert "the best checkpoint, Dice 0.900, is gone; the best one left is" in caplog.text


def test_batches_that_end_too_early(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 5})
    run = replace(make_run(config, tmp_path), batches=lambda stage, first: [squares(0)])
    with pytest.raises(TrainError, match="stage full: the batches ended before step 5"):
        fit(run, network(config))


@pytest.mark.parametrize(
    ("engine", "ranks", "told"),
    [
        ("ddp", 4, "16 MiB on a rank, activations"),
        ("zero1", 4, "10 MiB on a rank, 6 MiB less than ddp"),
        ("zero3", 4, "8 MiB on a rank, 8 MiB less than ddp"),  # 16 / 4, and 4 for the copy
        ("zero3", 1, "20 MiB on a rank, 4 MiB more than ddp"),
    ],
)
def test_what_an_engine_takes_counts_the_copy_that_is_scored(
    engine: str, ranks: int, told: str
) -> None:
    train = TrainConfig.model_validate({"engine": engine})
    net = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    assert told in memory_note(net, train, World(size=ranks))
    assert (Average(net, train).scored(net.state_dict()) is not net) == (engine == "zero3")  # type: ignore[arg-type, comparison-overlap]
