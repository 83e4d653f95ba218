"""A rank that stands still is named and ended: in a collective it would wait for ever.

Every rank notes what it is at; a thread of each writes that to a file of its own and, when a step
takes too long, says who is behind, with the stack of this process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from medpsp.types import World

log = logging.getLogger("medpsp")
EXIT_HANGS = 76
"""Ends a rank that hangs."""
PERIOD = 5.0
"""Seconds between two notes on disk."""


class Watch:
    """Notes of one rank, and the thread that reads them.

    Args:
        folder: For ``heartbeat-RANK.json`` and ``stack-RANK.txt`` of all ranks.
        world: Who we are.
        limits: Seconds for the first step of a stage, and for any other.
        end: Called with the line that says what hangs; it must end the process.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        limits: tuple[float, float],
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._folder, self._world, self._limits = folder, world, limits
        self._end = end or _leave
        self._now = (time.monotonic(), 0, "start", True)
        self._stop = threading.Event()
        self._period = min(PERIOD, min(limits) / 4)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name="medpsp-watch", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: str, first: bool = False) -> None:
        """This rank goes on.

        Args:
            step: That it is at.
            phase: data, step, evaluate or save.
            first: Whether the longer limit counts.
        """
        self._now = (time.monotonic(), step, phase, first)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            since, step, phase, first = self._now
            waited, limit = time.monotonic() - since, self._limits[0 if first else 1]
            self._note(step, phase, waited)
            if waited > limit:
                self._end(self._diagnosis(step, phase, waited))
                return

    def _note(self, step: int, phase: str, waited: float) -> None:
        with suppress(OSError):  # a full disk is told where something is lost by it
            path = self._folder / f"heartbeat-{self._world.rank}.json"
            partial = path.with_name(f".{path.name}")
            note = {"step": step, "phase": phase, "seconds": round(waited, 1), "time": time.time()}
            partial.write_text(json.dumps(note), encoding="utf-8")
            partial.replace(path)

    def _diagnosis(self, step: int, phase: str, waited: float) -> str:
        with suppress(OSError), (self._folder / f"stack-{self._world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        others = {}
        for rank in range(self._world.size):
            with suppress(OSError, ValueError):
                path = self._folder / f"heartbeat-{rank}.json"
                others[rank] = json.loads(path.read_text(encoding="utf-8"))
        behind = min(others, key=lambda rank: (others[rank]["step"], rank), default=None)
        text = f"train: rank {self._world.rank} hangs at step {step} ({phase}) for {waited:.0f} s"
        if behind is not None and self._world.size > 1:
            note = others[behind]
            text += f"; furthest behind is rank {behind}, at step {note['step']} ({note['phase']})"
        return f"{text}; stacks are in {self._folder.name}/, the limits are train.step_seconds"


def _leave(line: str) -> None:
    """End a process whose main thread will not come back."""
    log.critical("%s", line)
    os._exit(EXIT_HANGS)
