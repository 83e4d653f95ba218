"""The job chain as a value: it can be printed, compared and submitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medpsp.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job: ``medpsp <name> <config>``.

    Attributes:
        name: Command to run.
        after: Jobs that must have succeeded.
        cores: CPU cores wanted.
        minutes: Wall-clock limit.
    """

    name: str
    after: tuple[str, ...]
    cores: int
    minutes: int


CHAIN = ("shards", "check", "train", "evaluate", "export")


def plan_jobs(config: Config) -> tuple[JobSpec, ...]:
    """shards, check, train, evaluate, export, each after the one before."""
    workers = config.data.workers
    cores = {"shards": workers, "check": workers, "train": config.train.ranks}
    return tuple(
        JobSpec(
            name=name,
            after=CHAIN[index - 1 : index] if index else (),
            cores=cores.get(name, 1),
            minutes=24 * 60,
        )
        for index, name in enumerate(CHAIN)
    )


def describe(plan: tuple[JobSpec, ...], config: Path) -> str:
    """One line a job."""
    return "\n".join(
        f"{job.name:9} {job.cores} core{'s' if job.cores > 1 else ''}, {job.minutes} min"
        f"{', after ' + ', '.join(job.after) if job.after else ''}: medpsp {job.name} {config}"
        for job in plan
    )
