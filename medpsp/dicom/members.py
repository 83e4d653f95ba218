"""Members of zip and tar files by position: listed one at a time, read alone, never extracted.

`zipfile` holds the whole directory in memory (0.5 kB a member) and gives up on all members for
one odd entry; `tarfile` takes a damaged header for the end and parses extended headers in
quadratic time (CVE-2024-6232). Here a member is named by the offset of its entry, which is unique
whatever its name is, and leads to it without reading the others.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from medpsp.dicom.inflate import (
    MAX_OBJECT,
    MAX_PADDING,
    Packing,
    ReadAt,
    Unpacked,
    archive_limit,
    object_limit,
    pieces_of,
)
from medpsp.errors import DicomError

MAX_EXTENDED = 2**20
"""Bytes of one extended header of a tar member; it holds a path of at most 4 KiB."""

_METHODS: dict[int, Packing] = {8: "deflate", 12: "bzip2"}
_NO_DATA = b"123456"  # links, devices, folders, FIFOs: their size field counts nothing


class Member(NamedTuple):
    """One member that is no folder.

    Attributes:
        offset: Of its entry in the directory (zip) or of its header (tar), bytes.
        name: As the archive has it; bytes that are not UTF-8 are surrogates.
        code: Why it cannot be read, or empty.
        detail: Numbers about that.
    """

    offset: int
    name: str
    code: str = ""
    detail: str = ""


class _Directory(NamedTuple):
    start: int
    end: int
    shift: int  # of all offsets, where something was put in front
    count: int


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


class _TarEntry(NamedTuple):
    name: str
    kind: bytes
    data: int
    size: int
    sparse: bool
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
        count, total = count + 1, total + entry.size
        folder = entry.name.endswith("/") or entry.attributes & 0x10
        if entry.size or not folder:
            code, detail = _zip_refusal(entry)
            if not code and total > archive_limit(length):
                code, detail = "INFLATE_LIMIT", f"members up to here inflate to {total} bytes"
            yield Member(position, entry.name, code, detail)
        position = entry.end
    if count & 0xFFFF != directory.count & 0xFFFF:  # zip without zip64 counts modulo 65536
        raise _damaged(f"{count} members, the directory says {directory.count}")


def read_zip_member(read: ReadAt, length: int, member: Member) -> io.BytesIO:
    """All bytes of a member; its CRC-32 is checked.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED, ARCHIVE_UNSUPPORTED, NOT_REGULAR,
            SIZE_LIMIT, INFLATE_LIMIT.
    """
    directory = _directory(read, length)
    if not directory.start <= member.offset < directory.end:
        raise _damaged("the archive changed since it was listed")
    entry = _zip_entry(read, member.offset, directory)
    code, detail = _zip_refusal(entry)
    if code:
        raise DicomError(code, detail)
    header = read(entry.header, 30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise _damaged(f"no member at {entry.header}")
    start = entry.header + 30 + sum(struct.unpack("<2H", header[26:30]))
    out, crc = io.BytesIO(), 0
    for piece in _unzipped(read, start, entry):
        crc = zlib.crc32(piece, crc)
        out.write(piece)
        if out.tell() > entry.size:
            break
    if (out.tell(), crc) != (entry.size, entry.crc) or entry.name != member.name:
        raise _damaged(f"{out.tell()} bytes of {entry.size}, or a wrong checksum")
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
        raise _damaged(f"no directory at the end of {length} bytes; cut short?")
    disk, first_disk, _, count, size, offset = struct.unpack("<4H2I", tail[at + 4 : at + 20])
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\6\7":
        at -= 76
        if tail[at : at + 4] != b"PK\6\6":
            raise _damaged("no zip64 directory record")
        disk, first_disk, _, count, size, offset = struct.unpack("<2I4Q", tail[at + 16 : at + 56])
    if disk or first_disk:
        raise DicomError("ARCHIVE_UNSUPPORTED", "one part of a zip file in several")
    end = tail_at + at
    if offset + size > end:
        raise _damaged(f"a directory of {size} bytes at {offset}, but {end} bytes before its end")
    return _Directory(end - size, end, end - size - offset, count)


def _zip_entry(read: ReadAt, position: int, directory: _Directory) -> _ZipEntry:
    fixed = read(position, 46)
    if len(fixed) < 46 or fixed[:4] != b"PK\1\2":
        raise _damaged(f"no directory entry at {position}")
    made, _, flags, method, _, _, crc, packed, size = struct.unpack("<6H3I", fixed[4:28])
    names, extras, comments, _, _, attributes, header = struct.unpack("<5H2I", fixed[28:])
    rest, end = read(position + 46, names + extras), position + 46 + names + extras + comments
    if end > directory.end or len(rest) < names + extras:
        raise _damaged(f"the directory entry at {position} is cut short")
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
    return _size_refusal(entry.size, object_limit(entry.packed))


def _size_refusal(size: int, limit: int) -> tuple[str, str]:
    if size > MAX_OBJECT:
        return "SIZE_LIMIT", f"{size} bytes, at most {MAX_OBJECT}"
    if size > limit:
        return "INFLATE_LIMIT", f"{size} bytes, at most {limit}"
    return "", ""


def is_tar(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (512 bytes) is a tar file, of any age."""
    try:
        _block(head, 0)
    except DicomError:
        return False
    return True


def tar_members(read: ReadAt, length: int) -> Iterator[Member]:
    """Members of a tar file of ``length`` bytes, inflated, in its order.

    Zero blocks between two tar files that were put together are skipped, as by ``tar -i``.

    Raises:
        DicomError: ARCHIVE_DAMAGED, after the members that were found.
        EOFError: As `Unpacked.read_at`.
    """
    position, blank = 0, 0
    while position < length and blank < MAX_PADDING:
        if read(position, 512).count(0) == 512:
            position, blank = position + 512, blank + 512
            continue
        entry, offset, blank = _tar_entry(read, position), position, 0
        position = entry.end
        code, detail = _tar_refusal(entry)
        if entry.data + entry.size > length:
            code, detail = "ARCHIVE_DAMAGED", f"{entry.size} bytes; the archive is cut short"
        if entry.kind not in b"5DV" or not entry.kind:
            yield Member(offset, entry.name, code, detail)
    if not blank or position > length:
        raise _damaged(f"no end mark after {length} bytes; cut short?")


def read_tar_member(read: ReadAt, length: int, member: Member) -> io.BytesIO:
    """All bytes of a member.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_UNSUPPORTED, NOT_REGULAR, SIZE_LIMIT.
        EOFError: The archive ends within the member.
    """
    entry = _tar_entry(read, member.offset)
    if entry.name != member.name:
        raise _damaged("the archive changed since it was listed")
    code, detail = _tar_refusal(entry)
    if code:
        raise DicomError(code, detail)
    out = io.BytesIO()
    out.writelines(pieces_of(read, entry.data, entry.size))
    out.seek(0)
    return out


def _tar_refusal(entry: _TarEntry) -> tuple[str, str]:
    if entry.kind not in (b"0", b"\0", b"7", b"S"):
        return "NOT_REGULAR", f"a member of type {entry.kind.hex()}"
    if entry.sparse or entry.kind == b"S":
        return "ARCHIVE_UNSUPPORTED", "a sparse member"
    return _size_refusal(entry.size, MAX_OBJECT)


def _block(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        raise _damaged(f"no header at {position}") from None
    if info.size < 0:
        raise _damaged(f"a negative size at {position}")
    return info


def _tar_entry(read: ReadAt, position: int) -> _TarEntry:
    """The member at ``position``: any number of extended headers, then its own (POSIX pax)."""
    records: dict[str, bytes] = {}
    for _ in range(16):
        block = read(position, 512)
        info = _block(block, position)
        position += 512
        if info.type not in (b"x", b"X", b"g", b"L", b"K"):
            break
        if info.size > MAX_EXTENDED:
            raise _damaged(f"an extended header of {info.size} bytes")
        payload = read(position, info.size)
        position += _padded(info.size)
        if info.type == b"L":
            records["path"] = payload.split(b"\0", 1)[0]
        elif info.type in (b"x", b"X"):
            records |= _pax(payload)
    else:
        raise _damaged("more than 16 extended headers")
    more = info.type == b"S" and block[482]
    while more:  # GNU sparse: maps of 512 bytes between header and data
        block = read(position, 512)
        position += 512
        more = len(block) == 512 and block[504]
    path = records.get("path", b"").decode("utf-8", "surrogateescape")
    size = 0 if info.type in _NO_DATA else _number(records.get("size"), info.size)
    sparse = any(key.startswith("GNU.sparse.") for key in records)
    return _TarEntry(path or info.name, info.type, position, size, sparse, position + _padded(size))


def _pax(payload: bytes) -> dict[str, bytes]:
    """Records "length keyword=value\\n", the length in decimal and of the whole record."""
    records, at = {}, 0
    while at < len(payload) and payload[at]:
        space = payload.find(b" ", at, at + 20)
        end = at + _number(payload[at:space] if space > 0 else b"", 0)
        if space < 0 or end <= space + 1 or end > len(payload):
            raise _damaged("a malformed extended header")
        key, _, value = payload[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        at = end
    return records


def _number(text: bytes | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdigit() or len(text) > 20:
        raise _damaged("a length that is no number")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // 512) * 512


def _damaged(detail: str) -> DicomError:
    return DicomError("ARCHIVE_DAMAGED", detail)
