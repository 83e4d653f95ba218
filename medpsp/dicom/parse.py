"""Bytes to a pydicom header, and where the pixels start. Nothing is decoded here.

pydicom's `dcmread` returns an empty data set for many damaged files, inflates without a limit and
allocates what a length field asks for. The steps are the same here, each with its check.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, Generic, TypeVar

from pydicom import config as pydicom_config
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag

from medpsp.dicom.codestream import FREE_INFLATED
from medpsp.dicom.container import open_place
from medpsp.dicom.header import Header
from medpsp.errors import DicomError, SourceError
from medpsp.types import Place

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote element values
pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE

IMPLICIT, EXPLICIT, DEFLATED, BIG = (
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
)
PIXEL_TAGS = {
    0x7FE00010: "PixelData",
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
}
MAX_INFLATED = 1 << 30
"""Bytes that a deflated data set may grow to, and 64 times its size where that is less."""

_LONG_VR = (b"OB", b"OW", b"OF", b"OD", b"UN")


Header_co = TypeVar("Header_co", bound=Header, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parsed(Generic[Header_co]):
    """The header of one object.

    Attributes:
        header: All elements before the pixels; ``file_meta`` is set.
        stream: Positioned anywhere.
        syntax: Transfer syntax that the bytes follow.
        pixel_keyword: PixelData, FloatPixelData, DoubleFloatPixelData, or empty without pixels.
        pixel_vr: Of that element.
        value_at: Where the pixel value starts in the stream.
        length: Of the pixel value as declared, -1 where undefined (encapsulated).
        available: Bytes from ``value_at`` to the end.
        flags: NO_PREAMBLE, NO_META, TS_MISSING, TS_INVALID, GUESSED_TS, GZIP.
    """

    header: Header_co
    stream: BinaryIO
    syntax: str
    pixel_keyword: str
    pixel_vr: str
    value_at: int
    length: int
    available: int
    flags: tuple[str, ...]


@contextmanager
def refusing(code: str, what: str) -> Iterator[None]:
    """Whatever a parser or a codec raises on bad bytes becomes a DicomError that quotes nothing.

    pydicom puts element values into its warnings and messages, so both stop here. Some codecs
    panic with an exception that is no `Exception`.

    Raises:
        DicomError: ``code``; HDR_DEPTH or DEC_OOM where it is known to be that.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (SourceError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except RecursionError:
        raise DicomError("HDR_DEPTH", "sequences nested too deep") from None
    except MemoryError:
        raise DicomError("DEC_OOM", f"{what}: more memory than data.decode_memory_mib") from None
    except BaseException as error:  # noqa: BLE001
        raise DicomError(code, f"{what} ({type(error).__name__})") from None


def parse(place: Place) -> Parsed[Dataset]:
    """Read the header of an object.

    Raises:
        DicomError: FILE_TOO_SHORT, NOT_DICOM, HDR_TRUNCATED, HDR_DEPTH, INFLATE_LIMIT, DEC_OOM, or
            a code of `open_place`.
    """
    stream, flags = _mapped(open_place(place))
    with refusing("HDR_TRUNCATED", "not parsable"):
        size = stream.seek(0, os.SEEK_END) or stream.tell()
        stream.seek(0)
        start = _start(stream, size, flags)
        stream.seek(start)
        meta = read_dataset(stream, False, True, stop_when=_beyond_meta)
        syntax = _syntax(stream, meta, flags)
        if syntax == DEFLATED:
            stream = BytesIO(_inflate(stream))
            size = len(stream.getvalue())
        found: list[int] = []

        def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
            if int(tag) in PIXEL_TAGS or tag > 0x7FE00010:
                found[:] = [int(tag), length]
            return bool(found)

        begin = stream.tell()
        header = read_dataset(stream, syntax == IMPLICIT, syntax != BIG, stop_when=at_pixels)
        if not len(header):
            raise DicomError("HDR_TRUNCATED", f"{size - begin} bytes and no data element")
        if not found:
            _check_end(header, size)
        header.file_meta = meta  # type: ignore[assignment]
        return _with_pixels(header, stream, syntax, found, size, flags)


def _check_end(header: Dataset, size: int) -> None:
    """pydicom takes a last element that is cut short as it is."""
    last: Any = header.get_item(max(header.keys()))
    if isinstance(last, RawDataElement) and last.length != 0xFFFFFFFF:
        end = last.value_tell + last.length
        if end != size:
            raise DicomError("HDR_TRUNCATED", f"the last element ends at {end} of {size} bytes")


def _mapped(stream: BinaryIO) -> tuple[BinaryIO, list[str]]:
    """Map a plain file: a read of a length that the file does not have then allocates nothing."""
    if isinstance(stream, BytesIO):
        return stream, ["GZIP"] if getattr(stream, "gzip", False) else []
    with stream:
        try:
            view: Any = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DicomError("FILE_UNREADABLE", f"not mappable ({type(error).__name__})") from None
    return view, []


def _start(stream: BinaryIO, size: int, flags: list[str]) -> int:
    """Where the file meta, or without it the data set, begins (PS3.10 7.1)."""
    head = stream.read(140)
    if head[128:132] == b"DICM":
        if size == 132:
            raise DicomError("HDR_TRUNCATED", "a DICM prefix and nothing else")
        return 132
    if size < 16:
        raise DicomError("FILE_TOO_SHORT", f"{size} bytes")
    group, element = struct.unpack("<HH", head[:4])
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    length = struct.unpack("<I", head[4:8])[0]
    plausible = explicit or length < size
    known = (group in (0x0002, 0x0008) and element <= 0x0100) or head[:2] == b"\0\x08"
    if not (known and plausible):
        raise DicomError("NOT_DICOM", "no DICM prefix after 128 bytes, no element at the start")
    flags.append("NO_PREAMBLE")
    return 0


def _beyond_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag.group != 2


def _syntax(stream: BinaryIO, meta: Dataset, flags: list[str]) -> str:
    """The transfer syntax, or what the first bytes of the data set look like without one."""
    if not len(meta):
        flags.append("NO_META")
    named = str(meta.get("TransferSyntaxUID") or "").replace("_", ".").strip(" .\0")[:64]
    if named and named.replace(".", "").isdecimal():
        return named  # an unknown or private one too: the caller refuses it by its UID
    flags += ["TS_INVALID" if named else "TS_MISSING", "GUESSED_TS"]
    here = stream.tell()
    head = stream.read(8)
    stream.seek(here)
    if head[:1] == b"\0" and head[1:2] != b"\0":
        return BIG
    return EXPLICIT if head[4:6].isalpha() and head[4:6].isupper() else IMPLICIT


def _inflate(stream: BinaryIO) -> bytes:
    """PS3.5 A.5: raw deflate; the limit is checked while it grows."""
    packed = stream.read()
    limit = min(MAX_INFLATED, max(64 * len(packed), FREE_INFLATED))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(packed, limit)
    if inflater.unconsumed_tail:
        raise DicomError("INFLATE_LIMIT", f"{len(packed)} bytes inflate to more than {limit}")
    if not inflater.eof:
        raise DicomError("HDR_TRUNCATED", "the deflated data set is cut short")
    return data


def _with_pixels(
    header: Dataset, stream: BinaryIO, syntax: str, found: list[int], size: int, flags: list[str]
) -> Parsed[Dataset]:
    keyword, vr, at, length = "", "", size, 0
    if found and found[0] in PIXEL_TAGS:
        keyword = PIXEL_TAGS[found[0]]
        stream.seek(4, os.SEEK_CUR)
        if header.original_encoding[0]:  # what the bytes are, whatever the syntax says
            vr = "OW"
            stream.seek(4, os.SEEK_CUR)
        else:
            code = stream.read(2)
            vr = code.decode("latin-1")
            stream.seek(6 if code in _LONG_VR else 2, os.SEEK_CUR)
        at = stream.tell()
        length = -1 if found[1] == 0xFFFFFFFF else found[1]
    return Parsed(
        header=header,
        stream=stream,
        syntax=syntax,
        pixel_keyword=keyword,
        pixel_vr=vr,
        value_at=at,
        length=length,
        available=size - at,
        flags=tuple(flags),
    )
