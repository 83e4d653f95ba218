"""Who am I among the ranks: torchrun's variables to a `World`."""

from __future__ import annotations

import os

from medpsp.errors import LaunchError
from medpsp.types import World


def detect_world() -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; a plain process is a world of one.

    Raises:
        LaunchError: They are set, but not whole numbers that fit together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if "WORLD_SIZE" not in found:
        return World()
    try:
        rank, size, local = (int(found[name]) for name in names)
    except (KeyError, ValueError):
        raise LaunchError(
            f"ranks: expected whole numbers in {', '.join(names)}, got {found}; start with "
            "torchrun or `medpsp train`"
        ) from None
    if not 0 <= rank < size:
        raise LaunchError(f"ranks: RANK {rank} is not below WORLD_SIZE {size}")
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise LaunchError("ranks: MASTER_ADDR and MASTER_PORT are not set; start with torchrun")
    return World(rank=rank, size=size, local_rank=local)


def end_time() -> float | None:
    """When the scheduler ends this job, seconds since 1970; None where nothing says so."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None
