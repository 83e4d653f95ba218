"""Seeded damage to files of every kind that an archive holds."""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from launch.codestreams import ENCODERS
from medpsp.dicom.placement import LPS_TO_RAS
from tests.encoded import write_object
from tests.labelled import PLAIN, SHAPE, contour, frame_of, rtstruct, seg

WHEEL = Path(pydicom.__file__).parent / "data" / "test_files"
NATIVE = tuple(f"1.2.840.10008.1.2{tail}" for tail in ("", ".1", ".1.99", ".2"))
NUMBERS = (0x02, 0x06, 0x10, 0x11, 0x0100, 0x0101, 0x0102, 0x0103)
"""Elements of group 0028 that say how pixels are stored: samples, planes, rows, columns, bits."""
EXTREMES = (0, 1, 2, 3, 7, 8, 12, 16, 17, 31, 32, 64, 255, 256, 4095, 32767, 60000, 65535)
LENGTHS = (0, 1, 2, 8, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Source:
    """A file before its damage; ``kind`` is dicom, seg, rtstruct, nifti, image or archive."""

    name: str
    kind: str
    data: bytes


def sources(folder: Path, largest: int = 160_000) -> list[Source]:
    """pydicom's own files up to ``largest`` bytes, every transfer syntax, labels, containers."""
    found = [
        Source(path.name, "dicom", path.read_bytes())
        for path in sorted([*WHEEL.glob("*.*"), WHEEL / "dicomdirtests" / "DICOMDIR"])
        if path.stat().st_size <= largest and path.suffix in (".dcm", "", ".gz")
    ]
    row, column = np.indices((40, 36))
    grey = (column * 50 + row * 20).astype("<u2")
    colour = np.stack([column * 3, row * 2, column + row], axis=-1).astype(np.uint8)
    made = folder / "made"
    for syntax in (*NATIVE, *ENCODERS):
        kinds = {"grey": grey, "frames": np.stack([grey, grey + 1, grey + 2]), "colour": colour}
        if syntax.endswith("4.51"):  # extended JPEG has 12 bits
            del kinds["colour"]
        for kind, values in kinds.items():
            data = write_object(made, values, syntax).read_bytes()
            found.append(Source(f"{kind} {syntax[17:] or '.'}", "dicom", data))
    whole = next(s.data for s in found if s.name == "MR_small.dcm")
    others = [*_labels(folder), *_containers(whole), Source("png", "image", _png())]
    return [*found, *others, *others]


def _saved(path: Path, ds: Dataset) -> bytes:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = ds.SeriesInstanceUID = "1.2.3"
    ds.save_as(path, enforce_file_format=True)
    return path.read_bytes()


def _labels(folder: Path) -> list[Source]:
    """Labels of the series that `labelled.series` makes."""
    path = folder / "label"
    mask = (np.indices(SHAPE).sum(axis=0) % 3 == 0).astype(np.uint8)
    pixels = {
        "BitsStored": 1,
        "HighBit": 0,
        "BitsAllocated": 1,
        "PixelRepresentation": 0,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelData": np.packbits(mask, bitorder="little").tobytes() + b"\0",
    }
    binary = seg("BINARY", [frame_of(PLAIN, k, 1) for k in range(4)], {1: "liver"}, **pixels)
    grown = dict(pixels, BitsStored=8, HighBit=7, BitsAllocated=8, PixelData=mask.tobytes())
    labelmap = seg("LABELMAP", [frame_of(PLAIN, k, None) for k in range(4)], {1: "liver"}, **grown)
    square = [[0.0, 0.0], [9.0, 0.0], [9.0, 6.0], [0.0, 6.0]]
    contours = [contour([[*corner, 5.0 * k] for corner in square]) for k in range(4)]
    image = nib.Nifti1Image(mask.transpose(2, 1, 0), LPS_TO_RAS @ PLAIN)
    image.set_sform(image.affine, code=1)
    return [
        Source("binary", "seg", _saved(path, binary)),
        Source("labelmap", "seg", _saved(path, labelmap)),
        Source("contours", "rtstruct", _saved(path, rtstruct({"liver": contours}))),
        Source("mask.nii", "nifti", image.to_bytes()),
        Source("mask.nii.gz", "nifti", gzip.compress(image.to_bytes(), mtime=0)),
    ]


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.indices((5, 6)).sum(axis=0) % 2).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _containers(member: bytes) -> list[Source]:
    zipped, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as packed:
        for number in range(3):
            entry = zipfile.ZipInfo(f"folder/{number}")
            packed.writestr(entry, member, zipfile.ZIP_DEFLATED)
    with tarfile.open(fileobj=tar, mode="w:") as file:
        info = tarfile.TarInfo("folder/x")
        info.size = len(member)
        file.addfile(info, io.BytesIO(member))
    return [
        Source("a.zip", "archive", zipped.getvalue()),
        Source("a.tar.gz", "archive", gzip.compress(tar.getvalue(), mtime=0)),
        Source("a.tar", "archive", tar.getvalue()),
        Source("a.gz", "archive", gzip.compress(member, mtime=0)),
    ]


def _place(data: bytes, rng: Random) -> int:
    """Anywhere, but often in the first 2 kB, where headers are, or in the last ones."""
    zones = ((0, len(data)), (0, min(len(data), 2048)), (max(0, len(data) - 2048), len(data)))
    low, high = zones[rng.choice((0, 0, 1, 1, 2))]
    return rng.randrange(low, max(low + 1, high))


def flip(data: bytes, other: bytes, rng: Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        out[_place(data, rng)] = rng.randrange(256)
    return bytes(out)


def cut(data: bytes, other: bytes, rng: Random) -> bytes:
    return data[: _place(data, rng)]


def lengthen(data: bytes, other: bytes, rng: Random) -> bytes:
    """The length of some element, of 2 or 4 bytes, or any other number."""
    marks = [m.end() for m in re.finditer(rb"[A-Z]{2}(?=..\0?)", data)]
    at = rng.choice(marks) if marks and rng.random() < 0.8 else _place(data, rng)
    size, order = rng.choice(((2, "little"), (4, "little"), (4, "big")))
    value = rng.choice(LENGTHS) % 256**size
    return data[:at] + value.to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]


def renumber(data: bytes, other: bytes, rng: Random) -> bytes:
    """Rows, Columns, bits and so on become extremes; both byte orders, explicit and implicit."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        order = ">" if b"\x00\x28\x00\x10" in data else "<"
        at = data.find(struct.pack(order + "HH", 0x28, rng.choice(NUMBERS)))
        if at >= 0:
            value = struct.pack(order + "H", rng.choice(EXTREMES))
            data = data[: at + 8] + value + data[at + 10 :]
    return data


def _before_rows(data: bytes, explicit: bytes, implicit: bytes) -> bytes:
    at = data.find(b"\x28\x00\x10\x00")
    return data[:at] + (explicit if data[at + 4 : at + 6] == b"US" else implicit) + data[at:]


def reframe(data: bytes, other: bytes, rng: Random) -> bytes:
    """NumberOfFrames, changed or put in."""
    number = rng.choice((b"2 ", b"1000", b"199999", b"99999999", b"-1", b"0 ", b"1A", b"1e9 "))
    at = data.find(b"\x28\x00\x08\x00IS")
    if at >= 0:
        size = int.from_bytes(data[at + 6 : at + 8], "little")
        return data[: at + 6] + struct.pack("<H", len(number)) + number + data[at + 8 + size :]
    tag = b"\x28\x00\x08\x00"
    return _before_rows(
        data,
        tag + b"IS" + struct.pack("<H", len(number)) + number,
        tag + struct.pack("<I", len(number)) + number,
    )


def nest(data: bytes, other: bytes, rng: Random) -> bytes:
    """Sequences in sequences, of undefined length."""
    depth = rng.choice((3, 60, 250, 1100, 5000))
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    tag, unknown = b"\x21\x00\x40\x91", b"\xff\xff\xff\xff"
    return _before_rows(data, (tag + b"SQ\0\0" + unknown + item) * depth, (tag + unknown) * depth)


def delimit(data: bytes, other: bytes, rng: Random) -> bytes:
    """An item or delimiter tag where none belongs."""
    at = _place(data, rng)
    tag = rng.choice((b"\xfe\xff\xdd\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\x00\xe0"))
    return data[:at] + tag + struct.pack("<I", rng.choice(LENGTHS)) + data[at:]


def repeat(data: bytes, other: bytes, rng: Random) -> bytes:
    at, size = _place(data, rng), rng.choice((1, 2, 8, 64, 1000, 5000))
    times = rng.choice((0, 2, 2, 20))
    return data[:at] + data[at : at + size] * times + data[at + size :]


def splice(data: bytes, other: bytes, rng: Random) -> bytes:
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def resyntax(data: bytes, other: bytes, rng: Random) -> bytes:
    """Another transfer syntax over the same bytes."""
    at = data.find(b"\x02\x00\x10\x00UI")
    if at < 0:
        return flip(data, other, rng)
    size = int.from_bytes(data[at + 6 : at + 8], "little")
    uid = rng.choice((*NATIVE, *ENCODERS, "1.2.840.10008.1.2.4.100", "1.2.3")).encode()
    uid += b"\0" * (len(uid) % 2)
    return data[: at + 6] + struct.pack("<H", len(uid)) + uid + data[at + 8 + size :]


def resize(data: bytes, other: bytes, rng: Random) -> bytes:
    """The size that a codestream claims: SOF of JPEG, SIZ of JPEG 2000, header of RLE."""
    found = list(re.finditer(rb"\xff[\xc0-\xc3\xf7]\0[\x0b\x11]|\xff\x51\0[\x29\x2f]", data))
    found += list(re.finditer(rb"[\x01-\x0c]\0\0\0\x40\0\0\0", data))
    if not found:
        return renumber(data, other, rng)
    hit = rng.choice(found)
    at = hit.start() + rng.choice((4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 38, 40))
    value = struct.pack(">I", rng.choice((0, 1, 60000, 60000 << 16, 65535, 0xFFFFFFFF, 0x7FFFFFFF)))
    size = rng.choice((1, 2, 4))
    return data[:at] + value[4 - size :] + data[at + size :]


Mutation = Callable[[bytes, bytes, Random], bytes]
ANY: tuple[Mutation, ...] = (flip, flip, cut, lengthen, repeat, splice)
MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "dicom": (*ANY, renumber, renumber, reframe, nest, delimit, resyntax, resize),
    "seg": (*ANY, renumber, reframe, nest, delimit, resyntax),
    "rtstruct": (*ANY, nest, delimit),
    "nifti": ANY,
    "image": ANY,
    "archive": ANY,
}


def damaged(source: Source, other: Source, rng: Random) -> bytes:
    """``source`` after one or two mutations; ``other`` lends bytes to splices."""
    data = source.data
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = rng.choice(MUTATIONS[source.kind])(data, other.data or b"\0", rng) or b"\0"
    return data
