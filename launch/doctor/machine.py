"""Cores, memory, limits and the clock of this machine, as far as they are ours to use."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from launch.diagnose import more_files, size_text
from launch.doctor.rows import Row, note, ok, problem
from medpsp.machine import cores_allowed, memory_allowed, tasks_left

FEWEST_FILES, FEW_FILES = 256, 1024
"""Open files of a process; Ray's holds 56 with two workers, and more with more."""
FEWEST_TASKS, FEW_TASKS = 256, 1024
"""Processes and threads; Ray starts 200 for two workers and 22 for each further one."""
LEAST_MEMORY = 2 * 2**30
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
INFINIBAND = Path("/sys/class/infiniband")
DAY_S = 86400.0


def cores_row(threads: int) -> list[Row]:
    """What the kernel shows against what it lets us use, which is what medpsp starts threads for.

    Args:
        threads: ``train.threads`` times ranks of a configuration; 0 where they are not set.
    """
    seen, allowed = os.cpu_count() or 1, cores_allowed()
    found = f"{allowed:g}"
    if allowed < seen:
        found += f" of the {seen} that programs see (affinity or control group)"
    if threads <= allowed:
        return [ok("cores", found)]
    todo = "set train.threads to 0: then the ranks divide the cores that are ours"
    return [note("cores", f"{found}, and train.threads asks for {threads} with all ranks", todo)]


def memory_row(root: Path = Path("/")) -> list[Row]:
    """Of the machine, and of our control group."""
    text = (root / "proc/meminfo").read_text(encoding="utf-8")
    facts = {name: 1024 * int(kib) for name, kib in re.findall(r"(\w+): +(\d+) kB", text)}
    total, free = facts["MemTotal"], facts["MemAvailable"]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = {"control group": memory_allowed(root)}
    if soft != resource.RLIM_INFINITY:
        limits["ulimit -v"] = soft
    where, least = min(
        ((name, limit) for name, limit in limits.items() if limit is not None and limit < total),
        key=lambda pair: pair[1],
        default=("", total),
    )
    found = f"{size_text(total)}, {size_text(free)} available"
    if where:
        found = f"{size_text(least)} ({where}) of {size_text(total)}, {size_text(free)} available"
    if min(least, free) < LEAST_MEMORY:
        todo = "enough to predict; a shard task alone may take 1472 MiB (data.decode_memory_mib)"
        return [note("memory", found, todo)]
    if where == "ulimit -v":
        todo = "`ulimit -v unlimited`: torch and CUDA reserve addresses that they never fill"
        return [note("memory", found, todo)]
    if where:
        return [note("memory", found, "set data.memory_mib below that: programs see all of it")]
    return [ok("memory", found)]


def threads_row() -> list[Row]:
    """Environment variables that decide how many threads libraries start."""
    allowed = cores_allowed()
    rows, fine = [], []
    for name in THREADS:
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.isdecimal() or int(text) == 0:
            rows.append(note("threads", f"{name}={text} is no number", f"unset {name}"))
        elif int(text) > allowed:
            found = f"{name}={text}, with {allowed:g} cores"
            rows.append(note("threads", found, f"`export {name}={max(1, int(allowed))}`"))
        else:
            fine.append(f"{name}={text}")
    return rows or [ok("threads", ", ".join(fine) or "OMP_NUM_THREADS is not set")]


def files_row() -> list[Row]:
    """RLIMIT_NOFILE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} for a process (ulimit -n)"
    if _below(soft, FEWEST_FILES):
        return [problem("open files", found, more_files())]
    if _below(soft, FEW_FILES):
        return [note("open files", found, more_files())]
    return [ok("open files", found)]


def tasks_row(root: Path = Path("/")) -> list[Row]:
    """RLIMIT_NPROC, which counts threads of all processes of a user, and pids of control groups."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0:  # the kernel does not hold root to it
        soft = resource.RLIM_INFINITY
    left = tasks_left(root)
    found, todo = f"{_limit(soft)} processes and threads for this user (ulimit -u)", ""
    if left is not None:
        found += f", {left} more in this control group"
    if _below(soft, FEW_TASKS):
        todo = "raise it with `ulimit -u 4096`, or ask who runs this machine"
    if left is not None and left < FEW_TASKS:
        todo = "raise the limit of the job or container (docker run --pids-limit=4096)"
    if not todo:
        return [ok("processes", found)]
    bad = _below(soft, FEWEST_TASKS) or (left is not None and left < FEWEST_TASKS)
    make = problem if bad else note
    return [make("processes", found, f"{todo}: Ray takes 200 for two workers")]


def locked_row() -> list[Row]:
    """RLIMIT_MEMLOCK, which InfiniBand needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"{_limit(soft, size_text)} (ulimit -l)"
    if soft == resource.RLIM_INFINITY or not INFINIBAND.is_dir():
        return [ok("locked memory", found)]
    todo = "`ulimit -l unlimited`, or have it set for SLURM's jobs: NCCL registers its buffers"
    return [note("locked memory", f"{found}, and there is InfiniBand", todo)]


def written_row() -> list[Row]:
    """RLIMIT_FSIZE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = f"{_limit(soft, size_text)} (ulimit -f)"
    if soft == resource.RLIM_INFINITY:
        return [ok("file size", found)]
    return [problem("file size", found, "`ulimit -f unlimited`: shards and checkpoints are larger")]


def clock_row(now: float | None = None) -> list[Row]:
    """Against the time at which medpsp was put here.

    Args:
        now: Seconds since 1970; none: the clock's.
    """
    made, now = Path(__file__).stat().st_mtime, time.time() if now is None else now
    shown = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if now < made - DAY_S:
        found = f"{shown}, before medpsp was installed here"
        return [problem("clock", found, "set it, or start NTP: SLURM and TLS refuse wrong times")]
    return [ok("clock", shown)]


def _below(limit: int, least: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < least


def _limit(limit: int, shown: Callable[[int], str] = str) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else shown(limit)
