"""Real jobs of a chain on this machine: what they log, how they fail, how they are killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.byhand import run_by_hand
from launch.chain import Told, depends_on, made_from, processes_here, tell, told_by, unfinished
from launch.cli import app
from launch.cluster import kill_all
from launch.guards import refuse_other_training
from launch.jobs import run_command, shards_job
from launch.local import _lines, submit_plan
from launch.localstate import rows_here
from launch.phantom import Phantom, write_archive
from launch.plan import JobSpec
from launch.rundir import RunDir
from launch.status import ended, follow, log_files, require_success, status_of
from medpsp.config import Config
from medpsp.errors import (
    EXIT_AGAIN,
    CheckpointError,
    ConfigError,
    Interrupted,
    LaunchError,
    ShardError,
)
from medpsp.train.same import DATA
from shards.index import INDEX, OBJECTS, read_manifest, write_manifest

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
    log = run.logs / "jobs/shards.log"

    def kill() -> list[int]:
        until(log.exists)
        (task,) = until(lambda: working(run.root))
        until(lambda: list(commits.glob("[0-9]*.json")))
        helpers = children(task)
        os.kill(task, signal.SIGKILL)
        return helpers

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill)
        with pytest.raises(LaunchError) as caught:
            submit_plan(chain("shards"), run)
        helpers = killer.result(DEADLINE_S)
    assert str(caught.value) == f"shards: killed by SIGKILL; its output is in {log}"
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
    shown = capfd.readouterr().err  # the jobs' own lines
    assert f"shards: {config.shards} (128 slices; objects: 128 kept, " in shown
    assert "check: every digest, slice and split is as the manifest says" in shown
    assert "Traceback" not in shown
    assert "objects: 128 kept, " in (run.logs / "shards.log").read_text()


def test_a_failing_job_gives_its_own_reason_and_stops_the_chain(
    archive: Path, make_config: Make, tmp_path: Path
):
    run = RunDir.create(make_config(archive, tmp_path))
    with pytest.raises(LaunchError) as caught:
        submit_plan(chain("check", "train"), run)
    reason = f"shards {tmp_path / 'shards'}: no manifest.json; run `medpsp shards` to its end first"
    reason += ", or try a setting on the shards of another run with `medpsp sweep`"
    assert str(caught.value) == f"check: {reason}"
    assert (run.logs / "check.failed").read_text() == reason + "\n"
    assert not (run.logs / "train.log").exists()


def test_status_and_logs_of_a_run_on_this_machine(made: Config, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shards").symlink_to(made.shards)
    run = RunDir.create(made.model_copy(update={"out": out}))
    with pytest.raises(LaunchError, match="nothing was begun there; `medpsp run CONFIG` does"):
        status_of(run)
    with pytest.raises(LaunchError):
        submit_plan(chain("check", "evaluate", "export"), run)
    rows = {row.name: row for row in status_of(run)}
    assert {n: r.state for n, r in rows.items()} == {
        "check": "done",
        "evaluate": "failed",
        "export": "not run",
    }
    assert "run `medpsp train` first" in rows["evaluate"].note
    with pytest.raises(LaunchError, match=r"^evaluate: failed \(checkpoint .*\)$"):
        require_success(list(rows.values()))
    done = CliRunner().invoke(app, ["status", str(out)])
    assert done.exit_code == 0
    assert f"evaluate: {rows['evaluate'].note}" in " ".join(done.stdout.split())
    assert f"logs         {out}/logs " in done.stdout
    assert log_files(run, "check") == [run.logs / "check.log", run.logs / "jobs/check.log"]
    done = CliRunner().invoke(app, ["logs", str(out), "check"])
    assert done.stdout.count("check: every digest, slice and split is as the manifest says") == 1
    done = CliRunner().invoke(app, ["logs", str(out), "export"])
    assert (done.exit_code, done.stdout) == (0, "export: nothing yet\n")
    with pytest.raises(ConfigError, match="logs: which job\\? there are check, evaluate, export"):
        log_files(run, "")
    for path, what in ((run.config, "a file"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ConfigError, match=f"{path.name}: {what}; give that of a run"):
            status_of(RunDir(path))
    for name in ("train", "*", "/etc"):
        with pytest.raises(ConfigError, match="no such job; there are check, evaluate, export"):
            log_files(run, name)
    (run.logs / "train.log").write_text("2026-11-27 09:00:00,000 the last line\n")
    old = time.time() - 3600
    os.utime(run.logs / "train.log", (old, old))
    (run.logs / "ranks").mkdir()
    note = {"time": time.time(), "step": 3, "phase": "step"}  # of before the end
    (run.logs / "ranks" / "heartbeat-0.json").write_text(json.dumps(note))
    (row,) = [row for row in status_of(run) if row.name == "train"]  # a command of its own
    assert (row.state, row.at) == ("ended", "the last line")


def test_a_command_of_its_own_says_how_it_ended(made: Config, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shards").symlink_to(made.shards)
    run = RunDir.create(made.model_copy(update={"out": out}))

    def code(*words: str) -> int:
        command = [sys.executable, "-m", "launch.cli", words[0], str(run.config), *words[1:]]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert code("check", "--quick") == 0
    (row,) = status_of(run)
    assert (row.name, row.state) == ("check", "ended")  # it is less than the job of the chain
    assert code("check") == 0
    assert [(row.name, row.state) for row in status_of(run)] == [("check", "done")]
    assert code("evaluate") == 1
    (row,) = [row for row in status_of(run) if row.name == "evaluate"]
    assert (row.state, "run `medpsp train` first" in row.note) == ("failed", True)
    assert not run.page.exists()  # nothing was trained that it could be of
    told = replace(told_by(run, "check") or Told.begun({}, ""), state="running")
    tell(run, "check", told)
    (row,) = [row for row in status_of(run) if row.name == "check"]
    assert (row.state, row.note) == ("interrupted", "it was ended; the same command goes on")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    tell(run, "check", replace(told, process=f"{gone.pid} {processes_here()}"))
    with (run.root / ".lock").open("w") as held:  # of another command, which tells nothing
        fcntl.flock(held, fcntl.LOCK_EX)
        (row,) = [row for row in status_of(run) if row.name == "check"]
    assert (row.state, row.note) == ("interrupted", "it was ended; the same command goes on")


def test_telling_neither_hides_nor_fails_the_work(made: Config, tmp_path: Path):
    config = made.model_copy(update={"out": tmp_path / "out"})
    run, did = RunDir.create(config), list[str]()
    (run.root / "jobs").write_text("no folder")  # nothing can be told
    run_by_hand("check", config, lambda: did.append("work"))
    assert did == ["work"]

    def ask() -> None:
        raise Interrupted("train: saved")

    with pytest.raises(Interrupted, match="train: saved"):
        run_by_hand("train", config, ask)
    (run.root / "jobs").unlink()

    def wrong() -> None:
        raise KeyError("a name that nobody may read")

    with pytest.raises(KeyError):
        run_by_hand("check", config, wrong)
    told = told_by(run, "check")
    assert told
    assert (told.state, told.reason) == ("failed", "KeyError, a bug in medpsp")
    assert (run.logs / "check.failed").read_text() == "KeyError, a bug in medpsp\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        run_by_hand("check", config, lambda: did.append("rank 1"))
    assert told_by(run, "check") == told  # the first rank tells
    run_by_hand("check", config, lambda: None)
    assert not (run.logs / "check.failed").exists()


def test_what_was_made_from_other_files_is_made_again(made: Config, tmp_path: Path):
    """Shards or weights that commands by hand made since; what they left as it was counts not."""
    config = made.model_copy(update={"out": tmp_path / "out"})
    run, names = RunDir.create(config), ("shards", "check", "train", "evaluate", "export")
    best = run.checkpoints / "best" / "meta.json"
    for folder in (best.parent, run.export):
        folder.mkdir(parents=True)
    for path in (run.evaluation, run.int8):
        path.touch()
    manifest = read_manifest(made.shards)

    def shards(**tables: str) -> None:
        tool = f"medpsp {len(tables)}"
        write_manifest(
            config.shards, replace(manifest, tool=tool, tables={**manifest.tables, **tables})
        )

    shards()
    best.write_text("first")

    def tell_of(*chosen: str, code: int = 0) -> None:
        for name in chosen:
            told = Told.begun({}, depends_on(config, name), made_from(config, name))
            tell(run, name, told.ended_with(code, ""))

    def left(of: Config = config) -> list[str]:
        return [job.name for job in unfinished(chain(*names), of, run)]

    tell_of(*names)
    assert left() == []
    tell_of(*names[:3])  # again, and the same came of it
    assert left() == []
    tell_of("check", code=1)
    assert left() == ["check"]  # it makes nothing
    tell_of("check")
    best.write_text("second")
    assert left() == ["evaluate", "export"]
    tell_of("evaluate")
    assert left() == ["export"]
    tell_of("export")
    shards(**{OBJECTS: "d"})
    assert left() == []  # no slice is another
    shards(**{INDEX: "d"})
    assert left() == ["check", "train", "evaluate", "export"]
    tell_of(*names)
    shutil.rmtree(run.checkpoints)  # exported, and no longer needed
    assert left() == []
    run.int8.rename(run.root / "moved.onnx")
    assert left() == ["train", "evaluate", "export"]
    best.parent.mkdir(parents=True)
    assert left() == ["export"]
    (run.root / "moved.onnx").rename(run.int8)
    run.evaluation.rename(run.root / "moved.json")
    assert left() == ["evaluate", "export"]
    (run.root / "moved.json").rename(run.evaluation)
    data = config.data.model_copy(update={"workers": 7, "index": tmp_path / "index"})
    assert left(config.model_copy(update={"data": data})) == []
    train = config.train.model_copy(update={"log_every": 3, "threads": 1, "save_every": 7})
    assert left(config.model_copy(update={"train": train})) == []
    best.write_bytes(b"\xff\xfe")  # damaged is other, not a bug
    assert left() == ["evaluate", "export"]


def test_readers_of_shards_that_were_made_otherwise_are_refused_first(made: Config, tmp_path: Path):
    """Before anything is written: config.yaml would say what no shard is."""
    config = made.model_copy(update={"out": tmp_path / "out"})
    folder = RunDir.create(config)
    config.shards.symlink_to(made.shards)
    before = folder.config.read_bytes()
    for command in ("check", "train", "evaluate", "export"):
        words = [command, str(folder.config), "data.unlabelled=keep", "data.window=null"]
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, ShardError)
        assert "made with other data.unlabelled; run `medpsp shards`" in str(done.exception)
        assert folder.config.read_bytes() == before


@pytest.mark.parametrize("closed", [False, True])
def test_an_interrupted_process_does_what_python_does_at_an_end(closed: bool):
    code = (
        "import atexit, concurrent.futures as f; from launch.terminal import leave; "
        "pool = f.ThreadPoolExecutor(1); done = pool.submit(print, 'work'); "
        f"atexit.register(print, 'last'){'; import sys; sys.stdout.close()' if closed else ''}; "
        "leave(130)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 130
    assert closed or done.stdout.split() == [b"work", b"last"]


def test_what_a_chain_may_go_on_from_is_looked_at_before(
    made: Config, monkeypatch: pytest.MonkeyPatch
):
    asked = list[tuple[Config, bool]]()

    def ask(config: Config, any_data: bool) -> None:
        asked.append((config, any_data))

    monkeypatch.setattr("launch.train.refuse_other_run", ask)
    refuse_other_training(["shards", "check"], made)
    refuse_other_training(["evaluate"], made)
    assert not asked
    refuse_other_training(["preflight", "train", "evaluate"], made)
    refuse_other_training(["shards", "check", "train"], made)
    assert asked == [(made, False), (made, True)]


def test_shards_that_a_run_was_trained_on_are_not_made_otherwise(made: Config, tmp_path: Path):
    config = made.model_copy(update={"out": tmp_path / "out"})
    step = RunDir.create(config).checkpoints / "step-00000002"
    config.shards.symlink_to(made.shards)
    step.mkdir(parents=True)
    other = config.data.model_copy(update={"unlabelled": "keep", "workers": 5})
    changed, jobs = config.model_copy(update={"data": other}), ["shards", "check", "train"]
    meta = step / "meta.json"
    meta.write_text(json.dumps({"model": {DATA: read_manifest(made.shards).data_id}}))
    before = config.data.unlabelled
    wanted = rf"unlabelled: made with {before}, now keep; set it back, or give another folder"
    with pytest.raises(CheckpointError, match=wanted):
        refuse_other_training(jobs, changed)
    refuse_other_training(jobs, config)
    member = config.out / "sweep" / "one"
    member.mkdir(parents=True)
    (config.out / "checkpoints").rename(member / "checkpoints")
    with pytest.raises(CheckpointError, match=wanted):
        refuse_other_training(["plan", "convert", "publish"], changed)
    below = config.model_copy(update={"out": member, "data": other})
    (member / "shards").symlink_to(config.out / "shards")
    (config.out / "shards").unlink()
    (config.out / "shards").mkdir()
    shutil.copy(made.shards / "manifest.json", config.shards)
    with pytest.raises(CheckpointError, match=wanted):  # they are those of the base
        refuse_other_training(["shards"], below)
    meta = member / "checkpoints" / "step-00000002" / "meta.json"
    meta.write_text(json.dumps({"model": {DATA: "of others, which are gone"}}))
    refuse_other_training(jobs, changed)


def test_a_job_of_a_chain_with_a_bug_is_told_as_one(made: Config, tmp_path: Path):
    config = made.model_copy(update={"out": tmp_path / "out"})
    run = RunDir.create(config)
    with pytest.raises(LaunchError, match=r"KeyError, a bug in medpsp"):
        submit_plan(chain("nonsense"), run)
    told = told_by(run, "nonsense")
    assert told
    assert (told.state, told.reason) == ("failed", "KeyError, a bug in medpsp")


def test_what_cannot_be_told_is_not_what_was_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A full disk must not leave `running`, or `done`, of something else."""
    run = RunDir(tmp_path)
    tell(run, "check", Told.begun({}, ""))

    def full(*words: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("json.dump", full)
        with pytest.raises(OSError, match="No space"):
            tell(run, "check", Told.begun({}, ""))
    assert list(run.jobs.iterdir()) == []


def test_a_folder_where_nothing_was_begun_is_not_watched(tmp_path: Path):
    with pytest.raises(LaunchError, match="nothing was begun there"):
        follow(lambda: [RunDir(tmp_path)], 60, print)


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
    with pytest.raises(LaunchError, match=r"^nonsense: KeyError, a bug in medpsp: its ") as e:
        submit_plan(chain("nonsense"), run)
    assert "\n" not in str(e.value)


@contextlib.contextmanager
def typed(config: Config, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`medpsp run` in a process group of its own, as a shell starts it; nothing of it is left."""
    RunDir.create(config)
    command = [sys.executable, "-m", "launch.cli", "run", str(config.out / "config.yaml"), *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            kill_all(process.pid)
            left = working(config.out)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    assert not left


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """As a terminal sends it."""
    os.killpg(process.pid, signal.SIGINT)


def trains(made: Config, out: Path, ranks: int) -> Config:
    """So many steps that only a signal ends them."""
    tree = made.model_dump(mode="json")
    tree["train"] |= {"stages": [{"name": "only", "steps": 10**6, "lr": 1e-3, "augment": "none"}]}
    tree["train"] |= {"threads": 1, "ranks": ranks, "save_every": 10**6, "eval_every": 10**6}
    tree["model"] |= {"backbone": "timm/test_resnet", "psp_channels": 16, "decoder_channels": 16}
    out.mkdir()
    (out / "shards").symlink_to(made.shards)
    return Config.model_validate({**tree, "out": out})


def steps(out: Path, ranks: int) -> bool:
    """Whether all ranks have made one."""
    notes = [path.read_text() for path in (out / "logs/ranks").glob("heartbeat-*.json")]
    return len([n for n in notes if '"phase": "step"' in n and '"step": 0' not in n]) == ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_waits_until_training_has_saved(made: Config, tmp_path: Path, ranks: int):
    config = trains(made, tmp_path / "out", ranks)
    with typed(config, "--from", "train") as process:
        until(lambda: steps(config.out, ranks) or process.poll() is not None)
        rows = until(lambda: (found := rows_here(RunDir(config.out)))[0].at and found)
        assert [row.state for row in rows] == ["running", "waiting", "waiting"]
        assert not ended(rows)
        ctrl_c(process)
        _, shown = process.communicate(timeout=DEADLINE_S)
        assert working(config.out) == set()
    *_, last = shown.splitlines()
    told = re.fullmatch(
        r"medpsp: train: stopped by SIGINT after step (\d+), which is saved; .*", last
    )
    assert told, shown
    assert process.returncode == EXIT_AGAIN
    assert "Traceback" not in shown
    assert "death signal" not in shown
    assert "train is asked to end; a second Ctrl-C ends it at once\n" in shown
    assert (config.out / f"checkpoints/step-{int(told[1]):08d}/state.pt").is_file()
    rows = rows_here(RunDir(config.out))
    assert [row.state for row in rows] == ["stopped", "not run", "not run"]
    assert rows[0].note == last.removeprefix("medpsp: train: ")
    assert ended(rows)
    RunDir(config.out).lock()  # another command may begin at once


def test_ctrl_c_waits_although_nobody_reads_any_more(made: Config, tmp_path: Path):
    """As with `medpsp run ... 2>&1 | tee log`, where it ends tee, too."""
    config = trains(made, tmp_path / "out", 1)
    with typed(config, "--from", "train") as process:
        until(lambda: steps(config.out, 1) or process.poll() is not None)
        assert process.stderr is not None
        process.stderr.close()
        ctrl_c(process)
        assert process.wait(DEADLINE_S) == EXIT_AGAIN
    assert list((config.out / "checkpoints").glob("step-*"))


@pytest.mark.usefixtures("no_nohup")
def test_a_closed_terminal_waits_until_training_has_saved(made: Config, tmp_path: Path):
    config = trains(made, tmp_path / "out", 1)
    with typed(config, "--from", "train") as process:
        until(lambda: steps(config.out, 1) or process.poll() is not None)
        for _ in range(2):  # the shell's and the kernel's
            os.killpg(process.pid, signal.SIGHUP)
        _, shown = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == EXIT_AGAIN, shown
    assert "train: stopped by SIGHUP after step " in shown.splitlines()[-1]


def test_a_second_ctrl_c_ends_all_at_once(made: Config, tmp_path: Path):
    config = trains(made, tmp_path / "out", 2)
    with typed(config, "--from", "train") as process:
        until(lambda: steps(config.out, 2) or process.poll() is not None)
        ranks = [pid for pid in working(config.out) if pid != process.pid]
        for pid in ranks:  # who stands still can save nothing
            os.kill(pid, signal.SIGSTOP)
        ctrl_c(process)
        assert process.stderr is not None
        until(lambda: "is asked to end" in process.stderr.readline())
        ctrl_c(process)
        _, shown = process.communicate(timeout=20)
        until(lambda: not working(config.out))
    assert len(ranks) == 3
    assert shown.splitlines()[-1] == "medpsp: interrupted; run the same command again to go on"
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert not list((config.out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_has_nothing_to_save_ends_too(
    archive: Path, make_config: Make, tmp_path: Path, number: int
):
    config = make_config(archive, tmp_path / "out")
    with typed(config) as process:
        assert process.stderr is not None
        until(lambda: "shards: process" in process.stderr.readline())
        process.send_signal(number)  # while the job still imports: it hears it all the same
        _, shown = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + number
    assert shown.splitlines()[-1] == "medpsp: interrupted; run the same command again to go on"
    assert "Traceback" not in shown
    assert not config.shards.exists()


def test_a_job_whose_command_is_killed_saves_and_ends(made: Config, tmp_path: Path):
    config = trains(made, tmp_path / "out", 1)
    with typed(config, "--from", "train") as process:
        until(lambda: steps(config.out, 1) or process.poll() is not None)
        process.kill()
        process.wait()
        until(lambda: not working(config.out))
    (train, *_) = rows_here(RunDir(config.out))
    assert train.state == "stopped"
    assert list((config.out / "checkpoints").glob("step-*"))


def working(root: Path) -> set[int]:
    """Processes whose command line names the run folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(root) in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.add(int(entry.name))
    return found


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
    path.touch()
    lines = _lines(path)
    assert next(lines) == ""
    with path.open("w") as file:
        file.write("half")
        file.flush()
        assert next(lines) == ""
        file.write(" whole\nnext\n")
        file.flush()
        assert [next(lines), next(lines), next(lines)] == ["half whole\n", "next\n", ""]
