"""Submit a plan through submitit and follow it. The only file that imports submitit."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.jobs import run_command
from launch.plan import JobSpec
from launch.rundir import RunDir
from medpsp.errors import ConfigError, LaunchError

log = logging.getLogger("medpsp")
POLL_S = 0.2
DEVICES = "CUDA_VISIBLE_DEVICES"


def submit_plan(plan: tuple[JobSpec, ...], run: RunDir) -> None:
    """Run the jobs of a plan one after another on this machine, showing what they log.

    Raises:
        LaunchError: A job failed; the message is the job's own last line.
        ConfigError: A job found the configuration wrong.
    """
    import submitit

    executor: Any = submitit.LocalExecutor(folder=run.logs / "jobs")
    for spec in plan:
        executor.update_parameters(timeout_min=spec.minutes, name=f"medpsp-{spec.name}")
        job = executor.submit(
            run_with_devices, spec.name, run.config.absolute(), os.environ.get(DEVICES)
        )
        log.info("%s: job %s", spec.name, job.job_id)
        follow = _lines(Path(job.paths.stderr))
        try:
            while not job.done():
                _show(follow)
                time.sleep(POLL_S)
        finally:
            if not job.done():  # Ctrl-C here must not leave it running
                job.cancel()
        _show(follow)
        code, reason = _outcome(job)
        if reason:
            raise (ConfigError if code == 2 else LaunchError)(f"{spec.name}: {reason}")


def run_with_devices(name: str, config: Path, devices: str | None) -> tuple[int, str]:
    """`run_command` with the GPUs of the submitting process: submitit's local jobs see none."""
    if devices is None:
        os.environ.pop(DEVICES, None)
    else:
        os.environ[DEVICES] = devices
    return run_command(name, config)


def _outcome(job: Any) -> tuple[int, str]:
    """What `run_command` returned, or why it did not."""
    from submitit.core.utils import FailedJobError

    where = f"its output is in {job.paths.stderr}"
    if not job.paths.result_pickle.exists():  # submitit would wait 15 s for it to turn up
        return 1, f"died without a word (killed?); {where}"
    try:
        code, reason = job.result()
    except FailedJobError as error:  # its text holds the job's trace between two rules
        last = str(error).split("-" * 22)[1].strip().splitlines()[-1]
        return 1, f"failed ({last}); {where}"
    return code, reason


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
