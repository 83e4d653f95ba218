"""Inflate gzip, bzip2, xz and the deflate of zip, piece by piece and by position."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from medpsp.dicom.members import MAX_PADDING, PIECE, ReadAt, object_limit
from medpsp.errors import DicomError

Packing = Literal["gzip", "bzip2", "xz", "deflate"]

_XZ_MEMORY = 2**28  # xz -9 needs 65 MiB; a header may ask for 4 GiB
_MARKS = 256
_ENGINES: dict[Packing, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "deflate": lambda: zlib.decompressobj(-15),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


class Gunzipped(io.BytesIO):
    """The bytes of an object that lay gzip'd."""

    gzip = True


class _Mark(NamedTuple):
    end: int  # inflated bytes before it
    taken: int  # packed bytes before it
    rest: bytes  # of those, not yet used
    engine: Any


class Unpacked:
    """The inflated bytes of a stream, by position.

    Going forward inflates once. A jump starts at the last mark before its aim: zlib can copy its
    state (4 us, 40 kB), so gzip has up to 256 marks, 4 MiB apart or more; bzip2 and xz go back
    to the start.
    Several streams one after another (pigz, bgzip, cat) count as one, as for gzip itself.

    Args:
        read: The packed bytes by position.
        packing: What packed them.
        limit: Inflated bytes at which to stop.
        code: Reason code for bytes that do not inflate or fail their checksum.
        piece: Bytes to inflate at a time; what lies before damage in one piece is lost.
    """

    def __init__(
        self, read: ReadAt, packing: Packing, limit: int, code: str, piece: int = PIECE
    ) -> None:
        self._read, self._packing, self._limit, self._code = read, packing, limit, code
        self._size, self._spacing = piece, 2**22
        self._marks = [_Mark(0, 0, b"", None)]
        self._restore(self._marks[0])

    def _restore(self, mark: _Mark) -> None:
        self._end, self._taken, self._rest = mark.end, mark.taken, mark.rest
        self._engine = mark.engine.copy() if mark.engine else _ENGINES[self._packing]()
        self._piece = b""

    def next_piece(self) -> bytes:
        """The bytes that follow, at most ``piece``; none at the end.

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
                piece: bytes = self._engine.decompress(packed, self._size)
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
        if self._end >= self._marks[-1].end + self._spacing and hasattr(self._engine, "copy"):
            self._marks.append(_Mark(self._end, self._taken, self._rest, self._engine.copy()))
            if len(self._marks) > _MARKS:
                self._marks, self._spacing = self._marks[::2], self._spacing * 2
        return piece

    def read_at(self, position: int, size: int) -> bytes:
        """Inflated bytes ``position`` to ``position + size``, fewer at the end.

        Raises:
            DicomError: As `next_piece`.
            EOFError: As `next_piece`.
        """
        mark = self._marks[bisect_right(self._marks, position, key=lambda mark: mark.end) - 1]
        if position < self._end - len(self._piece) or mark.end > self._end:
            self._restore(mark)
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

    @property
    def inflated(self) -> int:
        """Bytes from the start to where it stands."""
        return self._end

    def measure(self) -> int:
        """Length in bytes; inflates to the end, so the checksums are verified too.

        Raises:
            DicomError: As `next_piece`.
            EOFError: As `next_piece`.
        """
        while self.next_piece():
            pass
        return self._end


def inflate_object(read: ReadAt, packed: int) -> Gunzipped:
    """All bytes of a gzip'd object of ``packed`` bytes.

    Raises:
        DicomError: GZIP_DAMAGED, INFLATE_LIMIT.
    """
    stream, out = Unpacked(read, "gzip", object_limit(packed), "GZIP_DAMAGED"), Gunzipped()
    try:
        while piece := stream.next_piece():
            out.write(piece)
    except EOFError:
        raise DicomError("GZIP_DAMAGED", f"cut short after {out.tell()} bytes") from None
    out.seek(0)
    return out
