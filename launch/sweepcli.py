"""Commands on several runs; heavy things are imported when one of them runs."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from launch.chaincli import (
    ConfigArg,
    Overrides,
    follow_runs,
    refuse_other,
    runs_of,
    wanted,
    with_index,
)
from launch.guards import refuse_beside_jobs, refuse_by_hand, refuse_other_training, require_idle
from medpsp.errors import ConfigError, LaunchError, MedpspError, ShardError

if TYPE_CHECKING:
    from launch.plan import JobSpec
    from launch.profile import Profile
    from launch.rundir import RunDir
    from medpsp.config import Config

log = logging.getLogger("medpsp")


def sweep(
    config: ConfigArg,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None, typer.Option(help="KEY=A,B to vary; several make all combinations.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="As for `run`.")] = "",
    wait: Annotated[bool, typer.Option(help="As for `run`.")] = False,
) -> None:
    """Train one configuration with several values, and compare. On the same shards."""
    from rich.console import Console

    from launch.compare import compare, show_comparison
    from launch.jobs import setup_logging
    from launch.plan import plan_cluster, plan_jobs
    from launch.profile import load_profile
    from launch.rundir import RunDir, find_config, open_run
    from launch.sweep import members, open_members, own_part, shared_part, write_table
    from medpsp.configio import load_config

    setup_logging()
    chosen = members(tuple(over or ()))
    changes = with_index(config, tuple(overrides or ())) if cluster else tuple(overrides or ())
    if cluster:
        profile = load_profile(cluster)
        for run in runs_of(RunDir(load_config(find_config(config), changes).out)):
            require_idle(run)

    def plan_of(planned: Config) -> tuple[JobSpec, ...]:
        return plan_cluster(planned, profile) if cluster else plan_jobs(planned)

    # how the base would be trained need not fit the cluster: any member plans what all share
    shared = shared_part(plan_of(load_config(find_config(config), (*changes, *chosen[0][1]))))

    def refuse(planned: Config) -> None:
        if not cluster:
            refuse_beside_jobs(planned)
        refuse_other(shared, planned, "")

    def refuse_member(planned: Config) -> None:
        left = own_part(plan_of(planned), planned, RunDir(planned.out))
        with suppress(ShardError):  # they are made first, or anew
            refuse_other_training([job.name for job in left], planned)

    base, folder = open_run(config, changes, refuse=refuse, trains=False)
    opened = open_members((config, changes), folder, chosen, refuse=refuse_member)
    left = wanted(shared, base, folder, "")
    failed = list[MedpspError]()
    if cluster:
        _sweep_on(cluster, profile, left, folder, opened)
        typer.echo(f"medpsp status {quote(str(folder.root))}")
        if not wait:
            return
        follow_runs(lambda: runs_of(folder))
    else:
        failed = _sweep_here(left, folder, opened)
        write_table(folder.root)
    show_comparison(compare([run.root for _, run in opened]), Console())
    if failed:
        raise failed[0]


def _sweep_here(
    shared: tuple[JobSpec, ...], folder: RunDir, opened: list[tuple[Config, RunDir]]
) -> list[MedpspError]:
    """Run all members; those that fail do not stop the others, as on a cluster."""
    from launch.local import submit_plan
    from launch.plan import plan_jobs
    from launch.sweep import own_part

    failed = list[MedpspError]()
    submit_plan(shared, folder)
    for member, run in opened:
        try:
            submit_plan(own_part(plan_jobs(member), member, run), run)
        except (LaunchError, ConfigError) as error:
            failed.append(type(error)(f"{run.root.name}: {error}"))
            log.warning("%s", failed[-1])
    return failed


def _sweep_on(
    cluster: str,
    profile: Profile,
    shared: tuple[JobSpec, ...],
    folder: RunDir,
    opened: list[tuple[Config, RunDir]],
) -> None:
    from launch.chain import Submitted
    from launch.plan import JobSpec, plan_cluster
    from launch.submit import submit_cluster, take_back
    from launch.sweep import own_part

    sent: list[Submitted] = []
    last: list[Submitted] = []
    try:
        sent += (first := submit_cluster(shared, profile, cluster, folder)).jobs
        before = [job.name for job in first.jobs]
        for member, run in opened:
            plan = own_part(plan_cluster(member, profile), member, run, before)
            if plan:
                chain = submit_cluster(plan, profile, cluster, run, first.jobs)
                sent += chain.jobs
                end = chain.jobs[-1]
                label = f"{run.root.name}/{end.name}"
                last.append(Submitted(name=label, id=end.id, after=end.after))
        ends = tuple(job.name for job in last)
        job = JobSpec(name="compare", after=ends, cores=1, minutes=10, anyway=True)
        submit_cluster((job,), profile, cluster, folder, (*first.jobs, *last), keep=True)
    except BaseException as error:  # Ctrl-C, too: half a sweep ends in no table
        take_back(sent, folder, error)
        raise


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs (`out`).")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page, too: intervals, curves, settings.")
    ] = None,
) -> None:
    """Put runs beside each other, the best first."""
    from rich.console import Console

    from launch.compare import compare as rows_of
    from launch.compare import scored_alike, show_comparison
    from launch.runfacts import require_begun

    for root in runs:
        require_begun(root)
    show_comparison(rows_of(runs), Console())
    if not scored_alike(runs):
        typer.echo("scored on other classes or patients: Dice does not say which of them is better")
    if html:
        from launch.comparepage import write_comparison

        write_comparison(html, runs)
        typer.echo(str(html))


def scale(
    config: ConfigArg,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to try.")] = "1,2",
    backbones: Annotated[
        str, typer.Option(help="Names, or all; empty: that of the configuration.")
    ] = "",
    link_gb: Annotated[
        float, typer.Option(min=0.001, help="GB/s of a GPU's link, for the calculated table.")
    ] = 12.5,
    cluster: Annotated[str, typer.Option(help="As for `run`.")] = "",
) -> None:
    """Time training at several numbers of ranks. Short pieces; shards must be there."""
    from rich.console import Console

    from launch.jobs import setup_logging
    from launch.measure import forget, measured
    from launch.rundir import find_config, open_run
    from launch.scale import calculated_table, measured_table
    from launch.sweep import open_members, scale_members
    from medpsp.configio import load_config

    setup_logging()
    given = config, tuple(overrides or ())
    pieces = scale_members(load_config(find_config(config), given[1]), ranks, backbones)
    _, folder = open_run(*given, refuse=partial(refuse_by_hand, "measure"), trains=False)
    opened = open_members(given, folder, pieces, "scale")
    if cluster:
        _scale_on(cluster, folder, opened)
    else:
        from launch.local import submit_plan
        from launch.plan import JobSpec

        for member, run in opened:
            forget(run)
            cores = member.train.ranks
            submit_plan((JobSpec(name="measure", after=(), cores=cores, minutes=60),), run)
    found = [one for _, run in opened if (one := measured(run))]
    if not found:
        raise LaunchError(f"scale: nothing was measured; the logs are in {folder.root}/scale")
    console = Console()
    console.print(measured_table(found))
    console.print(calculated_table(found, link_gb))


def _scale_on(cluster: str, folder: RunDir, opened: list[tuple[Config, RunDir]]) -> None:
    """One after another, so that no two share a node."""
    from launch.chain import Submitted
    from launch.measure import forget
    from launch.plan import JobSpec, spread
    from launch.profile import load_profile
    from launch.slurmstate import cancel_jobs
    from launch.submit import submit_cluster, take_back

    profile = load_profile(cluster)
    spans = [spread(member, profile) for member, _ in opened]  # all of them fit, or none is sent
    for _, run in opened:
        require_idle(run)
    sent: list[Submitted] = []
    try:
        for span, (_, run) in zip(spans, opened, strict=True):
            forget(run)
            job = JobSpec(
                name="measure",
                after=tuple(before.name for before in sent[-1:]),
                cores=profile.gpu.cpus,
                minutes=profile.minutes.get("measure", 30),
                gpu=True,
                anyway=True,
                **span,
            )
            (one,) = submit_cluster((job,), profile, cluster, run, tuple(sent[-1:])).jobs
            sent.append(Submitted(name=f"{run.root.name}/measure", id=one.id, after=one.after))
    except BaseException as error:
        take_back(sent, folder, error)
        raise
    for one, (_, run) in zip(sent, opened, strict=True):
        try:
            follow_runs(partial(list, [run]))
        except LaunchError as error:  # the others still make a table
            log.warning("%s: %s", run.root.name, error)
            with suppress(LaunchError):
                cancel_jobs([one.id])  # it may wait for ever, and the next one for it
