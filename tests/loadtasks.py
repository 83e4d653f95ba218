"""Tasks for the workers of the loader; they import this module, so it imports little."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.loadworker import Spec

SPECS = (Spec((3, 1000), "<i8"), Spec((5,), "|u1"))


def below(pid: int) -> list[int]:
    """Children that the loader started; zombies too."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and (b"loadworker" in command or not command):
            found.append(int(path.name))
    return found


@dataclass(frozen=True)
class Numbers:
    """Fills a batch with its number; the later ones are the faster ones."""

    slow: bool = False

    def __call__(self, item: int, arrays: Sequence[np.ndarray]) -> tuple[int, int]:
        if self.slow:
            time.sleep(0.02 if item % 3 == 0 else 0)
        arrays[0][...] = item
        arrays[1][...] = item % 256
        return item, os.getpid()


@dataclass(frozen=True)
class Fails:
    """Fails at one item."""

    at: int
    error: Any

    def __call__(self, item: int, arrays: Sequence[np.ndarray]) -> int:
        if item == self.at:
            if self.error == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.error == "exit":
                os._exit(7)
            raise self.error
        return item


class Unsendable(ValueError):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two


@dataclass(frozen=True)
class Modules:
    def __call__(self, item: object, arrays: object) -> list[str]:
        return sorted(set(sys.modules) & {"torch", "zarr", "ray", "pydantic", "tests.conftest"})


@dataclass(frozen=True)
class Raises:
    def __call__(self, item: object, arrays: object) -> None:
        raise Unsendable("a", "b")
