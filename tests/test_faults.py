"""Twelve faults, each provoked for real, end in one line that says what to do.

Commands run in processes forked from a server that has torch already; each of those mounts,
limits and patches what it likes for itself alone. `pytest -s` shows the lines.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medpsp.config import Config
from medpsp.configio import dump_yaml
from medpsp.errors import EXIT_AGAIN
from medpsp.train.watch import EXIT_HANGS
from shards.index import read_index
from tests.children import SERVER
from tests.damage import flip

ROOT = Path(__file__).resolve().parents[1]
NEW_MOUNTS = 0x20000
STEPS = "train.stages=[{name: only, steps: %d, lr: %g, augment: none}]"
needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


_started: list[Any] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No process outlives its test: pytest would wait for one that is stopped."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


@dataclass
class Told:
    """What a command said and how it ended."""

    name: str
    code: int | None
    text: str

    @property
    def line(self) -> str:
        """The one line for the user, without what pytest names a folder."""
        said = [line for line in self.text.splitlines() if line.startswith("medpsp:")]
        assert len(said) == 1, self.text
        assert self.text.splitlines()[-1] == said[0]
        assert "Traceback" not in self.text
        print(f"\n[{self.name}] exit {self.code}: {said[0]}")
        return said[0]


@dataclass
class Command:
    """`medpsp train`, as a rank or alone.

    Attributes:
        words: After the configuration.
        out: Run folder; shards are linked there.
        prepare: Runs in the process before it.
        environment: Of it.
    """

    config: Path
    out: Path
    words: tuple[str, ...] = ()
    prepare: Callable[..., None] | None = None
    arguments: tuple[Any, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def heard(self) -> Path:
        return self.out.with_name(f"{self.out.name}-{self.environment.get('RANK', '')}.txt")

    def start(self) -> Any:
        process = SERVER.Process(target=_run, args=(self,))
        process.start()
        _started.append(process)
        return process

    def told(self, process: Any, seconds: float = 180) -> Told:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"{self.out.name} hangs: {self.heard.read_text()}")
        return Told(self.out.name, process.exitcode, self.heard.read_text())

    def run(self) -> Told:
        return self.told(self.start())


def _run(command: Command) -> None:
    """In the process itself."""
    file = os.open(command.heard, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.update(command.environment, CUDA_VISIBLE_DEVICES="")
    sys.argv = ["medpsp", "train", str(command.config), f"out={command.out}", *command.words]
    if command.prepare:
        command.prepare(*command.arguments)
    from launch.cli import main

    try:
        main()
    except Exception:  # noqa: BLE001 - as the interpreter does at its end
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(1)


# What is done to a process before its command.


def mounted(place: Path, options: str, shards: Path | None = None) -> None:
    """A small file system, seen by this process alone, with a run folder that has shards."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        os._exit(99)
    mount = ["mount", "-t", "tmpfs", "-o", options, "medpsp-test", str(place)]
    for words in (["mount", "--make-rprivate", "/"], mount):
        if subprocess.run(words, capture_output=True, check=False).returncode:
            os._exit(99)
    if shards:
        (place / "run").mkdir()
        (place / "run" / "shards").symlink_to(shards)


def limited(kind: int, more: int) -> None:
    """A limit, counted from what is used already."""
    used = len(os.listdir("/proc/self/fd")) - 1
    if kind == resource.RLIMIT_AS:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(kind, (used + more, resource.getrlimit(kind)[1]))


def slow_batches(step: int, rank: str) -> None:
    """The batches of a rank stop coming."""
    import shards.dataset

    before = shards.dataset.train_batches

    def batches(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(before(*arguments)):
            if number == step and os.environ["RANK"] == rank:
                time.sleep(600)
            yield batch

    shards.dataset.train_batches = batches


def broken_loop() -> None:
    """A bug."""
    import launch.train

    def wrong(*_: object) -> None:
        raise KeyError("no such thing")

    launch.train._run_of = wrong  # type: ignore[assignment]


@pytest.fixture(scope="module")
def tiny(made: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run of seconds."""
    path = tmp_path_factory.mktemp("faults") / "c.yaml"
    tree = made.model_dump(mode="json")
    tree["model"] |= {
        "backbone": "timm/test_resnet",
        "psp_channels": 16,
        "decoder_channels": 16,
    }
    tree["train"] |= {"threads": 1, "log_every": 1, "most_bad_steps": 2, "stages": None}
    tree["train"] |= {"save_every": 1000, "eval_every": 1000, "preset": "onecycle", "steps": 4}
    path.write_text(dump_yaml(Config.model_validate(tree)))
    return path


@pytest.fixture
def prepare(tiny: Path, made: Config, tmp_path: Path) -> Callable[..., Command]:
    """A command on the shards that all share, or on a copy."""

    def make(name: str, *words: str, copy: bool = False, **more: Any) -> Command:
        out = tmp_path / name.replace(" ", "-")
        out.mkdir()
        if copy:
            shutil.copytree(made.shards, out / "shards")
        else:
            (out / "shards").symlink_to(made.shards)
        return Command(tiny, out, words, **more)

    return make


def pair(command: Command) -> list[Command]:
    """The same as two ranks that no torchrun started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = []
    for rank in ("0", "1"):
        own = {**common, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(
            Command(
                command.config, command.out, command.words, command.prepare, command.arguments, own
            )
        )
    return ranks


def wait_for(found: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "did not come"
        time.sleep(0.05)


def stepping(out: Path, rank: int) -> Callable[[], bool]:
    path = out / "logs" / "ranks" / f"heartbeat-{rank}.json"
    # not the first step, which has the longer limit
    return lambda: (
        path.exists() and bool(re.search(r'"step": [1-9]\d*, "phase": "step"', path.read_text()))
    )


Prepare = Callable[..., Command]


def test_a_shard_that_is_missing(prepare: Prepare):
    command = prepare("missing shard", copy=True)
    for path in command.out.glob("shards/*/image/c/*/0/0"):
        path.unlink()
    told = command.run()
    assert told.code == 1
    assert re.search(
        r"image slot \d+ cannot be read \(its file is missing\); run `medpsp", told.line
    )


def test_a_shard_that_is_damaged(prepare: Prepare):
    command = prepare("corrupt shard", copy=True)
    for path in command.out.glob("shards/*/image/c/*/0/0"):
        for place in range(0, path.stat().st_size // 2, 512):
            flip(path, 8 * place)
    told = command.run()
    assert told.code == 1
    assert re.search(r"image slot \d+ cannot be read \(.*CRC32C.*\); run `medpsp check", told.line)


def test_a_label_beyond_the_classes(prepare: Prepare, made: Config):
    """Whole shards with good checksums, all of whose labels are 9."""
    import zarr

    command = prepare("bad label", copy=True)
    for array in (path.parent for path in command.out.glob("shards/*/label/zarr.json")):
        labels = zarr.open_array(array)
        labels[:] = np.full(labels.shape, 9, np.uint8)
    told = command.run()
    assert told.code == 1
    assert re.search(r"slot \d+ has label 9, expected 0 to 3 or 255; run `medpsp check`", told.line)


def test_a_validation_label_beyond_the_classes(prepare: Prepare, made: Config):
    import zarr

    command = prepare("bad validation label", STEPS % (1, 1e-3), copy=True)
    for row in read_index(command.out / "shards"):
        if row.split == "val":
            path = command.out / "shards" / row.bucket / "label"
            labels = zarr.open_array(path)
            labels[row.slot] = np.full(labels.shape[1:], 9, np.uint8)
    told = command.run()
    assert told.code == 1
    assert re.search(r"slot \d+ has label 9, expected 0 to 3 or 255; run `medpsp check`", told.line)


def test_a_refused_command_leaves_the_run_as_it_was(prepare: Prepare):
    command = prepare("refused", STEPS % (1, 1e-3))
    assert command.run().code == 0
    before = (command.out / "config.yaml").read_bytes()
    events = sorted((command.out / "tensorboard").iterdir())
    other = Command(command.config, command.out, (*command.words, "model.psp_channels=24")).run()
    assert other.code == 1
    said = "model.psp_channels: made with 16, now 24; set it back, or try it beside"
    assert said in other.line
    place = f"out={command.out}"
    words = [str(command.config), place, *command.words, "model.psp_channels=24", "--from", "train"]
    for where in ((), ("--cluster", "generic")):
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", "run", *words, *where],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, said in done.stderr) == (1, True)
    assert (command.out / "config.yaml").read_bytes() == before
    assert sorted((command.out / "tensorboard").iterdir()) == events


def test_a_loss_that_is_not_finite(prepare: Prepare):
    told = prepare("nan", STEPS % (9, 1e30)).run()
    assert told.code == 1
    assert re.search(
        r"step \d: the gradient was not finite 2 times in a row; samples of", told.line
    )


def test_the_end_of_the_time(prepare: Prepare):
    now = str(int(time.time()))
    command = prepare("walltime", environment={"SLURM_JOB_END_TIME": now})
    told = command.run()
    assert told.code == EXIT_AGAIN
    assert "stopped by the end of its time after step 1, which is saved" in told.line
    assert (command.out / "checkpoints" / "step-00000001").is_dir()


def test_too_few_file_descriptors(prepare: Prepare):
    told = prepare("ulimit", prepare=limited, arguments=(resource.RLIMIT_NOFILE, 4)).run()
    assert told.code == 1
    assert re.search(r"too many open files: a process may have \d+ here \(ulimit -n\)", told.line)


def test_too_little_memory(prepare: Prepare):
    words = ("train.size=[512,512]", "train.batch_size=64")
    told = prepare("memory", *words, prepare=limited, arguments=(resource.RLIMIT_AS, 2**29)).run()
    assert told.code == 1
    assert re.search(r"no room for .*, ulimit -v allows [\d.]+ GiB; lower train.batch_", told.line)


@needs_mounts
def test_a_full_disk(prepare: Prepare, made: Config):
    command = prepare("disk full")
    command.prepare, command.arguments = mounted, (command.out, "size=1m", made.shards)
    command.out = command.out / "run"
    told = command.told(command.start())
    if told.code == 99:
        pytest.skip("mounting is not allowed here")
    assert told.code == 1
    assert re.search(
        r"disk full: .*run.*, \d+ [KM]?i?B of 1 MiB free after clean-up; delete old runs", told.line
    )


@needs_mounts
def test_shared_memory_that_is_full(prepare: Prepare, made: Config):
    command = prepare("dev shm full")
    shm = Path("/dev/shm")
    command.prepare, command.arguments = mounted, (shm, "size=1m", made.shards)
    heard, command.words = command.heard, ("out=/dev/shm/run",)
    process = command.start()
    process.join(180)
    told = Told(command.out.name, process.exitcode, heard.read_text())
    if told.code == 99:
        pytest.skip("mounting is not allowed here")
    assert told.code == 1
    assert re.search(
        r"shared memory full: /dev/shm, .* of 1 MiB free after clean-up; .* --shm-size", told.line
    )


@needs_mounts
def test_a_run_folder_that_cannot_be_written(prepare: Prepare):
    command = prepare("unwritable")
    command.prepare, command.arguments = mounted, (command.out, "ro,size=1m")
    told = command.run()
    if told.code == 99:
        pytest.skip("mounting is not allowed here")
    assert told.code == 1
    assert "cannot be written (Read-only file system); mend its rights, or take" in told.line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_of_somebody_else(prepare: Prepare):
    command = prepare("not ours")
    command.out.chmod(0o500)
    told = command.run()
    command.out.chmod(0o700)
    assert told.code == 1
    assert "cannot be written (Permission denied); mend its rights, or take" in told.line


def test_a_library_that_cannot_be_imported(prepare: Prepare, tmp_path: Path):
    command = prepare("import error")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.so").write_bytes(b"\x7fELF")
    missing = "import sys; sys.modules['torch'] = None; from launch.cli import main; main()"
    for start, words in (
        (["-c", missing], r"medpsp: torch is not installed; pip install 'medpsp\[all\]'"),
        (
            ["-m", "launch.cli"],
            r"medpsp: torch cannot be imported \(.*/torch.so: file too short\); install it again",
        ),
    ):
        done = subprocess.run(
            [sys.executable, *start, "train", str(command.config), f"out={command.out}"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"},
            capture_output=True,
            text=True,
            check=False,
        )
        told = Told("import error", done.returncode, done.stderr)
        assert told.code == 1
        assert re.match(words, told.line)


def test_a_port_that_is_in_use(prepare: Prepare):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = pair(prepare("port in use"))[0]
        command.environment["MASTER_PORT"] = port
        told = command.run()
    assert told.code == 1
    assert f"medpsp: rank 0: port {port} is in use by another program" in told.line


def test_a_rank_whose_peer_died(prepare: Prepare):
    ranks = pair(prepare("peer death", STEPS % (100000, 1e-3)))
    processes = [rank.start() for rank in ranks]
    wait_for(stepping(ranks[0].out, 1))
    processes[1].kill()
    told = ranks[0].told(processes[0])
    assert told.code == 1
    assert "rank 0: lost the connection to another rank, which ended; why, says" in told.line


def test_a_rank_that_is_killed_below_torchrun(prepare: Prepare):
    """The same from above: the parent knows the signal, and the logs have the ranks' numbers."""
    command = prepare("oom kill", STEPS % (100000, 1e-3), "train.ranks=2")
    process = command.start()
    ranks = command.out / "logs" / "ranks"
    wait_for(stepping(command.out, 1))
    victim = int(re.findall(r'"process": (\d+)', (ranks / "heartbeat-1.json").read_text())[0])
    os.kill(victim, signal.SIGKILL)
    told = command.told(process)
    assert told.code == 1
    assert re.search(r"train: rank 1 of 2: killed by SIGKILL \(out of memory\? this ", told.line)
    assert f"rank 1: one of 2 ranks, process {victim} on" in (ranks / "rank-1.log").read_text()
    log = (command.out / "logs" / "train.log").read_text()
    assert "train: 2 ranks on cpu" in log
    assert told.line.removeprefix("medpsp: ") in log


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_the_parent_lets_the_ranks_save(prepare: Prepare, number: int):
    command = prepare(f"signal {number}", STEPS % (100000, 1e-3), "train.ranks=2")
    process = command.start()
    wait_for(stepping(command.out, 1))
    os.kill(process.pid, number)
    told = command.told(process)
    assert told.code == EXIT_AGAIN
    assert re.search(rf"stopped by {signal.Signals(number).name} after step \d+, wh", told.line)
    assert list((command.out / "checkpoints").glob("step-*"))


def test_ranks_whose_parent_is_killed_save_and_end(prepare: Prepare):
    """Nobody else may begin in their folder before."""
    command = prepare("orphans", STEPS % (100000, 1e-3), "train.ranks=2")
    process = command.start()
    wait_for(stepping(command.out, 1))
    notes = (command.out / "logs" / "ranks").glob("heartbeat-*.json")
    ranks = [int(re.findall(r'"process": (\d+)', note.read_text())[0]) for note in notes]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    process.kill()
    process.join()
    second = Command(command.config, command.out, (STEPS % (100000, 1e-3),)).run()
    assert second.code == 1
    assert "ranks of an earlier medpsp command are at work there" in second.line
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    wait_for(lambda: not any(Path(f"/proc/{rank}/environ").exists() for rank in ranks))
    assert list((command.out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("how", ["stops", "has no batches"])
def test_a_rank_that_stands_still_is_named(prepare: Prepare, how: str):
    command = prepare(f"hang {how}", STEPS % (100000, 1e-3), "train.step_seconds=6")
    if how == "has no batches":
        command.prepare, command.arguments = slow_batches, (3, "1")
    ranks = pair(command)
    processes = [rank.start() for rank in ranks]
    began = time.monotonic()
    if how == "stops":
        wait_for(stepping(command.out, 1))
        os.kill(processes[1].pid, signal.SIGSTOP)
        began = time.monotonic()
    told = ranks[0].told(processes[0])
    took = time.monotonic() - began
    processes[1].kill()
    assert took < 150
    words = r"rank 1 gives no sign of life, the last time at step \d+ \(step, .*\.py:\d+\): stopped"
    if how == "has no batches":
        words = r"furthest behind is rank 1, at step [23] \((step|data), .*\); stacks are in "
    # its watch, or the word of gloo that the other one's watch had ended that one
    if told.code == EXIT_HANGS:
        assert re.search(rf"rank 0 hangs at step \d+ \(step, .*\) for \d+ s; {words}", told.line)
    else:
        assert how == "has no batches"
        assert "lost the connection to another rank" in told.line
        other = Told(f"{told.name}, rank 1", EXIT_HANGS, ranks[1].heard.read_text())
        assert re.search(words, other.line)
    teller = 0 if told.code == EXIT_HANGS else 1
    stack = (command.out / "logs" / "ranks" / f"stack-{teller}.txt").read_text()
    assert "medpsp/train/loop.py" in stack


def test_ranks_that_never_meet(prepare: Prepare):
    """The other one died before it came: not the ten minutes of torch."""
    command = pair(prepare("never met", "train.first_step_seconds=3"))[0]
    told = command.told(command.start())
    assert told.code == EXIT_HANGS
    assert re.search(
        r"rank 0 hangs at step 0 \(start, .*\) for \d+ s; rank 1 gives no sign of life: stopped, ki"
        r".* or never started; stacks are in .*logs/ranks, ranks have 3 s to meet$",
        told.line,
    )


def test_a_bug_has_its_traceback_in_the_log(prepare: Prepare):
    command = prepare("bug", prepare=broken_loop)
    told = command.run()
    assert told.code == 1
    log = command.out / "logs" / "train.log"
    assert told.line == f"medpsp: KeyError, a bug in medpsp: its traceback is at the end of {log}"
    assert "KeyError: 'no such thing'" in log.read_text()
