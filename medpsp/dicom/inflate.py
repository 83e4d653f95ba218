"""Inflate gzip, bzip2, xz and the deflate of zip piece by piece, under limits no header can move."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from medpsp.errors import DicomError

Packing = Literal["gzip", "bzip2", "xz", "deflate"]
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
"""Bytes that are handled at a time; a piece of 256 KiB stays in the cache of a core."""
MAX_PADDING = 2**24
"""Zero bytes after the end of a stream or a tape that are looked through for more."""

_XZ_MEMORY = 2**28  # xz -9 needs 65 MiB; a header may ask for 4 GiB
_MARKS = 256
_ENGINES: dict[Packing, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "deflate": lambda: zlib.decompressobj(-15),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


def object_limit(packed: int) -> int:
    """Bytes that an object of ``packed`` bytes may inflate to."""
    return min(MAX_OBJECT, max(RATIO * packed, FREE_OBJECT))


def archive_limit(packed: int) -> int:
    """Bytes that all members of an archive of ``packed`` bytes may inflate to."""
    return max(RATIO * packed, FREE_ARCHIVE)


class Unpacked:
    """The inflated bytes of a stream, by position.

    Going forward inflates once. Going back starts at the last mark: zlib can copy its state
    (4 us, 40 kB), so gzip has up to 256 marks, at first 4 MiB apart; bzip2 and xz start anew.
    Several streams one after another (pigz, bgzip, cat) count as one, as for gzip itself.

    Args:
        read: The packed bytes by position.
        packing: What packed them.
        limit: Inflated bytes at which to stop.
        code: Reason code for bytes that do not inflate or fail their checksum.
    """

    def __init__(self, read: ReadAt, packing: Packing, limit: int, code: str) -> None:
        self._read, self._packing, self._limit, self._code = read, packing, limit, code
        self._spacing = 2**22
        self._marks: list[tuple[int, int, bytes, Any]] = [(0, 0, b"", None)]
        self._restore(0)

    def _restore(self, position: int) -> None:
        mark = next(mark for mark in reversed(self._marks) if mark[0] <= position)
        self._end, self._taken, self._rest, engine = mark
        self._engine = engine.copy() if engine else _ENGINES[self._packing]()
        self._piece = b""

    def next_piece(self) -> bytes:
        """The bytes that follow, at most 256 KiB; none at the end.

        Raises:
            DicomError: INFLATE_LIMIT, or the code given for damaged bytes.
            EOFError: The packed bytes end too early.
        """
        while True:
            if self._engine.eof and not self._next_stream():
                return b""
            hungry = getattr(self._engine, "needs_input", not self._rest)
            packed = self._rest or (self._take() if hungry else b"")
            try:
                piece: bytes = self._engine.decompress(packed, PIECE)
            except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise DicomError(
                    self._code, f"damaged after {self._end} bytes ({type(error).__name__})"
                ) from None
            self._rest = getattr(self._engine, "unconsumed_tail", b"")
            if piece:
                return self._keep(piece)
            if hungry and not packed:
                raise EOFError

    def _take(self) -> bytes:
        packed = self._read(self._taken, PIECE // 4)
        self._taken += len(packed)
        return packed

    def _next_stream(self) -> bool:
        rest: bytes = self._engine.unused_data.lstrip(b"\0")
        stop = self._taken + MAX_PADDING
        while not rest and self._packing != "deflate" and self._taken < stop:
            packed = self._take()
            if not packed:
                break
            rest = packed.lstrip(b"\0")
        if not rest or self._packing == "deflate":
            return False
        self._engine, self._rest = _ENGINES[self._packing](), rest
        return True

    def _keep(self, piece: bytes) -> bytes:
        self._piece, self._end = piece, self._end + len(piece)
        if self._end > self._limit:
            raise DicomError("INFLATE_LIMIT", f"inflates to more than {self._limit} bytes")
        if self._end >= self._marks[-1][0] + self._spacing and hasattr(self._engine, "copy"):
            self._marks.append((self._end, self._taken, self._rest, self._engine.copy()))
            if len(self._marks) > _MARKS:
                self._marks, self._spacing = self._marks[::2], self._spacing * 2
        return piece

    def read_at(self, position: int, size: int) -> bytes:
        """Inflated bytes ``position`` to ``position + size``, fewer at the end.

        Raises:
            DicomError: As `next_piece`.
            EOFError: As `next_piece`.
        """
        if position < self._end - len(self._piece):
            self._restore(position)
        got = bytearray()
        while len(got) < size:
            if position < self._end:
                start = position - self._end + len(self._piece)
                part = self._piece[start : start + size - len(got)]
                got += part
                position += len(part)
            elif not self.next_piece():
                break
        return bytes(got)

    def measure(self) -> int:
        """Length in bytes; inflates to the end, so the checksums are verified too.

        Raises:
            DicomError: As `next_piece`.
            EOFError: As `next_piece`.
        """
        while self.next_piece():
            pass
        return self._end


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


def inflate_object(read: ReadAt, packed: int) -> io.BytesIO:
    """All bytes of a gzip'd object of ``packed`` bytes.

    Raises:
        DicomError: GZIP_DAMAGED, INFLATE_LIMIT.
    """
    stream, out = Unpacked(read, "gzip", object_limit(packed), "GZIP_DAMAGED"), io.BytesIO()
    try:
        while piece := stream.next_piece():
            out.write(piece)
    except EOFError:
        raise DicomError("GZIP_DAMAGED", f"cut short after {out.tell()} bytes") from None
    out.seek(0)
    return out
