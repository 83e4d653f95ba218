"""Values that must never come out of an archive, and a scanner that finds them in any wrapping.

A canary is a value that occurs nowhere by chance: ten letters and digits, a UID with twenty digits
at its end, a day of the nineteenth century, a number of ten digits.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr
from PIL import Image
from pydicom.datadict import dictionary_VR

ROOT_UID = "1.2.826.0.1.3680043.8.498."
LEAST = 8
"""Bytes of the shortest needle: none is found by chance, and the scanner looks at so many first."""

CHANCE, HEX = 4, b"0123456789abcdef"
"""So many more digits around a number make it a part of a longer one, or of a hash."""

CODECS = ("utf-8", "utf-16-le", "utf-16-be")
"""Canaries are ASCII, which is the same in UTF-8, Latin-1 and every code page."""


class Canaries:
    """Canaries by the place where they are planted; the same place gives the same value."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.uids: dict[str, str] = {}
        self.dates: dict[str, str] = {}
        self.times: dict[str, str] = {}
        self.numbers: dict[str, str] = {}

    def __len__(self) -> int:
        kinds = (self.texts, self.uids, self.dates, self.times, self.numbers)
        return sum(map(len, kinds))

    def text(self, where: str) -> str:
        """Ten capitals and digits, the first a capital: legal in CS, AE, SH, and in a file name."""
        code = base64.b32encode(hashlib.sha256(where.encode()).digest()).decode()
        return self.texts.setdefault(where, re.sub("^[^A-Z]*", "", code)[:10])

    def uid(self, where: str) -> str:
        return self.uids.setdefault(where, f"{ROOT_UID}{10**19 + _hash(where)}")

    def date(self, where: str) -> str:
        """YYYYMMDD from 1801 on, 3 days after the one before."""
        day = date(1801, 1, 1) + timedelta(3 * len(self.dates))
        return self.dates.setdefault(where, f"{day:%Y%m%d}")

    def time(self, where: str) -> str:
        """HHMMSS.FFFFFF; six digits alone would be found by chance."""
        code = f"{_hash(where) % 10**9:09}"
        return self.times.setdefault(where, f"1{code[0]}2{code[1]}3{code[2]}.{code[3:]}")

    def moment(self, where: str) -> str:
        """YYYYMMDDHHMMSS.FFFFFF."""
        day, time = self.date(where), self.time(where)
        self.numbers[where] = day + time[:6]
        return day + time

    def number(self, where: str) -> str:
        """1000000000 to 1999999999: legal in IS and DS."""
        return self.numbers.setdefault(where, f"{10**9 + _hash(where) % 10**9}")

    def name(self, where: str) -> str:
        """A PersonName of three components, each a canary."""
        return "^".join(self.text(f"{where} {part}") for part in ("family", "given", "middle"))

    def value(self, where: str, keyword: str) -> str:
        """A canary that is legal in an element."""
        where, kind = f"{where} {keyword}", dictionary_VR(keyword)
        makers = {
            "PN": self.name,
            "UI": self.uid,
            "DA": self.date,
            "TM": self.time,
            "DT": self.moment,
            "IS": self.number,
            "DS": self.number,
        }
        return makers.get(kind, self.text)(where)

    def needles(self) -> dict[bytes, str]:
        """Every wrapping of every canary, and which canary in which form it is."""
        return {
            needle: f"{where} as {form}"
            for where, text in self._spelt()
            for form, needle in encoded(text)
        }

    def _spelt(self) -> Iterator[tuple[str, str]]:
        for where, text in self.texts.items():
            yield from ((where, text), (where, text.lower()), (where, text.capitalize()))
        for where, uid in self.uids.items():
            yield from ((where, uid), (where, uid.rsplit(".", 1)[1]))
        for where, time in self.times.items():
            yield from ((where, time), (where, f"{time[:2]}:{time[2:4]}:{time[4:]}"))
        yield from self.numbers.items()
        for where, text in self.dates.items():
            year, month, day = text[:4], text[4:6], text[6:]
            yield from ((where, text), (where, day + month + year), (where, text[::-1]))
            for mark in "-./ ":
                yield where, mark.join((year, month, day))
                yield where, mark.join((day, month, year))
                yield where, mark.join((month, day, year))


def _hash(where: str) -> int:
    return int.from_bytes(hashlib.sha256(where.encode()).digest()[:8], "big")


def encoded(text: str) -> Iterator[tuple[str, bytes]]:
    """The forms that a text may take in a file."""
    for codec in CODECS:
        data = text.encode(codec)
        yield codec, data
        yield f"hex of {codec}", data.hex().encode()
        yield f"HEX of {codec}", data.hex().upper().encode()
        for start in range(3):  # what does not depend on the bytes before and after
            coded = base64.b64encode(bytes(start) + data)
            yield f"base64 of {codec}", coded[-(-start * 8 // 6) : (start + len(data)) * 8 // 6]


class Scanner:
    """Finds any of a hundred thousand needles in one pass.

    Where the first two bytes of any needle stand, the hash of eight bytes is looked at.

    Args:
        needles: What to look for, eight bytes or more, and what to call it.
    """

    def __init__(self, needles: Mapping[bytes, str]) -> None:
        assert min(map(len, needles)) >= LEAST
        self.needles, self.scanned = needles, 0
        self.by_start: dict[bytes, list[bytes]] = {}
        for needle in needles:
            self.by_start.setdefault(needle[:LEAST], []).append(needle)
        starts = np.frombuffer(b"".join(self.by_start), "<u8")
        self.pairs, self.known = np.zeros(1 << 16, np.bool_), np.zeros(1 << 22, np.bool_)
        self.pairs[starts & 0xFFFF] = True
        self.known[_place(starts)] = True

    def hits(self, data: bytes) -> set[str]:
        """Names of the needles in ``data``."""
        self.scanned += len(data)
        found = set()
        step, last = 1 << 20, len(data) - LEAST + 1
        for start in range(0, last, step):
            count = min(step, last - start)
            pairs, words = (
                np.ndarray((count,), kind, data, start, (1,)) for kind in ("<u2", "<u8")
            )
            at = np.flatnonzero(self.pairs[pairs])
            at = at[self.known[_place(words[at])]]
            for place in (at + start).tolist():
                for needle in self.by_start.get(data[place : place + LEAST], ()):
                    if data.startswith(needle, place) and not _by_chance(data, place, needle):
                        found.add(self.needles[needle])
        return found


def _place(words: np.ndarray) -> np.ndarray:
    """In a table of 4 Mi, by Fibonacci hashing."""
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(42)


def _by_chance(data: bytes, at: int, needle: bytes) -> bool:
    """Whether a number is part of a float or a hash: any eight digits are in some of these."""
    if len(needle) > 10 or not needle.isdigit():
        return False
    before = data[max(0, at - CHANCE) : at]
    after = data[at + len(needle) : at + len(needle) + CHANCE]
    digits = len(before) - len(before.rstrip(HEX)) + len(after) - len(after.lstrip(HEX))
    return digits >= CHANCE


def layers(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Some bytes, and all that is packed in them, however deep: (name, bytes)."""
    yield name, data
    for part, inner in _unpacked(data):
        yield from layers(f"{name} > {part}", inner)


def _unpacked(data: bytes) -> Iterator[tuple[str, bytes]]:
    if data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(31)  # gives what there is of one that is cut short
        yield "gzip", stream.decompress(data)
        yield "behind gzip", stream.unused_data
    elif zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # what is stored stands in the file as it is; so it is with checkpoints
            for member in (m for m in archive.infolist() if m.compress_type):
                yield f"zip {member.filename}", archive.read(member)
    elif data[:4] == b"PAR1":
        yield "parquet", parquet_text(data)
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for item in archive:
                file = archive.extractfile(item)
                yield f"tar {item.name}", file.read() if file else b""
    else:
        for match in re.finditer(rb"\x89PNG\r\n\x1a\n", data):  # also within an event file
            yield from _png_parts(data[match.start() :])
        for match in re.finditer(rb"base64,([A-Za-z0-9+/=]+)", data):
            yield "data URI", base64.b64decode(match[1])


def _png_parts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Packed text, and the pixels, of a PNG at the start of ``data``."""
    at, kind = 8, b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        if kind in (b"zTXt", b"iCCP"):
            yield kind.decode(), zlib.decompress(body.partition(b"\0")[2][1:])
        elif kind == b"iTXt" and body.partition(b"\0")[2][:1] == b"\1":
            yield "iTXt", zlib.decompress(body.partition(b"\0")[2][2:].split(b"\0", 2)[2])
        at += 12 + length
    with Image.open(io.BytesIO(data[:at])) as image:
        yield "pixels", image.tobytes()


def parquet_text(data: bytes) -> bytes:
    """Rows and schema of a Parquet file."""
    table = pq.read_table(io.BytesIO(data))
    rows = json.dumps(table.to_pylist(), default=str, ensure_ascii=False)
    return f"{rows}\n{table.schema}\n{table.schema.metadata}".encode("utf-8", "surrogateescape")


def tree_layers(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, its name, what is packed in it, and Zarr arrays decoded."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        yield f"name of {name}", name.encode("utf-8", "surrogateescape")
        if path.is_symlink():
            yield f"target of {name}", str(path.readlink()).encode("utf-8", "surrogateescape")
        elif path.is_file():
            yield from layers(name, path.read_bytes())
            if path.name == "zarr.json" and json.loads(path.read_text())["node_type"] == "array":
                yield f"{name} decoded", np.asarray(zarr.open_array(path.parent)[:]).tobytes()


def leaks(scanner: Scanner, parts: Iterable[tuple[str, bytes]]) -> dict[str, list[str]]:
    """Parts with needles in them, and which."""
    found = ((name, sorted(scanner.hits(data))) for name, data in parts)
    return {name: hits for name, hits in found if hits}
