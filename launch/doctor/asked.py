"""Whether this machine has what a configuration asks for, and a profile what that needs."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from launch.diagnose import existing_folder, size_text
from launch.doctor.rows import Row, note, ok, problem
from launch.estimate import RATIO, look, shard_memory_gb
from launch.preflight import room_needed
from launch.profile import Profile
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.errors import ConfigError
from medpsp.machine import memory_allowed
from shards.index import MANIFEST
from shards.preflight import require_means, require_places


def profile_memory_row(config: dict[str, Any], site: dict[str, Any]) -> list[Row]:
    """What shard tasks of a node may take against what the profile asks for."""
    profile = Profile.model_validate(site)
    need, asked = shard_memory_gb(Config.model_validate(config), profile), profile.cpu.memory_gb
    found = f"{need:.1f} GB for {profile.cpu.cpus} shard tasks"
    if asked and asked < need:
        todo = "raise cpu.memory_gb of the profile, or lower data.decode_memory_mib"
        return [problem("profile memory", f"{found}, the profile asks for {asked:g}", todo)]
    return [ok("profile memory", found)]


def memory_row(config: dict[str, Any]) -> list[Row]:
    """What shard tasks on this machine may take together."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min(total, memory_allowed() or total)
    try:
        need, budget = require_means(Config.model_validate(config).data)
    except ConfigError as error:
        found, _, todo = str(error).rpartition("; ")
        return [problem("data.workers", found, todo)]
    text = f"shard tasks may take {size_text(budget * 2**20)} together"
    if budget * 2**20 > limit:
        todo = f"set data.memory_mib to at most {int(0.8 * limit / 2**20)}, or lower data.workers"
        make = problem if need * 2**20 > limit else note
        return [make("data.workers", f"{text}, there are {size_text(limit)}", todo)]
    return [ok("data.workers", text)]


def places_row(config: dict[str, Any]) -> list[Row]:
    """Whether folders overlap that must not."""
    tree = Config.model_validate(config)
    try:
        require_places(tree.data, tree.shards)
    except ConfigError as error:
        found, _, todo = str(error).rpartition("; ")
        return [problem("places", found or todo, todo)]
    return [ok("places", "out, archive, labels and index lie apart")]


def room_row(config: dict[str, Any]) -> list[Row]:
    """What shards and checkpoints will take of the disk of the run folder."""
    tree = Config.model_validate(config)
    need, parts = room_needed(tree, RunDir(tree.out)), []
    parts.append(f"checkpoints and the rest {size_text(need)}")
    if not (tree.shards / MANIFEST).is_file():
        archive = look(tree.data.archive)
        shards = int(archive.size / RATIO)
        need += shards
        if archive.files:
            more = "more than " if archive.more else ""
            parts.insert(0, f"shards {more}{size_text(shards)} to {size_text(archive.size)}")
    free = shutil.disk_usage(existing_folder(tree.out)).free
    found = f"{', '.join(parts)}; {size_text(free)} free"
    if need > free:
        todo = f"make room for {size_text(need - free)} more, or set out to a folder elsewhere"
        return [problem("room", found, todo)]
    return [ok("room", found)]


def engine_rows(config: dict[str, Any], deepspeed: str | None) -> list[Row]:
    """Engine and compiler.

    Args:
        config: As JSON values.
        deepspeed: Its version; None where it is not there.
    """
    train = Config.model_validate(config).train
    rows = []
    if train.engine != "ddp":
        todo = "pip install 'medpsp[train]', or train.engine=ddp"
        if deepspeed is None:
            rows.append(problem("train.engine", f"{train.engine}: no DeepSpeed here", todo))
        elif train.precision == "fp64":
            found = f"{train.engine} with train.precision fp64, which DeepSpeed does not do"
            rows.append(problem("train.engine", found, "train.engine=ddp"))
        else:
            rows.append(ok("train.engine", f"{train.engine}, DeepSpeed {deepspeed}"))
    if train.compile:
        rows.append(_compiler_row())
    return rows


def _compiler_row() -> Row:
    """torch.compile builds C++ on a CPU, and Triton a module in C on a GPU."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None or not shutil.which(compiler):
        return problem(
            "train.compile", "no C++ compiler", "apt install g++, or train.compile=false"
        )
    if not header.is_file():
        todo = "apt install python3-dev, or train.compile=false"
        return problem("train.compile", f"{compiler}, but no Python.h", todo)
    return ok("train.compile", f"{compiler} and Python.h")
