"""Why training should end early: a signal, or the time that the scheduler grants.

A handler does nothing but set a number and say so on a terminal; the loop asks at its step
boundaries, where all ranks agree, save and leave together. A second Ctrl-C ends the process at
once. So does the end of the terminal ask, but not a process that shall outlive it (nohup).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from types import FrameType

from medpsp.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
OUT_OF_TIME = 128
"""In place of the number of a signal."""


class StopRequest:
    """What asks this rank to end.

    Args:
        deadline: Seconds since 1970 by which the process is to be gone; None for never.
        margin: Seconds before it at which to save; at most a quarter of what is left now, or a
            short job would do nothing but save.
        heard: Said on a terminal at the first Ctrl-C.
    """

    def __init__(
        self, deadline: float | None = None, margin: float = 120.0, heard: str = ""
    ) -> None:
        self._at: float | None = None
        if deadline is not None:
            self._at = deadline - min(margin, max(0.0, deadline - time.time()) / 4)
        self._signal, self._said = 0, heard

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals for as long as this lasts; in the main thread only."""
        before = {number: signal.signal(number, self._heard) for number in asking(SIGNALS)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._said and os.isatty(2):
            with suppress(OSError):
                os.write(2, f"\r\n{self._said}\r\n".encode())
        self._signal = number

    @property
    def code(self) -> int:
        """0 for none, the number of a signal, or `OUT_OF_TIME` near the end of the time."""
        if self._signal == 0 and self._at is not None and time.time() >= self._at:
            return OUT_OF_TIME
        return self._signal

    def killed_compilers(self, error: RuntimeError) -> bool:
        """Whether an error is that of compilers which torch had started, and which the signal that
        asks this rank to end ended, too: it goes to all processes of a job."""
        from torch._dynamo.exc import TorchDynamoException

        broken = isinstance(error, (TorchDynamoException, BrokenProcessPool))
        return broken and self.code not in (0, OUT_OF_TIME)


def asking(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of some signals that ask to end: all but SIGHUP where nohup lets it be ignored."""
    deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (deaf and number == signal.SIGHUP)]


def interrupted(code: int, step: int) -> Interrupted:
    """The error that ends a run which was asked to stop and has saved."""
    why = "the end of its time" if code == OUT_OF_TIME else signal.Signals(code).name
    if step == 0:
        return Interrupted(
            f"train: stopped by {why} in its first step; the same command begins again"
        )
    return Interrupted(
        f"train: stopped by {why} after step {step}, which is saved; the same command goes on there"
    )
