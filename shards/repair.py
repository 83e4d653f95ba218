"""Damaged shards are made anew from the archive, and nothing else is.

They are written as any others. What one holds by its commit and cannot be read now is an error;
where the commit is damaged, too, that is a row, and asked for again by the next run. Tables and
manifest `build_shards` writes every time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.words import many
from shards.build import build_shards
from shards.commit import committed_names, read_commit, write_commit
from shards.index import Manifest
from shards.inventory import shard_of_path
from shards.planfile import Plan
from shards.problem import BEYOND, Problem
from shards.settings import write_settings

log = logging.getLogger("medpsp")
NO_PLAN = ""
"""Digest of what was found damaged."""


def repair_shards(config: Config, problems: Sequence[Problem]) -> Manifest:
    """Convert the damaged shards again, and write the tables anew.

    Args:
        config: That the shards were made with.
        problems: That `check_shards` found.

    Raises:
        ShardError: The archive is not there or not what the shards were made from: then nothing
            is deleted but half-written files and a damaged plan; or a source of a damaged shard is
            gone or out of reach: then the shard stays as it is, to be made anew by the next run,
            which writes the manifest, too.
        ArchiveError, ConfigError: As `build_shards`.
    """
    damaged = damaged_shards(problems)
    if not config.data.archive.is_dir():
        raise ShardError(
            "data.archive: no such folder; repair converts the sources of a shard again, so mount "
            "it where the configuration says"
        )
    manifest = build_shards(config, lambda plan: _forget(config, plan, damaged))
    log.info(
        "repair: %s converted again%s; tables, plan and manifest written anew",
        many(len(damaged), "shard"),
        f" ({', '.join(damaged[:5])}{', ...' if len(damaged) > 5 else ''})" if damaged else "",
    )
    return manifest


def damaged_shards(problems: Sequence[Problem]) -> list[str]:
    """Names of the shards that must be converted again, in alphabetical order.

    A row of the index that disagrees with a commit is a fault of the index.
    """
    return sorted(
        {
            problem.shard
            for problem in problems
            if problem.kind not in BEYOND and shard_of_path(problem.path)
        }
    )


def _forget(config: Config, plan: Plan, damaged: Sequence[str]) -> None:
    """Let the commits of damaged shards be of no plan, so that whoever converts makes them anew.

    They still say what the shards hold.

    Raises:
        ShardError: The archive does not give what is in all shards any more.
    """
    root, text = config.shards, write_settings(config.data).text
    planned = {entry.name: entry.digest(text) for entry in plan.shards}
    for name in [*damaged, *sorted(set(committed_names(root)) - set(damaged))]:
        commit = read_commit(root, name)
        if name in planned and (commit is None or commit.digest in (planned[name], NO_PLAN)):
            continue
        if name in damaged:
            raise ShardError(
                f"shard {name}: is damaged, and its sources in data.archive are gone or not what "
                "they were; bring them back, or run `medpsp shards` to take the change over"
            )
        raise ShardError(
            f"shard {name}: data.archive or the configuration is not what it was made from, and "
            "repair would change it; bring the sources back as they were, or run `medpsp shards` "
            "to take the change over"
        )
    for name in damaged:
        commit = read_commit(root, name)
        if commit is not None:  # else it is of none already
            write_commit(root, replace(commit, digest=NO_PLAN))
