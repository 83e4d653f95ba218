"""Processes that answer rounds, and whole commands with their time and memory.

CPU time is user + system. Memory is VmHWM, the most that a process ever had resident: that of a
command is the sum over its processes, as if all had been at their largest at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.results import ROOT, Missing
from tests.bench.shards_rounds import below, clock

ENGINES = ROOT / "tests" / "bench" / "export_engines.py"
POLL_S, SETTLE_S = 0.01, 0.05
DISTURBED = 10
"""Preemptions in 100 ms of CPU time from which on another process had the cores: 23 were seen
with two others at work. Threads that wait for each other then spin: torch's 2 threads took 1.8 to
2.0 s of CPU for what takes 0.9 s where they sleep, and once 14 s."""


@dataclass
class Engine:
    """A process that holds one network ready; see `export_engines`.

    Attributes:
        cpu, wall: ms of one image, one figure a round.
        peak: MiB.
        preempted: How often another process got its core, one figure a round.
        passive: OpenMP threads sleep while they wait, they do not spin.
        about: Versions, and what the engine says of itself; why it does not answer.
        missing: It does not.
    """

    name: str
    arguments: tuple[str, ...]
    threads: int
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    peak: float = 0.0
    about: str = ""
    missing: bool = False
    passive: bool = False

    def __post_init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(ENGINES), "serve", *self.arguments, str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **environment(),
                "OMP_NUM_THREADS": str(self.threads),
                **({"OMP_WAIT_POLICY": "PASSIVE"} if self.passive else {}),
            },
        )
        answer = self._answer()
        self.about = str(answer.get("about", self.about))

    def round(self, counted: bool) -> None:
        """One image; unless it is not counted, its times are kept."""
        child = self._child
        if self.missing or child.stdin is None:
            return
        child.stdin.write("again\n")
        child.stdin.flush()
        answer = self._answer()
        if counted and not self.missing:
            self.cpu.append(answer["cpu"])
            self.wall.append(answer["wall"])
            self.preempted.append(answer["preempted"])
            self.peak = answer["peak"]

    def settle(self) -> None:
        """Wait until it takes no CPU time."""
        before, now = -1.0, clock(self._child.pid)
        while now - before >= POLL_S:
            time.sleep(SETTLE_S)
            before, now = now, clock(self._child.pid)

    def _answer(self) -> dict[str, Any]:
        line = self._child.stdout.readline() if self._child.stdout else ""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        said = self._child.stderr.read().strip().splitlines() if self._child.stderr else []
        self.missing, self.about = True, said[-1][:200] if said else "ended without a word"
        return {}

    def close(self) -> None:
        """End it."""
        if self._child.stdin:
            self._child.stdin.close()
        self._child.wait()

    @property
    def disturbed(self) -> bool:
        """Its times are not of a quiet machine."""
        return bool(self.cpu) and 100 * sum(self.preempted) > DISTURBED * sum(self.cpu)

    @property
    def text(self) -> str:
        """As it is printed."""
        if not self.cpu:
            return f"{self.name:32} -- {self.about}"
        cpu, wall = statistics.median(self.cpu), statistics.median(self.wall)
        spread = f"{min(self.cpu):.1f}-{max(self.cpu):.1f}"
        return (
            f"{self.name:32} {cpu:8.1f} ms CPU ({spread}), wall {wall:8.1f} ms, "
            f"{self.peak:5.0f} MiB, preempted {statistics.median(self.preempted):g}x  {self.about}"
        )


def in_turn(engines: Sequence[Engine], rounds: int) -> None:
    """A round of each after the other, forwards and backwards; the first is not counted.

    Threads of ONNX Runtime and OpenMP spin on for a while after a round; none begins before those
    of the last one sleep.
    """
    for number in range(rounds + 1):
        for engine in engines[:: -1 if number % 2 else 1]:
            engine.round(counted=number > 0)
            engine.settle()


def ratio(above: Engine, below_: Engine) -> float | None:
    """Median of the paired ratios of CPU time; None where one is missing."""
    pairs = list(zip(above.cpu, below_.cpu, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def environment() -> dict[str, str]:
    """For a child: what it imports may be kept compiled, and NNCF reports to nobody."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "NNCF_CI": "1", "CUDA_VISIBLE_DEVICES": ""}


def engine_task(*arguments: str) -> str:
    """One task of `export_engines`, in a process of its own; what it printed.

    Raises:
        Missing: It failed.
    """
    done = subprocess.run(
        [sys.executable, str(ENGINES), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Missing(f"{arguments[0]}: {said[-1][:200] if said else done.returncode}")
    return done.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A command that ended well: seconds, and MiB of it and of its children, each at its most."""

    wall: float
    cpu: float
    main: float
    children: tuple[float, ...] = ()

    @property
    def peak(self) -> float:
        """MiB of all."""
        return self.main + sum(self.children)


def ran(command: Sequence[str | Path], log: Path) -> Ran:
    """Run a command to its end.

    Raises:
        Missing: It failed; what it said is in the log.
    """
    peaks: dict[int, float] = {}
    with log.open("wb") as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=environment()
        )
        while True:
            for pid in (child.pid, *below(child.pid)):
                # not the largest: before exec a child has the memory of its parent
                peaks[pid] = high_water(pid) or peaks.get(pid, 0.0)
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(POLL_S)
        wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise Missing(f"exit {child.returncode}: {said[-1][:200] if said else 'no word'}")
    main = peaks.pop(child.pid)
    cpu = used.ru_utime + used.ru_stime
    return Ran(wall=wall, cpu=cpu, main=main, children=tuple(peaks.values()))


def high_water(pid: int | str) -> float:
    """MiB that a process has had resident at most; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
