"""Commands on the whole chain; heavy things are imported when one of them runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from launch.guards import at_work_of, refuse_beside_jobs, refuse_other_training, require_idle
from medpsp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from launch.plan import JobSpec
    from launch.profile import Profile
    from launch.rundir import RunDir
    from launch.status import Shown
    from medpsp.config import Config

ConfigArg = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, for example train.batch_size=8.")
]
RunArg = Annotated[Path, typer.Argument(help="Folder of the run (`out`).")]
POLL_S = 5.0
ALL_DONE = "{}: every job is done; --from JOB runs one again"
log = logging.getLogger("medpsp")


def run(
    config: ConfigArg,
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option(help="Submit to SLURM: a profile, YAML file or shipped name.")
    ] = "",
    start: Annotated[
        str, typer.Option("--from", help="Begin at this job; those before it are done.")
    ] = "",
    wait: Annotated[bool, typer.Option(help="Follow a submitted run to its end.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the jobs and stop.")] = False,
) -> None:
    """Run the whole chain: shards, check, train, evaluate, export."""
    from launch.jobs import setup_logging

    setup_logging()
    changes = tuple(overrides or ())
    if cluster:
        _run_on(cluster, config, changes, start, dry=dry_run, wait=wait)
        return
    from launch.home import trains
    from launch.plan import describe, plan_jobs
    from launch.rundir import RunDir, find_config, open_run
    from medpsp.configio import load_config

    if dry_run:  # writes nothing
        planned = load_config(find_config(config), changes)
        folder = RunDir(planned.out)
        plan = wanted(plan_jobs(planned), planned, folder, start)
        typer.echo(describe(plan, folder.config) if plan else ALL_DONE.format(folder.root))
        return

    def refuse(planned: Config) -> None:
        refuse_beside_jobs(planned)
        refuse_other(plan_jobs(planned), planned, start)

    resolved, folder = open_run(config, changes, refuse=refuse, trains=trains(start))
    from launch.local import submit_plan
    from launch.status import places

    if plan := wanted(plan_jobs(resolved), resolved, folder, start):
        submit_plan(plan, folder)
    else:
        typer.echo(ALL_DONE.format(folder.root))
        if (file := resolved.data.crosswalk) and not file.is_file():
            typer.echo(f"data.crosswalk {file}: not there; `medpsp shards` writes it")
    for line in places(folder):
        typer.echo(line)


def _run_on(
    cluster: str, config: str, changes: tuple[str, ...], start: str, *, dry: bool, wait: bool
) -> None:
    from launch.home import trains
    from launch.plan import plan_cluster
    from launch.profile import load_profile
    from launch.rundir import RunDir, find_config, open_run
    from medpsp.configio import load_config

    profile = load_profile(cluster)
    changes = with_index(config, changes)
    planned = load_config(find_config(config), changes)
    if dry:
        from launch.estimate import estimates
        from launch.sbatch import describe_scripts

        plan = wanted(plan_cluster(planned, profile), planned, RunDir(planned.out), start)
        typer.echo("\n".join(estimates(planned, profile, RunDir(planned.out))) + "\n")
        typer.echo(describe_scripts(plan, profile, RunDir(planned.out)))
        return
    require_idle(RunDir(planned.out))

    def refuse(planned: Config) -> None:
        refuse_other(plan_cluster(planned, profile), planned, start)

    resolved, folder = open_run(config, changes, refuse=refuse, trains=trains(start))
    plan = wanted(plan_cluster(resolved, profile), resolved, folder, start)
    _submit(plan, profile, cluster, folder)
    if wait and plan:
        follow_runs(lambda: [folder])


def refuse_other(plan: tuple[JobSpec, ...], planned: Config, start: str) -> None:
    """For `open_run`: as `refuse_other_training`, of the jobs of a plan that are to be run."""
    from launch.rundir import RunDir

    jobs = wanted(plan, planned, RunDir(planned.out), start)
    refuse_other_training([job.name for job in jobs], planned)


def _submit(plan: tuple[JobSpec, ...], profile: Profile, cluster: str, folder: RunDir) -> None:
    if not plan:
        typer.echo(ALL_DONE.format(folder.root))
        return
    from launch.submit import submit_cluster

    submit_cluster(plan, profile, cluster, folder)
    typer.echo(f"medpsp status {quote(str(folder.root))}")


def with_index(config: str, changes: tuple[str, ...]) -> tuple[str, ...]:
    """On a cluster the steps of shards are jobs of their own, which need an index."""
    from launch.rundir import find_config
    from medpsp.configio import load_config

    planned = load_config(find_config(config), changes)
    if planned.data.index is not None:
        return changes
    return (*changes, f"data.index={json.dumps(str(planned.out / 'index'))}")


def runs_of(folder: RunDir) -> list[RunDir]:
    """A run, and the members of its sweep and of `scale` that were begun."""
    from launch.rundir import RunDir
    from launch.sweep import FOLDERS

    below = (RunDir(path) for inside in FOLDERS for path in sorted(folder.root.glob(f"{inside}/*")))
    found = [run for run in below if run.chain.exists() or run.planned.exists()]
    own = folder.chain.exists() or folder.planned.exists() or not found
    return [*([folder] if own else []), *found]


def wanted(
    plan: tuple[JobSpec, ...], config: Config, folder: RunDir, start: str
) -> tuple[JobSpec, ...]:
    """The plan from a job on, or without the jobs that are done."""
    from launch.chain import unfinished
    from launch.plan import starting_at

    return starting_at(plan, start) if start else unfinished(plan, config, folder)


def follow_runs(listed: Callable[[], list[RunDir]]) -> None:
    """Show runs, which are asked for again each time, until nothing of them will run any more.

    Raises:
        LaunchError: A job did not end well.
    """
    from rich.console import Console, Group
    from rich.live import Live

    from launch.status import follow, require_success, table
    from launch.sweep import FOLDERS

    console = Console()
    if not console.is_terminal:
        seen: list[str] = []

        def say(found: Shown) -> None:
            lines = [
                f"{run.root.name + '/' if run.root.parent.name in FOLDERS else ''}"
                f"{row.name} {row.id}: {row.state} {row.nodes} {row.note}".rstrip()
                for run, rows in found
                for row in rows
            ]
            for line in lines:
                if line not in seen:
                    typer.echo(line)
            seen[:] = lines

        require_success(follow(listed, POLL_S, say))
        return
    with Live(console=console) as live:

        def draw(found: Shown) -> None:
            live.update(Group(*(table(folder, rows) for folder, rows in found)))

        rows = follow(listed, POLL_S, draw)
    require_success(rows)


def status(
    out: RunArg,
    watch: Annotated[bool, typer.Option(help="Go on until nothing will run any more.")] = False,
) -> None:
    """What the jobs of a run are at, here or on a cluster."""
    from rich.console import Console

    from launch.rundir import RunDir
    from launch.status import places, status_of, table

    if watch:
        follow_runs(lambda: runs_of(RunDir(out)))
        return
    for folder in runs_of(RunDir(out)):
        Console().print(table(folder, status_of(folder)), soft_wrap=True)
    typer.echo(f"logs         {out}/logs   (medpsp logs {quote(str(out))} JOB)")
    for line in places(RunDir(out)):
        typer.echo(line)


def logs(
    out: RunArg, job: Annotated[str, typer.Argument(help="As `status` names it.")] = ""
) -> None:
    """Print the logs of a job."""
    from launch.rundir import RunDir
    from launch.status import log_texts

    found = list(log_texts(RunDir(out), job))
    for path, text in found:
        typer.echo(f"== {path}\n{text}")
    if not found:
        typer.echo(f"{job}: nothing yet")


def cancel(out: RunArg) -> None:
    """End the jobs of a run that wait or run."""
    from launch.rundir import RunDir
    from launch.slurmstate import cancel_jobs

    runs = [run for run in runs_of(RunDir(out)) if run.chain.exists()]
    left = at_work_of(runs or [RunDir(out)])
    cancel_jobs(job.id for job in left)
    typer.echo(f"cancelled: {', '.join(job.name for job in left) or 'nothing was left'}")


def resume(out: RunArg) -> None:
    """Submit again what is not done. To the same cluster, and as configured."""
    from launch.chain import read_chain, unfinished
    from launch.jobs import setup_logging
    from launch.plan import plan_cluster, those
    from launch.profile import load_profile
    from launch.rundir import RunDir, open_run
    from launch.sweep import FOLDER, OWN
    from medpsp.configio import load_config

    setup_logging()
    folder = RunDir(out)
    chain, planned = read_chain(folder), load_config(folder.config)
    if planned.out.resolve() != out.resolve():
        raise ConfigError(
            f"resume {out}: its configuration says out {planned.out}; resume where it was "
            "submitted, or give `medpsp run` another out"
        )
    names = {*chain.planned, *(job.name for job in chain.jobs)}
    if "compare" in names or (not names & set(OWN) and (folder.root / FOLDER).is_dir()):
        raise ConfigError(f"resume {out}: a sweep; its command, given again, submits what is left")
    require_idle(folder)
    profile = load_profile(chain.cluster)
    config, folder = open_run(str(folder.config), with_index(str(folder.config), ()))
    plan = those(plan_cluster(config, profile), names)
    _submit(unfinished(plan, config, folder), profile, chain.cluster, folder)
