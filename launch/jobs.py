"""The jobs of a chain by name, and what is said of each that runs on a node."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.chain import Told, depends_on, has_failed, label_of, made_from, tell
from launch.cluster import sleep_at_barriers
from launch.diagnose import diagnosis, lost_peer
from launch.evaluate import evaluate_job
from launch.export import export_job
from launch.measure import measure_job
from launch.preflight import preflight_job
from launch.ranks import log_job
from launch.rundir import RunDir, keep_private, told_path
from launch.terminal import show
from launch.train import train_job
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.errors import EXIT_AGAIN, EXIT_CONFIG, ConfigError, Interrupted, MedpspError, ShardError
from medpsp.progress import FILE_ONLY
from medpsp.words import many

if TYPE_CHECKING:
    from shards.index import Manifest
    from shards.problem import Problem

log = logging.getLogger("medpsp")
PAGED = ("train", "evaluate", "export")
"""Jobs after which the page of the run is written: the last one may fail."""
SHOWN = 20
"""Problems of `check` on the terminal."""


def run_command(name: str, config_path: Path, part: tuple[int, int] = (1, 1)) -> tuple[int, str]:
    """Run one job of the chain in this process.

    Args:
        name: Of the job.
        config_path: Resolved configuration.
        part: Which of how many, of a job that is an array.

    Returns:
        0 and nothing, or an exit code and the one line a user needs, which is also in
        ``logs/<name>.failed``.
    """
    sleep_at_barriers()
    setup_logging()
    config = load_config(config_path)
    keep_private(config.data.archive, config.data.labels)
    run = RunDir(config.out)
    label = label_of(name, *part)
    log_job(run, label)
    marker = run.logs / f"{label}.failed"
    told = Told.begun(os.environ, depends_on(config, name), made_from(config, name))
    config = _on_this_node(config)
    leads = os.environ.get("RANK", "0") == "0"
    if leads and not has_failed(run, label, told):
        marker.unlink(missing_ok=True)
        tell(run, label, told)
    try:
        code, reason, echo = _run(name, config, part)
    except Exception as error:  # a bug: status must not say that it was interrupted
        with suppress(OSError):
            code, reason = bug_of(error)
            tell(run, label, told.ended_with(code, reason))
            marker.write_text(reason + "\n", encoding="utf-8")
        raise
    with suppress(OSError):  # the disk may be what is wrong
        if (echo or code == EXIT_AGAIN) and has_failed(run, label, told):
            return code, reason  # another rank knows why
        if leads or (code and code != EXIT_AGAIN):
            tell(run, label, told.ended_with(code, reason))
        if reason and code != EXIT_AGAIN:
            marker.write_text(reason + "\n", encoding="utf-8")
        if leads and name in PAGED and code != EXIT_AGAIN:
            write_page(run)
    return code, reason


def write_page(run: RunDir) -> None:
    """The page of the run anew, and say where it is."""
    from launch.runpage import write_run_page

    log.info("page: %s", write_run_page(run.root))


def _on_this_node(config: Config) -> Config:
    """In a SLURM job as many workers as it has cores for."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if "SLURM_JOB_ID" not in os.environ or not cores.isdecimal():
        return config
    data = config.data.model_copy(update={"workers": int(cores)})
    return config.model_copy(update={"data": data})


def _run(name: str, config: Config, part: tuple[int, int]) -> tuple[int, str, bool]:
    """Exit code, the one line, and whether it only tells that another rank failed."""
    try:
        if part[1] > 1:
            convert_job(config, *part)
        else:
            JOBS[name](config)
    except Interrupted as stop:
        log.warning("%s", one_line(stop))
        return EXIT_AGAIN, one_line(stop), False
    except (MedpspError, OSError, RuntimeError, MemoryError, ImportError) as error:
        end = end_of(error)
        if end is None:
            raise
        log.error("%s", end[1])
        return *end, lost_peer(error)
    return 0, "", False


def end_of(error: BaseException) -> tuple[int, str] | None:
    """Exit code and the one line of an error that a user can cause; None of a bug."""
    line = diagnosis(error)
    if line is None and not isinstance(error, MedpspError | OSError):
        return None
    codes = {ConfigError: EXIT_CONFIG, Interrupted: EXIT_AGAIN}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
    return code, line or one_line(error)


def bug_of(error: BaseException) -> tuple[int, str]:
    """The same of any other: its message may name a patient, and is not said."""
    return 1, f"{type(error).__name__}, a bug in medpsp"


def setup_logging() -> None:
    """Plain lines on stderr."""
    logger = logging.getLogger("medpsp")
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _Stderr(logging.Handler):
    """Lines for whoever started the command."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, FILE_ONLY):
            return
        show(self.format(record) + "\n")


def one_line(error: BaseException) -> str:
    """An error as one line; the path of an OSError may name a patient and is left out."""
    if isinstance(error, OSError) and not isinstance(error, MedpspError):
        where = told_path(error)
        return (error.strerror or type(error).__name__) + (f": {where}" if where else "")
    return " ".join(str(error).split())


def shards_job(config: Config) -> None:
    """Archive to shards.

    Raises:
        ShardError: More objects were quarantined than ``data.max_reject_fraction``.
    """
    from shards.build import build_shards

    _show_shards(config, build_shards(config))


def plan_job(config: Config) -> None:
    """First step of `shards_job`: scan the archive and decide what goes into which shard.

    Raises:
        ConfigError: ``data.index`` is not set, so the next step would not find the plan.
    """
    from shards.build import plan_shards

    if config.data.index is None:
        raise ConfigError("data.index: not set; steps that are commands of their own need it")
    log.info("plan: %s", many(len(plan_shards(config).shards), "shard"))


def convert_job(config: Config, part: int = 1, parts: int = 1) -> None:
    """Second step: the shards of part ``part`` of ``parts``, on any machine that sees the files."""
    from shards.build import convert_part

    count = convert_part(config, part, parts)
    log.info("convert: part %d of %d, %s", part, parts, many(count, "shard"))


def publish_job(config: Config) -> None:
    """Last step: index, manifest and report of what all parts wrote."""
    from shards.build import publish_shards

    _show_shards(config, publish_shards(config))


def _show_shards(config: Config, manifest: Manifest) -> None:
    from medpsp.dicom.codes import told_statuses
    from shards.index import reject_fraction
    from shards.report import write_report

    counts = ", ".join(f"{n} {status}" for status, n in manifest.counts.items())
    slices = many(manifest.slices, "slice")
    log.info("shards: %s (%s; objects: %s)", config.shards, slices, counts)
    for line in told_statuses(manifest.codes):
        log.info("%s", line)
    log.info("report: %s", write_report(config.shards))
    fraction, limit = reject_fraction(manifest), config.data.max_reject_fraction
    if fraction > limit:
        raise ShardError(
            f"shards {config.shards}: {fraction:.1%} of the objects were quarantined, "
            f"data.max_reject_fraction allows {limit:.1%}; see objects.parquet there"
        )


def check_job(config: Config, *, repair: bool = False, quick: bool = False) -> None:
    """Verify shards.

    Args:
        config: Of the shards.
        repair: Convert what is damaged again, and verify once more.
        quick: Leave the bytes of the shard files alone.

    Raises:
        ShardError: A problem was found, and is still there after repair; all are in the log file.
    """
    from shards.problem import BEYOND

    problems = _problems(config, quick)
    if repair and any(problem.kind not in BEYOND for problem in problems):
        from shards.repair import repair_shards
        from shards.report import write_report

        repair_shards(config, problems)
        write_report(config.shards)
        problems = _problems(config, quick)
    if problems:
        count = many(len(problems), "problem")
        advice = "see the log" if repair else "run `medpsp check --repair`, or see the log"
        raise ShardError(f"shards {config.shards}: {count}, the first: {problems[0]}; {advice}")
    log.info("check: every digest, slice and split is as the manifest says")


def _problems(config: Config, quick: bool) -> list[Problem]:
    """What is wrong; the first ones are shown, all go to the log file."""
    from medpsp.progress import Bar
    from shards.check import check_shards
    from shards.index import count_slices

    problems = []
    with Bar("check", count_slices(config.shards), "slices") as bar:
        for problem in check_shards(
            config.shards, workers=config.data.workers, quick=quick, advance=bar.advance
        ):
            problems.append(problem)
            shown = len(problems) <= SHOWN
            log.error("%s", problem, extra={} if shown else {FILE_ONLY: True})
    if len(problems) > SHOWN:
        log.error("and %d more, all in logs/check.log", len(problems) - SHOWN)
    return problems


def compare_job(config: Config) -> None:
    """The table of a sweep, of what its members have reached."""
    from launch.sweep import write_table

    log.info("table: %s", write_table(config.out))


JOBS: dict[str, Any] = {
    "preflight": preflight_job,
    "shards": shards_job,
    "plan": plan_job,
    "convert": convert_job,
    "publish": publish_job,
    "check": check_job,
    "train": train_job,
    "evaluate": evaluate_job,
    "export": export_job,
    "compare": compare_job,
    "measure": measure_job,
}
