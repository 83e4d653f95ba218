"""Every object of an archive exactly once, and its bytes: files, members of zip and tar, gzip.

Nothing is extracted and nothing is opened that is no regular file, so a FIFO cannot hold the run.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from medpsp.dicom.archives import Archive, archive_in, archive_members, packing_of, read_member
from medpsp.dicom.inflate import inflate_object
from medpsp.dicom.members import Member, ReadAt, damaged
from medpsp.dicom.walk import patiently, unreadable, walk_files
from medpsp.errors import DicomError
from medpsp.types import Place

MEMBER_MARK = "!//"
"""Between archive and member in `Found.name`; a path on disk never holds two slashes in a row."""

READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""To open what may be a FIFO or a terminal: neither may hold the run."""


class Found(NamedTuple):
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
    return patiently(lambda: _member(place) if place.member else _file(place.path))


def _regular(path: str) -> tuple[io.FileIO, os.stat_result]:
    handle = os.open(path, READ_FLAGS)
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
    """Every object below ``root`` once: `walk_files`, and each file as `objects_of` has it.

    Raises:
        ArchiveError: The folder does not exist or cannot be listed.
    """
    for entry in walk_files(root):
        if entry.code:
            yield Found(entry.name, Place(entry.path), entry.code, entry.detail)
        else:
            yield from objects_of(entry.name, entry.path)


def objects_of(name: str, path: str) -> Iterator[Found]:
    """The object that a file is, or the members of the archive that it is and then the archive.

    Members come in their archive's order; each is one object and the archive one more
    (ARCHIVE_OPENED, or what is wrong with it).

    Args:
        name: Of the file, relative to the root.
        path: To open it.
    """
    try:
        file, found = patiently(lambda: _regular(path))
    except DicomError as error:
        yield _refused(name, path, error)
        return
    with file:
        count = 0
        try:
            archive = archive_in(_bytes_of(file, found.st_size), found.st_size)
            if archive is None:
                yield Found(name, Place(path))
                return
            for member in archive_members(archive):
                text = f"{member.offset}/{member.name}"
                yield Found(
                    name + MEMBER_MARK + text, Place(path, text), member.code, member.detail
                )
                count += 1
            yield _refused(name, path, DicomError("ARCHIVE_OPENED", f"{count} members"))
        except DicomError as error:
            yield _refused(name, path, error)
        except OSError as error:
            yield _refused(name, path, unreadable(error))


def _refused(name: str, path: str, error: DicomError) -> Found:
    return Found(name, Place(path), error.code, error.detail)
