"""Who stands still, what the kernel says of memory, and which line of many ranks is shown."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from launch.cluster import oom_kills
from launch.diagnose import diagnosis, lost_peer
from launch.ranks import Reason, _error, _first, _killed
from medpsp.errors import (
    EXIT_AGAIN,
    EXIT_CONFIG,
    CheckpointError,
    ConfigError,
    Interrupted,
    LaunchError,
    ShardError,
)
from medpsp.train import ranks
from medpsp.train.stop import StopRequest
from medpsp.train.watch import Note, Watch, behind
from medpsp.types import World

PAIR = World(rank=0, size=2)


def notes(*places: tuple[int, str, float, bool]) -> dict[int, Note]:
    return {
        rank: Note(step, phase, seconds, "", waits)
        for rank, (step, phase, seconds, waits) in enumerate(places)
    }


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (notes((7, "step", 9, True), (6, "step", 9, False)), "rank 1, at step 6 (step)"),
        (notes((7, "step", 9, True), (7, "data", 9, False)), "rank 1, at step 7 (data)"),
        (notes((7, "step", 9, True), (7, "step", 9, False)), "rank 1, at step 7 (step)"),
        (notes((7, "step", 9, True), (8, "save", 1, True)), "rank 0, at step 7 (step)"),
        (notes((8, "save", 9, True), (8, "evaluate", 9, True)), "rank 1, at step 8 (evaluate)"),
    ],
)
def test_who_is_behind(now: dict[int, Note], words: str):
    before = notes(*[(0, "start", 0.0, False)] * 2)
    assert behind(2, before, now, 0) == f"furthest behind is {words}"


def test_a_silent_rank_comes_first():
    now = notes((3, "step", 9, True), (9, "step", 1, False))
    told = behind(2, {1: now[1]}, now, 0)
    assert told.startswith("rank 1 gives no sign of life, the last time at step 9 (step): stopped")
    assert behind(3, {}, now, 0).startswith("rank 2 gives no sign of life: stopped")


def watch(
    folder: Path, limits: tuple[float, float] = (5, 0.4), stop: StopRequest | None = None
) -> tuple[Watch, list[str]]:
    lines: list[str] = []
    left = threading.Event()
    made = Watch(
        folder,
        PAIR,
        limits,
        tell=lambda line, code: lines.append(line),
        leave=lambda code: left.set(),
        stop=stop,
    )
    made.left = left  # type: ignore[attr-defined]
    return made, lines


def test_a_watch_tells_once_and_ends(tmp_path: Path):
    with watch(tmp_path)[0] as one:
        one.at(4, "step")
        assert one.left.wait(60)  # type: ignore[attr-defined]
    made, lines = watch(tmp_path)
    made.at(4, "step")
    assert made.left.wait(60)  # type: ignore[attr-defined]
    made.close()
    assert len(lines) == 1
    assert lines[0].startswith("train: rank 0 hangs at step 4 (step")
    assert "rank 1 gives no sign of life" in lines[0]
    assert "test_a_watch_tells_once_and_ends" in (tmp_path / "stack-0.txt").read_text()


def test_a_watch_is_silent_while_steps_are_made(tmp_path: Path):
    made, lines = watch(tmp_path, (60, 3))  # a busy machine may halt a step for a second or two
    for step in range(32):
        made.at(step, "step")
        time.sleep(0.1)
    made.at(32, "evaluate", first=True)  # the longer limit
    time.sleep(3.5)
    made.close()
    assert lines == []


def test_a_watch_ends_a_process_that_holds_the_interpreter(tmp_path: Path):
    """Its own thread never gets a turn: the stack is shown, and the process ends."""
    code = (
        "import ctypes, sys\n"
        "from pathlib import Path\n"
        "from medpsp.train import watch\n"
        "from medpsp.types import World\n"
        "watch.GRACE = 0.5\n"
        f"made = watch.Watch(Path({str(tmp_path)!r}), World(), (8, 4))\n"
        "made.at(1, 'step')\n"
        "import time; time.sleep(2.5)\n"
        "ctypes.PyDLL(None).sleep(300)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 1
    assert time.monotonic() - began < 100
    assert 'File "<string>", line 9 in <module>' in done.stderr


def test_what_nccl_is_to_remember(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(names[0], "50")
    ranks.keep_record(tmp_path / "ranks")
    assert [os.environ[name] for name in names] == ["50", "1", f"{tmp_path}/ranks/record-"]
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    known = subprocess.run(["grep", "-c", "-a", names[2], library], capture_output=True, check=True)
    assert int(known.stdout) > 0
    ranks.write_record()  # no group, no record
    assert list((tmp_path / "ranks").iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nccl needs a GPU")
def test_the_record_of_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv(ranks.RECORD, raising=False)
    with ranks.process_group(World(), 1, alone=True, records=tmp_path) as device:
        torch.distributed.all_reduce(torch.ones(3, device=device))
        ranks.write_record()
    record = pickle.loads((tmp_path / "record-0").read_bytes())  # noqa: S301 - our own file
    assert record["entries"][-1]["profiling_name"] == "nccl:all_reduce"


@pytest.mark.parametrize(
    ("group", "file", "text", "count"),
    [
        ("0::/job/7\n", "sys/fs/cgroup/job/7/memory.events", "oom 3\noom_kill 2\n", 2),
        ("0::/else\n", "sys/fs/cgroup/memory.events", "oom_kill 1\n", 1),
        ("4:memory:/j\n0::/\n", "sys/fs/cgroup/memory/j/memory.oom_control", "oom_kill 5\n", 5),
        ("4:cpu:/j\n", "sys/fs/cgroup/memory/j/memory.oom_control", "oom_kill 5\n", None),
    ],
)
def test_what_the_kernel_says(tmp_path: Path, group: str, file: str, text: str, count: int | None):
    for name, content in (("proc/self/cgroup", group), (file, text)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    assert oom_kills(tmp_path) == count


def test_here_the_kernel_can_be_read_or_says_nothing():
    found = oom_kills()
    assert found is None or found >= 0


def test_the_line_of_the_rank_that_failed_first(tmp_path: Path):
    folder = tmp_path / "ranks"
    (folder / "id" / "attempt_0" / "1").mkdir(parents=True)
    log = folder / "id" / "attempt_0" / "1" / "stderr.log"
    log.touch()
    killed = _first({0: 1, 1: -signal.SIGKILL}, tmp_path, folder, False)
    assert killed == Reason(1, _killed(signal.SIGKILL, False))
    (tmp_path / "0.echo").write_text("lost the connection\n")
    assert _first({0: 1}, tmp_path, folder, False) == Reason(0, "lost the connection")
    assert _first({0: 1, 1: 9}, tmp_path, folder, False) == Reason(
        1, f"ended with code 9; its output is in {log}"
    )
    (tmp_path / "1.2").write_text("data.classes: wrong\n")
    # torchrun ended the rank on its way out, so its exit code says nothing
    assert _first({0: 1, 1: -15}, tmp_path, folder, False) == Reason(1, "data.classes: wrong", 2)
    # torchrun killed rank 1, which had stopped, after rank 0 had said so
    (tmp_path / "0.76").write_text("train: rank 0 hangs\n")
    os.utime(tmp_path / "0.76", (1, 1))
    assert _first({0: 76, 1: -9}, tmp_path, folder, False).rank == 0
    assert _killed(signal.SIGKILL, True).startswith("killed by the kernel, out of memory (")


def test_what_a_rank_was_ended_for_is_what_the_command_ends_for():
    """Not its exit code: torchrun ends those that do not end fast enough."""
    asked = _error(Reason(1, "train: stopped by SIGTERM", EXIT_AGAIN), 2)
    wrong = _error(Reason(1, "model.norm: ...", EXIT_CONFIG), 2)
    failed = _error(Reason(1, "a shard is missing"), 2)
    assert [type(error) for error in (asked, wrong, failed)] == [
        Interrupted,
        ConfigError,
        LaunchError,
    ]
    assert str(failed) == "train: rank 1 of 2: a shard is missing"


def test_who_is_asked_to_end_while_the_ranks_still_meet_leaves_at_once(tmp_path: Path):
    stop = StopRequest()
    made, lines = watch(tmp_path, stop=stop)
    with made as one:
        assert not one.left.wait(0.3)  # type: ignore[attr-defined]
        stop._heard(signal.SIGTERM, None)
        assert one.left.wait(60)  # type: ignore[attr-defined]
    assert lines == ["train: asked to end before its first step"]


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] "
NCCL_SHM = (
    "NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled system error, NCCL version 2.28.9\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.\n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-7PqT3y (size 9637888), "
    "error: No space left on device (28)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.25 GiB is free."
)
UNABLE = "Unable to allocate 7.45 GiB for an array with shape (1000000000,)"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:23203."),
            "lost the connection",
        ),
        (RuntimeError(GLOO + "Read error [::1]:2: Connection reset by peer."), "lost the connec"),
        (RuntimeError("NCCL communicator was aborted on rank 0."), "lost the connection"),
        (
            RuntimeError("Timed out waiting 20000ms for recv operation to complete"),
            "did not answer",
        ),
        (RuntimeError("wait timeout after 20000ms, keys: /default_pg/0//1"), "did not answer"),
        (RuntimeError(NCCL_SHM), "shared memory full: /dev/shm, "),
        (
            RuntimeError(CUDA),
            "GPU memory: no room for 2.00 GiB on GPU 0, 1.25 GiB of 79.11 GiB free",
        ),
        (MemoryError(UNABLE), "memory: no room for 7.45 GiB, this "),
        (RuntimeError("can't start new thread"), "no more threads: this user may have "),
        (OSError("libcudart.so.13: cannot open shared object file: No such file"), "pip install"),
        (OSError(errno.ENFILE, "x"), "too many open files on this machine"),
        (OSError(errno.EDQUOT, "x", "/tmp/a/b"), "disk quota reached: /tmp/a/b, "),
        (
            OSError(errno.EACCES, "Permission denied", "/x/y"),
            "/x/y: Permission denied; mend its rights, or take another folder",
        ),
        (
            ShardError("slot 3 cannot be read (Too many open files); check"),
            "too many open files: a",
        ),
        (ShardError("shard 3: No space left on device; mend it"), None),
        (CheckpointError("checkpoint x: unreadable"), None),
        (LaunchError("ranks: RANK 3 is not below WORLD_SIZE 2"), None),
        (RuntimeError("shape mismatch"), None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    ],
)
def test_the_words_of_others(error: Exception, words: str | None):
    line = diagnosis(error)
    assert (line is None) == (words is None), line
    assert words is None or words in (line or "")
    assert line is None or "\n" not in line
    assert lost_peer(error) == (words is not None and words[:8] in ("lost the", "did not "))


def test_an_option_that_a_command_does_not_have_is_not_proposed():
    error = OSError(errno.EACCES, "Permission denied", "/x/y")
    told = "/x/y: Permission denied; mend its rights, or take another folder"
    assert diagnosis(error) == told


def test_a_cause_that_hides_behind_an_error_of_ours():
    def unwritable(number: int) -> LaunchError:
        try:
            try:
                raise OSError(number, os.strerror(number), "/nowhere/run")
            except OSError as error:
                raise LaunchError("out /nowhere/run: cannot be written (...)") from error
        except LaunchError as found:
            return found

    assert "disk full: /nowhere/run, " in (diagnosis(unwritable(errno.ENOSPC)) or "")
    assert "(...); mend its rights" in (diagnosis(unwritable(errno.EROFS)) or "")
    assert diagnosis(unwritable(errno.ENOTDIR)) is None
