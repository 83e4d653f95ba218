"""Every file of an archive exactly once, in order of name. Nothing is opened here."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from medpsp.errors import ArchiveError, DicomError, NoArchive

_AGAIN = (errno.EIO, errno.ESTALE)  # network file systems: often the second try succeeds
_NOWHERE = (errno.ENOENT, errno.ENOTDIR)
NOWHERE = "a link to nowhere"
"""Detail of what may be a link to a disk that is not mounted."""
Out = TypeVar("Out")
Seen = set[tuple[int, int, int, int]]


class Stamp(NamedTuple):
    """What changes when the bytes of a file do; no time of a file is negative in `NO_STAMP`."""

    size: int
    mtime_ns: int
    ctime_ns: int


NO_STAMP = Stamp(-1, -1, -1)


def file_stamp(path: str) -> Stamp | None:
    """Of a file, links followed; None for one that cannot be looked at: who reads it says why."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def leads_nowhere(path: Path, root: Path) -> bool:
    """Whether a path that is not there, or a folder of it below ``root``, is a link to nowhere.

    What lies behind may be there another time: its disk is not mounted, say.
    """
    way = [path, *(p for p in path.parents if p != root and p.is_relative_to(root))]
    return any(place.is_symlink() and not os.path.exists(place) for place in way)


class Entry(NamedTuple):
    """One name that the walk met.

    Attributes:
        name: Relative to the root, unique; it may hold surrogates, where it is not UTF-8.
        path: To open it.
        stamp: `NO_STAMP` for what is no file to open.
        code: Why it is listed but not to be opened; empty for a file.
        detail: Numbers about that.
    """

    name: str
    path: str
    stamp: Stamp = NO_STAMP
    code: str = ""
    detail: str = ""


def walk_files(root: Path) -> Iterator[Entry]:
    """Every name below ``root`` that is no folder, and folders that cannot be listed.

    Names come in the order of `order_key`. A link to a folder is listed, not followed
    (SYMLINK_LOOP, SYMLINK_OUTSIDE, SYMLINK_FOLDER). A link to a file is SYMLINK_DUPLICATE where the
    walk meets the file itself, and is a file where it leads out of ``root``. A further name of a
    file that was met is SAME_FILE, a folder that cannot be listed FOLDER_UNREADABLE.

    Raises:
        ArchiveError: The folder does not exist or cannot be listed.
    """
    if not root.is_dir():
        raise NoArchive(f"archive {root}: no such folder; give the root of the DICOM files")
    top = os.path.join(root, "")
    real, seen = os.path.realpath(root), Seen()
    try:
        pending = [iter(_listed(top))]
    except DicomError as error:
        raise ArchiveError(f"archive {root}: cannot be listed ({error.detail})") from None
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            continue
        path = entry.path
        name = path.removeprefix(top)
        try:
            if entry.is_dir(follow_symlinks=False):
                pending.append(iter(_listed(path)))
            else:
                yield Entry(name, path, _stamp(entry, real, seen))
        except DicomError as error:
            yield Entry(name, path, NO_STAMP, error.code, error.detail)


def order_key(name: str) -> str:
    """Sorts names as the walk meets them: no name on disk holds a zero byte."""
    return name.replace("/", "\0")


def patiently(action: Callable[[], Out]) -> Out:
    """What it returns, at the second try if need be.

    Raises:
        DicomError: FILE_UNREADABLE or NOT_REGULAR for its OSError.
    """
    for last in (False, True):
        try:
            return action()
        except OSError as error:
            if last or error.errno not in _AGAIN:
                raise unreadable(error) from None
    raise AssertionError


def unreadable(error: OSError) -> DicomError:
    """The refusal of a file that cannot be read."""
    if error.errno == errno.ENXIO:  # what opening a socket gives
        return DicomError("NOT_REGULAR", "no regular file")
    known = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return DicomError("FILE_UNREADABLE", known)


def system_said(error: Exception) -> str:
    """Why a file could not be read, in the system's words; empty where its content is at fault."""
    known = error.errno if isinstance(error, OSError) else None
    return os.strerror(known) if known and known != errno.EINVAL else ""  # of offsets no file has


def _listed(folder: str) -> list[os.DirEntry[str]]:
    def scan() -> list[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    try:
        return patiently(scan)
    except DicomError as error:
        raise DicomError("FOLDER_UNREADABLE", error.detail) from None


def _stamp(entry: os.DirEntry[str], real: str, seen: Seen) -> Stamp:
    """Of a file to open; a DicomError for anything else."""
    linked = entry.is_symlink()
    if linked:
        _check_link(entry.path, real)
    elif not entry.is_file(follow_symlinks=False):
        raise DicomError("NOT_REGULAR", "no regular file")
    found = patiently(lambda: entry.stat(follow_symlinks=linked))
    # what cannot be opened is that first, under each of its names
    if (linked or found.st_nlink > 1) and os.access(entry.path, os.R_OK, effective_ids=True):
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if key in seen:
            raise DicomError("SAME_FILE", "a further name of a file")
        seen.add(key)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _check_link(path: str, real: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DicomError("SYMLINK_LOOP", "a link to itself") from None
        if error.errno in _NOWHERE:
            raise DicomError("NOT_REGULAR", NOWHERE) from None
        raise unreadable(error) from None
    target = os.path.realpath(path)
    if stat.S_ISDIR(mode):
        if _within(os.path.realpath(os.path.dirname(path)), target):
            raise DicomError("SYMLINK_LOOP", "a link to a folder around it")
        if _within(target, real):
            raise DicomError("SYMLINK_FOLDER", "a link to a folder of the archive")
        raise DicomError("SYMLINK_OUTSIDE", "a link to a folder outside the archive")
    if not stat.S_ISREG(mode):
        raise DicomError("NOT_REGULAR", "a link to no regular file")
    if _within(target, real):
        raise DicomError("SYMLINK_DUPLICATE", "a link to a file of the archive")


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))
