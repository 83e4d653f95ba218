"""Members of a zip file by position: listed one at a time, read alone, never extracted.

`zipfile` keeps every entry in memory (0.5 kB each) and loses all members to one odd entry. Here a
member is named by the offset of its entry in the directory: unique whatever the archive calls it,
and enough to read it without the others. APPNOTE is the .ZIP File Format Specification 6.3.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from medpsp.dicom.inflate import Packing, Unpacked
from medpsp.dicom.members import (
    Member,
    ReadAt,
    archive_limit,
    damaged,
    object_limit,
    pieces_of,
    size_refusal,
)
from medpsp.errors import DicomError

_METHODS: dict[int, Packing] = {8: "deflate", 12: "bzip2"}


class _Directory(NamedTuple):
    start: int
    end: int
    shift: int  # of all offsets, where something was put in front
    members: int


class _ZipEntry(NamedTuple):
    name: str
    system: int
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    attributes: int
    header: int
    end: int


def zip_members(read: ReadAt, length: int) -> Iterator[Member]:
    """Members of a zip file of ``length`` bytes in the order of its directory.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_UNSUPPORTED for one part of several; after the
            members that were found.
    """
    directory = _directory(read, length)
    position, count, total = directory.start, 0, 0
    while position < directory.end:
        entry = _zip_entry(read, position, directory)
        count += 1
        folder = entry.name.endswith("/") or entry.attributes & 0x10
        if entry.size or not folder:
            code, detail = _zip_refusal(entry)
            total += 0 if code else entry.size
            if not code and total > archive_limit(length):
                code, detail = "INFLATE_LIMIT", f"members up to here inflate to {total} bytes"
            yield Member(position, entry.name, code, detail)
        position = entry.end
    if count & 0xFFFF != directory.members & 0xFFFF:  # zip without zip64 counts modulo 65536
        raise damaged(f"{count} members, the directory says {directory.members}")


def read_zip_member(read: ReadAt, length: int, member: Member) -> io.BytesIO:
    """All bytes of a member; its CRC-32 is checked.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED, ARCHIVE_UNSUPPORTED, NOT_REGULAR,
            SIZE_LIMIT, INFLATE_LIMIT.
    """
    directory = _directory(read, length)
    if not directory.start <= member.offset < directory.end:
        raise damaged("the archive changed since it was listed")
    entry = _zip_entry(read, member.offset, directory)
    code, detail = _zip_refusal(entry)
    if code:
        raise DicomError(code, detail)
    header = read(entry.header, 30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise damaged(f"no member at {entry.header}")
    start = entry.header + 30 + sum(struct.unpack("<2H", header[26:30]))
    out, crc = io.BytesIO(), 0
    for piece in _unzipped(read, start, entry):
        crc = zlib.crc32(piece, crc)
        out.write(piece)
        if out.tell() > entry.size:
            break
    if (out.tell(), crc) != (entry.size, entry.crc) or entry.name != member.name:
        raise damaged(f"{out.tell()} bytes of {entry.size}, or a wrong checksum")
    out.seek(0)
    return out


def _unzipped(read: ReadAt, start: int, entry: _ZipEntry) -> Iterable[bytes]:
    if entry.method == 0:
        return pieces_of(read, start, entry.packed)

    def packed(position: int, size: int) -> bytes:
        return read(start + position, min(size, entry.packed - position))

    stream = Unpacked(packed, _METHODS[entry.method], entry.size, "ARCHIVE_DAMAGED")
    return iter(stream.next_piece, b"")


def _directory(read: ReadAt, length: int) -> _Directory:
    """The central directory (APPNOTE 4.3.16), by the end record or that of zip64 before it."""
    tail_at = max(0, length - 22 - 0xFFFF - 76)
    tail = read(tail_at, length - tail_at)
    at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - 18))
    if at < 0:
        raise damaged(f"no directory at the end of {length} bytes; cut short?")
    disk, first_disk, _, count, size, offset = struct.unpack("<4H2I", tail[at + 4 : at + 20])
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\6\7":
        at -= 76
        if tail[at : at + 4] != b"PK\6\6":
            raise damaged("no zip64 directory record")
        disk, first_disk, _, count, size, offset = struct.unpack("<2I4Q", tail[at + 16 : at + 56])
    if disk or first_disk:
        raise DicomError("ARCHIVE_UNSUPPORTED", "one part of a zip file in several")
    end = tail_at + at
    if offset + size > end:
        raise damaged(f"a directory of {size} bytes at {offset}, but {end} bytes before its end")
    return _Directory(end - size, end, end - size - offset, count)


def _zip_entry(read: ReadAt, position: int, directory: _Directory) -> _ZipEntry:
    fixed = read(position, 46)
    if len(fixed) < 46 or fixed[:4] != b"PK\1\2":
        raise damaged(f"no directory entry at {position}")
    made, _, flags, method, _, _, crc, packed, size = struct.unpack("<6H3I", fixed[4:28])
    names, extras, comments, _, _, attributes, header = struct.unpack("<5H2I", fixed[28:])
    rest, end = read(position + 46, names + extras), position + 46 + names + extras + comments
    if end > directory.end or len(rest) < names + extras:
        raise damaged(f"the directory entry at {position} is cut short")
    wide = _zip64(rest[names:])
    size, packed, header = (
        next(wide, value) if value == 0xFFFFFFFF else value for value in (size, packed, header)
    )
    return _ZipEntry(
        name=rest[:names].decode("utf-8", "surrogateescape"),
        system=made >> 8,
        flags=flags,
        method=method,
        crc=crc,
        packed=packed,
        size=size,
        attributes=attributes,
        header=header + directory.shift,
        end=end,
    )


def _zip64(extra: bytes) -> Iterator[int]:
    """The 64-bit numbers of the extra field 1: size, packed size, offset, as far as needed."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = extra[at + 4 : at + 4 + size]
            yield from struct.unpack_from(f"<{len(values) // 8}Q", values)
        at += 4 + size


def _zip_refusal(entry: _ZipEntry) -> tuple[str, str]:
    mode = stat.S_IFMT(entry.attributes >> 16) if entry.system == 3 else 0  # 3: made on Unix
    if mode not in (0, stat.S_IFREG):
        return "NOT_REGULAR", f"a member of file type {mode >> 12}"
    if entry.flags & 1:
        return "ARCHIVE_ENCRYPTED", f"method {entry.method}"
    if entry.method and entry.method not in _METHODS:
        return "ARCHIVE_UNSUPPORTED", f"compression method {entry.method}"
    return size_refusal(entry.size, object_limit(entry.packed))
