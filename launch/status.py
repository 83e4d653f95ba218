"""What a run is at; on a cluster SLURM's word first, then what the jobs say of themselves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shlex import quote

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launch.chain import Chain, Submitted, Told, label_of, read_chain, told_by
from launch.localstate import Row, at_work, is_local, last_said, rows_here
from launch.rundir import RunDir
from launch.slurmstate import ENDED, GONE, JobState, job_states, require_cluster
from medpsp.errors import ConfigError, LaunchError

SILENT_S = 600.0
"""A controller that is started again takes less."""
NEVER = re.compile(
    r"^(Partition(Node|Time)Limit|BadConstraints|AccountNotAllowed|Invalid(QOS|Account)"
    r"|\w+PerJob\w*|JobHeld\w+|launch failed requeued held)$"
)
"""Why a job waits that starts only if somebody changes it or the cluster."""
HOPELESS = re.compile(rf"{NEVER.pattern}|^Dependency")
"""The same, and jobs that wait for others."""


def status_of(run: RunDir) -> list[Row]:
    """Rows in the order of the chain.

    Raises:
        LaunchError: Nothing was begun, or no SLURM answers.
    """
    if is_local(run):
        return rows_here(run)
    chain = read_chain(run)
    require_cluster(chain.slurm, run.root)
    states = job_states(job.id for job in chain.jobs)
    return [_row(run, chain, job, states[job.id]) for job in chain.jobs]


def ended(rows: list[Row]) -> bool:
    """Whether nothing will run any more."""
    return all(row.ended for row in rows)


def _row(run: RunDir, chain: Chain, job: Submitted, state: JobState) -> Row:
    word = state.state
    told = _told(run, chain, job, since=word == GONE)
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
        at=last_said(run, label_of(job.name, 1, job.parts)) if "RUNNING" in word else "",
        note=note or (state.reason if word != "COMPLETED" else ""),
        waits=state.reason if state.state == "PENDING" else "",
        ended=state.ended,
        well=well,
    )


def _told(run: RunDir, chain: Chain, job: Submitted, since: bool) -> list[Told]:
    """What its tasks said; with ``since`` also a command by hand after the chain was submitted."""
    names = [label_of(job.name, n + 1, job.parts) for n in range(job.parts)]
    found = [told for name in names if (told := told_by(run, name))]
    theirs = {other.id for other in chain.jobs}
    return [
        told
        for told in found
        if told.job == job.id or (since and told.job not in theirs and told.began > chain.at)
    ]


def table(run: RunDir, rows: list[Row]) -> Group:
    """For the terminal: a row a job, and below them in full what jobs say of their failure."""
    shown = Table(title=Text(str(run.root)), title_justify="left")
    far, why = any(row.id for row in rows), any(row.note for row in rows)
    for name in ("job", "id", "state", "nodes", "again", "at", *(["why"] if why else [])):
        if far or name not in ("id", "nodes", "again"):
            shown.add_column(name, overflow="fold")
    told = []
    for row in rows:
        again, word = str(row.restarts or ""), row.note
        if " " in word:  # a line of ours, not SLURM's word
            told.append(f"{row.name}: {word}")
            word = "see below"
        where = (row.id, row.state, row.nodes, again) if far else (row.state,)
        shown.add_row(row.name, *map(Text, where), Text(row.at), *([Text(word)] if why else []))
    return Group(shown, *(Text(line) for line in told))


Shown = list[tuple[RunDir, list[Row]]]


def follow(
    listed: Callable[[], Sequence[RunDir]], seconds: float, show: Callable[[Shown], object]
) -> list[Row]:
    """Show until nothing will run any more; asks SLURM every ``seconds``.

    Args:
        listed: Gives the runs: members of a sweep on this machine begin one after another.
        seconds: From one look to the next.
        show: Gets what they are at.

    Raises:
        LaunchError: Nothing was begun, or on another cluster; or for ten minutes SLURM does not
            answer, or has nothing but jobs that it cannot start.
    """
    for run in (run for run in listed() if not is_local(run)):
        require_cluster(read_chain(run).slurm, run.root)
    heard = able = time.monotonic()
    while True:
        runs = listed()
        try:
            found = [(run, status_of(run)) for run in runs]
        except LaunchError:
            if all(map(is_local, runs)) or time.monotonic() - heard > SILENT_S:
                raise
            time.sleep(seconds)
            continue
        heard = time.monotonic()
        show(found)
        rows = [row for _, of_run in found for row in of_run]
        if ended(rows) and not any(is_local(run) and at_work(run, unknown=False) for run in runs):
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
        which = f", job {row.id}" if row.id else ""
        raise LaunchError(f"{row.name}: {row.state} ({row.note or 'no reason given'}){which}")


def places(run: RunDir) -> Iterator[str]:
    """A line for each thing of a run that is there to be looked at, or given to a device."""
    from shards.index import REPORT

    for what, path in (
        ("report", run.root / "shards" / REPORT),
        ("page", run.page),
        ("evaluation", run.evaluation.with_suffix(".html")),
        ("onnx fp32", run.fp32),
        ("onnx int8", run.int8),
        ("dossier", run.export_report.with_suffix(".html")),
    ):
        if path.is_file():
            yield f"{what:12} {path}"
    if run.tensorboard.is_dir():
        logdir = quote(str(run.root))
        yield f"{'tensorboard':12} {run.tensorboard}   (tensorboard --logdir {logdir})"


def log_files(run: RunDir, name: str) -> list[Path]:
    """Logs of a job: ours, and what it printed, which SLURM or `medpsp run` kept.

    Raises:
        ConfigError: No such job.
    """
    folder = run.logs / "jobs"
    if is_local(run):
        known = [row.name for row in rows_here(run)]
        theirs = [path for path in (folder / f"{name}.log",) if path.is_file()]
    else:
        jobs = read_chain(run).jobs
        known = [job.name for job in jobs]
        job = next((job for job in jobs if job.name == name), None)
        parts = [job.id, *(f"{job.id}_{n}" for n in range(job.parts))] if job else []
        theirs = [path for part in parts for path in sorted(folder.glob(f"{part}/*_log.out"))]
    if name not in known:
        what = f"logs {name}: no such job;" if name else "logs: which job?"
        raise ConfigError(f"{what} there are {', '.join(known)}")
    return [*sorted(run.logs.glob(f"{name}*.log")), *theirs]


def log_texts(run: RunDir, name: str) -> Iterator[tuple[Path, str]]:
    """Each of `log_files` that says something new, without what those before it said.

    Raises:
        ConfigError: As `log_files`.
    """
    seen: set[str] = set()
    for path in log_files(run, name):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        fresh = [line for line in lines if line not in seen]
        if path.parent == run.logs:  # ours; tasks of one job may well say the same
            seen.update(line.split(" ", 2)[-1] for line in lines)  # without its time
        if fresh:
            yield path, "\n".join(fresh)
