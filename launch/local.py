"""The jobs of a plan one after another on this machine, each a process of its own.

Each has a session of its own: a Ctrl-C of the terminal reaches the command alone, which asks the
job to end and waits until it has saved. A second one ends at once whatever is at work.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch.chain import write_planned
from launch.cluster import kill_all
from launch.jobs import run_command, setup_logging
from launch.plan import JobSpec
from launch.ranks import follow_parent
from launch.rundir import RunDir
from launch.terminal import leave, show
from medpsp.errors import EXIT_AGAIN, EXIT_CONFIG, ConfigError, Interrupted, LaunchError
from medpsp.train.stop import asking

log = logging.getLogger("medpsp")
POLL_S = 0.1
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST = "medpsp: "
"""Before the line that a process ends with; whoever started it says that line itself."""


def submit_plan(plan: tuple[JobSpec, ...], run: RunDir) -> None:
    """Run the jobs of a plan one after another, showing what they log.

    Raises:
        LaunchError: A job failed; the message is the job's own last line.
        ConfigError: A job found the configuration wrong.
        Interrupted: It was asked to end, and has saved.
        SystemExit: It was asked to end and had nothing to save, or was asked twice.
    """
    write_planned(run, [spec.name for spec in plan])
    folder = run.logs / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    for spec in plan:
        output = folder / f"{spec.name}.log"
        code, answer = _follow(spec.name, run, output)
        if code - 128 in ASKING:
            raise SystemExit(code)
        if code == EXIT_AGAIN and answer:
            raise Interrupted(answer)
        if code:
            reason = (answer or _last_line(output) or _died(code)).removeprefix(f"{spec.name}: ")
            where = "" if answer else f"; its output is in {output}"
            kind = ConfigError if code == EXIT_CONFIG else LaunchError
            raise kind(f"{spec.name}: {reason}{where}")


def _follow(name: str, run: RunDir, output: Path) -> tuple[int, str]:
    """Exit code of a job, and why it ended; nothing where it could not say so."""
    command = [sys.executable, "-m", "launch.local", name, str(run.config.absolute())]
    with _heard() as asked, output.open("w", encoding="utf-8") as file:
        with _held():  # the job hears what comes before it listens
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
            )
        log.info("%s: process %d", name, process.pid)
        lines, told = _lines(output), 0
        try:
            while process.poll() is None:
                _show(lines)
                if len(asked) > 1:
                    raise SystemExit(128 + asked[-1])
                if len(asked) > told:
                    told = len(asked)
                    process.send_signal(asked[-1])
                    log.warning("%s is asked to end; a second Ctrl-C ends it at once", name)
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                kill_all(process.pid)
            answer = process.communicate()[0]
        _show(lines)
    return process.returncode, answer.strip()


@contextmanager
def _heard() -> Iterator[list[int]]:
    """Signals that ask to end, in the order in which they come."""
    numbers: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if not (numbers and number == signal.SIGHUP):  # a shell sends its own beside the kernel's
            numbers.append(number)

    before = {number: signal.signal(number, hear) for number in asking(ASKING)}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _held() -> Iterator[None]:
    """Let signals wait, here and in what is started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _last_line(output: Path) -> str:
    """What a job said last, where it could still say so."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix(LAST) for line in lines if line.startswith(LAST)]
    return said[-1] if said else ""


def _lines(path: Path) -> Iterator[str]:
    """Whole new lines of a growing file; an empty string where there is none yet."""
    with path.open(encoding="utf-8", errors="replace") as file:
        held = ""
        while True:
            piece = file.readline()
            if piece.endswith("\n"):
                yield held + piece
                held = ""
            else:
                held += piece
                yield ""


def _show(lines: Iterator[str]) -> None:
    for line in lines:
        if not line:
            return
        if not line.startswith(LAST):
            show(line)


def main(name: str, config: Path) -> int:
    """A job in a process of its own.

    Args:
        name: Key of `launch.jobs.JOBS`.
        config: Resolved configuration; the run folder is the one that it lies in.

    Returns:
        Exit code; the one line a user needs is written to what was standard output.
    """
    answer = os.dup(1)
    os.dup2(2, 1)  # whoever prints does so into the log
    for number in asking(ASKING):
        signal.signal(number, _leave)
    follow_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    setup_logging()
    RunDir(config.parent).lock_as_rank(leads=False)
    code, reason = run_command(name, config)
    with os.fdopen(answer, "w", encoding="utf-8") as file:
        file.write(reason)
    return code


def _leave(number: int, frame: FrameType | None) -> None:
    """What has nothing to save ends at once: what is on disk is whole at any moment."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1], Path(sys.argv[2]))
    except SystemExit as end:  # of `_leave`
        code = int(end.code or 0)
    if code - 128 in ASKING:
        leave(code)
    sys.exit(code)
