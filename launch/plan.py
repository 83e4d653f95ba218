"""The job chain as a value: it can be printed, compared and submitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.profile import Profile
from medpsp.config import Config
from medpsp.errors import ConfigError
from medpsp.progress import duration
from medpsp.words import many

GPU_JOBS = ("preflight", "train", "evaluate")
"""Run where the GPUs are, if the site has any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job: ``medpsp <name> <config>``, or a step of ``medpsp shards``.

    Attributes:
        name: What to run, a key of `launch.jobs.JOBS`.
        after: Jobs that must have succeeded.
        cores: CPU cores of a task; on one machine workers of shards, or ranks.
        minutes: Wall-clock limit.
        nodes: That it spans.
        tasks: Processes on each node; ranks of training.
        parts: Elements of an array, each of which does its part.
        gpu: Whether it runs where the GPUs are.
        anyway: It runs, too, where those before it have failed.
    """

    name: str
    after: tuple[str, ...]
    cores: int
    minutes: int
    nodes: int = 1
    tasks: int = 1
    parts: int = 1
    gpu: bool = False
    anyway: bool = False


CHAIN = ("shards", "check", "train", "evaluate", "export")


def plan_jobs(config: Config) -> tuple[JobSpec, ...]:
    """shards, check, train, evaluate, export on one machine, each after the one before."""
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


def plan_cluster(config: Config, profile: Profile) -> tuple[JobSpec, ...]:
    """The chain for SLURM: shards in an array of parts, ranks as tasks, a preflight beside them.

    Raises:
        ConfigError: As `spread`; or ``minutes`` of the profile names no job.
    """
    after = {
        "preflight": (),
        "plan": (),
        "convert": ("plan",),
        "publish": ("convert",),
        "check": ("publish",),
        "train": ("check", "preflight"),
        "evaluate": ("train",),
        "export": ("evaluate",),
    }
    if unknown := profile.minutes.keys() - {*after, "measure"}:
        known = ", ".join((*after, "measure"))
        raise ConfigError(f"minutes.{min(unknown)} of the profile: no such job; there are {known}")
    spans = spread(config, profile)
    shapes: dict[str, dict[str, Any]] = {
        "preflight": spans,
        "train": spans,
        "convert": {"parts": profile.parts},
    }
    jobs = []
    for name, before in after.items():
        kind = profile.kind(name in GPU_JOBS)
        minutes = profile.minutes.get(name, 10 if name == "preflight" else kind.minutes)
        gpu = name in GPU_JOBS
        shape = shapes.get(name, {})
        jobs.append(
            JobSpec(name=name, after=before, cores=kind.cpus, minutes=minutes, gpu=gpu, **shape)
        )
    return tuple(jobs)


def spread(config: Config, profile: Profile) -> dict[str, Any]:
    """Nodes, and tasks on each, of a job of ranks.

    Raises:
        ConfigError: ``train.ranks`` do not fill whole nodes.
    """
    ranks, on_node = config.train.ranks, min(profile.ranks_per_node, config.train.ranks)
    if ranks % on_node:
        raise ConfigError(
            f"train.ranks {ranks}: the profile has {on_node} on a node (ranks_per_node), which "
            "leaves a node half empty; take a multiple"
        )
    return {"nodes": ranks // on_node, "tasks": on_node}


def starting_at(plan: tuple[JobSpec, ...], name: str) -> tuple[JobSpec, ...]:
    """A job, and all that come after it.

    Args:
        plan: In order.
        name: Of a job, or ``shards`` for its first step.

    Raises:
        ConfigError: No such job.
    """
    names = [job.name for job in plan]
    first = "plan" if name == "shards" and "plan" in names else name
    if first not in names:
        raise ConfigError(f"--from {name}: no such job; there are {', '.join(names)}")
    return those(plan, set(names[names.index(first) :]))


def those(plan: tuple[JobSpec, ...], names: set[str]) -> tuple[JobSpec, ...]:
    """Some jobs of a plan, which wait for each other only."""
    kept = [job for job in plan if job.name in names]
    return tuple(replace(job, after=tuple(n for n in job.after if n in names)) for job in kept)


def describe(plan: tuple[JobSpec, ...], config: Path) -> str:
    """One line a job of one's own machine, and what bounds them."""
    lines = [f"{job.name:9} {_here(job)}medpsp {job.name} {config}" for job in plan]
    limit = duration(60 * max(job.minutes for job in plan))
    return "\n".join([*lines, f"One after the other on this machine, each for {limit} at most."])


def _here(job: JobSpec) -> str:
    what = {"shards": "worker", "check": "worker", "train": "rank"}.get(job.name, "")
    return f"{many(job.cores, what)}: " if what else ""
