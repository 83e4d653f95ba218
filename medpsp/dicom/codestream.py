"""One codestream to an array: the one decoder of each compressed transfer syntax.

A corrupt image that one codec refuses comes back as a full array from a more forgiving one, so
there is no second try. All go to imagecodecs (libjpeg-turbo, CharLS, OpenJPEG); it is bit-exact on
every lossless file of a decode corpus, and it reads the 12-bit JPEG that others refuse.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import DicomError

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
    def frame_bytes(self) -> int:
        """Bytes of one decoded frame; a 1-bit pixel takes a whole one."""
        return self.rows * self.columns * self.samples * max(1, self.allocated // 8)


def _whole(stream: bytes) -> None:
    """JPEG, JPEG-LS and JPEG 2000 end with FFD9; libjpeg fills what is missing with grey."""
    if b"\xff\xd9" not in stream[-64:]:
        raise DicomError("PIX_TRUNCATED", "the codestream has no end marker")


def _jpeg(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    _whole(stream)
    if layout.samples == 1:
        return imagecodecs.jpeg8_decode(stream), layout.photometric
    # naming one space for both ends keeps the components as they are
    raw = imagecodecs.jpeg8_decode(stream, colorspace="RGB", outcolorspace="RGB")
    return raw, jpeg_space(stream, layout.photometric)


def jpeg_space(stream: bytes, photometric: str) -> str:
    """Colour space of a JPEG: the codestream's word over the tag's (APP14, JFIF, component ids)."""
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        body = stream[at + 4 : at + 2 + length]
        if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            return "YBR_FULL" if body[11] == 1 else "RGB"
        if marker == 0xE0 and body[:4] == b"JFIF":
            return "YBR_FULL"
        if marker in (0xC0, 0xC1, 0xC2, 0xC3) and body[6:15:3] == b"RGB":
            return "RGB"
        if marker == 0xDA:
            break
        at += 2 + length
    return photometric


def _jpegls(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    _whole(stream)
    return imagecodecs.jpegls_decode(stream), layout.photometric


def _jpeg2k(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    _whole(stream)
    size = stream.find(b"\xff\x4f\xff\x51")  # SIZ follows SOC: the size before any memory
    width, height = (int.from_bytes(stream[size + 8 + k : size + 12 + k], "big") for k in (0, 4))
    if size < 0 or width * height > 2 * MAX_FRAME_BYTES:
        raise DicomError("SIZE_LIMIT", f"the codestream says {height} x {width}")
    raw = imagecodecs.jpeg2k_decode(stream, numthreads=1)
    # the codec has undone the component transform, whatever the tag still says
    return raw, "RGB" if layout.photometric in ("YBR_ICT", "YBR_RCT") else layout.photometric


def _rle(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    import imagecodecs

    if layout.allocated < 8:
        raise DicomError("BITS_UNSUPPORTED", "1-bit pixels under RLE")
    dtype = np.dtype(f"<u{layout.allocated // 8}")
    data = imagecodecs.dicomrle_decode(stream, dtype.str)
    if len(data) < layout.frame_bytes:
        raise DicomError("PIX_TRUNCATED", f"{len(data)} bytes, expected {layout.frame_bytes}")
    planes = np.frombuffer(data, dtype, layout.frame_bytes // dtype.itemsize)
    planes = planes.reshape(layout.samples, layout.rows, layout.columns)  # always by plane: G.2
    raw = planes[0] if layout.samples == 1 else np.moveaxis(planes, 0, -1)
    return np.ascontiguousarray(raw), layout.photometric


def _deflated(stream: bytes, layout: Layout) -> tuple[NDArray[Any], str]:
    """Deflated Image Frame Compression (PS3.5 A.4.13): each frame a raw deflate stream."""
    packed_bits = layout.rows * layout.columns * layout.samples * layout.allocated
    need = math.ceil(packed_bits / 8)
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, need + 2)
    if not need <= len(data) <= need + 1:
        raise DicomError("PIX_TRUNCATED", f"{len(data)} bytes inflated, expected {need}")
    if layout.allocated == 1:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return bits[: layout.rows * layout.columns].reshape(layout.rows, layout.columns), (
            layout.photometric
        )
    dtype = np.dtype(f"<u{layout.allocated // 8}")
    raw = np.frombuffer(data, dtype, layout.frame_bytes // dtype.itemsize)
    shape = (layout.rows, layout.columns, layout.samples)[: 2 if layout.samples == 1 else 3]
    return raw.reshape(shape), layout.photometric


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
