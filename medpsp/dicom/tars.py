"""Members of a tar file by position: listed one at a time, read alone, never extracted.

`tarfile` takes a damaged header for the end of the archive, keeps every member, and parses
extended headers in quadratic time (CVE-2024-6232), so only its parser of one block is used. A
member is named by the offset of its header: unique whatever the archive calls it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from medpsp.dicom.members import (
    MAX_OBJECT,
    MAX_PADDING,
    Member,
    ReadAt,
    damaged,
    pieces_of,
    size_refusal,
)
from medpsp.errors import DicomError

MAX_EXTENDED = 2**20
"""Bytes of one extended header of a member; it holds a path of at most 4 KiB."""

_NO_DATA = b"123456"  # links, devices, folders, FIFOs: their size field counts nothing
_FOLDERS = (b"5", b"D", b"V")  # also the folder lists and volume names of GNU


class _TarEntry(NamedTuple):
    name: str
    kind: bytes
    data: int
    size: int
    sparse: bool
    end: int


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
        if entry.kind not in _FOLDERS:
            yield Member(offset, entry.name, code, detail)
    if not blank or position > length:
        raise damaged(f"no end mark after {length} bytes; cut short?")


def read_tar_member(read: ReadAt, member: Member) -> io.BytesIO:
    """All bytes of a member.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_UNSUPPORTED, NOT_REGULAR, SIZE_LIMIT.
        EOFError: The archive ends within the member.
    """
    entry = _tar_entry(read, member.offset)
    if entry.name != member.name:
        raise damaged("the archive changed since it was listed")
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
    return size_refusal(entry.size, MAX_OBJECT)


def _block(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        raise damaged(f"no header at {position}") from None
    if info.size < 0:
        raise damaged(f"a negative size at {position}")
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
            raise damaged(f"an extended header of {info.size} bytes")
        payload = read(position, info.size)
        position += _padded(info.size)
        if info.type == b"L":
            records["path"] = payload.split(b"\0", 1)[0]
        elif info.type in (b"x", b"X"):
            records |= _pax(payload)
    else:
        raise damaged("more than 16 extended headers")
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
            raise damaged("a malformed extended header")
        key, _, value = payload[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        at = end
    return records


def _number(text: bytes | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdigit() or len(text) > 20:
        raise damaged("a length that is no number")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // 512) * 512
