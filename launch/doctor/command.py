"""`medpsp doctor`: rows as they come, in order, and the exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from launch.chaincli import Overrides
from medpsp.errors import ConfigError

if TYPE_CHECKING:
    from launch.doctor.rows import Row
    from launch.doctor.steps import Step
    from launch.profile import Profile
    from medpsp.config import Config

LONG = ("torch", "imports")
"""Lanes that take longest, and begin first."""


def doctor(
    config: Annotated[str, typer.Argument(help="As for `train`; none: the machine alone.")] = "",
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option(help="As for `run`: a profile to check as well.")] = "",
) -> None:
    """Check this machine and what a configuration asks of it. 1 where there is a problem."""
    from launch.doctor.checks import steps_for
    from launch.doctor.rows import Verdict, lines_of

    steps = steps_for(*_given(config, tuple(overrides or ()), cluster))
    counts: Counter[Verdict] = Counter()
    for row in in_order(steps):
        counts[row.verdict] += 1
        typer.echo("\n".join(lines_of(row)))
    problems, notes = counts[Verdict.problem], counts[Verdict.note]
    typer.echo(f"{counts.total()} checks, problems: {problems}, notes: {notes}")
    if problems:
        raise typer.Exit(1)


def _given(
    config: str, overrides: tuple[str, ...], cluster: str
) -> tuple[Config | None, Profile | None]:
    """Configuration and profile, where they are named.

    Raises:
        ConfigError: As for `train` and `run`; or their file does not answer.
    """
    from launch.doctor.checks import readable
    from launch.doctor.steps import run

    resolved: Config | None = None
    profile: Profile | None = None
    for _, rows in run([readable(path) for path in (config, cluster) if path]):
        for row in rows:
            raise ConfigError(f"{row.what}: {row.found}; {row.todo}")
    if config:
        from launch.rundir import find_config
        from medpsp.configio import load_config

        resolved = load_config(find_config(config), overrides)
    if cluster:
        from launch.profile import load_profile

        profile = load_profile(cluster)
    return resolved, profile


def in_order(steps: list[Step]) -> Iterator[Row]:
    """Rows in the order of the steps, each as soon as it and all before it are there.

    Steps of one thing that follow each other show together.
    """
    from launch.doctor.rows import merged
    from launch.doctor.steps import run

    place = {id(step): number for number, step in enumerate(steps)}
    done: dict[int, list[Row]] = {}
    shown = 0
    for step, rows in run(sorted(steps, key=lambda step: step.lane not in LONG)):
        done[place[id(step)]] = rows
        while shown in done:
            end = shown
            while end < len(steps) and steps[end].what == steps[shown].what:
                end += 1
            if not all(number in done for number in range(shown, end)):
                break
            yield from merged(row for number in range(shown, end) for row in done[number])
            shown = end
