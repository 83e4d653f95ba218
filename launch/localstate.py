"""What a run on this machine is at, by what it leaves in its folder.

Nothing is written. A job that says that it runs is believed only while a command holds the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launch.chain import Told, chain_of, planned_here, processes_here, told_by
from launch.plan import CHAIN
from launch.rundir import RANKS_LOCK, RunDir
from medpsp.errors import ConfigError, LaunchError
from medpsp.progress import duration
from medpsp.words import many

STALE_S = 120.0
"""A rank that wrote nothing for this long is not shown as at work."""
ALONE_S = 30.0
"""A log that goes on this long after the end of its job is of a command of its own; the page of
the run comes at once."""
KNOWN = (*CHAIN, "measure")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job of the chain; on this machine it has no id, node or count of restarts.

    Attributes:
        name: Of the job.
        id: SLURM's; empty on this machine.
        state: SLURM's word; ``done`` and ``failed`` are the job's own where SLURM forgot it.
        nodes: Where it runs or ran.
        restarts: How often it was queued again.
        at: What it is at.
        note: Why it waits, or ended.
        waits: Why it waits, in SLURM's words.
        ended: Whether nothing of it will run any more.
        well: Whether all of it is done.
    """

    name: str
    id: str
    state: str
    nodes: str
    restarts: int
    at: str
    note: str
    waits: str = field(compare=False)  # it changes while a job waits, and is no news
    ended: bool
    well: bool


def is_local(run: RunDir) -> bool:
    """Whether what was begun last was begun on this machine; so too where nothing was."""
    chain = chain_of(run)
    if run.planned.is_file():
        return chain is None or chain.at < run.planned.stat().st_mtime
    return not run.chain.exists()


def at_work(run: RunDir, unknown: bool = True) -> bool:
    """Whether a command, or ranks of one, hold the folder; ``unknown`` where it has no locks."""
    for name in (".lock", RANKS_LOCK):
        try:
            handle = os.open(run.root / name, os.O_RDONLY)
        except OSError:  # nobody ever has
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return unknown
        finally:
            os.close(handle)
    return False


def rows_here(run: RunDir) -> list[Row]:
    """Rows in the order of the chain.

    Raises:
        ConfigError: No such folder.
        LaunchError: No command was begun there.
    """
    if not run.root.is_dir():
        what = "a file" if run.root.exists() else "no such folder"
        raise ConfigError(f"run {run.root}: {what}; give that of a run, `out` of its configuration")
    planned, works = planned_here(run), at_work(run)
    names = [name for name in KNOWN if name in planned or _log(run, name)]
    if not names:
        raise LaunchError(f"run {run.root}: nothing was begun there; `medpsp run CONFIG` does")

    def heard(name: str) -> float:
        told = told_by(run, name)
        return max(_log(run, name), told.began if told else 0.0)

    newest = max(names, key=heard)
    return [_row(run, name, planned, works and name == newest, works) for name in names]


def _log(run: RunDir, name: str) -> float:
    """When a job logged last; 0 where it never did."""
    path = run.logs / f"{name}.log"
    return path.stat().st_mtime if path.is_file() else 0.0


def _row(run: RunDir, name: str, planned: list[str], last: bool, works: bool) -> Row:
    told, logged, note, at = told_by(run, name), _log(run, name), "", ""
    due = run.planned.stat().st_mtime if name in planned else 0.0
    alone = told is None or (told.ended > 0 and logged > told.ended + ALONE_S)
    if logged < due and (told is None or told.began < due):
        state = "waiting" if works else "not run"
    elif told is None or alone:  # a command of its own, which does not say how it ended
        state, at = ("running", last_said(run, name)) if last else ("ended", _logged(run, name))
    elif told.state == "running":
        state, at = "running", _logged(run, name) if logged >= told.began else ""
        if not last or not _lives(told):
            state, note = "interrupted", "it was ended; the same command goes on"
    else:
        state = "stopped" if told.state == "again" else told.state
        note, at = (
            told.reason.removeprefix(f"{name}: "),
            f"took {duration(told.ended - told.began)}",
        )
    return Row(
        name=name,
        id="",
        state=state,
        nodes="",
        restarts=0,
        at=at,
        note=note,
        waits="",
        ended=not works or state not in ("waiting", "running"),
        well=state in ("done", "ended"),
    )


def _lives(told: Told) -> bool:
    """Whether the process that told it does, as far as this one can know."""
    number, _, space = told.process.partition(" ")
    if not space or space != processes_here() or told.node != os.uname().nodename:
        return True
    with suppress(PermissionError):  # another user's
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
    return True


def last_said(run: RunDir, name: str) -> str:
    """Step of the ranks in training, else the last line of a job's log without its time and level;
    empty where there is none."""
    return (name == "train" and heartbeat(run)) or _logged(run, name)


def _logged(run: RunDir, name: str) -> str:
    """The last line of its log, which has progress and the time that is left."""
    with suppress(OSError):
        text = (run.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return next(reversed(text.splitlines()), "").split(" ", 2)[-1]
    return ""


def heartbeat(run: RunDir) -> str:
    """Step and phase of the rank that is furthest behind; empty where none was heard lately."""
    notes: list[dict[str, Any]] = []
    for path in (run.logs / "ranks").glob("heartbeat-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(path.read_text(encoding="utf-8"))
            notes.append({name: note[name] for name in ("time", "step", "phase")})
    fresh = [note for note in notes if time.time() - note["time"] < STALE_S]
    if not fresh:
        return ""
    last = min(fresh, key=lambda note: int(note["step"]))
    return f"step {last['step']} ({last['phase']}), {many(len(fresh), 'rank')}"
