"""Whole batches from worker processes, without a copy on their way.

Workers are processes of our own, not of multiprocessing: they import the module of their task and
nothing of the program that runs. They fill a ring of shared memory that has no name, so nothing is
left behind however we end, and they end with us. Results come in the order of the items.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import TrainError
from shards.loadworker import Message, Spec, Told, arrays_at, batch_bytes
from shards.reader import ShardReader

AHEAD = 2
"""Batches that each worker has before it; one more lies with the caller."""

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


class Task(Protocol):
    """Makes batches; it travels to the workers by pickle, its module is imported there."""

    def __call__(self, item: Any, arrays: Sequence[NDArray[Any]]) -> object:
        """Fill the arrays of one batch; what it returns comes back beside them, by pickle."""


class Made(NamedTuple):
    """One batch; the arrays are overwritten once the next one is asked for."""

    arrays: tuple[NDArray[Any], ...]
    note: Any


def run_task(
    task: Task, specs: Sequence[Spec], items: Iterable[Any], workers: int
) -> Iterator[Made]:
    """Let workers do a task for every item; the results come in the order of the items.

    The memory of a batch is used again as soon as the next one is asked for: copy what must stay.
    Workers end at once where the caller stops early, with an error or without. After the last
    item they wait for the next call of this function, until this process ends or `end_workers`.

    Args:
        task: Called once for each item, in any worker.
        specs: Shape and dtype of each array of a batch.
        items: Taken a few at a time, as they are needed.
        workers: Processes; 0 does all in this one.

    Raises:
        TrainError: A worker died.
        Exception: What the task raised, in the turn of its item.
    """
    if workers == 0:
        arrays = tuple(np.empty(spec.shape, spec.dtype) for spec in specs)
        for item in items:
            yield Made(arrays, task(item, arrays))
        return
    crew = _crew(workers, batch_bytes(specs) * (workers * AHEAD + 1))
    finished = False
    try:
        yield from _Round(crew, task, specs, items)
        finished = True
    finally:
        if finished and not _idle and crew.owner == os.getpid():
            _idle.append(crew)
        else:
            crew.close()


def raw_batches(
    root: Path, bucket: str, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
    """Images (B, H, W) or (B, H, W, 3) and labels (B, H, W) as they are on disk.

    They are overwritten once the next batch is asked for.

    Args:
        root: Folder of the shards.
        bucket: Name of the bucket.
        batches: Slots of each batch; B may differ between them.
        workers: Processes; 0 reads in this one.

    Raises:
        ShardError: A slice is missing or damaged.
        TrainError: A worker died.
    """
    if not batches:
        return
    reader = ShardReader(root)
    frame, dtype = reader.frame(bucket)
    most = max(len(batch) for batch in batches)
    specs = (Spec((most, *frame), dtype.str), Spec((most, *frame[:2]), "|u1"))
    for (images, labels), count in run_task(_Raw(reader, bucket), specs, batches, workers):
        yield images[:count], labels[:count]


@dataclass(frozen=True, slots=True)
class _Raw:
    reader: ShardReader
    bucket: str

    def __call__(self, item: Sequence[int], arrays: Sequence[NDArray[Any]]) -> int:
        images, labels = (array[: len(item)] for array in arrays)
        self.reader.read_batch(self.bucket, item, images, labels)
        return len(item)


class _Crew:
    """Workers and the memory that they share with us."""

    def __init__(self, workers: int, size: int) -> None:
        self.owner, self.size = os.getpid(), size
        self.pipes: list[Connection] = []
        self._children: list[subprocess.Popen[bytes]] = []
        _crews.add(self)
        handle = os.memfd_create("medpsp-loader")
        try:
            os.ftruncate(handle, size)
            self.memory = mmap.mmap(handle, size)
            for _ in range(workers):
                self._start(handle)
        except BaseException:  # half a crew is none
            self.close()
            raise
        finally:
            os.close(handle)

    def _start(self, memory: int) -> None:
        ours, theirs = Pipe()
        told = f"{theirs.fileno()}, {memory}, {self.size}, {self.owner}"
        # the modules that we have, and none from the current folder
        code = f"import sys; sys.path[:] = {sys.path!r}; from shards.loadworker import main"
        # blocked from its first moment on: schedulers signal all processes of a job, and we decide
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", f"{code}; main({told})"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.pipes.append(ours)
        self._children.append(child)

    def usable(self, workers: int, size: int) -> bool:
        """Whether it will do for another round."""
        alive = all(child.poll() is None for child in self._children)
        return alive and len(self.pipes) == workers and self.size >= size

    def obituary(self, number: int) -> TrainError:
        """Why a worker does not answer."""
        child = self._children[number]
        try:
            code = child.wait(10)
        except subprocess.TimeoutExpired:
            code = 0  # it closed its pipe and lives on
        how = f"ended with {code}; what it wrote stands above"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", most likely for its memory; lower train.loader_workers"
        return TrainError(f"loader: worker {number + 1} of {len(self.pipes)} {how}")

    def close(self) -> None:
        """End the workers now, whatever they are at."""
        for pipe in self.pipes:
            pipe.close()
        if self.owner == os.getpid():  # after a fork they are not ours
            for child in self._children:
                child.kill()
            for child in self._children:
                child.wait()
        self._children.clear()


_crews: weakref.WeakSet[_Crew] = weakref.WeakSet()
_idle: list[_Crew] = []


def _crew(workers: int, size: int) -> _Crew:
    """The crew of an earlier round if it fits: a worker takes a third of a second to start."""
    while _idle:
        crew = _idle.pop()
        if crew.owner == os.getpid() and crew.usable(workers, size):
            return crew
        crew.close()
    return _Crew(workers, size)


def end_workers() -> None:
    """End the workers that wait for another call of `run_task`."""
    while _idle:
        _idle.pop().close()


@atexit.register
def _end_all() -> None:
    for crew in list(_crews):
        crew.close()


class _Round:
    """One call of `run_task`: items out, batches in, in their order."""

    def __init__(
        self, crew: _Crew, task: Task, specs: Sequence[Spec], items: Iterable[Any]
    ) -> None:
        self._crew, self._items = crew, iter(items)
        self._load = [0] * len(crew.pipes)
        step = batch_bytes(specs)
        places = range(0, step * (len(crew.pipes) * AHEAD + 1), step)
        self._arrays = {place: arrays_at(crew.memory, place, specs) for place in places}
        self._free = list(places)
        self._at: dict[int, int] = {}  # where each batch on its way lies
        self._done: dict[int, Told] = {}
        self._sent = 0
        for number in range(len(crew.pipes)):
            self._send(number, Message(task=task, specs=tuple(specs)))

    def __iter__(self) -> Iterator[Made]:
        turn = 0
        while True:
            self._hand_out()
            if turn == self._sent:
                return
            if turn not in self._done:
                self._collect()
                continue
            told, place = self._done.pop(turn), self._at.pop(turn)
            if told.error is not None:
                raise told.error
            yield Made(self._arrays[place], told.note)
            self._free.append(place)
            turn += 1

    def _hand_out(self) -> None:
        while self._free and min(self._load) < AHEAD:
            try:
                item = next(self._items)
            except StopIteration:
                return
            number = self._load.index(min(self._load))
            place = self._at[self._sent] = self._free.pop()
            self._load[number] += 1
            self._send(number, Message(number=self._sent, place=place, item=item))
            self._sent += 1

    def _send(self, number: int, message: Message) -> None:
        try:
            self._crew.pipes[number].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._crew.obituary(number) from None

    def _collect(self) -> None:
        for pipe in wait(self._crew.pipes):
            number = self._crew.pipes.index(pipe)  # type: ignore[arg-type]
            try:
                told: Told = self._crew.pipes[number].recv()
            except (EOFError, ConnectionResetError):
                raise self._crew.obituary(number) from None
            self._load[number] -= 1
            self._done[told.number] = told
