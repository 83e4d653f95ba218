"""One job by its own command, which is told as one of the chain is."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from launch.chain import Told, depends_on, tell
from launch.diagnose import diagnosis
from launch.jobs import JOBS, PAGED, one_line, write_page
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.errors import EXIT_AGAIN, EXIT_CONFIG, ConfigError, Interrupted, MedpspError


def run_by_hand(name: str, config: Config, work: Callable[[], object] | None = None) -> None:
    """A job by its own command: told, and on the page of the run, as one of the chain is.

    Args:
        name: Of the job. One rank of several is told by whoever started them.
        config: Of an open run.
        work: Does it; none: the one of that name.
    """
    do = work or partial(JOBS[name], config)
    if "WORLD_SIZE" in os.environ:
        do()
        return
    run = RunDir(config.out)
    told, marker = Told.begun(os.environ, depends_on(config, name)), run.logs / f"{name}.failed"
    marker.unlink(missing_ok=True)
    tell(run, name, told)
    try:
        do()
    except Interrupted as stop:
        tell(run, name, told.ended_with(EXIT_AGAIN, one_line(stop)))
        raise
    except (MedpspError, OSError, RuntimeError, MemoryError) as error:
        reason = diagnosis(error) or one_line(error)
        with suppress(OSError):  # the disk may be what is wrong
            marker.write_text(reason + "\n", encoding="utf-8")
            code = EXIT_CONFIG if isinstance(error, ConfigError) else 1
            tell(run, name, told.ended_with(code, reason))
            if run.page.is_file():  # it would say something else
                write_page(run)
        raise
    tell(run, name, told.ended_with(0, ""))
    if name in PAGED:
        write_page(run)
