"""SEG on their way to a peer, in a thread that nothing else waits for.

The queue is on disk: ``unsent/assoc-000001.series-000.dcm`` below the folder of answers is an empty
file that lies there before the SEG has its name, and goes once the peer has taken it. A process
that is killed forgets none so, and no number of them needs memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from medpsp.deploy.dicomnet import Peer, hang_up, send, sending_entity
from medpsp.durable import sync
from medpsp.errors import DicomError

log = logging.getLogger("medpsp")

UNSENT = "unsent"
"""Folder of the notes."""
PAUSES = (1.0, 5.0, 15.0, 60.0)
"""Seconds before the second try, the third, the fourth, and each one after that."""
END_S = 3.0
"""Seconds for what is left when the receiver ends; lines are cut then."""


class _Failed(NamedTuple):
    """Tries so far, when the next may be by our clock, and why the last one failed."""

    tries: int
    due: float
    why: str


_UNTRIED = _Failed(0, 0.0, "")


class Sender:
    """Sends what is noted, in the order of its associations, again and again until it is taken.

    A peer that cannot be reached stops all; a SEG that the peer refuses stops no other one.

    Args:
        out: Folder of answers, owned by this process.
        peer: Takes them.
        aet: Our title.
        pauses: As `PAUSES`; the last one is repeated.

    Raises:
        ConfigError: pynetdicom is missing, or the title is none.
    """

    def __init__(self, out: Path, peer: Peer, aet: str, pauses: Sequence[float] = PAUSES) -> None:
        self._out, self._peer, self._pauses = out, peer, pauses
        self._entity = sending_entity(aet)
        self._wake, self._ending, self._cut = (threading.Event() for _ in range(3))
        self._failures: dict[str, _Failed] = {}
        self._told: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)

    def start(self) -> None:
        """Begin with what an earlier process left; notes without a SEG are taken away."""
        (self._out / UNSENT).mkdir(exist_ok=True)
        for note in (self._out / UNSENT).iterdir():
            if not _seg_of(self._out, note.name).exists():
                note.unlink()
        if left := unsent(self._out):
            log.info("receive: %d SEG of before are sent now, to %s", len(left), self._peer)
        self._thread.start()

    def note(self, files: Sequence[Path]) -> None:
        """Answers that will be there in a moment: a kill between must not lose their SEG."""
        folder = self._out / UNSENT
        for path in files:
            if path.suffix == ".dcm":
                (folder / f"{path.parent.name}.{path.name}").touch()
        sync(folder)

    def wake(self) -> None:
        """What was noted is there."""
        self._wake.set()

    def close(self) -> None:
        """End within seconds; what is not taken by then stays noted."""
        if not self._thread.is_alive():
            return
        self._ending.set()
        self._wake.set()
        self._thread.join(END_S)
        self._cut.set()
        until = time.monotonic() + END_S
        while self._thread.is_alive() and time.monotonic() < until:
            hang_up(self._entity)
            self._thread.join(0.1)
        left = unsent(self._out)
        for name in left:
            if name not in self._told:
                self._tell(name, "the receiver ends")
        if left:
            log.warning(
                "receive: %d SEG are not sent to %s; they stay, and are sent at the next start",
                len(left),
                self._peer,
            )

    def _run(self) -> None:
        while not self._cut.is_set():
            self._wake.clear()
            last = self._ending.is_set()
            try:
                pause = self._round()
            except OSError as error:  # the folder of notes: a file server that comes back
                self._tell(UNSENT, error.strerror or type(error).__name__)
                pause = self._pauses[-1]
            if last:
                return
            self._wake.wait(pause)

    def _round(self) -> float | None:
        """One try of each SEG whose time has come; seconds until the next, None for no such."""
        left = [name for name in unsent(self._out) if not self._taken(name)]
        now = time.monotonic()
        return min((max(0.0, self._failed(name).due - now) for name in left), default=None)

    def _taken(self, name: str) -> bool:
        """False where it was not, or its time has not come."""
        before = self._failed(name)
        if self._cut.is_set():
            return False
        if before.due > time.monotonic():
            self._tell(name, before.why)
            return False
        try:
            why, reached = send(_seg_of(self._out, name), self._peer, self._entity)
        except Exception as error:  # noqa: BLE001 - one SEG ends no service
            why, reached = type(error).__name__, True
        if reached:
            self._failures.pop("", None)
        if why:
            key = name if reached else ""
            tries = self._failures.get(key, _UNTRIED).tries
            pause = self._pauses[min(tries, len(self._pauses) - 1)]
            self._failures[key] = _Failed(tries + 1, time.monotonic() + pause, why)
            self._tell(name, why)
            return False
        (self._out / UNSENT / name).unlink(missing_ok=True)
        self._failures.pop(name, None)
        self._told.pop(name, None)
        log.info("%s: SEG sent to %s", _told_as(name), self._peer)
        return True

    def _failed(self, name: str) -> _Failed:
        """What holds it up longer: its own failures, or those of the peer, which have no name."""
        return max(
            (self._failures.get(key, _UNTRIED) for key in (name, "")), key=lambda one: one.due
        )

    def _tell(self, name: str, why: str) -> None:
        if self._told.get(name) != why:  # once, not with each try
            self._told[name] = why
            error = DicomError("SEG_NOT_SENT", f"{why} ({self._peer})")
            log.error("%s: %s; it stays, and is sent later", _told_as(name), error)


def unsent(out: Path) -> list[str]:
    """Names of notes whose SEG is there, in the order of associations."""
    folder = out / UNSENT
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    there = [name for name in names if _seg_of(out, name).exists()]
    return sorted(there, key=lambda name: (len(name.partition(".")[0]), name))


def _seg_of(out: Path, name: str) -> Path:
    folder, _, file = name.partition(".")
    return out / folder / file


def _told_as(name: str) -> str:
    return name.replace(".", "/", 1)
