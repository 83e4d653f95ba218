"""What a dry run says of disk, memory and time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import estimate
from launch.estimate import estimates, look
from launch.profile import Profile
from launch.rundir import RunDir
from medpsp.config import Config


def config(out: Path, archive: Path) -> Config:
    return Config.model_validate(
        {
            "out": out,
            "data": {"archive": archive, "classes": ["background", "organ"], "labels": archive},
            "model": {"backbone": "timm/test_resnet"},
            "train": {"stages": [{"name": "a", "steps": 1000, "lr": 1e-3}]},
        }
    )


def test_an_archive_is_counted_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(6):
        (tmp_path / f"{number}").write_bytes(bytes(10))
    assert look(tmp_path) == estimate.Found(6, 60, False)
    monkeypatch.setattr(estimate, "COUNTED", 4)
    found = look(tmp_path)
    assert (found.files, found.size, found.more) == (4, 40, True)
    lines = estimates(config(tmp_path / "out", tmp_path), Profile(), RunDir(tmp_path / "out"))
    assert lines[0] == "archive   more than 4 files, 4e-08 GB"


def test_time_is_what_scale_has_measured(tmp_path: Path):
    run, chosen = RunDir(tmp_path / "out"), config(tmp_path / "out", tmp_path / "archive")
    small = Profile.model_validate({"cpu": {"memory_gb": 0.1}})
    lines = "\n".join(estimates(chosen, small, run))
    assert "`medpsp scale` measures a step" in lines
    assert "the profile asks for 0.1 GB" in lines
    place = run.root / "scale/timm-test_resnet_1"
    place.mkdir(parents=True)
    said = {"backbone": "timm/test_resnet", "ranks": 1, "step_s": 0.2, "data_s": 0.1}
    (place / "scale.json").write_text(json.dumps(said))
    lines = "\n".join(estimates(chosen, Profile(), run))
    assert "1000 steps, 5 min as `medpsp scale` measured" in lines
    assert "the profile asks" not in lines
