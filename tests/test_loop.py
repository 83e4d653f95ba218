"""The training loop on squares that are brighter than their surroundings.

Run as a program, this file is one of two ranks.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
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

from medpsp.config import Config
from medpsp.errors import CheckpointError, NonFiniteLossError, TrainError
from medpsp.model.psp import PSPNet, build_model
from medpsp.train.batch import Batch
from medpsp.train.board import Board
from medpsp.train.checkpoint import TrainState, load_checkpoint, read_state, save_checkpoint
from medpsp.train.engine import process_group, sum_over_ranks, wrap
from medpsp.train.loop import Run, evaluate, fit, identify, resume, train_step
from medpsp.train.metrics import dice_per_class
from medpsp.types import World

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SIZE, BATCH = 64, 4
torch.set_num_threads(1)


def make_config(*stages: dict[str, Any], **train: Any) -> Config:
    plan = [{"augment": "none", "lr": 3e-3, **stage} for stage in stages]
    train = {"warmup_steps": 2, "eval_every": 1000, "log_every": 1, "batch_size": BATCH, **train}
    return Config.model_validate(
        {
            "data": {"archive": "none", "classes": ["background", "square"]},
            "model": {
                "backbone": "mobilenetv3_large_100",
                "psp_channels": 16,
                "decoder_channels": 16,
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
    return Batch(image=torch.from_numpy(image), label=torch.from_numpy(label), patients=names)


def share(batch: Batch, world: World) -> Batch:
    mine = slice(world.rank, None, world.size)
    return replace(
        batch, image=batch.image[mine], label=batch.label[mine], patients=batch.patients[mine]
    )


def make_run(config: Config, folder: Path, world: World | None = None) -> Run:
    """Batches depend on the stage and the step alone, as they do with shards."""
    world = world or World()

    def batches(stage: int, first: int) -> Iterator[Batch]:
        for step in range(first, config.train.stages[stage].steps + 3):  # three too many
            yield share(squares(1000 * stage + step), world)

    return Run(
        config=config,
        world=world,
        device=CPU,
        checkpoints=folder / "checkpoints",
        board=Board(folder / "tensorboard" if world.rank == 0 else None, 0),
        batches=batches,
        val_batches=lambda: [share(squares(99), world)],
        examples=squares(98, 2),
        weights=torch.ones(2),
    )


def network(config: Config, seed: int = 0) -> PSPNet:
    torch.manual_seed(seed)
    return build_model(config.model, 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


class Interrupted(RuntimeError):
    """Stands for the end of the process."""


def interrupt(run: Run, at: int) -> Run:
    """The same run, whose batches end the process before the n-th one it asks for."""
    asked = 0

    def batches(stage: int, first: int) -> Iterable[Batch]:
        nonlocal asked
        for batch in run.batches(stage, first):
            if asked == at:
                raise Interrupted
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
    assert state.best >= state.score > 0.9
    counts = evaluate(model, [squares(99)], 2, CPU)
    assert counts.sum() == BATCH * SIZE * SIZE
    assert dice_per_class(counts)[1] == pytest.approx(state.score, abs=1e-12)


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
    rates = [event.value for event in board.Scalars("train/lr")]
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
    with pytest.raises(Interrupted):
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
    first, second = (tensors["optimizer"]["state"] for tensors, _ in pair)
    for index in first:
        assert_equal(first[index], second[index])


def test_a_kill_between_saving_and_marking_the_best_is_made_good(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 3}, eval_every=1)
    run, model = make_run(config, tmp_path), network(config)
    with pytest.raises(Interrupted):
        fit(interrupt(run, 1), model)
    (run.checkpoints / "best").unlink()
    optimizer = torch.optim.AdamW(model.parameters())
    state = resume(run, model, optimizer)
    assert read_state(run.checkpoints / "best") == state
    tensors, _ = load_checkpoint(run.checkpoints / "best", CPU)
    worse = replace(state, step=2, score=state.best - 0.1)
    save_checkpoint(run.checkpoints, "step-00000002", tensors, worse)
    assert resume(run, model, optimizer) == worse  # the newest is not the best
    assert read_state(run.checkpoints / "best").step == 1


def test_another_model_is_refused(trained: tuple[Run, PSPNet, TrainState]) -> None:
    run = trained[0]
    model = run.config.model.model_copy(update={"bins": (1, 2), "psp_channels": 24})
    other = run.config.model_copy(update={"model": model})
    with pytest.raises(CheckpointError, match=r"made with other bins, psp_channels; use another"):
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
    assert sum(changed) > 0.9 * len(changed)


def test_a_loss_that_is_no_number_stops_at_once(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 5}, eval_every=1)
    run = make_run(config, tmp_path)

    def batches(stage: int, first: int) -> Iterator[Batch]:
        for step in range(first, 5):
            batch = squares(step)
            if step == 2:
                batch.image[0, 0, 0, 0] = float("nan")
            yield batch

    with pytest.raises(NonFiniteLossError, match="step 2: loss is nan"):
        fit(replace(run, batches=batches), network(config))
    tensors, state = load_checkpoint(run.checkpoints / "step-00000002", CPU)
    assert state.step == 2
    floats = [t for t in tensors["model"].values() if t.is_floating_point()]
    assert all(torch.isfinite(t).all() for t in floats)


class Rooted(nn.Module):
    """A finite loss with an infinite slope."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.cat([x, x + self.root.sqrt()], dim=1), None


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 5})
    model = Rooted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with pytest.raises(NonFiniteLossError, match="step 0: gradient is"):
        train_step(make_run(config, tmp_path), model, optimizer, squares(0), 0)
    assert float(model.root.detach()) == 0


def test_batches_that_end_too_early(tmp_path: Path) -> None:
    config = make_config({"name": "full", "steps": 5})
    run = replace(make_run(config, tmp_path), batches=lambda stage, first: [squares(0)])
    with pytest.raises(TrainError, match="stage full: the batches ended before step 5"):
        fit(run, network(config))


# Two ranks -------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two convolutions and an auxiliary head; no BatchNorm, so that ranks do not differ."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3, padding=1)
        self.main, self.aux = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.body(x))
        return self.main(features), self.aux(features)


def uneven() -> Batch:
    """Four slices; ranks take every second one, and rank 1 gets nearly all that counts."""
    generator = torch.Generator().manual_seed(4)
    label = torch.randint(0, 3, (4, 12, 10), generator=generator).to(torch.uint8)
    label[0], label[2, 1:] = 255, 255
    label[3] = 2
    image = torch.rand(4, 1, 12, 10, generator=generator)
    return Batch(image=image, label=label, patients=("a", "b", "c", "d"))


def one_step(world: World, folder: Path) -> dict[str, Any]:
    """Loss and gradients of the first step of the small network."""
    config = make_config({"name": "full", "steps": 1}, clip_norm=1e9)
    run = replace(make_run(config, folder, world), weights=torch.tensor([0.5, 1.0, 2.0]))
    torch.manual_seed(2)
    model = Tiny()
    net = wrap(model, world)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    loss = train_step(run, net, optimizer, share(uneven(), world), 0)
    return {
        "losses": [float(x) for x in (loss.total, loss.dice, loss.focal)],
        "grads": {name: p.grad.clone() for name, p in model.named_parameters()},
    }


def blow_up(world: World, folder: Path) -> str:
    """What a rank says when another one's image is broken."""
    config = make_config({"name": "full", "steps": 1})
    run = replace(make_run(config, folder, world), weights=torch.ones(3))
    net, batch = wrap(Tiny(), world), share(uneven(), world)
    if world.rank == 1:
        batch.image[0, 0, 0, 0] = float("inf")
    try:
        train_step(run, net, torch.optim.AdamW(net.parameters()), batch, 0)
    except NonFiniteLossError as error:
        return str(error)
    return ""


STAGES = (
    {"name": "warm", "steps": 3},
    {"name": "head", "steps": 2, "trains": "head"},
    {"name": "full", "steps": 3},
)


def whole_fit(world: World, folder: Path) -> dict[str, Any]:
    config = make_config(*STAGES, eval_every=2)
    model = network(config)
    state = fit(make_run(config, folder, world), model)
    return {"model": model.state_dict(), "state": vars(state)}


def rank_main(folder: Path) -> None:
    world = World(rank=int(os.environ["RANK"]), size=2, local_rank=int(os.environ["LOCAL_RANK"]))
    with process_group(world, threads=1) as device:
        total = sum_over_ranks(torch.tensor([1.0, float(world.rank)]))
        result = {
            "device": str(device),
            "sum": total.tolist(),
            "step": one_step(world, folder),
            "error": blow_up(world, folder),
            "fit": whole_fit(world, folder),
        }
    torch.save(result, folder / f"rank{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two gloo ranks found, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()  # if one died, the other would wait for it
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    return folder, [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


Ranks = tuple[Path, list[dict[str, Any]]]


def test_two_ranks_join_and_sum(ranks: Ranks) -> None:
    assert [result["device"] for result in ranks[1]] == ["cpu", "cpu"]
    assert [result["sum"] for result in ranks[1]] == [[2, 1], [2, 1]]


def test_one_and_two_ranks_take_the_same_first_step(ranks: Ranks, tmp_path: Path) -> None:
    alone = one_step(World(), tmp_path)
    for result in ranks[1]:
        assert result["step"]["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        for name, grad in alone["grads"].items():
            assert grad.abs().max() > 1e-3, name
            torch.testing.assert_close(result["step"]["grads"][name], grad, rtol=0, atol=1e-5)


def test_all_ranks_stop_for_one_broken_image(ranks: Ranks) -> None:
    first, second = (result["error"] for result in ranks[1])
    assert first == second
    assert first.startswith("step 0: loss is nan")


def test_ranks_stay_equal_through_all_stages(ranks: Ranks) -> None:
    folder, (first, second) = ranks
    assert first["fit"]["state"] == second["fit"]["state"]
    assert first["fit"]["state"]["step"] == 8
    assert_equal(first["fit"]["model"], second["fit"]["model"])
    assert names(folder / "checkpoints")[1:4] == ["stage-0-warm", "stage-1-head", "stage-2-full"]
    tensors, _ = load_checkpoint(folder / "checkpoints" / "step-00000008", CPU)
    assert_equal(tensors["model"], first["fit"]["model"])


def test_one_rank_goes_on_where_two_stopped(ranks: Ranks, tmp_path: Path) -> None:
    config = make_config(*STAGES, eval_every=2)
    run = make_run(config, tmp_path)
    shutil.copytree(ranks[0] / "checkpoints", run.checkpoints, symlinks=True)
    for name in ("step-00000008", "stage-2-full"):  # as if killed after step 6
        shutil.rmtree(run.checkpoints / name)
    tensors, state = load_checkpoint(run.checkpoints / "step-00000006", CPU)
    model = network(config, seed=9)
    assert (state.step, fit(run, model).step) == (6, 8)
    moved = [
        (model.state_dict()[name] - tensor).abs().max()
        for name, tensor in tensors["model"].items()
        if name.endswith("weight")
    ]
    assert 0 < max(moved) < 0.02  # two steps of Adam from there, not a start from new weights


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
