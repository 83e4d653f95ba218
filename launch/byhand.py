"""One job by its own command, which is told as one of the chain is."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from launch.chain import Told, depends_on, made_from, tell
from launch.jobs import JOBS, PAGED, bug_of, end_of, log, write_page
from launch.rundir import REASONS, RunDir
from medpsp.config import Config
from medpsp.errors import MedpspError


def run_by_hand(name: str, config: Config, work: Callable[[], object] | None = None) -> None:
    """A job by its own command: told, and on the page of the run, as one of the chain is.

    Of ranks that torchrun started the first one tells; for ranks of ours, whoever started them.

    Args:
        name: Of the job.
        config: Of an open run.
        work: Does it; none: the one of that name.
    """
    do = work or partial(JOBS[name], config)
    if REASONS in os.environ or os.environ.get("RANK", "0") != "0":
        do()
        return
    run = RunDir(config.out)
    told = Told.begun(os.environ, depends_on(config, name), made_from(config, name))
    _say(run, name, told)
    try:
        do()
    except Exception as error:  # a bug, too: status must not say that it was interrupted
        _say(run, name, told.ended_with(*(end_of(error) or bug_of(error))))
        raise
    _say(run, name, told.ended_with(0, ""))


def _say(run: RunDir, name: str, told: Told) -> None:
    marker = run.logs / f"{name}.failed"
    with suppress(OSError):  # the disk may be what is wrong; the work counts
        tell(run, name, told)
        if told.state == "failed":
            marker.write_text(told.reason + "\n", encoding="utf-8")
        else:
            marker.unlink(missing_ok=True)
        finished = name in PAGED and told.state == "done"
        if told.state in ("done", "failed") and (finished or run.page.is_file()):
            try:
                write_page(run)  # one that is there would say something else
            except MedpspError as error:
                log.warning("page: not written, %s", error)
