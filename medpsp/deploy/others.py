"""What other processes take of a machine while something is measured on it."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


class Others:
    """Counts from its making on.

    Args:
        source: What /proc/stat holds.
    """

    def __init__(self, source: Path = STAT) -> None:
        self._source = source
        self._began = self._now()

    def _now(self) -> tuple[float, float, float | None]:
        return time.perf_counter(), time.process_time(), busy_seconds(self._source)

    def cores(self) -> float | None:
        """Cores that others kept busy, on average; None where the kernel does not say."""
        (t0, own0, busy0), (t1, own1, busy1) = self._began, self._now()
        if busy0 is None or busy1 is None or t1 <= t0:
            return None
        return max(0.0, (busy1 - busy0 - (own1 - own0)) / (t1 - t0))


def busy_seconds(source: Path = STAT) -> float | None:
    """Seconds that all cores were at work since the machine began: not idle, nor waiting for a
    disk. What a hypervisor gave to others counts, what guests take is in it already."""
    try:
        name, *ticks = source.read_text(encoding="ascii").partition("\n")[0].split()
        user, nice, system, _idle, _wait, irq, soft, steal = (int(t) for t in ticks[:8])
    except (OSError, ValueError):  # not Linux
        return None
    if name != "cpu":
        return None
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
