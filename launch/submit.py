"""Submit a plan through submitit and follow it; `launch.sbatch` asks it for the text of scripts."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.chain import Chain, Submitted, chain_of, write_chain
from launch.jobs import run_command
from launch.ontask import Task
from launch.plan import JobSpec
from launch.profile import Profile, profile_place
from launch.rundir import RunDir
from launch.sbatch import check_folder, parameters
from launch.slurmstate import cancel_jobs, cluster_name
from medpsp.errors import EXIT_CONFIG, ConfigError, LaunchError

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
            said = reason.removeprefix(f"{spec.name}: ")  # many a reason names its job itself
            raise (ConfigError if code == EXIT_CONFIG else LaunchError)(f"{spec.name}: {said}")


def submit_cluster(
    plan: tuple[JobSpec, ...],
    profile: Profile,
    cluster: str,
    run: RunDir,
    before: tuple[Submitted, ...] = (),
    keep: bool = False,
) -> Chain:
    """Give a plan to SLURM, each job after those before it; returns at once.

    Args:
        plan: In order.
        profile: Of the cluster.
        cluster: Its name, for the record.
        run: Where it runs.
        before: Jobs of other plans that these wait for.
        keep: Those are of this run, too.

    Raises:
        LaunchError: SLURM refuses a job, or is not there. What was submitted before is cancelled.
        ConfigError: The run folder has a name that sbatch cannot take.
    """
    check_folder(run.root.absolute())
    run.jobs.mkdir(parents=True, exist_ok=True)
    earlier, jobs = chain_of(run), list[Submitted]()
    chain = Chain(
        cluster=profile_place(cluster),
        at=time.time(),
        jobs=before if keep else (),
        slurm=cluster_name(),
        planned=tuple(spec.name for spec in plan),
    )
    try:
        for spec in plan:
            ids = {job.name: job.id for job in (*before, *jobs)}
            number = _send(spec, profile, ids, run)
            jobs.append(Submitted(name=spec.name, id=number, after=spec.after, parts=spec.parts))
            chain = replace(chain, jobs=(*chain.jobs, jobs[-1]))
            write_chain(run, chain)  # at once: no job may be there that nobody knows
            array = f", {spec.parts} parts" if spec.parts > 1 else ""
            log.info("%s: job %s%s", spec.name, number, array)
        if not plan:  # of a sweep whose shards are there
            write_chain(run, chain)
    except BaseException as error:  # Ctrl-C, too
        take_back(jobs, run, error)
        if earlier:
            write_chain(run, earlier)
        else:
            run.chain.unlink(missing_ok=True)
        raise
    return chain


def _send(spec: JobSpec, profile: Profile, ids: dict[str, str], run: RunDir) -> str:
    """Give one job to SLURM; its number.

    Raises:
        LaunchError: SLURM does not take it.
    """
    import submitit

    folder, config = run.logs / "jobs", run.config.absolute()
    ranks = spec.nodes * spec.tasks > 1
    tasks = [Task(spec.name, config, part + 1, spec.parts, ranks) for part in range(spec.parts)]
    executor: Any
    try:
        executor = submitit.SlurmExecutor(folder=folder.absolute() / "%j", python=profile.python)
        executor.update_parameters(**parameters(spec, profile, ids, run))
        with _outside_any_job():
            if len(tasks) > 1:
                sent = executor.map_array(Task.__call__, tasks)[0]
            else:
                sent = executor.submit(tasks[0])
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise LaunchError(f"{spec.name}: not submitted: {_last_line(error)}") from None
    return str(sent.job_id).split("_")[0]


def take_back(jobs: list[Submitted], run: RunDir, error: BaseException) -> None:
    """Cancel what was submitted before an error: half of it is of no use.

    Args:
        jobs: To cancel.
        run: That knows of them.
        error: What went wrong.

    Raises:
        LaunchError: They cannot be cancelled now.
    """
    try:
        cancel_jobs([job.id for job in jobs])
    except LaunchError as why:
        ids = ", ".join(job.id for job in jobs)
        raise LaunchError(
            f"{str(error) or type(error).__name__}; {ids} were submitted before it and cannot be "
            f"cancelled now ({why}): `medpsp cancel {run.root}` when SLURM answers"
        ) from None


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """Variables of a job that submits must not be those of the one submitted."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:  # what there is are defaults of the user
        yield
        return
    conf = os.environ.get("SLURM_CONF")
    with clean_env():
        if conf is not None:  # which cluster it is
            os.environ["SLURM_CONF"] = conf
        yield


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("sbatch:", "srun:"))]
    return (said or lines or [type(error).__name__])[-1]


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
