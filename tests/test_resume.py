"""Where training goes on after odd ends: half of a stage's end, another schedule, other shards."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch._dynamo

from medpsp.config import Config, TrainConfig
from medpsp.errors import CheckpointError, Interrupted
from medpsp.stages import in_steps
from medpsp.train.checkpoint import STATE, TrainState, mark_best, read_state, rewrite_state
from medpsp.train.loop import Run, fit
from medpsp.train.same import begun_stages, identify, refuse_other, schedule_of
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
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(make_config(*TWO), tmp_path, 3)
    other = make_config(TWO[0], {**TWO[1], "lr": 0.5, "fraction": 0.5})
    monkeypatch.setattr(logging.getLogger("medpsp"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("medpsp"), "handlers", [caplog.handler])
    fit(make_run(other, tmp_path), network(other))
    (line,) = [text for text in caplog.messages if "goes on with" in text]
    assert line.startswith("train: stage full goes on with lr 0.5, begun with ")
    assert "fraction 0.5, begun with 1.0" in line


def test_another_end_of_the_schedule_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(make_config(*TWO, {"name": "fine", "steps": 9}), tmp_path, 3)
    other = make_config(TWO[0], {**TWO[1], "steps": 3}, {"name": "fine", "steps": 1, "lr": 0.5})
    monkeypatch.setattr(logging.getLogger("medpsp"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("medpsp"), "handlers", [caplog.handler])
    fit(make_run(other, tmp_path), network(other))
    (line,) = [text for text in caplog.messages if "schedule" in text]
    assert line.startswith(
        "train: the schedule after step 3 is another: train.stages: made with 13 steps (warm 2 + "
        "full 2 + fine 9), now 6 steps (warm 2 + full 3 + fine 1); lr of stage fine: made with "
    )
    caplog.clear()
    fit(make_run(other, tmp_path), network(other))  # it knows the new one now
    assert not [text for text in caplog.messages if "schedule" in text]


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


def test_the_best_survives_the_lengthening_of_the_stage_that_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder of the stage's end is written anew; the name of its step was lost."""
    said = {4: 0.9}
    monkeypatch.setattr(
        "medpsp.train.saving.validate", lambda run, m, step, show=True: said.get(step, 0.1)
    )
    config = make_config({"name": "full", "steps": 4}, save_every=2, eval_every=2)
    run = make_run(config, tmp_path)
    fit(run, network(config))
    for path in run.checkpoints.glob("step-*"):
        shutil.rmtree(path)
    longer = make_config({"name": "full", "steps": 10}, save_every=2, eval_every=2)
    fit(make_run(longer, tmp_path), network(longer))
    best = read_state(run.checkpoints / "best")
    assert (best.step, best.score) == (4, 0.9)


def test_another_seed_is_refused_before_stages_in_epochs_have_steps() -> None:
    stages = [{"name": "full", "epochs": 3, "lr": 1e-3}]
    tree = make_config({"name": "full", "steps": 4}).model_dump(mode="json")
    tree["train"]["stages"] = stages
    config = Config.model_validate(tree)
    state = TrainState(
        step=2, stage="full", best=0, score=0, model=identify(config), schedule=schedule_of(config)
    )
    refuse_other(config, Path("step-00000002"), state, "")
    other = config.model_copy(update={"seed": config.seed + 1})
    with pytest.raises(CheckpointError, match=r": seed: made with 0, now 1; set it back, or try"):
        refuse_other(other, Path("step-00000002"), state, "")


def test_a_stage_that_is_shortened_to_what_is_done_ends_there(tmp_path: Path) -> None:
    stopped_at(make_config({"name": "full", "steps": 9}), tmp_path, 3)
    config = make_config({"name": "full", "steps": 3})
    run = make_run(config, tmp_path)
    assert fit(run, network(config)).step == 3
    assert read_state(run.checkpoints / "stage-0-full").scored


def scored_as(folder: Path, scores: dict[int, float], judged: str) -> None:
    """Checkpoints as if they had these scores."""
    best = max(scores, key=lambda step: scores[step])
    for path in (*folder.glob("step-*"), *folder.glob("stage-*")):
        state = read_state(path)
        so_far = max(score for step, score in scores.items() if step <= state.step)
        state = replace(state, judged=judged, content=judged, scored=True, best=so_far)
        rewrite_state(path, replace(state, score=scores[state.step]))
    mark_best(folder / f"step-{best:08d}")


@pytest.mark.parametrize("ends", [3, 4])
def test_the_best_is_scored_again_on_other_validation_slices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ends: int
) -> None:
    """Also where nothing is left to train: the last network is not the best because it is last."""
    config = make_config({"name": "full", "steps": ends}, eval_every=1)
    if ends == 3:
        first = make_run(config, tmp_path)
        fit(first, network(config))
    else:
        first = stopped_at(config, tmp_path, 3)
    scored_as(first.checkpoints, {2: 2.0, 3: 1.5}, "before")
    run = replace(make_run(config, tmp_path), content="after", judged="after")
    said = {2: 0.9, 3: 0.2, 4: 0.3}
    monkeypatch.setattr("medpsp.train.saving.validate", lambda run, m, step, show=True: said[step])
    monkeypatch.setattr(logging.getLogger("medpsp"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("medpsp"), "handlers", [caplog.handler])
    for _ in range(2):
        state = fit(run, network(config))
        assert (state.best, state.score) == (0.9, said[ends])
        best = read_state(run.checkpoints / "best")
        assert (best.step, best.score, best.judged) == (2, 0.9, "after")
    assert "the shards are not those of step 3" in caplog.text
    assert caplog.text.count("the best is scored again") == 1
    assert "is gone" not in caplog.text


@pytest.mark.parametrize("judged", ["now", ""])
def test_the_best_of_an_earlier_version_stays(tmp_path: Path, judged: str) -> None:
    """It knows neither its shards nor its slices; a newer one was compared with it."""
    config = make_config({"name": "full", "steps": 3}, eval_every=1)
    first = make_run(config, tmp_path)
    fit(first, network(config))
    scored_as(first.checkpoints, {2: 0.9, 3: 0.5}, "")
    for path in (*first.checkpoints.glob("step-*3"), *first.checkpoints.glob("stage-*")):
        rewrite_state(path, replace(read_state(path), content="X", judged=judged))
    run = replace(make_run(config, tmp_path), content="X", judged="now")
    assert fit(run, network(config)).best == 0.9
    assert read_state(run.checkpoints / "best").step == 2


def test_a_damaged_name_of_the_best_is_not_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"name": "warm", "steps": 3}, {"name": "full", "steps": 1}, eval_every=1)
    first = make_run(config, tmp_path)
    fit(first, network(config))
    scored_as(first.checkpoints, {3: 2.0, 4: 1.0}, "before")
    flip(first.checkpoints / "stage-0-warm" / "state.pt", 999)
    monkeypatch.setattr("medpsp.train.saving.validate", lambda run, m, step, show=True: 0.5)
    run = replace(make_run(config, tmp_path), content="after", judged="after")
    fit(run, network(config))
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(run.checkpoints / "stage-0-warm")
    assert read_state(run.checkpoints / "step-00000003").judged == "after"


@pytest.mark.parametrize("judged", ["now", ""])
def test_other_training_slices_leave_the_best_alone(tmp_path: Path, judged: str) -> None:
    config = make_config({"name": "full", "steps": 3}, eval_every=1)
    first = make_run(config, tmp_path)
    fit(first, network(config))
    scored_as(first.checkpoints, {2: 0.9, 3: 0.8}, judged)  # earlier versions know the shards only
    run = replace(make_run(config, tmp_path), content="after" if judged else "", judged="now")
    for _ in range(2):
        assert fit(run, network(config)).best == 0.9
        assert read_state(run.checkpoints / "best").step == 2


def test_who_is_asked_to_end_before_a_late_score_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"name": "full", "steps": 4}, eval_every=2)
    run = stopped_at(config, tmp_path, 2)
    monkeypatch.setattr("medpsp.train.saving.validate", lambda *_: pytest.fail("it validates"))
    run.stop._heard(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="after step 2"):
        fit(run, network(config))


@pytest.mark.parametrize("asked", ["a compiler", "nothing", "else"])
def test_compilers_that_the_signal_killed_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """A signal to all processes of a job ends those of torch.compile, too (gcc, Triton's)."""
    stopped_at(make_config({"name": "full", "steps": 4}), tmp_path, 2)
    config = make_config({"name": "full", "steps": 4}, compile=True)
    run, tries = make_run(config, tmp_path), []

    def killed(*_: object) -> None:
        tries.append(run.stop._heard(signal.SIGTERM, None) if asked != "nothing" else None)
        if asked == "else":
            raise RuntimeError("out of memory, not what was killed")
        raise torch._dynamo.exc.TorchDynamoException("a compiler was killed")

    monkeypatch.setattr("medpsp.train.loop.train_step", killed)
    compiler = asked == "a compiler"
    error = Interrupted if compiler else RuntimeError
    with pytest.raises(error, match="SIGTERM after step 2, which" if compiler else "was killed"):
        fit(run, network(config))
    assert len(tries) == 1


def test_stages_in_epochs_keep_the_steps_that_are_begun() -> None:
    stages = [
        {"name": name, "epochs": epochs, "lr": 1, "fraction": share}
        for name, epochs, share in (("warm", 2, 0.2), ("full", 10, 1.0), ("fine", 1, 1.0))
    ]
    train = TrainConfig.model_validate({"stages": stages, "batch_size": 16})
    before = in_steps(train, lambda share: round(1000 * share))
    assert [stage.steps for stage in before.stages] == [25, 625, 62]
    data = {"archive": "none", "classes": ["a", "b"]}
    config = Config.model_validate({"data": data}).model_copy(update={"train": before})
    state = TrainState(
        step=100, stage="full", best=0, score=0, model={}, schedule=schedule_of(config)
    )
    after = in_steps(train, lambda share: round(1100 * share), begun_stages(state))
    assert [stage.steps for stage in after.stages] == [25, 625, 69]
    other = TrainConfig.model_validate({"stages": [{**stages[0], "epochs": 4}], "batch_size": 16})
    again = in_steps(other, lambda share: round(1000 * share), begun_stages(state))
    assert [stage.steps for stage in again.stages] == [50]


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
