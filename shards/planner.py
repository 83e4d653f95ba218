"""Parts of an archive to planned series, by several processes at once."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

from medpsp.dataconfig import DataConfig
from medpsp.dicom.codes import refusal
from medpsp.dicom.sandbox import shared_sandbox
from medpsp.dicom.walk import Stamp
from medpsp.errors import ShardError, SourceError
from medpsp.types import ScanRow, SliceRef
from shards.commit import PASSING
from shards.headers import RowReader, file_id
from shards.masks import Aim
from shards.partition import lists
from shards.parts import planned_series, series_of_part
from shards.seriesfile import Entry, entry_of
from shards.spool import unpacked

log = logging.getLogger("medpsp")


class Task(NamedTuple):
    """A part: its frames as batches of `spool.packed`, and label objects that may belong to it."""

    frames: list[bytes]
    aims: list[Aim]


class Made(NamedTuple):
    """Of a part: its series, rows of what is in none of them, and what is to be logged."""

    series: list[Entry]
    rows: list[ScanRow]
    said: list[str]


class Planner:
    """Plans parts, in any process.

    Args:
        data: Of the configuration.
        key: Of the project.
        robbed: See `masks.Aims`.
    """

    def __init__(self, data: DataConfig, key: bytes, robbed: Iterable[str]) -> None:
        self.data, self.key, self.robbed = data, key, frozenset(robbed)

    def __call__(self, task: Task) -> Made:
        """Plan one part."""
        reader = RowReader(os.path.join(self.data.archive, ""), partial(file_id, self.key))
        refs: list[SliceRef] = []
        stamps: dict[str, Stamp] = {}
        for batch in map(unpacked, task.frames):
            columns = lists(batch)
            refs += reader.refs(columns)
            stamps.update(reader.stamps(columns))
        missed: dict[str, SourceError] = {}
        same = partial(self._same_pixels, missed)
        series, rows = series_of_part(refs, task.aims, self.robbed, self.data, same, self.key)
        found = [entry_of(planned_series(item, self.data, self.key, stamps)) for item in series]
        return Made(found, [_asked_again(row, missed) for row in rows], [])

    def _same_pixels(self, missed: dict[str, SourceError], refs: Sequence[SliceRef]) -> bool:
        """Whether frames decode to the same values; one that does not decode is like no other.

        Args:
            missed: Takes up ``file_id`` of what may decode another time.
            refs: The frames.
        """
        box = shared_sandbox(self.data.decode_seconds, self.data.decode_memory_mib)
        digests: set[str] = set()
        for ref in refs:
            try:
                digests.add(box.digest(ref))
            except SourceError as error:
                if error.code in PASSING:
                    missed[ref.file_id] = error
                return False
        return len(digests) == 1


def _asked_again(row: ScanRow, missed: dict[str, SourceError]) -> ScanRow:
    """A row that says what was in the way: no copy and no rival, until it is known."""
    error = missed.get(row.file_id)
    return refusal(row.file_id, error.code, error.detail, row.frame) if error else row


def planned_parts(planner: Planner, tasks: Iterator[Task], workers: int) -> Iterator[Made]:
    """Plan parts; what comes out is in their order.

    Args:
        planner: Does it.
        tasks: Taken a few at a time, as they are needed.
        workers: Processes; 1 plans in this one.

    Raises:
        ShardError: A process was killed.
    """
    if workers == 1:
        yield from map(planner, tasks)
        return
    running: deque[Future[Made]] = deque()
    spawn = multiprocessing.get_context("spawn")  # this process has threads
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(planner,)) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(_plan, task))
                if len(running) > 2 * workers:
                    yield _heard(running.popleft())
            while running:
                yield _heard(running.popleft())
        except BrokenProcessPool:
            raise ShardError(
                "plan: a process that planned was killed, most likely for its memory; use fewer "
                "data.workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _heard(future: Future[Made]) -> Made:
    made = future.result()
    for text in made.said:
        log.warning("%s", text)
    return made


class _Keep(logging.Handler):
    """Keeps warnings for the process that has the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


_planner: Planner
_keep: _Keep


def _begin(planner: Planner) -> None:
    global _planner, _keep
    _planner, _keep = planner, _Keep()
    log.addHandler(_keep)
    gc.disable()  # nothing here has cycles, and looking for them takes a tenth of the time


def _plan(task: Task) -> Made:
    _keep.texts = []
    return _planner(task)._replace(said=_keep.texts)
