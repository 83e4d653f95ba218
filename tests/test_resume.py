"""Where training goes on after odd ends: half of a stage's end, another schedule, other shards."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medpsp.config import Config, TrainConfig
from medpsp.errors import Interrupted
from medpsp.train.checkpoint import STATE, read_state, rewrite_state
from medpsp.train.loop import Run, fit
from medpsp.train.stop import StopRequest
from medpsp.types import Window
from shards.crops import jittered
from tests.damage import flip
from tests.squares import make_config, make_run, names, network

TWO = ({"name": "warm", "steps": 2}, {"name": "full", "steps": 2})


def stopped_at(config: Config, folder: Path, step: int) -> Run:
    """A run that was asked to end in a step, and the same one for another start."""
    run = make_run(config, folder)

    def batches(stage: int, first: int):  # type: ignore[no-untyped-def]
        for number, batch in enumerate(run.batches(stage, first)):
            if sum(s.steps for s in config.train.stages[:stage]) + first + number + 1 == step:
                asking.stop._heard(signal.SIGTERM, None)
            yield batch

    asking = replace(run, batches=batches, stop=StopRequest())
    with pytest.raises(Interrupted):
        fit(asking, network(config))
    return run


def test_who_is_asked_to_end_does_not_validate_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"name": "full", "steps": 4}, eval_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("medpsp.train.saving.validate", lambda *_: pytest.fail("it validates"))
        run = stopped_at(config, tmp_path, 2)
    assert not read_state(run.checkpoints / "step-00000002").scored
    fit(run, network(config))
    assert read_state(run.checkpoints / "step-00000002").scored


def test_what_a_begun_stage_goes_on_with_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(make_config(*TWO), tmp_path, 3)
    other = make_config(TWO[0], {**TWO[1], "lr": 0.5, "fraction": 0.5})
    logging.getLogger("medpsp").propagate = True
    fit(make_run(other, tmp_path), network(other))
    (line,) = [text for text in caplog.messages if "goes on with" in text]
    assert line.startswith("train: stage full goes on with lr 0.5, begun with ")
    assert "fraction 0.5, begun with 1.0" in line


@pytest.mark.parametrize("left", ["stage-0-warm", "step-00000002"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_half_of_a_stages_end_is_made_whole(tmp_path: Path, left: str, how: str) -> None:
    """As after a kill, or a full disk, between its two folders."""
    config = make_config(*TWO)
    run = stopped_at(config, tmp_path, 2)
    (lost,) = {"stage-0-warm", "step-00000002"} - {left}
    if how == "missing":
        shutil.rmtree(run.checkpoints / lost)
    else:
        flip(run.checkpoints / lost / STATE, 999)
    fit(run, network(config))
    assert read_state(run.checkpoints / "stage-0-warm") == read_state(
        run.checkpoints / "step-00000002"
    )
    assert {"stage-0-warm", "stage-1-full", "step-00000004"} <= set(names(run.checkpoints))


def test_a_stage_that_is_shortened_to_what_is_done_ends_there(tmp_path: Path) -> None:
    stopped_at(make_config({"name": "full", "steps": 9}), tmp_path, 3)
    config = make_config({"name": "full", "steps": 3})
    run = make_run(config, tmp_path)
    assert fit(run, network(config)).step == 3
    assert read_state(run.checkpoints / "stage-0-full").scored


def test_scores_on_other_shards_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config({"name": "full", "steps": 4}, eval_every=1)
    first = stopped_at(config, tmp_path, 3)
    for path in first.checkpoints.glob("step-*"):
        state = replace(read_state(path), content="before", score=2.0, best=2.0, scored=True)
        rewrite_state(path, state)
    run = replace(make_run(config, tmp_path), content="after")
    caplog.set_level("WARNING", logger="medpsp")
    logging.getLogger("medpsp").addHandler(caplog.handler)
    state = fit(run, network(config))
    logging.getLogger("medpsp").removeHandler(caplog.handler)
    assert "the shards are not those of step 3" in caplog.text
    assert state.best <= 1
    assert read_state(run.checkpoints / "best").content == "after"
    assert fit(run, network(config)).best == state.best


@pytest.mark.parametrize("steps", [300, 300.0, "300"])
def test_steps_of_a_preset_may_be_written_in_any_way(steps: object) -> None:
    train = TrainConfig.model_validate({"preset": "article", "steps": steps})
    assert [(s.name, s.steps) for s in train.stages] == [
        ("backbone", 100),
        ("head", 100),
        ("all", 100),
    ]


@pytest.mark.parametrize("preset", ["progressive", "article", "onecycle"])
def test_the_stages_of_a_preset_have_its_steps(preset: str) -> None:
    for steps in (3, 4, 5, 7, 100):
        train = TrainConfig.model_validate({"preset": preset, "steps": steps})
        assert sum(stage.steps for stage in train.stages) == steps


def test_jitter_leaves_narrow_windows_narrow() -> None:
    """Of maps in small units; a linear window has a width of at least 1 (PS3.3 C.11.2.1.2)."""
    rng = np.random.default_rng(1)
    (narrow,) = jittered((Window(center=0.001, width=0.002),), 0.05, rng)
    assert 0.0019 <= narrow.width <= 0.0021
    (linear,) = jittered((Window(center=1, width=1, function="LINEAR"),), 0.5, rng)
    assert linear.width >= 1
