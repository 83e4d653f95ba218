"""Real jobs through submitit on this machine: what they log, how they fail, how they are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.jobs import run_command, shards_job
from launch.phantom import Phantom, write_archive
from launch.plan import JobSpec
from launch.rundir import RunDir
from launch.submit import DEVICES, _lines, run_with_devices, submit_plan
from medpsp.config import Config
from medpsp.errors import ConfigError, LaunchError, ShardError

pytestmark = pytest.mark.usefixtures("own_handlers")
Make = Callable[..., Config]
DEADLINE_S = 120


def chain(*names: str) -> tuple[JobSpec, ...]:
    return tuple(JobSpec(name=name, after=(), cores=1, minutes=10) for name in names)


def until(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition, or a failure after two minutes."""
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return value


def children(parent: int) -> list[int]:
    """Process ids whose parent this is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def shard_bytes(config: Config) -> dict[str, bytes]:
    files = config.shards.rglob("c/*/0/0")
    return {p.relative_to(config.shards).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def many(
    tmp_path_factory: pytest.TempPathFactory, make_config: Make, phantom: Phantom, ray_once: None
) -> tuple[Path, Config]:
    """An archive of 128 shards of one slice, and a clean conversion of it by two workers."""
    root = tmp_path_factory.mktemp("many")
    write_archive(root, 16, replace(phantom, shape=(8, 48, 48)))
    config = make_config(root, tmp_path_factory.mktemp("clean"), shard_slices=1, workers=2)
    shards_job(config)
    return root, config


def test_a_job_killed_half_way_says_so_and_the_next_run_ends_as_a_clean_one(
    many: tuple[Path, Config],
    make_config: Make,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    root, clean = many
    config = make_config(root, tmp_path, shard_slices=1, workers=1)
    run = RunDir.create(config)
    commits = config.shards / "commits"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(submit_plan, chain("shards"), run)
        (log,) = until(lambda: list((run.logs / "jobs").glob("*_0_log.err")))
        (task,) = until(lambda: children(int(log.name.split("_")[0])))
        until(lambda: future.done() or list(commits.glob("[0-9]*.json")))
        helpers = children(task)
        os.kill(task, signal.SIGKILL)
        error = future.exception(timeout=DEADLINE_S)
    assert isinstance(error, LaunchError)
    assert str(error) == f"shards: died without a word (killed?); its output is in {log}"
    survivors = {p.name: p.stat().st_mtime_ns for p in commits.glob("[0-9]*.json")}
    assert 0 < len(survivors) < 128
    assert not (config.shards / "manifest.json").exists()
    assert helpers
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in helpers))

    capfd.readouterr()
    submit_plan(chain("shards", "check"), run)
    assert shard_bytes(config) == shard_bytes(clean)
    for name in ("index.parquet", "objects.parquet"):
        assert (config.shards / name).read_bytes() == (clean.shards / name).read_bytes()
    assert list(config.shards.rglob(".*")) == []
    assert {n: (commits / n).stat().st_mtime_ns for n in survivors} == survivors
    shown = capfd.readouterr().err  # the jobs' own lines, and nothing of submitit's
    assert f"shards: {config.shards} (128 slices; objects: 128 kept, " in shown
    assert "check: every digest, slice and split is as the manifest says" in shown
    assert "submitit" not in shown
    assert "objects: 128 kept, " in (run.logs / "shards.log").read_text()


def test_a_failing_job_gives_its_own_reason_and_stops_the_chain(
    archive: Path, make_config: Make, tmp_path: Path
):
    run = RunDir.create(make_config(archive, tmp_path))
    with pytest.raises(LaunchError) as caught:
        submit_plan(chain("check", "train"), run)
    reason = f"shards {tmp_path / 'shards'}: no manifest.json; run `medpsp shards` to its end first"
    assert str(caught.value) == f"check: {reason}"
    assert (run.logs / "check.failed").read_text() == reason + "\n"
    assert not (run.logs / "train.log").exists()


def test_a_job_that_finds_the_configuration_wrong_is_a_configuration_error(
    archive: Path, make_config: Make, tmp_path: Path
):
    run = RunDir.create(make_config(archive, tmp_path, labels=Path("/nowhere")))
    with pytest.raises(ConfigError) as caught:
        submit_plan(chain("shards"), run)
    assert str(caught.value) == "shards: data.labels /nowhere: no such folder"


def test_a_job_that_raises_something_else_names_it_in_one_line(
    archive: Path, make_config: Make, tmp_path: Path
):
    run = RunDir.create(make_config(archive, tmp_path))
    with pytest.raises(LaunchError, match=r"^nonsense: failed \(KeyError: 'nonsense'\); its ") as e:
        submit_plan(chain("nonsense"), run)
    assert "\n" not in str(e.value)


def test_ctrl_c_ends_the_job_too(archive: Path, make_config: Make, tmp_path: Path):
    run = RunDir.create(make_config(archive, tmp_path / "out"))
    command = [sys.executable, "-m", "launch.cli", "run", str(run.config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "shards: job" in next(iter(process.stderr))
            until(lambda: working(run.root) - {process.pid})
            process.send_signal(signal.SIGINT)
            _, shown = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "medpsp: interrupted; run the same command again to go on\n" in shown
    until(lambda: not working(run.root))


def working(root: Path) -> set[int]:
    """Processes whose command line names the run folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(root) in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.add(int(entry.name))
    return found


def test_a_job_sees_the_gpus_of_who_submitted_it(made: Config, monkeypatch: pytest.MonkeyPatch):
    """submitit hides all of them from a local job by an empty CUDA_VISIBLE_DEVICES."""
    run = RunDir.create(made)
    monkeypatch.setenv(DEVICES, "")
    assert run_with_devices("check", run.config, "2,3") == (0, "")
    assert os.environ[DEVICES] == "2,3"
    assert run_with_devices("check", run.config, None) == (0, "")
    assert DEVICES not in os.environ


def test_a_mark_of_failure_goes_with_the_next_success(copied: Config):
    run = RunDir.create(copied)
    index = copied.shards / "index.parquet"
    whole = index.read_bytes()
    index.unlink()
    code, reason = run_command("check", run.config)
    assert code == 1
    assert "1 problem, the first: index.parquet: missing" in reason
    assert (run.logs / "check.failed").read_text() == reason + "\n"
    index.write_bytes(whole)
    assert run_command("check", run.config) == (0, "")
    assert not (run.logs / "check.failed").exists()


def test_too_many_refused_objects_fail_the_job_after_the_shards_are_whole(
    archive: Path, make_config: Make, tmp_path: Path, phantom: Phantom, ray_once: None
):
    """2 of 34 images are damaged: 5.9 %."""
    config = make_config(archive, tmp_path, max_reject_fraction=0.05)
    with pytest.raises(ShardError, match=r"5\.9% of the objects were quarantined, .* allows 5\.0%"):
        shards_job(config)
    assert (config.shards / "manifest.json").exists()


def test_lines_of_a_growing_file_come_whole(tmp_path: Path):
    path = tmp_path / "log"
    lines = _lines(path)
    assert next(lines) == ""
    with path.open("w") as file:
        file.write("half")
        file.flush()
        assert next(lines) == ""
        file.write(" whole\nnext\n")
        file.flush()
        assert [next(lines), next(lines), next(lines)] == ["half whole\n", "next\n", ""]
