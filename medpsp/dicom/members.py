"""What the readers of zip, tar and gzip files share: a member, and limits no header can move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from medpsp.errors import DicomError

ReadAt = Callable[[int, int], bytes]
"""(position, size) to at most that many bytes; fewer only at the end, as `os.pread`."""

RATIO = 64
"""Inflated bytes to one packed byte. CT and MR reach 2 to 10, empty masks 1000."""
FREE_OBJECT = 2**28
"""An object may inflate to 256 MiB whatever its ratio: 1000 frames of 512 x 512 mask."""
FREE_ARCHIVE = 2**30
"""All members of an archive together may inflate to 1 GiB whatever the ratio."""
MAX_OBJECT = 2**30
"""A member or a gzip'd file is read into memory, so 1 GiB at most; a plain file has no limit."""
PIECE = 2**18
"""Bytes that are handled at a time; 256 KiB stay in the cache of a core."""
MAX_PADDING = 2**24
"""Zero bytes after the end of a stream or a tape that are looked through for more."""


class Member(NamedTuple):
    """One member of an archive that is no folder.

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


def object_limit(packed: int) -> int:
    """Bytes that an object of ``packed`` bytes may inflate to."""
    return min(MAX_OBJECT, max(RATIO * packed, FREE_OBJECT))


def archive_limit(packed: int) -> int:
    """Bytes that all members of an archive of ``packed`` bytes may inflate to."""
    return max(RATIO * packed, FREE_ARCHIVE)


def size_refusal(size: int, limit: int) -> tuple[str, str]:
    """Code and detail for a member of ``size`` bytes; empty where it is small enough."""
    if size > MAX_OBJECT:
        return "SIZE_LIMIT", f"{size} bytes, at most {MAX_OBJECT}"
    if size > limit:
        return "INFLATE_LIMIT", f"{size} bytes, at most {limit}"
    return "", ""


def damaged(detail: str) -> DicomError:
    """ARCHIVE_DAMAGED, to be raised."""
    return DicomError("ARCHIVE_DAMAGED", detail)


def pieces_of(read: ReadAt, start: int, size: int) -> Iterator[bytes]:
    """``size`` bytes from ``start`` on, piece by piece.

    Raises:
        EOFError: They end too early.
    """
    for position in range(start, start + size, PIECE):
        wanted = min(PIECE, start + size - position)
        piece = read(position, wanted)
        if len(piece) < wanted:
            raise EOFError
        yield piece
