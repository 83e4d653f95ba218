"""The header of an ordinary image without pydicom: one read, one pass, only what is asked for.

Ordinary is a file with preamble and file meta, little endian, of one frame, whose header is a flat
list of elements in front of Pixel Data. Anything else is None here, and pydicom reads it. Values
are pydicom's own: its converters make them from the raw bytes, once for the same bytes. So both
ways end in the same texts, numbers, refusals and reasons; `tests/test_flat.py` compares them.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from pydicom.datadict import dictionary_VR, tag_for_keyword

from medpsp.dicom.codestream import CODECS
from medpsp.dicom.container import READ_FLAGS
from medpsp.dicom.flatvalues import KEPT, META, UNUSUAL, FlatHeader
from medpsp.dicom.flatwalk import UNDEFINED, Field, Shape, Unusual, Walk, shape_of, swapped
from medpsp.dicom.labelref import KINDS as LABEL_KINDS
from medpsp.dicom.parse import EXPLICIT, IMPLICIT, Parsed

HEAD = 1 << 14
"""Bytes that hold most headers."""
MARGIN = 1 << 12
"""Bytes by which the header of the next file may be longer."""
MOST = 1 << 18
"""Bytes that are tried next: private elements of MR take a hundred thousand."""

SYNTAXES = {uid.encode(): uid for uid in (IMPLICIT, EXPLICIT, *CODECS)}
CHARSETS = frozenset(
    f"{prefix} {number}".encode()
    for prefix, numbers in (
        ("ISO_IR", (6, 100, 101, 109, 110, 144, 127, 126, 138, 148, 166, 192)),
        ("ISO 2022 IR", (6, 100, 101, 109, 110, 144, 127, 126, 138, 148, 166, 87, 159, 149, 58)),
    )
    for number in numbers
) | {b""}
"""Of SpecificCharacterSet; bytes below 128 but ESC are ASCII in all (PS3.3 C.12.1.1.2)."""
_NUMERIC = frozenset(("US", "SS", "UL", "SL", "FL", "FD", "US or SS"))
_EITHER_SIGN = "US or SS"
_PIXEL_VRS = (b"OW", b"OB")


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise AssertionError(keyword)
    return tag


_KEYWORD = {_tag(keyword): keyword for keyword in (*KEPT, *META)}
_VR = {tag: dictionary_VR(tag) for tag in _KEYWORD}
_WANTED = {swapped(_tag(k)): True for k in KEPT} | {swapped(_tag(k)): False for k in UNUSUAL}
_SYNTAX = _tag("TransferSyntaxUID")
_PIXELS = struct.pack("<I", swapped(0x7FE00010))
_WANTED_META = {swapped(_tag(keyword)): True for keyword in META}


class Kind(NamedTuple):
    """What files of one shape have in common.

    Attributes:
        keywords, vrs: Of the wanted elements in the order of the file.
        syntax: Transfer syntax; its raw value decides how the rest is read.
        pixel_vr: As `Parsed` has it.
        syntax_at: Index of TransferSyntaxUID.
    """

    keywords: tuple[str, ...]
    vrs: tuple[str, ...]
    syntax: str
    pixel_vr: str
    syntax_at: int


class Flat(NamedTuple):
    """An ordinary header as raw bytes.

    Attributes:
        values: In the order of ``kind.keywords``.
        value_at: Where the pixel value starts.
        length: Of the pixel value as declared, 0xFFFFFFFF where undefined.
    """

    kind: Kind
    values: list[bytes]
    value_at: int
    length: int

    @property
    def header(self) -> FlatHeader:
        """With values; `is_ordinary` must have been so."""
        kind = self.kind
        elements = dict(zip(kind.keywords, zip(kind.vrs, self.values, strict=True), strict=True))
        if _EITHER_SIGN in kind.vrs:  # the sign of the pixels tells (PS3.5 A.1)
            vr = "SS" if elements["PixelRepresentation"][1] == b"\1\0" else "US"
            for key, (found, raw) in elements.items():
                elements[key] = (vr if found == _EITHER_SIGN else found), raw
        return FlatHeader(elements)

    def parsed(self, stream: BinaryIO, size: int) -> Parsed[FlatHeader]:
        """As `parse` gives it, of a file of ``size`` bytes; `is_ordinary` must have been so."""
        return Parsed(
            header=self.header,
            stream=stream,
            syntax=self.kind.syntax,
            pixel_keyword="PixelData",
            pixel_vr=self.kind.pixel_vr,
            value_at=self.value_at,
            length=-1 if self.length == UNDEFINED else self.length,
            available=size - self.value_at,
            flags=(),
        )


class _Last:
    """The shape of the file before; a stale one costs a walk and nothing else."""

    shape: Shape | None = None


def flat_of(data: bytes) -> Flat | None:
    """Find the wanted elements of a file that starts with ``data``.

    Returns:
        None for what is unusual, as far as tags, VRs and lengths tell; see `is_ordinary`.

    Raises:
        EOFError: The data end before the pixels.
    """
    if data[128:132] != b"DICM":
        return None
    shape = _Last.shape.again(data) if _Last.shape else None
    values = shape.values(data) if shape else []
    if shape is None or _syntax(shape.known, values) != shape.known.syntax:
        try:
            shape = _walked(data)
        except Unusual:
            return None
        except struct.error:
            raise EOFError from None
        values = shape.values(data)
    _Last.shape = shape
    return Flat(shape.known, values, int(shape.at[-1]) + 8, int(shape.words[-1]) >> 32)


def _syntax(kind: Kind, values: list[bytes]) -> str:
    return SYNTAXES.get(values[kind.syntax_at].rstrip(b"\0 "), "")


def _walked(data: bytes) -> Shape:
    walk = Walk(data, _WANTED_META)
    begin = walk.meta(132)
    names = [field.tag for field in walk.fields]
    if names.count(_SYNTAX) != 1:
        raise Unusual
    at = walk.looked[walk.fields[names.index(_SYNTAX)].word]
    syntax = SYNTAXES.get(data[at + 8 : at + 8 + data[at + 6]].rstrip(b"\0 "))
    if syntax is None or data[at + 7]:
        raise Unusual
    implicit, walk.wanted = syntax == IMPLICIT, _WANTED
    first = data[begin + 4 : begin + 6]
    if (first.isalpha() and first.isupper()) == implicit:
        raise Unusual  # pydicom believes the bytes, not the syntax
    pixels = walk.data_set(begin, implicit)
    if pixels == begin or data[pixels : pixels + 4] != _PIXELS:
        raise Unusual
    walk.look(pixels)
    if not implicit:
        walk.look(pixels + 4)
        if len(data) < pixels + 12:
            raise EOFError
        if data[pixels + 4 : pixels + 6] not in _PIXEL_VRS:
            raise Unusual
    kind = _kind(walk.fields, syntax, data[pixels + 4 : pixels + 6])
    return shape_of(walk, kind)


def _kind(fields: list[Field], syntax: str, pixel_vr: bytes) -> Kind:
    tags = [field.tag for field in fields]
    vrs = [field.vr or _VR[field.tag] for field in fields]
    for tag, vr in zip(tags, vrs, strict=True):
        if vr != _VR[tag] and not (_VR[tag] == _EITHER_SIGN and vr in ("US", "SS")):
            raise Unusual
    if len(set(tags)) != len(tags):
        raise Unusual
    return _known(
        tuple(_KEYWORD[tag] for tag in tags),
        tuple(vrs),
        syntax,
        "OW" if syntax == IMPLICIT else pixel_vr.decode(),
    )


@lru_cache(maxsize=256)
def _known(keywords: tuple[str, ...], vrs: tuple[str, ...], syntax: str, pixel_vr: str) -> Kind:
    return Kind(keywords, vrs, syntax, pixel_vr, keywords.index("TransferSyntaxUID"))


def is_ordinary(flat: Flat) -> bool:
    """Whether pydicom takes the wanted values for what they are: ASCII, one frame, no palette."""
    kind, raw = flat.kind, dict(zip(flat.kind.keywords, flat.values, strict=True))
    texts = [v for v, vr in zip(flat.values, kind.vrs, strict=True) if vr not in _NUMERIC]
    charset = raw.get("SpecificCharacterSet", b"").rstrip(b" \0")
    either = [v for v, vr in zip(flat.values, kind.vrs, strict=True) if vr == _EITHER_SIGN]
    signs = (b"\0\0", b"\1\0")
    return (
        plain_text(texts)
        and CHARSETS.issuperset(charset.split(b"\\"))
        and raw.get("NumberOfFrames", b"").strip(b" \0") in (b"", b"1")
        and b"PALETTE" not in raw.get("PhotometricInterpretation", b"")
        and raw.get("SOPClassUID", b"").rstrip(b"\0 ").decode() not in LABEL_KINDS
        and all(len(value) == 2 for value in either)
        and (not either or raw.get("PixelRepresentation") in signs)
    )


def plain_text(values: list[bytes]) -> bool:
    """Whether every text is ASCII and switches to no other character set (PS3.5 6.1.2.5.3)."""
    text = b"\\".join(values)
    return text.isascii() and b"\x1b" not in text


def read_flat(path: str) -> Flat | None:
    """The header of an ordinary file: opened once, read once, or twice where it is long.

    Returns:
        None for what pydicom is to read; also for what is no regular file or cannot be opened.
    """
    try:
        handle = os.open(path, READ_FLAGS)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            return None
        return _grown(lambda size: os.pread(handle, size, 0))
    except OSError:
        return None
    finally:
        os.close(handle)


def _grown(read: Callable[[int], bytes]) -> Flat | None:
    """Of a file as much as the header before took, and some more; then as much as any may take."""
    before = int(_Last.shape.at[-1]) + MARGIN if _Last.shape else 0
    for size in (min(max(HEAD, before), MOST), MOST):
        try:
            return flat_of(read(size))
        except EOFError:
            continue
    return None


def parse_flat(path: str) -> Parsed[FlatHeader] | None:
    """`parse` of an ordinary file, mapped; None where only `parse` itself will do."""
    try:
        handle = os.open(path, READ_FLAGS)
    except (OSError, ValueError):
        return None
    try:
        size = os.fstat(handle).st_size
        view: Any = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # empty, a FIFO, a folder
        return None
    finally:
        os.close(handle)
    flat = _grown(lambda count: view[:count])
    if flat is None or not is_ordinary(flat):
        view.close()
        return None
    return flat.parsed(view, size)
