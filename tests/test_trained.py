"""What ties shards, checkpoints and a run folder together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.phantom import Phantom
from launch.rundir import RunDir
from launch.trained import labelled_rows
from medpsp.config import Config, StageConfig
from medpsp.configio import load_config, without_paths
from medpsp.dicom.placement import LPS_TO_RAS, place_mask
from medpsp.errors import CheckpointError, LabelError, ShardError
from medpsp.stages import in_steps
from medpsp.train.checkpoint import TrainState
from medpsp.train.same import (
    changes_told,
    identify,
    other_draws,
    other_steps,
    refuse_other,
    schedule_of,
    too_late,
)
from shards.layout import data_id, data_settings


def changed(config: Config, **data: object) -> Config:
    tree = config.model_dump(mode="json")
    return Config.model_validate({**tree, "data": {**tree["data"], **data}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_map", {0: 0, 1: 2, 2: 1, 3: 3}),
        ("window", {"center": 600, "width": 50}),
        ("modalities", ["MR"]),
        ("split", {"val": 0.25, "test": 0.6}),
    ],
)
def test_shards_of_another_configuration_are_not_used(made: Config, key: str, value: object):
    assert labelled_rows(made)
    with pytest.raises(ShardError, match=rf"made with other data\.{key}; run `medpsp shards`"):
        labelled_rows(changed(made, **{key: value}))


def test_data_id_changes_with_what_could_move_a_patient(made: Config):
    data, pairs = made.data, {("p", "train")}
    first = data_id(data, "k", pairs)
    assert first == data_id(data, "k", {("p", "train"), ("new", "test")})  # thresholds move nobody
    assert first != data_id(data, "another key", pairs)
    assert first != data_id(changed(made, split={"val": 0.3, "test": 0.1}).data, "k", pairs)
    voc = changed(made, source="voc").data
    assert data_id(voc, "k", pairs) != data_id(voc, "k", {("p", "test")})  # split lists may
    assert "archive" not in data_settings(data)


def schedule(made: Config, *stages: tuple[str, int], **train: object) -> Config:
    tree = made.model_dump(mode="json")
    plan = [{"name": name, "steps": steps, "lr": 1e-3} for name, steps in stages]
    return Config.model_validate({**tree, "train": {**tree["train"], "stages": plan, **train}})


def test_later_stages_may_change_but_not_the_steps_done(made: Config):
    trained = schedule(made, ("a", 4), ("b", 6))
    state = TrainState(
        step=7, stage="b", best=0.5, score=0.5, model={}, schedule=schedule_of(trained)
    )
    why = "(its step 7 is in stage b, and what is done must stay as it was)"
    for stages, now in (
        ((("a", 4), ("b", 6)), ""),
        ((("a", 4), ("b", 9), ("c", 2)), ""),
        ((("a", 3), ("b", 7)), "10 steps (a 3 + b 7)"),
        ((("z", 2),), "2 steps (z 2)"),
        ((("a", 4), ("c", 6)), "10 steps (a 4 + c 6)"),
    ):
        told = f"train.stages: made with 10 steps (a 4 + b 6), now {now} {why}"
        assert other_steps(state, schedule(made, *stages)) == ([told] if now else [])
        assert other_draws(state, schedule(made, *stages)) == []
    other = schedule(made, ("a", 4), ("b", 6), batch_size=2)
    assert other_draws(state, other) == ["train.batch_size: made with 4, now 2"]
    other = other.model_copy(update={"seed": 9})
    assert other_draws(state, other)[0] == "seed: made with 0, now 9"


def test_what_can_change_nothing_any_more_is_refused_and_told_while_it_can(made: Config):
    trained = schedule(made, ("a", 4), ("b", 6))
    loss = trained.loss.model_copy(update={"dice": 0.25})
    other = schedule(made, ("a", 4), ("b", 6), size=[64, 32], ranks=2, log_every=7)
    other = other.model_copy(update={"loss": loss})
    told = f"loss.dice: made with {made.loss.dice:g}, now 0.25"
    known = TrainState(
        step=10, stage="b", best=0.5, score=0.5, model=identify(made), schedule=schedule_of(trained)
    )
    size = f"train.size: made with {list(made.train.size)}, now [64, 32]"
    assert too_late(known, other) == [told, size]
    assert too_late(known, trained) == []
    with pytest.raises(CheckpointError, match=r"all 10 steps are done, so that nothing would come"):
        refuse_other(other, Path("step-00000010"), known, "")
    longer = other.model_copy(update={"train": schedule(made, ("a", 4), ("b", 9)).train})
    assert too_late(known, longer) == []  # nor is it refused
    refuse_other(longer, Path("step-00000010"), known, "")
    lines = changes_told(known, longer)
    assert f"goes on with other settings: {told}" in lines
    first = trained.train.stages[0].model_copy(update={"lr": 0.5})
    stages = trained.train.model_copy(update={"stages": (first, *trained.train.stages[1:])})
    early = trained.model_copy(update={"train": stages})
    for step in (4, 7, 10):  # stage a is done
        past = replace(known, step=step, stage="a" if step == 4 else "b")
        assert other_steps(past, early) == ["lr of stage a: made with 0.001, now 0.5"]
        assert other_steps(past, trained) == []
    assert other_steps(replace(known, step=3, stage="a"), early) == []  # goes on with it
    assert changes_told(replace(known, schedule={}), trained)[-1].startswith("the schedule after")
    assert too_late(replace(known, step=7), other) == []


def test_stages_in_epochs_are_compared_before_the_shards_are_read(made: Config):
    def in_epochs(first: float, last: float = 1.0, lr: float = 1e-3, more: int = 0) -> Config:
        names = ("a", first, lr), ("b", last, 1e-3), *[("c", 1.0, 1e-3)] * more
        stages = tuple(StageConfig(name=name, epochs=n, lr=rate) for name, n, rate in names)
        return made.model_copy(update={"train": made.train.model_copy(update={"stages": stages})})

    asked = in_epochs(2.0)
    slices = in_steps(asked.train, lambda _: 10 * made.train.batch_size)
    read = asked.model_copy(update={"train": slices})
    known = TrainState(
        step=30, stage="b", best=0.5, score=0.5, model=identify(made), schedule=schedule_of(read)
    )
    path = Path("step-00000030")
    refuse_other(asked, path, known, "")
    refuse_other(in_epochs(2.0, 3.0), path, known, "")  # how many steps that is is not known yet
    refuse_other(in_epochs(3.0), path, known, "")  # nor there
    refuse_other(in_epochs(2.0, more=1), path, known, "")
    for other in (in_epochs(2.0, lr=0.5, more=1), in_epochs(2.0, 3.0, lr=0.5)):
        with pytest.raises(
            CheckpointError, match=r"00030: lr of stage a: made with 0.001, now 0.5"
        ):
            refuse_other(other, path, known, "")
    other = asked.model_copy(update={"loss": made.loss.model_copy(update={"dice": 0.25})})
    with pytest.raises(CheckpointError, match=r"loss.dice: .*all 30 steps are done"):
        refuse_other(other, path, known, "")
    model = made.model.model_copy(update={"pretrained": True})
    other = asked.model_copy(update={"model": model})
    with pytest.raises(CheckpointError, match=r"model.pretrained: made with False, now True"):
        refuse_other(other, path, replace(known, step=3, stage="a"), "")


def test_only_one_command_works_in_a_run_folder(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from launch.rundir import RunDir\n"
        "RunDir(Path(sys.argv[1])).lock(); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"locked\n"
        second = subprocess.run(command, input=b"", capture_output=True, check=False)
        assert second.returncode == 1
        assert b"another medpsp command is at work there" in second.stderr
        first.communicate()
    RunDir(tmp_path).lock()  # free again


@pytest.mark.parametrize("thickness", [0.5, 1.0, 5.0])
def test_a_single_slice_gets_its_mask_whatever_its_thickness(thickness: float):
    phantom = Phantom(shape=(1, 5, 7), spacing=(thickness, 2.0, 3.0), oblique_deg=20)
    affine = phantom.affine_lps()
    alone = affine.copy()
    alone[:3, 2] /= thickness  # a lone DICOM slice says nothing of a distance
    mask = np.arange(35).reshape(7, 5, 1)
    placed = place_mask(mask, LPS_TO_RAS @ affine, alone, (1, 5, 7))
    np.testing.assert_array_equal(placed, mask.transpose(2, 1, 0))
    turned = Phantom(shape=(1, 5, 7), spacing=(thickness, 2.0, 3.0), oblique_deg=25).affine_lps()
    with pytest.raises(LabelError, match="MASK_GRID_MISMATCH"):
        place_mask(mask, LPS_TO_RAS @ turned, alone, (1, 5, 7))


@pytest.mark.parametrize("pattern", ["{PatientID}.nii.gz", "{PatientID}", "{folder}/m.nii"])
def test_a_label_pattern_needs_no_quotes_of_its_own(tmp_path: Path, pattern: str):
    file = tmp_path / "c.yaml"
    file.write_text("data: {archive: secret, classes: [a, b]}\n")
    config = load_config(file, (f"data.label_pattern={pattern}",))
    assert config.data.label_pattern == pattern
    assert "secret" not in without_paths(config)
