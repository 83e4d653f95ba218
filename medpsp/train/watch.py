"""A rank that stands still is named and ended: in a collective it would wait for ever.

Every rank notes what it is at; a thread of each writes that to a file of its own and, when a step
takes too long, says who is behind, with the stack of this process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from medpsp.errors import EXIT_AGAIN
from medpsp.progress import duration
from medpsp.train.ranks import write_record
from medpsp.train.stop import StopRequest
from medpsp.types import World

log = logging.getLogger("medpsp")
EXIT_HANGS = 76
"""Ends a rank that hangs."""
PERIOD = 5.0
"""Seconds between two notes on disk."""
JOIN_SECONDS = 300.0
"""For all ranks to find each other, unless a first step has less."""
GRACE = 60.0
"""Seconds after which the process ends without a line, where even the watch is held up."""

_PHASES = ("start", "data", "step", "evaluate", "save")
_OURS = ("/medpsp/", "/shards/", "/launch/")
_COLLECTIVE = "/torch/distributed/"


class Note(NamedTuple):
    """What a rank is at.

    Attributes:
        step: That it is at.
        phase: start, model, data, step, evaluate or save.
        seconds: Since it went on last.
        place: Innermost line of this program, as file:line.
        waits: Whether it waits for the others there.
    """

    step: int
    phase: str
    seconds: float
    place: str = ""
    waits: bool = False


class Watch:
    """Notes of one rank, and the thread that reads them.

    It starts before the ranks meet, and ends after they part.

    Args:
        folder: For ``heartbeat-RANK.json`` and ``stack-RANK.txt`` of all ranks.
        world: Who we are.
        limits: Seconds for the first step of a stage, and for any other.
        tell: Called with the line that says why this process ends, and its exit code.
        leave: Ends the process with a code.
        stop: Asked while the ranks still meet: nothing of theirs looks at it there.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        limits: tuple[float, float],
        tell: Callable[[str, int], None] | None = None,
        leave: Callable[[int], None] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self._stop_request = stop or StopRequest()
        self._folder, self._world, self._limits = folder, world, limits
        self._tell, self._leave = tell or _tell, leave or _leave
        self._now = (time.monotonic(), 0, "start", True)
        self._main = threading.get_ident()
        self._before: dict[int, Note] = {}
        self._stop = threading.Event()
        self._period = min(PERIOD, min(limits) / 4)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(self._note())  # over one of an earlier run
        self._thread = threading.Thread(target=self._run, name="medpsp-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def at(self, step: int, phase: str, first: bool = False) -> None:
        """This rank goes on.

        Args:
            step: That it is at.
            phase: model, data, step, evaluate or save.
            first: Whether the longer limit counts.
        """
        self._now = (time.monotonic(), step, phase, first)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            limit = self._limit()
            # a thread without the interpreter's lock: some hold it for ever
            faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=2)
            note = self._note()
            self._write(note)
            if note.phase == "start" and self._stop_request.code:
                self._tell("train: asked to end before its first step", EXIT_AGAIN)
                self._leave(EXIT_AGAIN)
                return
            if note.seconds > limit / 2 and not self._before:
                self._before = self._heard()
            elif note.seconds <= limit / 2:
                self._before = {}
            if note.seconds > limit:
                faulthandler.dump_traceback_later(GRACE, exit=True, file=2)
                self._tell(self._diagnosis(note), EXIT_HANGS)
                write_record()  # the last thing: it may wait for a GPU that hangs
                faulthandler.cancel_dump_traceback_later()
                self._leave(EXIT_HANGS)
                return

    def _limit(self) -> float:
        _, _, phase, first = self._now
        if phase == "start":
            return min(JOIN_SECONDS, self._limits[0])
        return self._limits[0 if first else 1]

    def _note(self) -> Note:
        since, step, phase, _ = self._now
        place, waits = _where(sys._current_frames().get(self._main))
        return Note(step, phase, round(time.monotonic() - since, 1), place, waits)

    def _write(self, note: Note) -> None:
        with suppress(OSError):  # a full disk is told where something is lost by it
            path = self._folder / f"heartbeat-{self._world.rank}.json"
            partial = path.with_name(f".{path.name}")
            seen = {**note._asdict(), "process": os.getpid(), "time": time.time()}
            partial.write_text(json.dumps(seen), encoding="utf-8")
            partial.replace(path)

    def _heard(self) -> dict[int, Note]:
        notes = {}
        for rank in range(self._world.size):
            with suppress(OSError, ValueError, KeyError):
                path = self._folder / f"heartbeat-{rank}.json"
                seen = json.loads(path.read_text(encoding="utf-8"))
                notes[rank] = Note(*(seen[name] for name in Note._fields))
        return notes

    def _diagnosis(self, note: Note) -> str:
        rank, size = self._world.rank, self._world.size
        with suppress(OSError), (self._folder / f"stack-{rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        text = f"train: rank {rank} hangs at step {_told(note)} for {duration(round(note.seconds))}"
        if size > 1:
            text += f"; {behind(size, self._before, self._heard(), rank)}"
        limit = f"the limit is train.{'first_' * self._now[3]}step_seconds"
        if note.phase == "start":
            limit = f"ranks have {self._limit():.0f} s to meet"
        return f"{text}; stacks are in {self._folder}, {limit}"


def behind(size: int, before: dict[int, Note], now: dict[int, Note], teller: int) -> str:
    """Which rank holds the others up.

    A rank whose note did not change is dead or stopped. Else it is the one of the lowest step,
    and of those in the same step one that waits for nobody.

    Args:
        size: Number of ranks.
        before: Rank to its note, some periods ago.
        now: The same now.
        teller: The rank that looks; it is alive.
    """
    silent = [
        rank
        for rank in range(size)
        if rank != teller and (rank not in now or now[rank] == before.get(rank))
    ]
    if silent:
        rank = silent[0]
        last = f", the last time at step {_told(now[rank])}" if rank in now else ""
        return f"rank {rank} gives no sign of life{last}: stopped, killed, or never started"

    def place(rank: int) -> tuple[int, bool, int, float]:
        note = now[rank]
        phase = _PHASES.index(note.phase) if note.phase in _PHASES else 0
        return note.step, note.waits, phase, -note.seconds

    rank = min(now, key=place)
    return f"furthest behind is rank {rank}, at step {_told(now[rank])}"


def _told(note: Note) -> str:
    return f"{note.step} ({note.phase}{', ' + note.place if note.place else ''})"


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """Innermost line of ours, and whether the call goes on into torch.distributed."""
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or _COLLECTIVE in name
        if any(folder in name for folder in _OURS) and "site-packages/torch" not in name:
            path = Path(name)
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}", waits
        frame = frame.f_back
    return "", waits


def _tell(line: str, code: int) -> None:
    log.critical("%s", line)


def _leave(code: int) -> None:
    """End a process whose main thread will not come back."""
    os._exit(code)
