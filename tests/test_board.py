"""What TensorBoard is told: counts, pictures, texts, and curves that a kill does not double.

Run as a program, this file is a run that is killed.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginAccumulator,
)
from tensorboard.util.tensor_util import make_ndarray

from medpsp.config import Config
from medpsp.tiles import Tiling
from medpsp.train import boardcounts, saving
from medpsp.train.batch import Batch
from medpsp.train.board import Board, ranked
from medpsp.train.boardcounts import BUCKETS, Tally, sum_all
from medpsp.train.boardsetup import data_text, finish, hparams_of, layout_of, open_board
from medpsp.train.calibration import BINS, calibration_bins
from medpsp.train.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from medpsp.train.loop import Run, fit
from medpsp.train.metrics import dice_per_class
from medpsp.train.pictures import (
    BOTH,
    PREDICTED,
    TRUTH,
    UNKNOWN,
    confusion_picture,
    contoured,
    outline,
    reliability_picture,
    tinted_rows,
)
from medpsp.train.validate import evaluate
from tests.squares import CPU, SIZE, make_config, make_run, network, squares

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
SCORED = [4, 5, 10, 12]


# counts -----------------------------------------------------------------------------------------


def tally_of_four() -> Tally:
    """Four pixels and an ignored one, of two classes."""
    sure = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.9])
    tally = Tally.empty(2)
    label = torch.tensor([1, 1, 0, 0, 255], dtype=torch.uint8)
    tally.add(torch.stack([1 - sure, sure])[None, :, None], label[None, None])
    return tally


def test_a_curve_by_hand() -> None:
    curve = tally_of_four().curve(1)
    assert {len(of) for of in curve} == {BUCKETS}
    at: dict[int, tuple[float, ...]] = {
        0: (2, 2, 0, 0, 0.5, 1),
        31: (2, 1, 1, 0, 2 / 3, 1),
        63: (2, 0, 2, 0, 1, 1),
        64: (1, 0, 2, 1, 1, 0.5),
        126: (1, 0, 2, 1, 1, 0.5),
    }
    for place, expected in at.items():
        assert [of[place] for of in curve] == pytest.approx(expected)
    nothing = Tally.empty(2).curve(1)
    assert all((of == 0).all() for of in nothing)


def test_the_bins_are_those_of_the_evaluation() -> None:
    """A pixel of 0.5 to 0.5 is called background, which is wrong here."""
    sure = np.array([1, 0.5, 0.75, 1], dtype=np.float32)
    right = np.array([True, False, True, True])
    np.testing.assert_array_equal(tally_of_four().bins, calibration_bins(sure, right))


def test_the_tally_and_dice_are_of_the_same_forward_pass() -> None:
    model, tally = network(make_config({"name": "a", "steps": 1})), Tally.empty(2)
    batches = [squares(1), squares(2)]
    counts = evaluate(model, batches, 2, Tiling((SIZE, SIZE)), tally)
    np.testing.assert_array_equal(counts, evaluate(model, batches, 2, Tiling((SIZE, SIZE))))
    assert tally.bins[0].sum() == tally.pixels[1].sum() == counts.sum()
    assert tally.bins[2].sum() == np.diag(counts).sum()
    assert tally.pixels[1, 1].sum() == counts[1].sum()
    half = tally.curve(1)  # with two classes, the mask is p >= 0.5 = 63/126
    assert half.true_positives[63] == pytest.approx(counts[1, 1], abs=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    broken = Tally.empty(2)
    evaluate(model, batches[:1], 2, Tiling((SIZE, SIZE)), broken)
    assert np.isfinite(broken.bins).all()


def test_ranks_add_up_in_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def two_equal_ranks(counts: np.ndarray, device: torch.device) -> np.ndarray:
        calls.append(counts.dtype)
        return 2 * counts

    monkeypatch.setattr(boardcounts, "sum_counts", two_equal_ranks)
    mine, tally = np.array([[3, 1], [0, 5]]), tally_of_four()
    counts, both = sum_all(mine, tally, CPU)
    assert calls == [np.int64]
    np.testing.assert_array_equal(counts, 2 * mine)
    np.testing.assert_array_equal(both.pixels, 2 * tally.pixels)
    np.testing.assert_allclose(both.bins, 2 * tally.bins, rtol=1e-6)


# pictures ---------------------------------------------------------------------------------------


def test_worst_median_and_best() -> None:
    """Class 1 in the upper of 4 rows, in the second slice found in one more, in others nowhere."""
    truth = np.zeros((5, 4, 4), dtype=np.uint8)
    truth[:4, :1] = 1
    found = truth.copy()
    found[1, 1] = 1
    found[[2, 3]] = 0
    found[3, 0, 0] = 1
    assert ranked(truth, found) == {
        "worst": (2, 0.0),
        "median": (3, pytest.approx(0.4)),  # 2 * 1 / (4 + 1), the lower of the two in the middle
        "best": (0, 1.0),
    }
    assert list(ranked(truth[:3], found[:3])) == ["worst", "median", "best"]
    assert ranked(truth[:2], found[:2]) == {"worst": (1, pytest.approx(2 / 3)), "best": (0, 1.0)}
    assert ranked(truth[:1], found[:1]) == {"worst": (0, 1.0)}
    assert ranked(truth[4:], found[4:]) == {}  # nothing there, nothing found
    truth[4] = 255
    assert ranked(truth[4:], found[4:]) == {}


def test_contours_by_hand() -> None:
    """On 8 x 8: truth in columns 0 to 3, prediction in rows 0 to 3, the last column ignored."""
    truth, found = np.zeros((8, 8), dtype=np.uint8), np.zeros((8, 8), dtype=np.uint8)
    truth[:, :4] = 1
    found[:4] = 1
    truth[:, 7] = 255
    drawn = contoured(np.full((8, 8), 0.5, np.float32), truth, found, "a case")
    assert drawn.shape == (2 * 640 + 40, 640, 3)
    plain, lower = drawn[:640], drawn[640:1280]
    assert np.unique(plain).tolist() == [127]
    cell = 80
    assert tuple(lower[6 * cell, 4 * cell - 1]) == TRUTH
    assert tuple(lower[4 * cell - 1, 6 * cell]) == PREDICTED
    assert tuple(lower[4 * cell - 1, 4 * cell - 1]) == BOTH
    assert tuple(lower[4 * cell, 7 * cell + 9]) == UNKNOWN
    assert tuple(lower[2 * cell, 2 * cell]) == (127, 127, 127)  # inside
    assert outline(np.zeros((5, 5), np.uint8)).sum() == 0


def test_a_network_draws_nothing_on_padding() -> None:
    """On 4 x 4: the last column is padding, and the network calls all of it a class."""
    truth, found = np.zeros((1, 4, 4), np.uint8), np.ones((1, 4, 4), np.uint8)
    truth[..., 3] = 255
    drawn = tinted_rows(np.full((1, 4, 4), 0.5, np.float32), truth, found)
    assert drawn.shape == (4, 12, 3)
    image, true, predicted = np.split(drawn, 3, axis=1)
    assert np.unique(image).tolist() == [127]
    for panel in (true, predicted):
        assert {tuple(pixel) for pixel in panel[:, 3].tolist()} == {UNKNOWN}
    assert (true[:, :3] == 127).all()
    assert (predicted[:, :3] == predicted[0, 0]).all()
    assert (predicted[0, 0] != 127).any()


def test_a_confusion_matrix_is_darker_where_more_is() -> None:
    counts = np.array([[90, 10, 0], [5, 5, 0], [0, 0, 0]])
    drawn = confusion_picture(counts, ("background", "liver", "a very long name of a class"))
    corner = [[drawn[64 + 84 * r + 4, 120 + 84 * c + 4, 0] for c in range(3)] for r in range(3)]
    assert corner == [[26, 230, 255], [128, 128, 255], [255, 255, 255]]  # 255 (1 - share)
    many = confusion_picture(np.eye(40, dtype=np.int64), [f"class {n}" for n in range(40)])
    assert max(many.shape) < 1200


def test_the_bars_of_a_reliability_diagram() -> None:
    """Sure by 0.9, right by 0.6: a bar of 0.6, and the missing 0.3 above it."""
    bins = calibration_bins(np.full(10, 0.9, np.float32), np.arange(10) < 6)
    drawn = reliability_picture(bins)
    left, low = 56, 52 + 400  # of the origin
    column = drawn[:, left + round(400 * 13.5 / BINS) - 8]
    blue = np.flatnonzero((column == (0, 114, 178)).all(1))
    assert (low - blue.min(), blue.max() - low) == pytest.approx((240, -1), abs=2)
    red = np.flatnonzero((drawn[:, left + 360] == (213, 94, 0)).all(1))
    assert (low - red.min(), low - red.max()) == pytest.approx((360, 240), abs=2)


# the run ----------------------------------------------------------------------------------------


def test_what_is_compared_between_runs() -> None:
    config = make_config({"name": "warm", "steps": 4, "lr": 0.25}, {"name": "full", "steps": 8})
    hidden = config.model.model_copy(update={"pretrained": Path("/secret/weights.pt")})
    found = hparams_of(config.model_copy(update={"model": hidden}))
    assert found["train/stages/warm/lr"] == 0.25
    assert found["model/backbone"] == "timm/test_resnet"
    assert found["train/size"] == "[64, 64]"
    assert found["model/aux"] == "false"
    assert not any("secret" in str(value) for value in found.values())
    assert layout_of(config)["validation"]["Dice"][1] == ["^val/dice_mean$", "^val/dice/square$"]
    weights = data_text("abc", config.data.classes, (0.5, 2))
    assert weights.endswith("| background | 0.5 |\n| square | 2 |")


def test_a_later_board_is_read_later(tmp_path: Path) -> None:
    """Files are read in the order of their names: of a second, host and process."""
    for _ in range(3):
        Board(tmp_path, 0).close()
    seconds = [int(path.name.split(".")[3]) for path in tmp_path.iterdir()]
    assert len(set(seconds)) == 3


def test_a_board_without_a_folder_writes_nothing(tmp_path: Path) -> None:
    config = make_config({"name": "a", "steps": 1})
    board = open_board(None, 0, config, {"data": "x"})
    board.scalars(0, {"a": 1})
    board.tables(0, config.data.classes, np.ones((2, 2), np.int64), tally_of_four())
    board.overlays(0, *(np.zeros((1, 4, 4)),) * 3)  # type: ignore[arg-type]
    finish(board, config, 1, 0.5)
    board.close()


def curve_config() -> Config:
    stages = ({"name": "warm", "steps": 4}, {"name": "full", "steps": STEPS - 4, "lr": 2e-3})
    return make_config(*stages, eval_every=5, save_every=5)


def run_in(folder: Path) -> Run:
    """As the training job makes it."""
    config = curve_config()
    run = make_run(config, folder / "unused")
    checkpoints = folder / "checkpoints"
    newest = latest_checkpoint(checkpoints)
    first = read_state(newest).step if newest else 0
    text = {"data": data_text("f00d", config.data.classes, (1, 1))}
    board = open_board(folder / "tensorboard", first, config, text)
    return replace(run, checkpoints=checkpoints, board=board)


def train_on(folder: Path) -> None:
    """From the newest checkpoint to the end."""
    torch.set_num_threads(1)  # as the process that was killed: sums depend on it
    run = run_in(folder)
    state = fit(run, network(run.config))
    finish(run.board, run.config, state.step, state.best)
    run.board.close()


def train_till_killed(folder: Path, at: int) -> None:
    """SIGKILL when ``at`` steps are done: nothing is flushed or closed.

    Between evaluation and checkpoint if these are due, else where the next batch is asked for.
    """
    run = run_in(folder)

    def save_or_die(where: Path, name: str, tensors: dict[str, Any], state: TrainState) -> Path:
        if state.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return save_checkpoint(where, name, tensors, state)

    def batches(stage: int, first: int) -> Iterator[Batch]:
        start = (0, 4)[stage]
        for step, batch in enumerate(run.batches(stage, first), start=start + first):
            if step == at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    with patch.object(saving, "save_checkpoint", save_or_die):
        fit(replace(run, batches=batches), network(run.config))


def killed_and_resumed(folder: Path, at: int) -> None:
    """Train in a process that is killed, and in this one to the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, __file__, str(folder), str(at)], env=env, stderr=-1, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    (events,) = (folder / "tensorboard").iterdir()
    with events.open("ab") as file:
        file.write(b"\x18\x00\x00")  # a record that was being written
    train_on(folder)


def read_events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def read_tensors(folder: Path, tag: str) -> list[tuple[int, np.ndarray]]:
    """Steps and values, as TensorBoard itself reads them: the above keeps tensors that are void."""
    found = PluginAccumulator(str(folder / "tensorboard"), tensor_size_guidance={"pr_curves": 0})
    found.Reload()
    return [(event.step, make_ndarray(event.tensor_proto)) for event in found.Tensors(tag)]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed with the events of five steps and an evaluation after a checkpoint."""
    folder = tmp_path_factory.mktemp("resumed")
    killed_and_resumed(folder, 10)
    return folder


def test_a_run_killed_before_any_checkpoint_starts_its_curves_anew(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, 2)
    found = read_events(tmp_path)
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, STEPS + 1))
    for text, steps in (("stage", [1, 5]), ("config", [1])):
        assert [step for step, _ in read_tensors(tmp_path, f"{text}/text_summary")] == steps


def test_curves_never_double(resumed: Path, tmp_path: Path) -> None:
    shutil.copytree(resumed, tmp_path, dirs_exist_ok=True)
    for again in range(2):
        found = read_events(tmp_path)
        scalars, images = (found.Tags()[kind] for kind in ("scalars", "images"))
        assert len(scalars) > 15
        steps = {tag: [event.step for event in found.Scalars(tag)] for tag in scalars}
        for tag in scalars:
            every = SCORED if tag.startswith("val/") else list(range(1, STEPS + 1))
            assert steps[tag] == ([STEPS + 1] if tag == "val/dice_best" else every), tag
        assert len(images) == 5  # of two examples none is the median
        assert all([event.step for event in found.Images(tag)] == SCORED for tag in images)
        curves = read_tensors(tmp_path, "val/pr/square")
        assert [step for step, _ in curves] == SCORED
        assert curves[-1][1].shape == (6, BUCKETS)
        marks = read_tensors(tmp_path, "stage/text_summary")
        assert [step for step, _ in marks] == [1, 5]
        assert b"**full**: steps 4 to 11" in marks[1][1][0]
        starts = [step for step, _ in read_tensors(tmp_path, "data/text_summary")]
        assert starts == [1, 6] + again * [STEPS + 1]  # each process says it once
        if not again:
            train_on(tmp_path)  # a finished run, started once more


def test_the_values_are_those_of_the_run(resumed: Path, tmp_path: Path) -> None:
    """Resumed or not: the same losses and scores, and the picture of the last evaluation."""
    train_on(tmp_path)
    pair = [read_events(folder) for folder in (resumed, tmp_path)]
    for tag in ("train/loss", "train/lr/head", "val/dice_mean", "val/ece", "stage/index"):
        one, other = ([event.value for event in found.Scalars(tag)] for found in pair)
        assert one == other, tag
    for tag in ("val/confusion", "val/reliability", "val/case/worst"):
        one, other = (found.Images(tag)[-1].encoded_image_string for found in pair)
        assert one == other, tag
    counts = evaluate_last(resumed)
    assert pair[0].Scalars("val/dice/square")[-1].value == pytest.approx(
        dice_per_class(counts)[1], abs=1e-6
    )


def evaluate_last(folder: Path) -> np.ndarray:
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    model = network(curve_config())
    model.load_state_dict(load_checkpoint(newest, CPU)[0]["model"])
    return evaluate(model, [squares(99)], 2, Tiling((SIZE, SIZE)))


def test_pictures_of_a_board(tmp_path: Path) -> None:
    """Of six examples four are drawn as rows; worst, median and best are among all six."""
    truth = np.zeros((6, 16, 16), dtype=np.uint8)
    truth[:, 4:12, 4:12] = 1
    found = truth.copy()
    found[5] = 0
    board = Board(tmp_path / "tensorboard", 0)
    board.overlays(0, np.zeros((6, 3, 16, 16), np.float32), truth, found)
    board.close()
    events = read_events(tmp_path)
    sizes = {
        tag: Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)).size
        for tag in events.Tags()["images"]
    }
    assert sizes.pop("val/overlay (image, truth, prediction)") == (3 * 16, 4 * 16)
    assert sizes == {f"val/case/{name}": (640, 1320) for name in ("worst", "median", "best")}


if __name__ == "__main__":
    train_till_killed(Path(sys.argv[1]), int(sys.argv[2]))
