"""What a run on a cluster is at: SLURM's word first, then what the jobs say of themselves."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launch.chain import Chain, Submitted, Told, label_of, read_chain, told_by
from launch.rundir import RunDir
from launch.slurmstate import ENDED, GONE, JobState, job_states, require_cluster
from medpsp.errors import LaunchError
from medpsp.words import many

SILENT_S = 600.0
"""A controller that is started again takes less."""
NEVER = re.compile(
    r"^(Partition(Node|Time)Limit|BadConstraints|AccountNotAllowed|Invalid(QOS|Account)"
    r"|\w+PerJob\w*|JobHeld\w+|launch failed requeued held)$"
)
"""Why a job waits that starts only if somebody changes it or the cluster."""
HOPELESS = re.compile(rf"{NEVER.pattern}|^Dependency")
"""The same, and jobs that wait for others."""
STALE_S = 120.0
"""A rank that wrote nothing for this long is not shown as at work."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job of the chain.

    Attributes:
        name: Of the job.
        id: SLURM's.
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


def status_of(run: RunDir) -> list[Row]:
    """Rows in the order of the chain.

    Raises:
        LaunchError: Nothing was submitted, or no SLURM answers.
    """
    chain = read_chain(run)
    require_cluster(chain.slurm, run.root)
    states = job_states(job.id for job in chain.jobs)
    return [_row(run, job, states[job.id]) for job in chain.jobs]


def ended(rows: list[Row]) -> bool:
    """Whether nothing will run any more."""
    return all(row.ended for row in rows)


def _row(run: RunDir, job: Submitted, state: JobState) -> Row:
    told = _told(run, job)
    word = state.state
    failed = next((t for t in told if t.state == "failed"), None)
    if word == GONE and failed:
        word = "failed"
    elif word == GONE and [t.state for t in told] == ["done"] * job.parts:
        word = "done"
    well = word in ("COMPLETED", "done")
    last = failed or (told[-1] if told and word in ENDED else None)
    note = last.reason if last and not well else ""
    if job.parts > 1 and len(state.counts) > 1:
        word = ", ".join(f"{count} {name}" for name, count in sorted(state.counts.items()))
    return Row(
        name=job.name,
        id=job.id,
        state=word,
        nodes=",".join(sorted(state.nodes)),
        restarts=max([state.restarts, *(t.restarts for t in told)]),
        at=_at(run, job) if "RUNNING" in word else "",
        note=note or (state.reason if word != "COMPLETED" else ""),
        waits=state.reason if state.state == "PENDING" else "",
        ended=state.ended,
        well=well,
    )


def _told(run: RunDir, job: Submitted) -> list[Told]:
    names = [label_of(job.name, n + 1, job.parts) for n in range(job.parts)]
    return [told for name in names if (told := told_by(run, name)) and told.job == job.id]


def _at(run: RunDir, job: Submitted) -> str:
    """The last line of progress in its log."""
    if job.name == "train" and (note := heartbeat(run)):
        return note
    name = label_of(job.name, 1, job.parts)
    with suppress(OSError):
        lines = (run.logs / f"{name}.log").read_text(encoding="utf-8").splitlines()
        return lines[-1].split(" ", 2)[-1] if lines else ""
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


def table(run: RunDir, rows: list[Row]) -> Group:
    """For the terminal: a row a job, and below them in full what jobs say of their failure."""
    shown = Table(title=Text(str(run.root)), title_justify="left", pad_edge=False)
    for name in ("job", "id", "state", "nodes", "again", "at", ""):
        shown.add_column(name, overflow="fold")
    told = []
    for row in rows:
        again, word = str(row.restarts or ""), row.note
        if " " in word:  # a line of ours, not SLURM's word
            told.append(f"{row.name}: {word}")
            word = "see below"
        shown.add_row(row.name, row.id, row.state, row.nodes, again, row.at, word)
    return Group(shown, *(Text(line) for line in told))


Shown = list[tuple[RunDir, list[Row]]]


def follow(runs: Sequence[RunDir], seconds: float, show: Callable[[Shown], object]) -> list[Row]:
    """Show until nothing will run any more; asks SLURM every ``seconds``.

    Raises:
        LaunchError: Nothing was submitted, or to another cluster; or for ten minutes SLURM does
            not answer, or has nothing but jobs that it cannot start.
    """
    for run in runs:
        require_cluster(read_chain(run).slurm, run.root)
    heard = able = time.monotonic()
    while True:
        try:
            found = [(run, status_of(run)) for run in runs]
        except LaunchError:
            if time.monotonic() - heard > SILENT_S:
                raise
            time.sleep(seconds)
            continue
        heard = time.monotonic()
        show(found)
        rows = [row for _, of_run in found for row in of_run]
        if ended(rows):
            return rows
        stuck = [(run, row) for run, of_run in found for row in of_run if NEVER.search(row.waits)]
        if not stuck or any(not row.ended and not HOPELESS.search(row.waits) for row in rows):
            able = heard
        elif heard - able > SILENT_S:
            run, row = stuck[0]
            root = runs[0].root if runs[0].root in run.root.parents else run.root
            raise LaunchError(
                f"{row.name}: cannot start ({row.waits}), job {row.id}; change the profile to what "
                f"the partition allows, `medpsp cancel {root}`, and submit again"
            )
        time.sleep(seconds)


def require_success(rows: list[Row]) -> None:
    """Raise where a job did not end well.

    Raises:
        LaunchError: Naming the first that failed, and why.
    """
    bad = [row for row in rows if not row.well]
    if bad:
        row = next((r for r in bad if "CANCELLED" not in r.state), bad[0])
        raise LaunchError(
            f"{row.name}: {row.state} ({row.note or 'no reason given'}), job {row.id}"
        )


def log_files(run: RunDir, chain: Chain, name: str) -> list[Path]:
    """Logs of a job, ours and SLURM's.

    Raises:
        LaunchError: No such job.
    """
    job = next((job for job in chain.jobs if job.name == name), None)
    if job is None:
        known = ", ".join(job.name for job in chain.jobs)
        raise LaunchError(f"logs {name}: no such job; there are {known}")
    own = sorted(run.logs.glob(f"{name}*.log"))
    places = [job.id, *(f"{job.id}_{part}" for part in range(job.parts))]
    theirs = [p for place in places for p in sorted((run.logs / "jobs").glob(f"{place}/*_log.out"))]
    return [*own, *theirs]
