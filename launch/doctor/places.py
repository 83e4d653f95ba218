"""Folders that are read and written: there, ours to use, with room, and with a clock like ours."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from launch.diagnose import MORE_SHM, OTHER_FOLDER, SHM, existing_folder, size_text
from launch.doctor.rows import Row, note, ok, private, problem
from launch.nodes import OBJECT_STORE
from launch.preflight import BESIDE, MOST_SKEW_S

BLOCK = 2**16
"""Bytes that are written to see whether a folder takes them."""
LIMIT = 107
"""Bytes of a socket's path (unix(7))."""
SESSION = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest that Ray puts below its folder; the last number is a process."""
MAY_READ = "have its owner let this user read it"
FULL = 0.95
"""Share of a disk from which on Ray refuses to store objects."""


def run_row(out: str) -> list[Row]:
    """The folder of a run, which may still have to be made."""
    return [folder_row("run folder", Path(out), out, OTHER_FOLDER)]


def temp_row() -> list[Row]:
    """Where temporary files go."""
    asked = os.environ.get("TMPDIR")
    todo = "set TMPDIR to a folder of your own with some GiB"
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return [problem("temporary files", "no folder for them can be written", todo)]
    if asked and place != Path(asked).absolute():
        found = f"TMPDIR {private(asked)} cannot be written; {private(place)} is taken in its place"
        return [problem("temporary files", found, todo)]
    return [folder_row("temporary files", place, private(place), todo)]


def folder_row(what: str, path: Path, shown: str, todo: str) -> Row:
    """Write a file into a folder, or into the nearest one above it, and look at what is left.

    Args:
        what: Of the row.
        path: Of the folder.
        shown: Its path for people.
        todo: Where it cannot be written.
    """
    if os.path.isfile(path):  # pathlib raises where a folder above may not be entered
        return problem(what, f"{shown}: a file, expected a folder", todo)
    place = existing_folder(path)
    try:
        skew = _write(place)
    except OSError as error:
        return problem(what, f"{shown}: cannot be written ({error.strerror})", todo)
    usage, inodes = shutil.disk_usage(place), os.statvfs(place)
    found = f"{shown}: {size_text(usage.free)} of {size_text(usage.total)} free"
    if inodes.f_files and not inodes.f_favail:
        return problem(what, f"{found}, but room for no more files (inodes)", "delete old files")
    if usage.free < BESIDE:
        return problem(what, found, f"make room, at least {size_text(BESIDE)}; `df -h` shows disks")
    if abs(skew) > MOST_SKEW_S:
        todo = "set up NTP on both: what is newest is decided by times of files"
        return problem(what, f"{found}; the clock of its server is {skew:+.0f} s off ours", todo)
    return ok(what, found)


def _write(folder: Path) -> float:
    """How far the clock of a file system is from ours, s; a file is written and removed."""
    handle, name = tempfile.mkstemp(prefix=".medpsp-doctor-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            before = time.time()
            file.write(bytes(BLOCK))
            file.flush()
            os.fsync(handle)  # network file systems say only then that they are full
            made, after = os.fstat(handle).st_mtime, time.time()
    finally:
        with suppress(OSError):
            os.unlink(name)
    return min(made - before, 0.0) or max(made - after, 0.0)


def shm_row() -> list[Row]:
    """Shared memory: Ray's objects, and what NCCL sends between the GPUs of a node."""
    if not SHM.is_dir():
        return [note("shared memory", f"no {SHM}", "mount it: Ray and NCCL are slower without")]
    usage = shutil.disk_usage(SHM)
    found = f"{SHM}: {size_text(usage.free)} of {size_text(usage.total)} free"
    if usage.free < OBJECT_STORE:
        todo = f"{MORE_SHM}: Ray takes the disk in its place, NCCL may fail"
        return [note("shared memory", found, todo)]
    return [ok("shared memory", found)]


def ray_row() -> list[Row]:
    """Whether Ray could start: its folder and the length of its sockets. It is not started."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    todo = "set RAY_TMPDIR to a short path with room, such as /tmp"
    used, most = len(os.fsencode(folder)), LIMIT - len(SESSION)
    if used > most:
        found = f"its folder has a path of {used} bytes, and its sockets leave room for {most}"
        return [problem("Ray", found, todo)]
    row = folder_row("Ray", folder, private(folder), todo)
    usage = shutil.disk_usage(existing_folder(folder))
    if row.verdict == "ok" and usage.used > FULL * usage.total:
        found = f"{row.found}: above {FULL:.0%} full it stores no objects"
        return [problem("Ray", found, f"make room there, or {todo}")]
    return [row]


def key_row(path: str | None) -> list[Row]:
    """The key of the pseudonyms."""
    from medpsp.errors import ConfigError
    from medpsp.identity import KEY_VARIABLE, fingerprint, load_key

    try:
        key = load_key(Path(path) if path else None)
    except ConfigError as error:
        found, _, todo = str(error).removeprefix("data.key_file").strip(" :").partition("; ")
        return [problem("data.key_file", found, todo or "make one with `medpsp key new FILE`")]
    return [ok("data.key_file", f"{path or KEY_VARIABLE}: fingerprint {fingerprint(key)}")]


def read_row(path: str) -> list[Row]:
    """No row for a file that answers, readable or not."""
    with suppress(OSError):
        if Path(path).is_file():
            Path(path).read_bytes()
    return []


def source_row(name: str, path: str) -> list[Row]:
    """A folder that is read.

    Args:
        name: Of ``data``.
        path: Of the folder.
    """
    what, todo = f"data.{name}", f"set data.{name} to where it lies, or mount it"
    place = Path(path)
    try:
        if not place.is_dir():
            kind = "a file, expected a folder" if place.exists() else "no such folder"
            return [problem(what, f"{path}: {kind}", todo)]
        with os.scandir(place):
            pass
    except OSError as error:
        return [problem(what, f"{path}: cannot be read ({error.strerror})", MAY_READ)]
    try:
        if not _reads_a_file(place):
            return [problem(what, f"{path}: holds no file; is it mounted?", todo)]
    except OSError as error:
        found = f"{path}: its first file cannot be read ({error.strerror})"
        return [problem(what, found, MAY_READ)]
    return [ok(what, path)]


def _reads_a_file(folder: Path) -> bool:
    """Whether there is a regular file; a byte of the first one is read."""
    for above, _, names in os.walk(folder):
        for name in names:
            path = Path(above, name)
            if path.is_file():  # a FIFO would wait for ever
                with path.open("rb") as file:
                    file.read(1)
                return True
    return False
