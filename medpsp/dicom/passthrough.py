"""Codestreams that can be stored as they are: lossless, whole, and without a word of text in them.

A comment of a codestream may name the patient as well as the header may, so only the segments that
decoding needs are kept (JPEG-LS: ITU-T T.87 C; JPEG 2000: ISO 15444-1 A).
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from medpsp.dicom import frames
from medpsp.dicom.codestream import Layout
from medpsp.dicom.decode import layout_of
from medpsp.dicom.fragments import frame_bytes
from medpsp.dicom.opened import opened
from medpsp.types import SliceRef

SYNTAXES = {
    "jpegls": ("1.2.840.10008.1.2.4.80",),
    "htj2k": ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202"),
}
"""Transfer syntaxes that are lossless by their name, for each kind of codestream."""

_JPEGLS_KEPT = {0xF7, 0xF8, 0xDA, 0xDD}  # SOF55, LSE, SOS, DRI
_J2K_COMMENT, _J2K_SOT, _J2K_SOD, _J2K_EOC = 0xFF64, 0xFF90, 0xFF93, 0xFFD9
_SOF = struct.Struct(">BHHB")  # precision, rows, columns, components
_SCAN_ENDS = re.compile(rb"\xff[\x80-\xff]")  # within a scan, a bit is stuffed after FF (T.87 A.1)


class Codestream(NamedTuple):
    """A codestream of 16-bit values; modality value = decoded value + ``offset`` modulo 2^16."""

    data: bytes
    offset: int


def kept_codestream(ref: SliceRef, kind: str) -> Codestream | None:
    """The codestream of a frame if it can be stored as it is, else None.

    The frame must have been decoded without an error; its modality values must be int16.

    Args:
        ref: Of the frame.
        kind: Of `SYNTAXES`.

    Raises:
        DicomError: As `parse` and `layout_of`.
    """
    if ref.dtype != "int16" or ref.region or ref.channels != 1:
        return None
    parsed = opened(ref.place)
    layout = layout_of(parsed)
    slope, intercept, _ = frames.rescaling(parsed.header, ref.frame)
    plain = (
        parsed.syntax in SYNTAXES[kind]
        and (layout.samples, layout.allocated) == (1, 16)
        and layout.high + 1 == layout.stored
        # 16 bits of either sign add up modulo 2**16; fewer would have to be extended
        and not (layout.signed and layout.stored < 16)
        and layout.photometric.startswith("MONOCHROME")
        and slope == 1
        and intercept == int(intercept)
    )
    if not plain:
        return None
    clean = _CLEANED[kind](frame_bytes(parsed, layout.frames, ref.frame), layout)
    return Codestream(clean, int(intercept)) if clean else None


def clean_jpegls(stream: bytes, layout: Layout) -> bytes | None:
    """A JPEG-LS of one scan without comments and application segments; None for another kind."""
    if stream[:2] != b"\xff\xd8":
        return None
    kept, at = [stream[:2]], 2
    while stream[at : at + 1] == b"\xff" and len(stream) >= at + 4:
        marker, end = stream[at + 1], at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xF7:
            precision, rows, columns, components = _SOF.unpack(
                stream[at + 4 : at + 10].ljust(_SOF.size, b"\0")
            )
            if not _as_told((precision, rows, columns, components), layout):
                return None
        if marker in _JPEGLS_KEPT:
            kept.append(stream[at:end])
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            return None
        at = end
        if marker == 0xDA:
            break
    scan_end = _SCAN_ENDS.search(stream, at)
    if scan_end is None or scan_end.group() != b"\xff\xd9":
        return None
    return b"".join([*kept, stream[at : scan_end.end()]])


def clean_j2k(stream: bytes, layout: Layout) -> bytes | None:
    """A JPEG 2000 codestream without comments; None if a tile has one, or for another kind."""
    if stream[:4] != b"\xff\x4f\xff\x51" or len(stream) < 47:
        return None
    width, height, left, top = struct.unpack_from(">4I", stream, 8)
    components, depth = struct.unpack_from(">HB", stream, 40)
    signed, bits = depth >> 7 == 1, (depth & 0x7F) + 1
    told = _as_told((bits, height - top, width - left, components), layout)
    if not told or signed != layout.signed:
        return None
    kept, at = [stream[:2]], 2
    while (marker := int.from_bytes(stream[at : at + 2], "big")) != _J2K_SOT:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker >> 8 != 0xFF or end >= len(stream) or end < at + 4:
            return None
        if marker != _J2K_COMMENT:
            kept.append(stream[at:end])
        at = end
    tiles = at
    while int.from_bytes(stream[at : at + 2], "big") == _J2K_SOT:
        length = int.from_bytes(stream[at + 6 : at + 10], "big")
        if int.from_bytes(stream[at + 12 : at + 14], "big") != _J2K_SOD or length < 14:
            return None
        at += length
    if stream[at : at + 2] != _J2K_EOC.to_bytes(2, "big"):
        return None
    return b"".join([*kept, stream[tiles : at + 2]])


def _as_told(found: tuple[int, int, int, int], layout: Layout) -> bool:
    precision, *shape = found
    fits = precision == layout.stored if layout.signed else precision <= layout.stored
    return fits and shape == [layout.rows, layout.columns, 1]


_CLEANED = {"jpegls": clean_jpegls, "htj2k": clean_j2k}
