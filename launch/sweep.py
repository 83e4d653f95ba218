"""One configuration, many values: the shards are made once, each member is a run of its own."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from launch.chain import unfinished
from launch.plan import JobSpec
from launch.rundir import RunDir, find_config, open_run
from medpsp.config import Config
from medpsp.errors import ConfigError
from medpsp.machine import threads_each

log = logging.getLogger("medpsp")
FOLDER = "sweep"
FOLDERS = (FOLDER, "scale")
"""Below a run, of its members."""
MOST = 1000
TIMED = 20
"""Steps of `medpsp scale`."""
SHARED = ("data", "out")
OWN = ("train", "evaluate", "export")
_UNFIT = re.compile(r"[^A-Za-z0-9.=_+-]+")


def members(over: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Name and overrides of every combination.

    Args:
        over: ``KEY=A,B`` each; values are YAML.

    Raises:
        ConfigError: Not of that form, a key of the data, which all members share, or two members of
            one name.
    """
    axes: list[list[tuple[str, str]]] = []
    for text in over:
        key, mark, values = text.partition("=")
        try:
            found: Any = yaml.safe_load(f"[{values}]") if mark else None
        except (yaml.YAMLError, ValueError):  # also a date that is none
            found = None
        if not found or not key:
            raise ConfigError(f"--over {text}: expected KEY=A,B")
        if key.split(".")[0] in SHARED:
            raise ConfigError(f"--over {key}: all members share shards and folder; vary others")
        axes.append(
            [(key, yaml.safe_dump(v, default_flow_style=True).split("\n")[0]) for v in found]
        )
    if not axes:
        raise ConfigError("--over: nothing to vary; for example --over seed=0,1,2")
    chosen = list(itertools.product(*axes))
    if len(chosen) > MOST:
        raise ConfigError(f"--over: {len(chosen)} members, at most {MOST}")
    named = [(_name(pairs), tuple(f"{key}={value}" for key, value in pairs)) for pairs in chosen]
    if len({name for name, _ in named}) < len(named):
        raise ConfigError("--over: two members have the same values")
    return named


def scale_members(base: Config, ranks: str, backbones: str) -> list[tuple[str, tuple[str, ...]]]:
    """Name and overrides of every piece of training that `medpsp scale` times.

    Args:
        base: A rank has as many slices at once as one of its ranks has.
        ranks: Numbers, with commas.
        backbones: Names, with commas, or ``all``; empty: that of the base.

    Raises:
        ConfigError: Not numbers.
    """
    from medpsp.config import BACKBONES

    counts = ranks.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise ConfigError(f"--ranks {ranks}: expected numbers above 0 with commas between them")
    names = list(BACKBONES) if backbones == "all" else (backbones or base.model.backbone).split(",")
    alone = base.train.batch_size // base.train.ranks
    stages = _written([{"name": "measure", "steps": TIMED, "lr": 1e-4}])
    shared = [f"train.stages={stages}"]
    if not base.train.threads:  # or one rank would have the cores of all
        threads = threads_each(max(int(count) for count in counts))
        shared.append(f"train.threads={threads}")
    return [
        (
            _UNFIT.sub("-", f"{name}_{int(count)}"),
            (
                f"model.backbone={name}",
                f"train.ranks={int(count)}",
                f"train.batch_size={alone * int(count)}",
                *shared,
            ),
        )
        for name in names
        for count in counts
    ]


def _written(value: object) -> str:
    """A value as an override gives it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]


def _name(pairs: Sequence[tuple[str, str]]) -> str:
    return "_".join(_UNFIT.sub("-", f"{key.rpartition('.')[2]}={value}") for key, value in pairs)


def open_members(
    given: tuple[str, tuple[str, ...]],
    base: RunDir,
    chosen: Sequence[tuple[str, tuple[str, ...]]],
    folder: str = FOLDER,
    refuse: Callable[[Config], None] | None = None,
) -> list[tuple[Config, RunDir]]:
    """Folders of all members below that of the base, which has the shards.

    Args:
        given: Configuration and overrides of the command: that of all members but for their own.
        base: Of the run; its ``config.yaml`` says how it was trained itself.
        chosen: Of `members`.
        folder: Below the base.
        refuse: Raises where what is in the folder of a member belongs to something else.

    Raises:
        ConfigError: A value that is not legal: before anything is written, as of ``refuse``.
    """
    from medpsp.configio import load_config

    roots = [base.root / folder / name for name, _ in chosen]
    config, overrides = given
    changes = [
        (*overrides, *words, f"out={_written(str(root))}")
        for (_, words), root in zip(chosen, roots, strict=True)
    ]
    for words in changes:  # all, before the first is written
        planned = load_config(find_config(config), words)
        if refuse:
            refuse(planned)
    opened = []
    for root, words in zip(roots, changes, strict=True):
        root.mkdir(parents=True, exist_ok=True)
        link = root / "shards"
        if not link.is_symlink():
            link.symlink_to(os.path.join("..", "..", "shards"))
        opened.append(open_run(config, words))
    return opened


def shared_part(plan: tuple[JobSpec, ...]) -> tuple[JobSpec, ...]:
    """What is done once."""
    return tuple(job for job in plan if job.name not in OWN)


def own_part(
    plan: tuple[JobSpec, ...], config: Config, run: RunDir, before: Iterable[str] = ()
) -> tuple[JobSpec, ...]:
    """What a member still has to do.

    Args:
        plan: Of the whole chain.
        config: Of the member.
        run: Its folder.
        before: Jobs of the shared part that are on their way.
    """
    mine = tuple(job for job in plan if job.name in OWN)
    left = {job.name for job in unfinished(mine, config, run)}
    known = left | set(before)
    return tuple(
        replace(job, after=tuple(name for name in job.after if name in known))
        for job in mine
        if job.name in left
    )


def write_table(base: Path) -> Path:
    """``sweep/table.md`` of what the members have reached."""
    from launch.compare import compare, comparison_text

    roots = sorted(path for path in (base / FOLDER).iterdir() if (path / "config.yaml").is_file())
    place = base / FOLDER / "table.md"
    partial = place.with_name(f".table.{os.getpid()}.partial")
    partial.write_text(comparison_text(compare(roots)), encoding="utf-8")
    partial.replace(place)
    return place
