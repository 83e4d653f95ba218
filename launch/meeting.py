"""Small files by which processes on several nodes tell each other: whole, or not there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from medpsp.errors import LaunchError

_POLL_S = 0.1


def write_json(path: Path, tree: object, mode: int = 0o666) -> None:
    """Write a file in one rename.

    Args:
        path: Its folder is made.
        tree: JSON values.
        mode: Of a new file, before the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(tree, file, indent=1)
        partial.replace(path)
    except OSError:  # the disk is full
        partial.unlink(missing_ok=True)
        raise


def wait_for_json(path: Path, seconds: float, why: str) -> Any:
    """What another process writes, once it is there: network file systems show a new file late.

    Raises:
        LaunchError: It is not, in time; with ``why``.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            time.sleep(_POLL_S)
    raise LaunchError(why)
