"""What a command that failed takes away again: the folder that it made and did nothing in."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from launch.rundir import RANKS_LOCK, made

OWN = {".lock", RANKS_LOCK, "config.yaml"}
KEPT = {"logs": (".log", ".failed"), "jobs": (".json",)}


def remove_traces(line: str) -> None:
    """Remove folders that this process made, where they hold no more than locks, settings and logs.

    Args:
        line: Why the command ends; logs that it points to stay.
    """
    for folder in made:
        files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        if f"{folder}/logs" in line or not all(_own(path.relative_to(folder)) for path in files):
            return
        if files:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # one above it that holds another run by now
            folder.rmdir()
    made.clear()


def _own(path: Path) -> bool:
    if len(path.parts) == 1:
        return path.name in OWN
    return path.suffix in KEPT.get(path.parts[0], ())
