"""Who am I among the ranks, and what may I have: torchrun's, SLURM's and the kernel's word."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from medpsp.errors import LaunchError
from medpsp.machine import group_files, memory_allowed

if TYPE_CHECKING:  # numpy comes with it
    from medpsp.types import World


def detect_world() -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; a plain process is a world of one.

    Raises:
        LaunchError: They are set, but not whole numbers that fit together.
    """
    from medpsp.types import World

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


def sleep_at_barriers() -> None:
    """Let threads of OpenMP sleep while they wait for one another; before torch is imported.

    libgomp has them spin for milliseconds at each barrier, of which a step has hundreds: beside
    other programs a step took several times as long. What the environment says already, stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def end_time() -> float | None:
    """When the scheduler ends this job, seconds since 1970; None where nothing says so."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if text.isdecimal():
        return float(text)
    number = os.environ.get("SLURM_JOB_ID", "")
    if not number:
        return None
    try:  # SLURM before 23 sets no variable
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", number],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r" EndTime=(\d{4}-\S+)", done.stdout)
    return datetime.fromisoformat(found[1]).timestamp() if found else None


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes of this control group that the kernel killed for memory; None where it is silent.

    Args:
        root: Above ``proc`` and ``sys``.
    """
    for file in ("memory.events", "memory.oom_control"):
        for text in group_files("memory", file, root)[:1]:
            for line in text.splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill" and count.isdecimal():
                    return int(count)
    return None


def memory_limit() -> str:
    """What bounds the memory of this process, in words."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        return f"ulimit -v allows {soft / 2**30:.1f} GiB"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_allowed()
    if limit is not None and limit < pages:
        return f"this job may have {limit / 2**30:.1f} GiB"
    return f"this machine has {pages / 2**30:.1f} GiB"


def own_address() -> str:
    """The address by which other nodes reach this one; nothing is sent to find it."""
    with suppress(OSError):
        for *_, place in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET):
            if not str(place[0]).startswith("127."):
                return str(place[0])
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737)
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def kill_all(process: int) -> None:
    """End a process at once, and all that it has started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(path.parent.name))
    found = [process]
    for one in found:
        found += parents.get(one, [])
    for one in found:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
