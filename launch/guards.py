"""What keeps a command out of a run folder that others write in, or that was trained otherwise."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from shlex import quote
from typing import TYPE_CHECKING

from medpsp.errors import CheckpointError, ConfigError, LaunchError, ShardError

if TYPE_CHECKING:
    from pathlib import Path

    from launch.chain import Submitted
    from launch.rundir import RunDir
    from medpsp.config import Config
    from shards.index import Manifest

log = logging.getLogger("medpsp")
MOST_LINKS = 40
"""As many as Linux follows."""


def refuse_by_hand(job: str, config: Config) -> None:
    """For `open_run`: one job, as a command of its own."""
    refuse_beside_jobs(config)
    refuse_other_training([job], config)


def refuse_other_training(jobs: Collection[str], config: Config) -> None:
    """For `open_run`: jobs that would go on in another way than their run was trained.

    Args:
        jobs: To be run. With one of shards among them training itself looks at what they hold.
        config: Of them.

    Raises:
        CheckpointError: As `launch.train.refuse_other_run`; or the shards that the run was trained
            on would be made with other settings.
        ShardError: They read shards that were made with other settings.
    """
    from launch.chain import MAKERS

    makers = set(jobs) & set(MAKERS)
    if jobs and not makers - {"train"}:
        _refuse_unfit(config)
    if makers - {"train"}:
        _refuse_other_shards(config)
    if "train" in makers and find_spec("torch"):  # a login node may lack it; training looks too
        from launch.train import refuse_other_run

        refuse_other_run(config, any_data=makers != {"train"})


def _refuse_other_shards(config: Config) -> None:
    from launch.rundir import RunDir
    from shards.index import read_manifest

    roots, shards = {config.out.resolve()}, config.shards
    while shards.is_symlink() and len(roots) < MOST_LINKS:  # those of the base of a sweep
        shards = shards.parent / shards.readlink()
        roots.add(shards.parent.resolve())
    own = f"{RunDir(config.out).checkpoints.name}/*/meta.json"
    places = [own, f"sweep/*/{own}"]
    metas = [path for root in roots for place in places for path in root.glob(place)]
    if not metas:
        return
    try:
        made = read_manifest(config.shards)
    except ShardError:  # nothing that could be lost
        return
    changes = _changes(config, made)
    trained = [path for path in metas if changes and _trained_on(path) == made.data_id]
    if trained:
        folders = sorted({str(path.parent.parent) for path in trained})
        raise CheckpointError(
            f"shards {config.shards}: the run was trained on them; {'; '.join(changes)}; set it "
            "back, or give another folder for other shards, out=FOLDER, or start over: delete "
            f"{', '.join(folders)}"
        )


def _refuse_unfit(config: Config) -> None:
    from launch.trained import require_fit
    from shards.index import read_manifest

    try:
        made = read_manifest(config.shards)
    except ShardError:  # whoever reads them says so
        return
    require_fit(config, made)


def _trained_on(meta: Path) -> str | None:
    """`Manifest.data_id` of the shards of a checkpoint; None where it is damaged."""
    from medpsp.train.same import DATA

    try:
        return str(json.loads(meta.read_text(encoding="utf-8"))["model"][DATA])
    except (OSError, ValueError, KeyError, TypeError):  # training says so
        return None


def _changes(config: Config, made: Manifest) -> list[str]:
    """What would make other shards: key, value of before and of now."""
    from medpsp.identity import fingerprint, load_key
    from medpsp.train.same import told_change
    from shards.layout import changed_settings, data_settings

    now = data_settings(config.data)
    keys = [name.removeprefix("data.") for name in changed_settings(config.data, made.settings)]
    found = [told_change(f"data.{key}", made.settings.get(key), now[key]) for key in keys]
    with suppress(ConfigError):  # none: whoever makes shards says so
        if fingerprint(load_key(config.data.key_file)) != made.key_fingerprint:
            found.append("data.key_file: they were made with another key")
    return found


def refuse_beside_jobs(config: Config) -> None:
    """For `open_run`: a command on this machine must not write where jobs of a cluster do.

    Raises:
        ConfigError: As `require_idle`.
    """
    from launch.chain import chain_of
    from launch.rundir import REASONS, RunDir

    folder = RunDir(config.out)
    if REASONS in os.environ or os.environ.get("RANK", "0") != "0":  # who started it has looked
        return
    try:
        own = {os.environ.get(f"SLURM_{name}JOB_ID", "") for name in ("", "ARRAY_")}
        chain = chain_of(folder)
        if not (chain and own & {job.id for job in chain.jobs}):
            require_idle(folder)
    except LaunchError as error:
        log.warning("jobs that were submitted before may be at work in %s: %s", config.out, error)


def require_idle(folder: RunDir) -> None:
    """Two chains must not write into one run.

    Raises:
        ConfigError: A job that was submitted before has not ended.
        LaunchError: No SLURM answers.
    """
    if not folder.chain.exists():
        return
    if left := at_work_of([folder]):
        names = ", ".join(job.name for job in left)
        cancel = f"medpsp cancel {quote(str(folder.root))}"
        raise ConfigError(f"{folder.root}: {names} still waits or runs; `{cancel}` first")


def at_work_of(runs: list[RunDir]) -> list[Submitted]:
    """Jobs of runs that wait or run."""
    from launch.chain import read_chain
    from launch.slurmstate import job_states, require_cluster

    jobs: dict[str, Submitted] = {}
    for run in runs:
        chain = read_chain(run)
        require_cluster(chain.slurm, run.root)
        jobs |= {job.id: job for job in chain.jobs}
    states = job_states(jobs)
    return [job for job in jobs.values() if not states[job.id].ended]
