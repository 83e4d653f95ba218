"""Folders of answers that one process has for itself."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medpsp.errors import ConfigError

log = logging.getLogger("medpsp")
FULL = (errno.ENOSPC, errno.EDQUOT)


def lock(handle: int, out: Path) -> None:
    """Take a lock that ends with the process, or when the file is closed.

    Args:
        handle: Of a file, or of the folder itself.
        out: The folder, for messages.

    Raises:
        ConfigError: Another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{out}: another medpsp is at work there; end it, or take another folder"
        ) from None
    except OSError:  # a file server without locks
        log.warning("%s: cannot be locked; start only one command on it", out)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """An empty folder for this process; it is made, and removed if this fails with it empty.

    Raises:
        ConfigError: It is a file, or not empty, or another process is at work there.
    """
    _require_empty(out)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(handle, out)
        _require_empty(out)  # of what another one wrote before it ended
        yield
    except BaseException:
        if made and not any(out.iterdir()):
            out.rmdir()
        raise
    finally:
        os.close(handle)


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """A folder for half a work: what a killed one left goes first, and the folder with an error.

    Where the disk is full and the error does not say of what file, it is that of the folder: once
    that is gone, there is room again, and nobody could find out.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL and not error.filename:
            error.filename = str(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: not a folder; take another one for the masks")
    found = [path.name for path in out.iterdir()] if out.is_dir() else []
    if found and all(name.startswith(".partial-") for name in found):
        raise ConfigError(
            f"{out}: holds {found[0]} of a run that was killed, or is at work; delete it, or take "
            "another folder"
        )
    if found:
        raise ConfigError(
            f"{out}: not empty, and masks of other patients would "
            "stand among the new; give a new folder"
        )
