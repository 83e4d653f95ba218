"""A short job before the long ones: do the nodes, ranks and folders work together?"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from launch.cluster import detect_world
from launch.meeting import wait_for_json, write_json
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.errors import LaunchError
from medpsp.words import many

log = logging.getLogger("medpsp")
MOST_SKEW_S = 5.0
BESIDE = 2**30
"""Bytes that have to be free beside the checkpoints: curves, pictures, the exported files, logs."""
SEEN_S = 60.0


def preflight_job(config: Config) -> None:
    """Check what a job of several nodes needs; each rank says what it finds.

    Raises:
        LaunchError: Naming the node and what to do.
    """
    import torch
    import torch.distributed as dist

    from medpsp.train.ranks import process_group

    world, run = detect_world(), RunDir(config.out)
    if world.size != config.train.ranks:
        raise LaunchError(
            f"preflight: SLURM started {world.size} ranks, train.ranks is {config.train.ranks}; "
            "set nodes and tasks of the profile to it"
        )
    folder = run.jobs / f".preflight-{os.environ.get('SLURM_JOB_ID', 'local')}"
    with process_group(world, threads=1, seconds=300):
        total = torch.ones(1)
        if dist.is_initialized():
            dist.all_reduce(total)  # behind it all ranks are at the same moment
        mine = _facts(run.root)
        if int(total) != world.size:
            raise LaunchError(f"preflight: an all-reduce over {world.size} ranks gave {int(total)}")
        write_json(folder / f"{world.rank}.json", mine)
        unseen = (
            f"preflight: node {mine['node']} does not see what another rank wrote; is {folder} a "
            "folder that all nodes share?"
        )
        everyone = [
            wait_for_json(folder / f"{rank}.json", SEEN_S, unseen) for rank in range(world.size)
        ]
        if dist.is_initialized():
            dist.barrier()
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        for line in faults(everyone, room_needed(config, run)):
            raise LaunchError(line)
        nodes = sorted({facts["node"] for facts in everyone})
        ranks = many(world.size, "rank")
        log.info("preflight: %s on %s: each sees the others and %s", ranks, nodes, run.root)


def faults(everyone: list[dict[str, Any]], need: int) -> list[str]:
    """What does not fit, worst first.

    Args:
        everyone: Of each rank: node, time, free bytes, whether scontrol is there.
        need: Bytes that have to be free in the run folder.
    """
    lines = []
    for facts in everyone:
        where = f"preflight: node {facts['node']}"
        if facts["free"] < need:
            lines.append(
                f"{where}: {facts['free'] / 2**30:.1f} GiB free in out, training may need "
                f"{need / 2**30:.1f}; make room"
            )
        if not facts["scontrol"]:
            lines.append(f"{where}: no scontrol, so a job there cannot queue itself again")
    times = [facts["time"] for facts in everyone]
    if max(times) - min(times) > MOST_SKEW_S:
        lines.append(f"preflight: clocks differ by {max(times) - min(times):.0f} s; set up NTP")
    return lines


def room_needed(config: Config, run: RunDir) -> int:
    """Bytes that training still needs: while one is written, one more than are kept."""
    from medpsp.model.psp import build_model
    from medpsp.train.memory import checkpoint_bytes, checkpoints_kept

    one = checkpoint_bytes(
        build_model(config.model.untrained, len(config.data.classes)), config.train
    )
    held = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    return max(one, one * (checkpoints_kept(config.train) + 1) - held) + BESIDE


def _facts(root: Path) -> dict[str, Any]:
    return {
        "node": os.uname().nodename,
        "time": time.time(),
        "free": shutil.disk_usage(root).free,
        "scontrol": "MEDPSP_REQUEUE" in os.environ,  # of the script, outside any container
    }
