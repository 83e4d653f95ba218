"""Every object of an archive exactly once, and its bytes: files, members of zip and tar, gzip.

Nothing is extracted and nothing is opened that is no regular file, so a FIFO cannot hold the run.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from medpsp.dicom.archives import Archive, archive_in, archive_members, packing_of, read_member
from medpsp.dicom.inflate import inflate_object
from medpsp.dicom.members import Member, ReadAt, damaged
from medpsp.errors import ArchiveError, DicomError
from medpsp.types import Place

MEMBER_MARK = "!//"
"""Between archive and member in `Found.name`; a path on disk never holds two slashes in a row."""

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_AGAIN = (errno.EIO, errno.ESTALE)  # network file systems: often the second try succeeds
_NOWHERE = (errno.ENOENT, errno.ENOTDIR)
Out = TypeVar("Out")
Seen = set[tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object that the walk met.

    Attributes:
        name: Relative to the root, unique; of a member: archive, ``!//``, ``place.member``. It
            holds file names, so only its pseudonym may be shown.
        place: For `open_place`. A member is "offset/name" with the offset of its entry, since an
            archive may hold one name twice; names that are not UTF-8 hold surrogates.
        code: Why it is listed but not to be opened; empty for an object to read.
        detail: Numbers about that.
    """

    name: str
    place: Place
    code: str = ""
    detail: str = ""


class _Kept(threading.local):
    """The archive that this thread read last: of a compressed tar the next member is near."""

    key: tuple[str | int, ...] = ()
    file: io.FileIO | None = None
    archive: Archive | None = None


_kept = _Kept()


def open_place(place: Place) -> BinaryIO:
    """The bytes of an object, seekable.

    A plain file is opened, not read. A member, or an object that lies gzip'd, is inflated into
    memory under the limits of `members`: 1 GiB, and 256 MiB where it inflates more than 64 times.
    The attribute ``gzip`` is True on the stream of a gzip'd object.

    Raises:
        DicomError: FILE_EMPTY, FILE_UNREADABLE, NOT_REGULAR, SIZE_LIMIT, INFLATE_LIMIT,
            GZIP_DAMAGED, ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED, ARCHIVE_UNSUPPORTED, and
            ARCHIVE_NESTED for an archive within an archive.
    """
    return _patient(lambda: _member(place) if place.member else _file(place.path))


def _patient(action: Callable[[], Out]) -> Out:
    for last in (False, True):
        try:
            return action()
        except OSError as error:
            if last or error.errno not in _AGAIN:
                raise _unreadable(error) from None
    raise AssertionError


def _unreadable(error: OSError) -> DicomError:
    if error.errno == errno.ENXIO:  # what opening a socket gives
        return DicomError("NOT_REGULAR", "no regular file")
    known = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return DicomError("FILE_UNREADABLE", known)


def _regular(path: str) -> tuple[io.FileIO, os.stat_result]:
    handle = os.open(path, _FLAGS)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise DicomError("NOT_REGULAR", "no regular file")
    return io.FileIO(handle), found


def _bytes_of(file: io.FileIO, length: int) -> ReadAt:
    def read(position: int, size: int) -> bytes:
        if position >= length:  # also offsets that no file can have
            return b""
        return os.pread(file.fileno(), min(size, length - position), position)

    return read


def _file(path: str) -> BinaryIO:
    file, found = _regular(path)
    try:
        if found.st_size == 0:
            raise DicomError("FILE_EMPTY", "0 bytes")
        read = _bytes_of(file, found.st_size)
        if packing_of(read(0, 132)) != "gzip":
            return io.BufferedReader(file)
        with file:
            return _filled(inflate_object(read, found.st_size))
    except BaseException:
        file.close()
        raise


def _filled(stream: io.BytesIO) -> io.BytesIO:
    if not stream.getbuffer().nbytes:
        raise DicomError("FILE_EMPTY", "0 bytes")
    return stream


def _member(place: Place) -> BinaryIO:
    offset, _, name = place.member.partition("/")
    stream = _filled(read_member(_archive_at(place.path), Member(int(offset), name)))
    length = stream.getbuffer().nbytes

    def read(position: int, size: int) -> bytes:
        return bytes(stream.getbuffer()[position : position + size])

    if archive_in(read, length):
        raise DicomError("ARCHIVE_NESTED", "an archive within an archive; unpack the outer one")
    if packing_of(read(0, 132)) == "gzip":
        return _filled(inflate_object(read, length))
    return stream


def _archive_at(path: str) -> Archive:
    file, found = _regular(path)
    key = (path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if _kept.archive and key == _kept.key:
        file.close()
        return _kept.archive
    if _kept.file:
        _kept.file.close()
    _kept.key, _kept.file, _kept.archive = key, file, None
    _kept.archive = archive_in(_bytes_of(file, found.st_size), found.st_size)
    if _kept.archive is None:
        raise damaged("no archive any more")
    return _kept.archive


def walk_objects(root: Path) -> Iterator[Found]:
    """Every object below ``root`` once, folders in order of name, members in their archive's.

    An archive is one object (ARCHIVE_OPENED, or what is wrong with it, after its members) and
    each of its members one more. A link to a folder is listed, not followed (SYMLINK_LOOP,
    SYMLINK_OUTSIDE, SYMLINK_FOLDER). A link to a file is SYMLINK_DUPLICATE where the walk meets
    the file itself, and is read where it leads out of ``root``. A further name of a file that was
    met is SAME_FILE, a folder that cannot be listed FOLDER_UNREADABLE.

    Raises:
        ArchiveError: The folder does not exist or cannot be listed.
    """
    if not root.is_dir():
        raise ArchiveError(f"archive {root}: no such folder; give the root of the DICOM files")
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
        name = entry.path.removeprefix(top)
        try:
            if entry.is_dir(follow_symlinks=False):
                pending.append(iter(_listed(entry.path)))
                continue
            linked = _linked(entry, real)
        except DicomError as error:
            yield _refused(name, entry.path, error)
        except OSError as error:
            yield _refused(name, entry.path, _unreadable(error))
        else:
            yield from _objects_of(name, entry.path, linked, seen)


def _refused(name: str, path: str, error: DicomError) -> Found:
    return Found(name=name, place=Place(path), code=error.code, detail=error.detail)


def _listed(folder: str) -> list[os.DirEntry[str]]:
    def scan() -> list[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    try:
        return _patient(scan)
    except DicomError as error:
        raise DicomError("FOLDER_UNREADABLE", error.detail) from None


def _linked(entry: os.DirEntry[str], real: str) -> bool:
    """Whether it is a link to a file outside; a DicomError for what is not to be opened."""
    if entry.is_symlink():
        _check_link(entry.path, real)
        return True
    if entry.is_file(follow_symlinks=False):
        return False
    raise DicomError("NOT_REGULAR", "no regular file")


def _check_link(path: str, real: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DicomError("SYMLINK_LOOP", "a link to itself") from None
        if error.errno in _NOWHERE:
            raise DicomError("NOT_REGULAR", "a link to nowhere") from None
        raise _unreadable(error) from None
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


def _objects_of(name: str, path: str, linked: bool, seen: Seen) -> Iterator[Found]:
    """The object that a file is, or the members of the archive that it is and then the archive."""
    try:
        file, found = _patient(lambda: _regular(path))
    except DicomError as error:
        yield _refused(name, path, error)
        return
    with file:
        if linked or found.st_nlink > 1:
            key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if key in seen:
                yield _refused(name, path, DicomError("SAME_FILE", "a further name of a file"))
                return
            seen.add(key)
        count = 0
        try:
            archive = archive_in(_bytes_of(file, found.st_size), found.st_size)
            if archive is None:
                yield Found(name=name, place=Place(path))
                return
            for member in archive_members(archive):
                text = f"{member.offset}/{member.name}"
                yield Found(
                    name=name + MEMBER_MARK + text,
                    place=Place(path, text),
                    code=member.code,
                    detail=member.detail,
                )
                count += 1
            yield _refused(name, path, DicomError("ARCHIVE_OPENED", f"{count} members"))
        except DicomError as error:
            yield _refused(name, path, error)
        except OSError as error:
            yield _refused(name, path, _unreadable(error))
