"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

log = logging.getLogger("medpsp")
LINE_EVERY_S = 5.0
"""Seconds between two lines."""
FILE_ONLY = "file_only"
"""Attribute of a log record that is for the log file alone."""


def duration(seconds: float) -> str:
    """As people say it: ``9 h 10 min``, ``12 min 30 s``, ``45 s``, ``0.8 s``."""
    if seconds < 9.5:
        return f"{seconds:.2g} s" if seconds >= 0.01 else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _parts(*divmod(whole, 60), "min", "s")
    return _parts(*divmod(round(seconds / 60), 60), "h", "min")


def _parts(large: int, small: int, unit: str, below: str) -> str:
    return f"{large} {unit} {small} {below}" if small else f"{large} {unit}"


class _Times(ProgressColumn):
    """Of a bar on a terminal: how long it has taken, and will take."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        text = duration(round(task.elapsed or 0))
        if task.time_remaining and not task.finished:
            text += f", ETA {duration(round(task.time_remaining))}"
        return Text(text)


class _Noted(Progress):
    """The note below the bar: beside it both would be cut in 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if note := task.fields.get("note"):
                yield Text(f"  {note}", no_wrap=True, overflow="ellipsis")


class Bar:
    """Counts to ``total`` and shows where it is.

    Args:
        label: What is counted, for example ``train``.
        total: How many; 0 where unknown.
        unit: Name of one, plural, for example ``steps``.
        show: False on all ranks but 0.
        inner: Within another bar: lines only, and none where it takes less than one.
    """

    def __init__(
        self, label: str, total: int, unit: str, *, show: bool = True, inner: bool = False
    ) -> None:
        self.label, self.total, self.unit, self.show = label, total, unit, show
        self.done = self.start = 0
        self.began = self.last_line = time.monotonic()
        self.note = ""
        self._said = -1
        self._inner = inner
        self._rich: Progress | None = None
        console = Console(stderr=True)  # stdout is for results
        if show and not inner and sys.stderr.isatty() and not console.is_dumb_terminal:
            self._rich = _Noted(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                _Times(table_column=Column(no_wrap=True)),
                console=console,
            )
            self._task = self._rich.add_task(label, total=total or None, rate="", note="")

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich:
            with suppress(OSError):  # the terminal may be closed
                self._rich.stop()
        if self.show and kind is None and self._said != self.done and not self._inner:
            self._line()

    def resume_at(self, done: int) -> None:
        """Set the count without counting it towards the rate."""
        self.done = self.start = done
        if self._rich:
            self._rich.reset(self._task, completed=done)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more; ``note`` is shown with it until the next one."""
        self.done += count
        self.note = note or self.note
        if not self.show:
            return
        if self._rich:
            self._rich.update(
                self._task,
                completed=self.done,
                rate=f"{self.rate():.1f} {self.unit}/s",
                note=self.note,
            )
        if time.monotonic() - self.last_line >= LINE_EVERY_S:
            self._line()

    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def _line(self) -> None:
        self.last_line, self._said = time.monotonic(), self.done
        rate = self.rate()
        speed = f", {rate:.1f} {self.unit}/s" if self.done > self.start else ""  # 0.0 is no stall
        left = (self.total - self.done) / rate if rate > 0 and self.total > self.done else 0.0
        of = f"/{self.total}" if self.total else ""
        log.info(
            "%s %d%s %s%s%s%s",
            self.label,
            self.done,
            of,
            self.unit,
            speed,
            f", ETA {duration(round(left))}" if self.total else "",
            f", {self.note}" if self.note else "",
            extra={FILE_ONLY: True} if self._rich else {},  # the terminal has the bar
        )
