"""Submit a plan through submitit and follow it. The only file that imports submitit."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.jobs import run_command
from launch.plan import JobSpec
from launch.rundir import RunDir
from medpsp.errors import LaunchError

log = logging.getLogger("medpsp")
POLL_S = 0.2


def submit_plan(plan: tuple[JobSpec, ...], run: RunDir) -> None:
    """Run the jobs of a plan one after another on this machine, showing what they log.

    Raises:
        LaunchError: A job failed; the message is the job's own last line.
    """
    import submitit

    executor: Any = submitit.LocalExecutor(folder=run.logs / "jobs")
    for spec in plan:
        executor.update_parameters(timeout_min=spec.minutes, name=f"medpsp-{spec.name}")
        job = executor.submit(run_command, spec.name, run.config.absolute())
        log.info("%s: job %s", spec.name, job.job_id)
        follow = _lines(Path(job.paths.stderr))
        while not job.done():
            _show(follow)
            time.sleep(POLL_S)
        _show(follow)
        try:
            reason = job.result()
        except submitit.core.utils.UncompletedJobError:
            reason = f"died; its output is in {job.paths.stderr}"
        except submitit.core.utils.FailedJobError as error:
            last = str(error).strip().splitlines()[-1]
            reason = f"failed ({last}); its output is in {job.paths.stderr}"
        if reason:
            raise LaunchError(f"{spec.name}: {reason}")


def _lines(path: Path) -> Iterator[str]:
    """Whole new lines of a growing file; an empty string where there is none yet."""
    while not path.exists():
        yield ""
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
        if "submitit" not in line:
            sys.stderr.write(line)
