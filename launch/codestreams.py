"""Encoders of one frame for every compressed transfer syntax, and how frames are wrapped.

What they write is for checks and tests: small, and by the standard, not for archives.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID, JPEG2000Lossless

Array = NDArray[Any]
DEFLATED_FRAME = "1.2.840.10008.1.2.8.1"
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def jpeg(values: Array, **how: Any) -> bytes:
    """Colour stays in the components as it is; a negative value becomes its two's complement."""
    values = plain(values)
    spaces = {"colorspace": "RGB", "outcolorspace": "RGB"} if values.ndim == 3 else {}
    return bytes(imagecodecs.jpeg8_encode(values, **{**spaces, **how}))


def jpegls(values: Array, level: int = 0) -> bytes:
    """Off by ``level`` at most."""
    return bytes(imagecodecs.jpegls_encode(plain(values), level=level))


def plain(values: Array) -> Array:
    """The same bits without a sign."""
    return values.view(f"u{values.dtype.itemsize}")


def jpeg2k(values: Array, **how: Any) -> bytes:
    """A bare codestream, as DICOM has it."""
    return bytes(imagecodecs.jpeg2k_encode(values, codecformat="j2k", **how))


def rle(values: Array) -> bytes:
    """PS3.5 G, literal runs only."""
    width = values.dtype.itemsize
    planes = np.moveaxis(np.atleast_3d(values), -1, 0)
    segments = []
    for plane in planes:
        data = plane.astype(f">u{width}").tobytes()
        segments += [data[k::width] for k in range(width)]
    return rle_of([literal(segment) for segment in segments])


def literal(data: bytes) -> bytes:
    """A segment of RLE without a run."""
    parts = [data[k : k + 128] for k in range(0, len(data), 128)]
    packed = b"".join(bytes([len(part) - 1]) + part for part in parts)
    return packed + b"\x80" * (len(packed) % 2)


def rle_of(segments: list[bytes]) -> bytes:
    """The RLE header (PS3.5 G.5) and its segments."""
    starts = 64 + np.cumsum([0, *map(len, segments[:-1])])
    header = [len(segments), *map(int, starts), *[0] * (15 - len(segments))]
    return struct.pack("<16I", *header) + b"".join(segments)


def deflated(values: Array) -> bytes:
    """One frame of PS3.5 A.4.13."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(values.tobytes()) + packer.flush()


ENCODERS: dict[str, Callable[[Array], bytes]] = {
    "1.2.840.10008.1.2.5": rle,
    DEFLATED_FRAME: deflated,
    "1.2.840.10008.1.2.4.50": lambda v: jpeg(v, level=98),
    "1.2.840.10008.1.2.4.51": lambda v: jpeg(v, level=98, bitspersample=12),
    "1.2.840.10008.1.2.4.57": lambda v: jpeg(
        v, lossless=True, predictor=6, bitspersample=8 * v.itemsize
    ),
    "1.2.840.10008.1.2.4.70": lambda v: jpeg(
        v, lossless=True, predictor=1, bitspersample=8 * v.itemsize
    ),
    "1.2.840.10008.1.2.4.80": jpegls,
    "1.2.840.10008.1.2.4.81": lambda v: jpegls(v, 2),
    "1.2.840.10008.1.2.4.90": lambda v: jpeg2k(v, reversible=True),
    "1.2.840.10008.1.2.4.91": lambda v: jpeg2k(v, level=90),
    "1.2.840.10008.1.2.4.201": lambda v: bytes(imagecodecs.htj2k_encode(v, reversible=True)),
    "1.2.840.10008.1.2.4.202": lambda v: bytes(imagecodecs.htj2k_encode(v, reversible=True)),
    "1.2.840.10008.1.2.4.203": lambda v: bytes(imagecodecs.htj2k_encode(v, reversible=False)),
}
"""Compressed transfer syntax to an encoder of one frame."""


def fragmented(
    frames: list[bytes], cuts: int = 1, table: list[int] | None = None, tail: bytes = _END
) -> bytes:
    """Encapsulated frames (PS3.5 A.4), each cut into ``cuts`` fragments.

    Args:
        frames: Codestreams.
        cuts: Fragments of each.
        table: Basic Offset Table; None for an empty one.
        tail: What follows the last fragment.
    """
    out = b""
    for frame in frames:
        step = -(-len(frame) // cuts)
        step += step % 2
        for k in range(0, len(frame), step):
            part = frame[k : k + step]
            part += b"\0" * (len(part) % 2)
            out += _ITEM + struct.pack("<I", len(part)) + part
    offsets = struct.pack(f"<{len(table or [])}I", *(table or []))
    return _ITEM + struct.pack("<I", len(offsets)) + offsets + out + tail


def known_syntax(syntax: str) -> UID:
    """The same, or one of equal length that pydicom, which does not know all, writes for it."""
    return JPEG2000Lossless if syntax == DEFLATED_FRAME else UID(syntax)


def set_syntax(path: Path, syntax: str) -> None:
    """In a file that was written with `known_syntax`, the one that is meant."""
    if (written := known_syntax(syntax)) != syntax:
        path.write_bytes(path.read_bytes().replace(written.encode(), f"{syntax}\0".encode()))
