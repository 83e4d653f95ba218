"""The two ways of reading a file, side by side: flat where it is ordinary, and by pydicom."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest import mock

import numpy as np

from medpsp.dicom import opened as opening
from medpsp.dicom.flat import parse_flat
from medpsp.dicom.flatvalues import KEPT, UNUSUAL
from medpsp.dicom.parse import parse, refusing
from medpsp.dicom.read import Pixels, read_frame, read_headers, scan_header
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy, SliceRef

POLICIES = (
    ReadPolicy(),
    ReadPolicy(burned_in="keep", non_volumes="keep"),
    ReadPolicy(modalities=("MR", "CT"), burned_in="blank", colour="grey"),
)
Refused = tuple[str, str]
Out = TypeVar("Out")


@dataclass
class Ways:
    """How files were read, and where the two ways differ; no difference is allowed."""

    counts: Counter[str] = field(default_factory=Counter)
    apart: list[str] = field(default_factory=list)

    def add(self, path: Path, name: str = "") -> bool:
        """Read a file both ways; True where it was ordinary."""
        refs: list[SliceRef] = []
        flat = False
        for policy in POLICIES:
            short = outcome(lambda p=policy: scan_header(str(path), "id", p))
            long = outcome(lambda p=policy: read_headers(Place(str(path)), "id", p))
            flat = flat or short is not None
            if short is not None and repr(short) != repr(long):
                self.apart.append(f"{name or path.name}: {short} is not {long}")
            refs += long if isinstance(long, list) else []
        self.counts["flat" if flat else "long"] += 1
        self._values(path, name or path.name)
        for ref in {repr(ref): ref for ref in refs[:1] + refs[-1:]}.values():
            self._pixels(ref, name or path.name)
        return flat

    def _values(self, path: Path, name: str) -> None:
        """Every value that may be asked for, its type, or the type of what it raises."""
        found = parse_flat(str(path))
        if found is None:
            return
        self.counts["parsed flat"] += 1
        whole = parse(Place(str(path)))
        for part in ("syntax", "pixel_keyword", "pixel_vr", "value_at", "length", "available"):
            if getattr(found, part) != getattr(whole, part):
                self.apart.append(f"{name}: {part}")
        if whole.flags:
            self.apart.append(f"{name}: {whole.flags}")
        for keyword in (*KEPT, *UNUSUAL):
            short = _value(lambda k=keyword: found.header.get(k))
            if short != _value(lambda k=keyword: whole.header.get(k)):
                self.apart.append(f"{name}: {keyword}")
            if (keyword in found.header) != (keyword in whole.header):
                self.apart.append(f"{name}: presence of {keyword}")

    def _pixels(self, ref: SliceRef, name: str) -> None:
        opening._opened.cache_clear()  # two files of one size may be written at one time
        short = outcome(lambda: read_frame(ref))
        with mock.patch("medpsp.dicom.read.opened", parse):
            long = outcome(lambda: read_frame(ref))
        if not _same(short, long):
            self.apart.append(f"{name}: pixels of {ref.frame}")
        self.counts["pixels" if isinstance(long, Pixels) else "no pixels"] += 1


def outcome(read: Callable[[], Out]) -> Out | Refused:
    try:
        return read()
    except DicomError as error:
        return error.code, error.detail


def _value(get: Callable[[], Any]) -> tuple[str, str]:
    try:
        with refusing("ELEM_INVALID", "value"):
            value = get()
    except DicomError as error:
        return "raises", error.detail
    return type(value).__name__, repr(value)


def _same(short: Pixels | Refused, long: Pixels | Refused) -> bool:
    if not isinstance(short, Pixels) or not isinstance(long, Pixels):
        return short == long
    if short.values.dtype != long.values.dtype or (short.padding is None) != (long.padding is None):
        return False
    same = np.array_equal(short.values, long.values, equal_nan=short.values.dtype.kind == "f")
    return same and (long.padding is None or bool(np.array_equal(short.padding, long.padding)))


TEXTS = (
    b"", b" ", b"\0", b"  \0", b"1", b"-2.5", b" 3 ", b"1\\2", b"1\\2\\3", b" 1\\ 2 \\3\0", b"\\",
    b"1\\\\3", b"1e400", b"nan", b"inf\\1\\2", b"1_0", b"0x10", b"1,5", b"+.5", b"5.", b"1e5",
    b"1d5", b"1\\2\\3\\", b"1.0000000000000000001", b"\xb5", b"\x1b$B", b"A B", b"a", b"CT",
    b"MR", b"US", b"YES", b"NO", b"MONOCHROME1", b"PALETTE COLOR", b"RGB", b"YBR_FULL_422",
    b"ORIGINAL\\PRIMARY\\LOCALIZER", b"DERIVED\\SECONDARY", b"1.2.840.10008.5.1.4.1.1.7",
    b"1.2.840.10008.5.1.4.1.1.66.4", b"1.2.840.10008.1.3.10", b"ISO_IR 100", b"ISO_IR 13",
    b"ISO 2022 IR 6\\ISO 2022 IR 87", b"\\ISO 2022 IR 87", b"ISO_IR 999", b"latin", b"20200102",
    b"101112.5", b"10:11:12", b"HU", b"LINEAR", b"SIGMOID", b"INVERSE", b"-0", b"\0\0", b"\1\0",
    b"\2\0", b"\xff\xff", b"\0\x80", b"\1\0\2\0", b"\1",
)  # fmt: skip


def revalue(data: bytes, rng: Random, keywords: Sequence[str] = KEPT) -> bytes:
    """Another value for one to three wanted elements, or a VR, or the element left out or twice."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = _revalued(data, rng, rng.choice(keywords))
    return data


def _revalued(data: bytes, rng: Random, keyword: str) -> bytes:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword)
    assert tag is not None
    mark, value, vr = struct.pack("<HH", tag >> 16, tag & 0xFFFF), rng.choice(TEXTS), b""
    at, explicit = data.find(mark, 132), b"\x08\x00\x16\x00UI" in data
    if at < 0 or (explicit and not data[at + 4 : at + 6].isalpha()):
        at = data.find(b"\x28\x00\x10\x00", 132)
        if at < 0:
            return data
        vr, end = dictionary_VR(tag)[:2].encode(), at  # put in, out of its place
    elif explicit:
        vr, end = data[at + 4 : at + 6], at + 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    else:
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    vr = rng.choice((vr, vr, vr, vr, vr, vr, vr, b"LO", b"UN", b"US", b"OB", b"XX"))
    value += b" " * (len(value) % 2) * rng.choice((1, 1, 1, 0))
    size = struct.pack("<H", len(value)) if explicit else struct.pack("<I", len(value))
    element = mark + vr * explicit + size + value
    element *= rng.choice((1, 1, 1, 1, 1, 1, 0, 2))
    return data[:at] + element + data[end:]
