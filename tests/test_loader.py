"""Batches from worker processes: in order, without a trace, and clear when something breaks."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from medpsp.errors import DicomError, ShardError, TrainError
from shards import loader
from shards.loader import end_workers, raw_batches, run_task
from shards.loadworker import Spec
from tests.loadtasks import SPECS, Fails, Modules, Numbers, Raises, below
from tests.test_reader import BUCKET, HOLE, bucket_name, labels, make_store, slices


@pytest.fixture(autouse=True)
def no_workers_left() -> Iterator[None]:
    yield
    end_workers()
    assert below(os.getpid()) == []


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers: int):
    pids = set()
    for turn, ((numbers, small), note) in enumerate(
        run_task(Numbers(True), SPECS, range(30), workers)
    ):
        assert numbers.shape == (3, 1000)
        assert (numbers == turn).all()
        assert (small == turn).all()
        assert note[0] == turn
        pids.add(note[1])
    assert turn == 29
    assert (os.getpid() in pids) == (workers == 0)
    assert len(pids) == max(1, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_items_make_no_batches(workers: int):
    assert list(run_task(Numbers(), SPECS, [], workers)) == []


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    stream = run_task(Numbers(), SPECS, items(), 2)
    for _ in range(3):
        next(stream)
    assert len(taken) <= 3 + 2 * loader.AHEAD
    stream.close()  # type: ignore[attr-defined]


def test_memory_is_used_again():
    places = {
        made.arrays[0].__array_interface__["data"][0]
        for made in run_task(Numbers(), SPECS, range(50), 2)
    }
    assert len(places) <= 2 * loader.AHEAD + 1


def test_workers_wait_for_the_next_round_and_are_no_more_than_asked_for():
    def pids(count: int, size: int = 1000) -> set[int]:
        specs = (Spec((3, size), "<i8"), SPECS[1])
        return {made.note[1] for made in run_task(Numbers(True), specs, range(12), count)}

    first = pids(2)
    assert pids(2) == first
    assert pids(2, 10) == first
    assert set(below(os.getpid())) == first
    assert pids(2, 100_000).isdisjoint(first)  # their memory is too small
    last = pids(1)
    assert below(os.getpid()) == list(last)


def test_two_rounds_at_once_do_not_meet():
    one, two = (run_task(Numbers(True), SPECS, range(20), 1) for _ in range(2))
    for turn, (a, b) in enumerate(zip(one, two, strict=True)):
        assert (a.arrays[0] == turn).all()
        assert (b.arrays[0] == turn).all()
        assert a.note[1] != b.note[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        ShardError("slot 5 is damaged"),
        DicomError("PIX_TRUNCATED", "5 of 7"),
        KeyError("x"),
        ZeroDivisionError("over"),
    ],
)
def test_an_error_of_a_task_comes_up_in_its_turn(error: Exception, workers: int):
    stream = run_task(Fails(5, error), SPECS, range(20), workers)
    assert [next(stream).note for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert str(caught.value) == str(error)
    assert below(os.getpid()) == []


def test_an_error_that_cannot_travel_comes_up_by_its_text():
    task = Fails(1, None)
    with pytest.raises((RuntimeError, TypeError), match="exceptions must derive"):
        list(run_task(task, SPECS, range(3), 2))
    with pytest.raises(RuntimeError, match="Unsendable: a"):
        list(run_task(Raises(), SPECS, range(3), 1))


def test_an_error_of_the_items_ends_the_workers():
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(run_task(Numbers(), SPECS, items(), 2))
    assert below(os.getpid()) == []


@pytest.mark.parametrize(
    ("how", "why"),
    [("kill", "was killed by SIGKILL, most likely for its memory"), ("exit", "ended with 7")],
)
def test_a_worker_that_dies_is_one_clear_error(how: str, why: str):
    with pytest.raises(TrainError, match=f"loader: worker [12] of 2 {why}"):
        list(run_task(Fails(6, how), SPECS, range(20), 2))
    assert below(os.getpid()) == []


def test_a_worker_killed_from_outside_is_noticed_at_once():
    stream = run_task(Numbers(), SPECS, range(10**9), 2)
    next(stream)
    os.kill(below(os.getpid())[0], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(TrainError, match="was killed by SIGKILL"):
        deque(stream, maxlen=0)
    assert time.monotonic() < began + 10


def test_idle_workers_that_died_are_replaced():
    list(run_task(Numbers(), SPECS, range(4), 2))
    pid = below(os.getpid())[0]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    assert [made.note[0] for made in run_task(Numbers(), SPECS, range(4), 2)] == [0, 1, 2, 3]
    assert len(below(os.getpid())) == 2


def test_workers_do_not_hear_the_signals_of_a_scheduler():
    stream = run_task(Numbers(), SPECS, range(40), 2)
    next(stream)
    for pid in below(os.getpid()):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    assert len(list(stream)) == 39


# stopping early


def stop_by_break() -> None:
    for made in run_task(Numbers(True), SPECS, range(100), 2):
        if made.note[0] == 3:
            break


def stop_by_error() -> None:
    with contextlib.suppress(KeyError):
        for _ in run_task(Numbers(True), SPECS, range(100), 2):
            raise KeyError


def stop_by_collection() -> None:
    stream = run_task(Numbers(True), SPECS, range(100), 2)
    next(stream)
    del stream


@pytest.mark.parametrize("stop", [stop_by_break, stop_by_error, stop_by_collection])
def test_stopping_early_ends_the_workers(stop: Callable[[], None]):
    handles, maps = len(os.listdir("/proc/self/fd")), len(shared(os.getpid()))
    stop()
    gc.collect()
    assert below(os.getpid()) == []
    assert len(os.listdir("/proc/self/fd")) <= handles
    assert len(shared(os.getpid())) <= maps


def shared(pid: int) -> list[str]:
    """Memory of the loader that a process has, and whatever it has that outlives processes."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if "medpsp-loader" in line or "/dev/shm" in line]


PROGRAM = """
import sys, os, time
from tests.loadtasks import SPECS, Numbers, below
from shards.loader import run_task
for made in run_task(Numbers(), SPECS, range({items}), 2):
    if made.note[0] == 5:
        print(*below(os.getpid()), flush=True)
        {then}
{after}
"""


def program(items: int, then: str, after: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    code = PROGRAM.format(items=items, then=then, after=after)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    return child, [int(word) for word in child.stdout.readline().split()]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_workers_end_with_a_parent_that_is_killed():
    child, pids = program(10**9, "time.sleep(600)")
    assert len(pids) == 2
    for pid in (child.pid, *pids):  # without a name in /dev/shm it ends with the last of them
        assert [line for line in shared(pid) if "/memfd:" in line] == shared(pid) != []
    child.kill()
    child.communicate()
    until(lambda: all(map(gone, pids)))


def test_workers_end_although_another_process_holds_their_pipe():
    """A child that the parent forked outlives it, with copies of all its descriptors."""
    child, pids = program(10**9, "print(os.fork() or '', flush=True); time.sleep(600)")
    assert child.stdout is not None
    fork = int(child.stdout.readline().strip() or child.stdout.readline())
    child.kill()
    child.wait()
    until(lambda: all(map(gone, pids)))
    os.kill(fork, signal.SIGKILL)
    child.communicate()


@pytest.mark.parametrize(
    ("items", "then", "after", "code"),
    [
        (8, "pass", "", 0),
        (100, "sys.exit(3)", "", 3),
        (100, "1 / 0", "", 1),
        (8, "pass", "1 / 0", 1),
    ],
)
def test_workers_end_with_a_parent_that_ends(items: int, then: str, after: str, code: int):
    child, pids = program(items, then, after)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == code
    assert len(pids) == 2
    until(lambda: all(map(gone, pids)))
    assert ("ZeroDivisionError" in errors) == (code == 1)
    assert "Resource" not in errors


def test_a_fork_of_the_parent_leaves_the_workers_alone():
    stream = run_task(Numbers(), SPECS, range(40), 2)
    next(stream)
    child = os.fork()
    if child == 0:
        stream.close()  # type: ignore[attr-defined]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(stream)) == 39


def test_workers_import_what_the_task_needs_and_no_more():
    (made,) = run_task(Modules(), SPECS, [0], 1)
    assert "torch" not in made.note
    assert "ray" not in made.note


# slices


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["int16", "uint8"])
def test_raw_batches_are_the_slices(workers: int, dtype: str, tmp_path: Path):
    images, masks = make_store(tmp_path, dtype, count=20)
    order = [n for n in np.random.default_rng(0).permutation(20).tolist() if n != HOLE]
    batches = [order[at : at + 6] for at in range(0, len(order), 6)]
    count = 0
    for (image, label), batch in zip(
        raw_batches(tmp_path, bucket_name(dtype), batches, workers), batches, strict=True
    ):
        np.testing.assert_array_equal(image, images[batch])
        np.testing.assert_array_equal(label, masks[batch])
        count += len(label)
    assert count == 19
    assert list(raw_batches(tmp_path, bucket_name(dtype), [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_slice_is_a_shard_error_of_its_batch(workers: int, tmp_path: Path):
    make_store(tmp_path)
    path = tmp_path / BUCKET / "label/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    stream = raw_batches(tmp_path, BUCKET, [[0, 1], [2, 3], [6, 0]], workers)
    image, label = next(stream)
    np.testing.assert_array_equal(image, slices("int16")[:2])
    np.testing.assert_array_equal(label, labels()[:2])
    with pytest.raises(ShardError, match=f"{BUCKET}/label slot 3 cannot be read .*CRC32C"):
        next(stream)
