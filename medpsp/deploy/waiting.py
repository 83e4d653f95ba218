"""Associations that are whole and wait to be segmented: the queue of `receive` on disk.

Their senders were told that all is stored and send nothing again, so a kill must lose none. Each is
a folder ``.whole-<tries>-assoc-000001`` of objects; the number of tries is that of the processes
which began to segment it, since one that was killed may have been killed by it.
"""

from __future__ import annotations

import re
from pathlib import Path

from medpsp.durable import sync, sync_all

MOST_TRIES = 2
"""Of processes that may end while they segment it."""
_NAME = re.compile(r"\.whole-(\d+)-(assoc-\d+)")


def keep(folder: Path, name: str) -> Path:
    """Let a folder of objects wait, through power cuts as well.

    Args:
        folder: Of an association that was released.
        name: Of its answers.

    Returns:
        Where it is now: in the same folder.
    """
    sync_all(folder)
    kept = folder.rename(folder.with_name(f".whole-0-{name}"))
    sync(kept.parent)
    return kept


def tried(folder: Path) -> Path:
    """The same with one try more, before it begins."""
    tries, name = _parts(folder)
    return folder.rename(folder.with_name(f".whole-{tries + 1}-{name}"))


def untried(folder: Path) -> Path:
    """The same without tries, as nothing was killed."""
    return folder.rename(folder.with_name(f".whole-0-{_parts(folder)[1]}"))


def waiting(out: Path) -> list[tuple[str, int, Path]]:
    """Name, tries and folder of what earlier processes left, in the order of their coming."""
    found = [path for path in out.glob(".whole-*") if _NAME.fullmatch(path.name)]
    named = [(*_parts(path)[::-1], path) for path in found]
    return sorted(named, key=lambda one: (len(one[0]), one[0]))


def _parts(folder: Path) -> tuple[int, str]:
    tries, name = _NAME.fullmatch(folder.name).groups()  # type: ignore[union-attr]
    return int(tries), name
