"""A folder that is watched: each entry of it is segmented once, into a folder of its own."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from medpsp.deploy.jobs import WORK, run_job
from medpsp.deploy.predict import Predictor
from medpsp.errors import ConfigError

log = logging.getLogger("medpsp")

HALF = (".part", ".partial", ".tmp")
"""Ends of names that whoever copies gives what is not whole yet."""
POLL_S, RETRY_S = 0.2, 60.0
"""Seconds until a request to stop is seen, and until a job is tried again that the disk stopped."""

Stamps = tuple[tuple[str, int, int], ...]
"""Name below the entry, bytes and mtime in ns of each file."""


def stamps_of(entry: Path) -> Stamps:
    """Of all files of an entry; empty where there is none, or one goes while we look."""
    found: list[tuple[str, int, int]] = []

    def closed(error: OSError) -> None:  # a folder that cannot be listed must not go unsaid
        found.append((os.path.relpath(os.fsdecode(error.filename), entry), 0, 0))

    try:
        top = entry.stat()
        if stat.S_ISREG(top.st_mode):
            return (("", top.st_size, top.st_mtime_ns),)
        for folder, _, names in os.walk(entry, onerror=closed):
            for name in names:
                path = os.path.join(folder, name)
                seen = os.lstat(path)
                found.append((os.path.relpath(path, entry), seen.st_size, seen.st_mtime_ns))
    except OSError:
        return ()
    return tuple(sorted(found))


class Ready(NamedTuple):
    """An entry that is whole, and not done yet."""

    name: str
    entry: Path
    stamps: Stamps


class Watch:
    """The entries of a folder, each segmented once it has settled; the folder stays as it is.

    An entry is done where ``job-<12 hex>`` or ``job-<12 hex>.failed`` is in the folder of answers,
    named by a SHA-256 of its name and stamps: remove that file, and it is tried again. Time is our
    own clock's: that of a file server may differ, and copies may keep old mtimes.

    Args:
        predictor: The model at work.
        inbox: Its direct entries: folders, DICOM files, zip and tar files, NIfTI.
        out: For the answers, of which this process is the owner; see `jobs.owned`.
        settle: Seconds for which nothing of an entry may have changed.

    Raises:
        ConfigError: No such folder, or the answers would lie inside it.
    """

    def __init__(self, predictor: Predictor, inbox: Path, out: Path, settle: float = 5.0) -> None:
        if not inbox.is_dir():
            raise ConfigError(f"{inbox}: no such folder; make it, or give another")
        if out.resolve().is_relative_to(inbox.resolve()):
            raise ConfigError(f"{out}: lies inside {inbox}, where it would be segmented")
        self.predictor, self.inbox, self.out, self.settle = predictor, inbox, out, settle
        self._since: dict[str, tuple[Stamps, float]] = {}
        self._later: dict[str, float] = {}
        self._blind = False

    def look(self, now: float) -> list[Ready]:
        """Settled entries that are not done, by name.

        Args:
            now: Seconds of a clock that never goes back.
        """
        since: dict[str, tuple[Stamps, float]] = {}
        ready = []
        for entry in self._entries():
            stamps = stamps_of(entry)
            name = _job_name(entry.name, stamps)
            if not stamps or self._done(name):
                continue
            before = self._since.get(entry.name)
            first = before[1] if before and before[0] == stamps else now
            since[entry.name] = (stamps, first)
            if now - first >= self.settle and now >= self._later.get(name, now):
                ready.append(Ready(name, entry, stamps))
        self._since = since
        return ready

    def run(self, stop: Callable[[], bool], every: float = 1.0, once: bool = False) -> int:
        """Look and segment until asked to stop; what is begun is finished.

        Args:
            stop: Whether to.
            every: Seconds between two looks. More where looking takes long: at most a tenth of the
                time is spent on it.
            once: End after the first ``settle`` seconds, with what is settled then.

        Returns:
            How many jobs failed.
        """
        failed, began = 0, time.monotonic()
        now = began
        while not stop():
            ready = self.look(now)
            took = time.monotonic() - now
            for item in ready:
                if stop():
                    break
                failed += not self.do(item)
            if once and now - began >= self.settle:
                if left := len(self._since) - len(ready):
                    log.info("watch: %d entries still change; the next time", left)
                break
            rest(min(every, self.settle) if once else max(every, 9 * took), stop)
            now = time.monotonic()
        return failed

    def do(self, item: Ready) -> bool:
        """Segment one entry; False where that failed. One that changes meanwhile is left alone."""
        job = run_job(
            self.predictor,
            item.entry,
            self.out / item.name,
            lambda: stamps_of(item.entry) == item.stamps,
        )
        if job is None:
            return True
        if not job.failed:
            log.info("%s: %s", item.name, job.line)
            return True
        log.error("%s: failed: %s", item.name, job.line)
        if job.again or not self._mark(item.name, job.line):
            self._later[item.name] = time.monotonic() + RETRY_S
        return False

    def _entries(self) -> list[Path]:
        try:
            found = sorted(self.inbox.iterdir())
        except OSError as error:  # a file server that comes back
            if not self._blind:
                log.error("watch: the folder cannot be listed: %s", error.strerror)
            self._blind = True
            return []
        self._blind = False
        return [p for p in found if p.name[:1] != "." and not p.name.lower().endswith(HALF)]

    def _done(self, name: str) -> bool:
        return (self.out / name).exists() or (self.out / f"{name}.failed").exists()

    def _mark(self, name: str, line: str) -> bool:
        part = self.out / f"{WORK}{name}.failed"
        try:
            part.write_text(line + "\n", encoding="utf-8")
            part.replace(self.out / f"{name}.failed")
        except OSError:
            with suppress(OSError):
                part.unlink()
            return False
        return True


def _job_name(name: str, stamps: Stamps) -> str:
    text = repr((name, stamps)).encode("utf-8", "surrogateescape")
    return f"job-{hashlib.sha256(text).hexdigest()[:12]}"


def rest(seconds: float, stop: Callable[[], bool]) -> None:
    """Sleep, but not beyond a request to stop."""
    until = time.monotonic() + seconds
    while not stop() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, POLL_S))
