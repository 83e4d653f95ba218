"""Interleaved rounds of CPU time, and the table of what they say.

CPU time is user + system of this process, of its children that ended and of those that live.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.bench import results
from tests.bench.results import ROOT, Missing, Row, paired

PEERS = ROOT / ".venv-bench" / "shards"
PEER_PYTHON = PEERS / "bin" / "python"

Work = Callable[[], float | None]
"""One round; it returns its CPU seconds where it measured them itself."""


FAILURES = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ImportError)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the table: two cells of a section and what their ratio should be.

    Attributes:
        ours, theirs: Names of cells; together the label.
        least: Theirs / ours should reach it.
        most: Or ours / theirs should not pass it, for floors.
        wall: The ratio of wall clock times instead.
    """

    ours: str
    theirs: str
    least: float | None = None
    most: float | None = None
    wall: bool = False

    @property
    def label(self) -> str:
        """What is divided by what."""
        first, second = (self.theirs, self.ours) if self.most is None else (self.ours, self.theirs)
        return f"{first} / {second}{', wall' if self.wall else ''}"


@dataclass
class Cell:
    """ms of CPU and of wall clock a slice, one figure a round; or why there is none."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    missing: str = ""


Cells = dict[str, Cell]


def entry(module: str, name: str) -> Any:
    """Something of the product that this bench uses.

    Raises:
        Missing: The tree has no such thing.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise Missing(f"the tree has no {module}.{name}") from None


def cpu_seconds() -> float:
    """CPU time of this process and of everything below it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = sum(map(clock, below(os.getpid())))
    return time.process_time() + ended.ru_utime + ended.ru_stime + alive


def below(pid: int) -> list[int]:
    """Processes below one that live."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = [int(word) for word in path.read_text().split()]
        except OSError:
            continue  # it ended
        for child in pids:
            found += [child, *below(child)]
    return found


def clock(pid: int) -> float:
    """CPU seconds of a process; 0 when it is gone."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3); /proc counts in 10 ms
    except OSError:
        return 0.0


def measure(works: dict[str, Work], count: int, rounds: int) -> Cells:
    """Every work once to warm up, then ``rounds`` times in turn; times are for one of ``count``."""
    cells = {name: Cell() for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            cell = cells[name]
            if cell.missing:
                continue
            before, began = cpu_seconds(), time.perf_counter()
            try:
                own = work()
            except Missing as error:
                cell.missing = str(error)
                continue
            except FAILURES as error:  # one that fails must not cost the table
                cell.missing = f"{type(error).__name__}: {error}"[:300]
                continue
            wall, used = time.perf_counter() - began, cpu_seconds() - before
            if number:
                cell.cpu.append((used if own is None else own) / count * 1e3)
                cell.wall.append(wall / count * 1e3)
    return cells


class Peer:
    """A process of the peers' environment that does works on request and times itself."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child and self._child.stdin:
            self._child.stdin.close()
            self._child.wait()

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        """The answer of a function of `shards_peers`.

        Raises:
            Missing: There is no such environment, or the peer cannot do it.
        """
        if not PEER_PYTHON.exists():
            raise Missing("no .venv-bench/shards: make bench-shards makes it")
        if self._child is None:
            self._child = subprocess.Popen(
                [PEER_PYTHON, str(Path(__file__).with_name("shards_peers.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        child = self._child
        if child.stdin is None or child.stdout is None:
            raise Missing("no pipe to the peers")
        child.stdin.write(json.dumps({"task": task, **request}) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            self._child = None
            raise Missing(f"the peer died over {task} with {child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Missing(answer["error"])
        return answer

    def work(self, task: str, **request: Any) -> Work:
        """A request as a work of `measure`."""
        return lambda: float(self.ask(task, **request)["cpu"])


def report(
    section: str,
    cells: Cells,
    targets: Sequence[Target],
    facts: dict[str, Any],
    more: Sequence[Row] = (),
) -> None:
    """Ratios that were asked for, then what each cell took, into the results of `shards`."""
    rows = [*(judge(target, cells) for target in targets), *more]
    for name, cell in cells.items():
        cpu = cell.cpu or cell.wall
        kind = "CPU time" if cell.cpu else "wall"
        rows.append(
            Row(
                label=f"{name}: {kind}",
                value=statistics.median(cpu) if cpu else None,
                unit="ms",
                why=cell.missing,
                spread=f"{min(cpu):.3g} to {max(cpu):.3g}" if cpu else "",
            )
        )
    results.report("shards", section, rows, facts)


def judge(target: Target, cells: Cells) -> Row:
    """Medians and the median of the paired ratios."""
    ours, theirs = (cells.get(n, Cell(missing="not run")) for n in (target.ours, target.theirs))
    mine, other = (c.wall if target.wall else c.cpu for c in (ours, theirs))
    row = paired(target.label, mine, other, least=target.least, most=target.most)
    return row if mine and other else replace(row, why=ours.missing or theirs.missing)
