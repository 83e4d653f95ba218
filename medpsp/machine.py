"""What the kernel lets this process use: cores, memory, tasks."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def memory_allowed(root: Path = Path("/")) -> int | None:
    """Bytes that this control group and those above it allow; None where none of them says so.

    Version 1 writes a number that no machine has where there is no limit.
    """
    texts = [t for name in ("memory.max", "memory.limit_in_bytes") for t in _group(name, root)]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def cores_allowed(root: Path = Path("/")) -> float:
    """Cores' worth of time that affinity and control groups leave to this process."""
    cores = affinity()
    if cores is None:
        return float(os.cpu_count() or 1)
    allowed = float(len(cores))
    pairs = [tuple(text.split()) for text in _group("cpu.max", root)]
    pairs += zip(_group("cpu.cfs_quota_us", root), _group("cpu.cfs_period_us", root), strict=False)
    for quota, period in pairs:
        if quota.isdecimal() and period.isdecimal():  # else max, or -1
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def affinity() -> list[int] | None:
    """Numbers of the cores that this process may run on; None where the system does not tell."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return None


def whole_cores() -> int:
    """Threads that are worth starting: :func:`cores_allowed`, and at least one.

    ``os.cpu_count`` knows neither affinity nor quotas, and more threads than cores wait for one
    another: a job with 4 cores of 64 would start 64.
    """
    return max(1, int(cores_allowed()))


def threads_each(ranks: int) -> int:
    """Threads of a rank where the configuration sets none: its share of the cores it may use.

    Args:
        ranks: So many share this machine, unless LOCAL_WORLD_SIZE says how many.
    """
    cores, here = whole_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if own.isdecimal():
        cores = max(1, min(int(own), cores))
        # a task for each rank; torchrun's ranks share one, and so do those of a shell of salloc
        if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
            return cores
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
