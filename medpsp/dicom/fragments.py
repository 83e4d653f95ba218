"""Which fragments of encapsulated pixels make up a frame (PS3.5 A.4).

The fragments themselves are counted: offset tables are absent, empty or wrong in many archives,
and no length of a codestream is trusted that the file does not have.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from medpsp.dicom.header import Header
from medpsp.dicom.parse import Parsed
from medpsp.errors import DicomError

MAX_FRAGMENTS = 1_000_000
_ITEM = 0xE000FFFE
_BEGINS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")  # JPEG(-LS), J2K, JP2


class Fragment(NamedTuple):
    """Where the bytes of a fragment are, and where its item tag is after the offset table."""

    start: int
    length: int
    offset: int


@lru_cache(maxsize=1)
def frames_of(parsed: Parsed[Header], frames: int) -> tuple[tuple[Fragment, ...], ...]:
    """The fragments of each frame.

    As many fragments as frames are one each, which is always so for RLE and under an Extended
    Offset Table. Otherwise a frame starts where a fragment starts like a codestream, and where
    none does, the Basic Offset Table decides. An empty fragment is nobody's.

    Raises:
        DicomError: PIX_TRUNCATED for a fragment that the file does not hold and for fewer
            fragments than frames, DEC_ERROR where frames cannot be told apart, SIZE_LIMIT.
    """
    fragments, table = _fragments(parsed.stream, parsed.value_at, parsed.available)
    if len(fragments) < frames:
        raise DicomError("PIX_TRUNCATED", f"{len(fragments)} fragments for {frames} frames")
    if len(fragments) == frames:
        return tuple((fragment,) for fragment in fragments)
    starts = [n for n, f in enumerate(fragments) if _begins(parsed.stream, f)]
    if not starts:
        places = {fragment.offset: n for n, fragment in enumerate(fragments)}
        starts = [places.get(offset, -1) for offset in table] if frames > 1 else [0]
    if len(starts) != frames or starts[0] != 0 or starts != sorted(set(starts)):
        raise DicomError(
            "DEC_ERROR", f"{len(fragments)} fragments, {len(starts)} codestreams, {frames} frames"
        )
    ends = [*starts[1:], len(fragments)]
    return tuple(tuple(fragments[a:b]) for a, b in zip(starts, ends, strict=True))


def frame_bytes(parsed: Parsed[Header], frames: int, frame: int) -> bytes:
    """The codestream of one frame; raises as `frames_of`."""
    parts = []
    for fragment in frames_of(parsed, frames)[frame]:
        parsed.stream.seek(fragment.start)
        parts.append(parsed.stream.read(fragment.length))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _begins(stream: BinaryIO, fragment: Fragment) -> bool:
    stream.seek(fragment.start)
    return stream.read(min(fragment.length, 8)).startswith(_BEGINS)


def _fragments(stream: BinaryIO, at: int, available: int) -> tuple[list[Fragment], list[int]]:
    """Fragments that are not empty, and the Basic Offset Table."""
    stream.seek(at)
    end, found, table, base = at + available, [], b"", -1
    for _ in range(MAX_FRAGMENTS):
        head = stream.read(8)
        tag, length = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
        if tag != _ITEM:  # the delimiter, or what follows where it is missing
            break
        start = stream.tell()
        if length > end - start:
            raise DicomError("PIX_TRUNCATED", f"{end - start} of {length} bytes of a fragment")
        if base < 0:
            base, table = start + length, stream.read(length)
        elif length:
            found.append(Fragment(start, length, start - 8 - base))
        stream.seek(start + length)
    else:
        raise DicomError("SIZE_LIMIT", f"over {MAX_FRAGMENTS} fragments")
    offsets = struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    return found, list(offsets)
