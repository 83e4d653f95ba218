"""The jobs of a run as values, and who a rank is."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cluster import detect_world
from launch.jobs import JOBS
from launch.plan import CHAIN, describe, plan_jobs
from medpsp import machine
from medpsp.config import Config
from medpsp.errors import LaunchError
from medpsp.types import World

GOLDEN = Path(__file__).parent / "golden" / "plan.txt"


def config() -> Config:
    return Config.model_validate(
        {
            "data": {"archive": "archive", "classes": ["background", "organ"], "workers": 16},
            "train": {"ranks": 4},
        }
    )


def test_the_printed_plan_is_the_golden_one():
    text = describe(plan_jobs(config()), Path("runs/demo/config.yaml"))
    assert text + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_each_job_comes_after_the_one_before_and_is_a_command():
    plan = plan_jobs(config())
    assert [job.after for job in plan] == [(), *((name,) for name in CHAIN[:-1])]
    assert [job.name for job in plan] == list(CHAIN)
    assert {*CHAIN} < JOBS.keys()


def world_of(monkeypatch: pytest.MonkeyPatch, **found: str) -> World:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return detect_world()


MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_ranks_without_a_meeting_point_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        world_of(monkeypatch, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")


def test_ranks_come_from_the_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch):
    assert world_of(monkeypatch) == World(rank=0, size=1, local_rank=0)
    assert world_of(monkeypatch, RANK="3") == World()  # without a world there is no rank
    assert world_of(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", **MASTER) == World(
        rank=5, size=8, local_rank=1
    )


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"WORLD_SIZE": "2"}, "expected whole numbers in RANK"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "got .*'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"}, "RANK -1 is not below"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], match: str
):
    with pytest.raises(LaunchError, match=match):
        world_of(monkeypatch, **found)


def test_ranks_share_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "cores_allowed", lambda: 8.5)
    assert [machine.threads_each(ranks) for ranks in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of 16 on other machines, too
    assert machine.threads_each(16) == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert machine.threads_each(16) == 3  # what starts ranks in a shell of salloc
    monkeypatch.setenv("RANK", "0")  # each task has its own
    assert machine.threads_each(16) == 6
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # ranks share one task
    assert machine.threads_each(16) == 3
