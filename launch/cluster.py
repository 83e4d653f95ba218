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


def memory_allowed(root: Path = Path("/")) -> int | None:
    """Bytes that this control group and those above it allow; None where none of them says so.

    Version 1 writes a number that no machine has where there is no limit.
    """
    texts = [t for name in ("memory.max", "memory.limit_in_bytes") for t in _group(name, root)]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def cores_allowed(root: Path = Path("/")) -> float:
    """Cores' worth of time that affinity and control groups leave to this process."""
    allowed = float(len(os.sched_getaffinity(0)))
    pairs = [tuple(text.split()) for text in _group("cpu.max", root)]
    pairs += zip(_group("cpu.cfs_quota_us", root), _group("cpu.cfs_period_us", root), strict=False)
    for quota, period in pairs:
        if quota.isdecimal() and period.isdecimal():  # else max, or -1
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def threads_each(ranks: int) -> int:
    """Threads of a rank where the configuration sets none: its share of the cores it may use.

    Args:
        ranks: So many share this machine, unless LOCAL_WORLD_SIZE says how many.
    """
    cores, here = max(1, int(cores_allowed())), int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if own.isdecimal() and "TORCHELASTIC_RUN_ID" not in os.environ:  # whose ranks share a task
        return max(1, min(int(own), cores))
    return max(1, cores // here)


def tasks_left(root: Path = Path("/")) -> int | None:
    """Processes and threads that control groups still allow; None where they do not count them."""
    pairs = zip(_group("pids.max", root), _group("pids.current", root), strict=False)
    return min((int(m) - int(n) for m, n in pairs if m.isdecimal()), default=None)


def _group(name: str, root: Path) -> list[str]:
    return [text.strip() for text in group_files(name.partition(".")[0], name, root)]


def group_files(kind: str, name: str, root: Path = Path("/")) -> list[str]:
    """A file of our control group, of version 2 or 1, then of those above it; those there are.

    Args:
        kind: Controller, such as memory.
        name: Of the file.
        root: Above ``proc`` and ``sys``.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    top = root / "sys/fs/cgroup"
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        # in a container the path may be the one outside, and ours is at the top
        for base in (top / kind, top) if kinds else (top, top / "unified"):
            inner = Path(path.lstrip("/"))
            found = []
            for folder in (base / inner, *(base / above for above in inner.parents)):
                with suppress(OSError):
                    found.append((folder / name).read_text(encoding="utf-8"))
            if found:
                return found
    return []


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
