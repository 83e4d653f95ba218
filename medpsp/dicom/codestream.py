"""One codestream to an array: the one decoder of each compressed transfer syntax.

A corrupt image that one codec refuses comes back as a full array from a more forgiving one, so
there is no second try. All go to imagecodecs (libjpeg-turbo, CharLS, OpenJPEG); it is bit-exact on
every lossless file of a decode corpus, and it reads the 12-bit JPEG that others refuse.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import DicomError

_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})  # SOFn, SOF55
FREE_INFLATED = 1 << 26
"""Deflated data may grow to 64 MiB whatever their size: an empty mask packs to a thousandth."""
MAX_FRAME_BYTES = 1 << 29
"""512 MiB: a mammogram of 4096 x 5625 has 46 MB, a slide tile of 1024 x 1024 3 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the pixels of an object are stored; PS3.3 C.7.6.3.

    ``signed`` and the bit fields are 0 for float pixels (``floating``).
    """

    rows: int
    columns: int
    samples: int
    frames: int
    allocated: int
    stored: int
    high: int
    signed: bool
    floating: bool
    photometric: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W), or (H, W, 3)."""
        return (self.rows, self.columns) if self.samples == 1 else (self.rows, self.columns, 3)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame; a 1-bit pixel takes a whole one."""
        return self.rows * self.columns * self.samples * max(1, self.allocated // 8)


def _whole(stream: bytes) -> None:
    """JPEG, JPEG-LS and JPEG 2000 end with FFD9; libjpeg fills what is missing with grey."""
    end = stream[-256:].rstrip(b"\0")  # writers pad
    if b"\xff\xd9" not in end[-64:]:
        raise DicomError("PIX_TRUNCATED", "the codestream has no end marker")


def _same_size(rows: int, columns: int, samples: int, layout: Layout) -> None:
    """A codestream may claim any size: it is compared before a codec takes memory for it."""
    expected = (layout.rows, layout.columns, layout.samples)
    if (rows, columns, samples) != expected:
        raise DicomError(
            "DEC_ERROR", f"a codestream of {(rows, columns, samples)}, header says {expected}"
        )


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, body) of the segments of a JPEG or JPEG-LS, up to its first scan."""
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill
            at += 1
            continue
        yield marker, stream[at + 4 : at + 2 + length]
        if marker == 0xDA:
            return
        at += 2 + length


def _jpeg_checked(stream: bytes, layout: Layout) -> None:
    _whole(stream)
    for marker, body in _segments(stream):
        if marker in _FRAME_HEADERS and len(body) >= 6:
            rows, columns = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            return _same_size(rows, columns, body[5], layout)
    raise DicomError("DEC_ERROR", "a JPEG without a frame header")


def _jpeg(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    _jpeg_checked(stream, layout)
    if layout.samples == 1:
        return imagecodecs.jpeg8_decode(stream), layout.photometric
    # naming one space for both ends keeps the components as they are
    raw = imagecodecs.jpeg8_decode(stream, colorspace="RGB", outcolorspace="RGB")
    return raw, jpeg_space(stream, layout.photometric)


def jpeg_space(stream: bytes, photometric: str) -> str:
    """Colour space of a JPEG: the codestream's word over the tag's (APP14, JFIF, component ids).

    Components of unlike sampling are no RGB, whatever the tag says.
    """
    for marker, body in _segments(stream):
        if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            return "YBR_FULL" if body[11] == 1 else "RGB"
        if marker == 0xE0 and body[:4] == b"JFIF":
            return "YBR_FULL"
        if marker in _FRAME_HEADERS and body[6:15:3] == b"RGB":
            return "RGB"
        if marker in _FRAME_HEADERS and len(set(body[7:16:3])) > 1:
            return "YBR_FULL"
    return photometric


def _jpegls(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    _jpeg_checked(stream, layout)
    return imagecodecs.jpegls_decode(stream), layout.photometric


def _jpeg2k(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    _whole(stream)
    size = stream.find(b"\xff\x4f\xff\x51")  # SOC, then SIZ (ISO 15444-1 A.5.1)
    if size < 0 or len(stream) < size + 42:
        raise DicomError("DEC_ERROR", "a JPEG 2000 without its size")
    width, height, left, top = struct.unpack_from(">4I", stream, size + 8)
    (samples,) = struct.unpack_from(">H", stream, size + 40)
    _same_size(height - top, width - left, samples, layout)
    raw = imagecodecs.jpeg2k_decode(stream, numthreads=1)
    # the codec has undone the component transform, whatever the tag still says
    undone = layout.photometric in ("YBR_ICT", "YBR_RCT") or _is_transformed(stream, size)
    return raw, "RGB" if undone and layout.samples == 3 else layout.photometric


def _is_transformed(stream: bytes, at: int) -> bool:
    """Whether COD of the main header says that a component transform was used (A.6.1)."""
    at += 2
    while stream[at : at + 1] == b"\xff" and stream[at + 1 : at + 2] not in (b"\x90", b"\xd9"):
        if stream[at + 1] == 0x52:  # then length, style, progression, layers, transform
            return stream[at + 8 : at + 9] == b"\1"
        at += 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
    return False


def _rle(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    """PS3.5 G: a segment for each byte of each sample; 1-bit pixels are packed before."""
    import imagecodecs

    width = max(1, layout.allocated // 8)
    segments = int.from_bytes(stream[:4], "little")
    if segments != width * layout.samples:
        raise DicomError("DEC_ERROR", f"{segments} segments, expected {width * layout.samples}")
    need = _packed_bytes(layout)
    if need > 64 * len(stream):  # two bytes stand for 128 at most
        raise DicomError("PIX_TRUNCATED", f"{len(stream)} bytes of RLE for {need}")
    data = imagecodecs.dicomrle_decode(stream, f"<u{width}", out=bytearray(need))
    if len(data) < need:
        raise DicomError("PIX_TRUNCATED", f"{len(data)} bytes, expected {need}")
    if layout.allocated == 1:
        return _unpacked(data, layout), layout.photometric
    planes = np.frombuffer(data, f"<u{width}")
    planes = planes.reshape(layout.samples, layout.rows, layout.columns)  # always by plane: G.2
    raw = planes[0] if layout.samples == 1 else np.moveaxis(planes, 0, -1)
    return np.ascontiguousarray(raw), layout.photometric


def _deflated(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    """Deflated Image Frame Compression (PS3.5 A.4.13): each frame a raw deflate stream."""
    need = _packed_bytes(layout)
    if need > max(64 * len(stream), FREE_INFLATED):
        raise DicomError("INFLATE_LIMIT", f"{len(stream)} bytes for {need}")
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, need + 2)
    if not need <= len(data) <= need + 1:
        raise DicomError("PIX_TRUNCATED", f"{len(data)} bytes inflated, expected {need}")
    if layout.allocated == 1:
        return _unpacked(data, layout), layout.photometric
    raw = np.frombuffer(data[:need], f"<u{layout.allocated // 8}")
    return raw.reshape(layout.shape), layout.photometric


def _packed_bytes(layout: Layout) -> int:
    return math.ceil(layout.rows * layout.columns * layout.samples * layout.allocated / 8)


def _unpacked(data: bytes | bytearray, layout: Layout) -> NDArray[np.uint8]:
    """1-bit pixels, the first in the lowest bit (PS3.5 8.1.1)."""
    pixels = layout.rows * layout.columns * layout.samples
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=pixels, bitorder="little")
    return bits.reshape(layout.shape)


CODECS: dict[str, Callable[[bytes, Layout], tuple[NDArray[Any], str]]] = {
    "1.2.840.10008.1.2.5": _rle,  # RLE Lossless
    "1.2.840.10008.1.2.8.1": _deflated,  # Deflated Image Frame Compression
    "1.2.840.10008.1.2.4.50": _jpeg,  # JPEG Baseline (Process 1)
    "1.2.840.10008.1.2.4.51": _jpeg,  # JPEG Extended (Process 2 and 4)
    "1.2.840.10008.1.2.4.57": _jpeg,  # JPEG Lossless (Process 14)
    "1.2.840.10008.1.2.4.70": _jpeg,  # JPEG Lossless (Process 14, Selection Value 1)
    "1.2.840.10008.1.2.4.80": _jpegls,  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81": _jpegls,  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.90": _jpeg2k,  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91": _jpeg2k,  # JPEG 2000
    "1.2.840.10008.1.2.4.201": _jpeg2k,  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202": _jpeg2k,  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203": _jpeg2k,  # HTJ2K
}
"""Transfer syntax to its one decoder."""

LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 81, 91, 203)}
