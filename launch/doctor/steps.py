"""Checks run in child processes: one that crashes or hangs costs its own row, and no more.

Lanes run beside each other. The steps of a lane run one after another in one child, so that what
it imported serves the next step; where a child ends, a new one goes on behind the step that ended
it. A child that does not even die (a dead network file system, a stuck driver) is left behind.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launch.doctor.rows import Row, Verdict, note, private, problem, row_of
from medpsp.progress import duration

ALL_S = 120.0
"""For all lanes together; what has not begun by then is not checked."""
AT_ONCE = 4
"""Children; more would make each other slow, and need more open files than there may be."""
START_S = 60.0
"""For Python and the module of a check, which is more than the check where a disk is slow."""
DIE_S = 2.0
_CHILD = "import sys; sys.path[:] = {path!r}; from launch.doctor.steps import main; main()"
_QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1"}
"""It would ask PyPI for a newer version, and wait where no network answers."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One check.

    Attributes:
        what: Of its row where it does not end well.
        label: Within that; others need it by this name.
        call: ``module:function`` that makes a list of rows.
        arguments: Of that; JSON values.
        seconds: Until it is given up, from where its module is imported.
        crash: What to do where it ends Python.
        silence: What to do where it does not answer.
        missed: Verdict where it does not answer.
        needs: Label of a step of the same lane that must have gone well.
        lane: Those of one name run one after another.
    """

    what: str
    call: str
    lane: str
    label: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    crash: str = ""
    silence: str = ""
    missed: Verdict = Verdict.problem
    needs: str = ""

    def named(self, text: str) -> str:
        """With the label before it."""
        return f"{self.label}: {text}" if self.label else text


Answer = tuple[Step, list[Row]]


class _Lane:
    """The steps of one lane, and the child that is at the first of them, if one is."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = deque(steps)
        self.child: subprocess.Popen[bytes] | None = None
        self.until = self._limit = 0.0
        self._failed: set[str] = set()
        self._heard = b""

    def go_on(self) -> Iterator[Answer]:
        """Ask for the next step that can be checked; afterwards there is a child or no step."""
        while self.steps:
            step = self.steps[0]
            if step.needs in self._failed:
                found = note(step.what, step.named("not checked"), f"see {step.needs} first")
                yield self._done([found], failed=True)
                continue
            try:
                self._ask(step)
            except OSError as error:
                found = problem(
                    step.what,
                    step.named(f"no process can be started for it ({error.strerror})"),
                    "raise the limits of processes and open files (ulimit -u, ulimit -n)",
                )
                self.end()
                yield self._done([found])
                continue
            return
        self.end()

    def _ask(self, step: Step) -> None:
        if self.child is None:
            self.child = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries print there; rows say what is wrong
                bufsize=0,
                env=os.environ | _QUIET,
            )
        request = {"call": step.call, "what": step.what, "arguments": step.arguments}
        self._heard = b""
        self._wait(START_S)
        if self.child.stdin:
            with suppress(BrokenPipeError):  # it ended: what it leaves says how
                self.child.stdin.write(json.dumps(request).encode() + b"\n")

    def _wait(self, seconds: float) -> None:
        self._limit, self.until = seconds, time.monotonic() + seconds

    def hear(self) -> Iterator[Answer]:
        """What the child says: an empty line as a check begins, its rows, or how it ended."""
        if self.child is None or self.child.stdout is None:
            return
        piece = os.read(self.child.stdout.fileno(), 2**16)
        self._heard += piece
        if not piece:
            yield self._done([self._obituary(self.steps[0], self.child)])
            yield from self.go_on()
        elif self._heard == b"\n":
            self._wait(self.steps[0].seconds)
        elif self._heard.endswith(b"\n"):
            yield self._done([row_of(tree) for tree in json.loads(self._heard)])
            yield from self.go_on()

    def _obituary(self, step: Step, child: subprocess.Popen[bytes]) -> Row:
        how = "without a word"
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(DIE_S)
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
        self.end()
        return problem(step.what, step.named(f"ends Python ({how})"), step.crash)

    def give_up(self) -> Iterator[Answer]:
        """The step at hand does not answer."""
        step = self.steps[0]
        text = step.named(f"no answer within {self._limit:.0f} s")
        self.end()
        yield self._done([Row(step.what, step.missed, text, step.silence)], failed=True)
        yield from self.go_on()

    def end(self) -> None:
        """Kill the child; one that the kernel holds, and that stays, is left behind."""
        child, self.child = self.child, None
        if child:
            child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.wait(DIE_S)
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()

    def _done(self, rows: list[Row], failed: bool = False) -> Answer:
        step = self.steps.popleft()
        if failed or any(row.verdict is Verdict.problem for row in rows):
            self._failed.add(step.label or step.what)
        return step, rows


def run(steps: Iterable[Step], seconds: float = ALL_S) -> Iterator[Answer]:
    """Check; each step with its rows, as they come.

    Args:
        steps: The lane whose first step comes first begins first.
        seconds: For all of them.
    """
    lanes: dict[str, list[Step]] = {}
    for step in steps:
        lanes.setdefault(step.lane, []).append(step)
    waiting, running = deque(_Lane(own) for own in lanes.values()), list[_Lane]()
    end = time.monotonic() + seconds
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(waiting.popleft())
                yield from running[-1].go_on()
            yield from _turn(running, end)
            running = [lane for lane in running if lane.steps]
            if time.monotonic() >= end:
                yield from _late([*running, *waiting], seconds)
                return
    finally:
        for lane in running:
            lane.end()


def _turn(running: list[_Lane], end: float) -> Iterator[Answer]:
    """Wait for the first that says something or is late."""
    with selectors.DefaultSelector() as selector:
        for lane in running:
            if lane.child and lane.child.stdout:
                selector.register(lane.child.stdout, selectors.EVENT_READ, lane)
                end = min(end, lane.until)
        ready = selector.select(max(0.0, end - time.monotonic())) if selector.get_map() else []
    for key, _ in ready:
        yield from key.data.hear()
    heard = [key.data for key, _ in ready]
    for lane in running:
        if lane.child and lane not in heard and lane.until <= time.monotonic():
            yield from lane.give_up()


def _late(lanes: Iterable[_Lane], seconds: float) -> Iterator[Answer]:
    for lane in lanes:
        for step in lane.steps:
            text = step.named(f"not checked, {duration(seconds)} were over")
            yield step, [note(step.what, text, "see what did not answer before it")]


def main() -> None:
    """The child: requests from stdin, rows to stdout, a line each, until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        module, name = request["call"].split(":")
        try:
            call = getattr(importlib.import_module(module), name)
            answers.write("\n")
            answers.flush()
            rows = call(**request["arguments"])
        except Exception as error:  # noqa: BLE001 - a check that fails must not take others out
            found = f"{type(error).__name__}: {private(error)}"
            rows = [problem(request["what"], found, "mend that, and check again")]
        answers.write(json.dumps([row.tree() for row in rows]) + "\n")
        answers.flush()
