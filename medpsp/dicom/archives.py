"""What kind of archive some bytes are, and its members. No suffix is believed.

A file with DICM after 128 bytes is a DICOM file whatever else it looks like (PS3.10 7.1).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from medpsp.dicom.inflate import Packing, Unpacked
from medpsp.dicom.members import Member, ReadAt, archive_limit, damaged
from medpsp.dicom.tars import is_tar, read_tar_member, tar_members
from medpsp.dicom.zips import read_zip_member, zip_members
from medpsp.errors import DicomError

_ZIP = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
_UNSUPPORTED = {
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d\x90": "compress",
    b"MSCF\0\0\0\0": "cab",
}


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip or tar file.

    Attributes:
        read: Its bytes by position, inflated.
        length: Number of packed bytes.
        zipped: zip, or else tar.
        stream: Set where the tar file is compressed.
    """

    read: ReadAt
    length: int
    zipped: bool
    stream: Unpacked | None = None


def packing_of(head: bytes) -> Packing | None:
    """What compressed a file that starts with ``head`` (at least 132 bytes where it has them)."""
    if head[128:132] == b"DICM":
        return None
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\0") else None


def archive_in(read: ReadAt, length: int) -> Archive | None:
    """The archive that ``length`` bytes are; None for anything else, gzip'd objects too.

    Raises:
        DicomError: ARCHIVE_UNSUPPORTED for 7z, rar and others, and for bzip2 and xz without tar;
            ARCHIVE_DAMAGED for those where nothing can be read.
    """
    head = read(0, 512)
    if head[128:132] == b"DICM":
        return None
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise DicomError("ARCHIVE_UNSUPPORTED", name)
    if head.startswith(_ZIP) or is_tar(head):
        return Archive(read, length, head.startswith(_ZIP))
    packing = packing_of(head)
    if packing is None:
        return None
    try:
        if is_tar(Unpacked(read, packing, 1024, "ARCHIVE_DAMAGED", piece=512).read_at(0, 512)):
            stream = Unpacked(read, packing, archive_limit(length), "ARCHIVE_DAMAGED")
            return Archive(stream.read_at, length, False, stream)
    except (DicomError, EOFError):
        if packing != "gzip":
            raise damaged(f"{packing} that does not inflate to 512 bytes") from None
    if packing == "gzip":  # an object by itself, sound or damaged
        return None
    raise DicomError("ARCHIVE_UNSUPPORTED", packing)


def archive_members(archive: Archive) -> Iterator[Member]:
    """Members in the order of the archive, one at a time.

    A compressed tar file is first inflated to its end: only there are its checksums. Where they
    fail or are cut off, any member may be wrong (one flipped bit can look like an early end), so
    each is listed with ARCHIVE_DAMAGED.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_UNSUPPORTED, INFLATE_LIMIT; after the members found.
    """
    if archive.zipped:
        yield from zip_members(archive.read, archive.length)
    elif archive.stream is None:
        yield from tar_members(archive.read, archive.length)
    else:
        yield from _compressed_members(archive.stream)


def _compressed_members(stream: Unpacked) -> Iterator[Member]:
    wrong: DicomError | None = None
    try:
        stream.measure()
    except EOFError:
        wrong = damaged(f"cut short after {stream.inflated} bytes")
    except DicomError as error:
        if error.code == "INFLATE_LIMIT":
            raise
        wrong = error
    length, detail = stream.inflated, wrong.detail if wrong else ""
    try:
        for member in tar_members(stream.read_at, length):
            suspect = wrong and not member.code
            yield member._replace(code="ARCHIVE_DAMAGED", detail=detail) if suspect else member
    except EOFError:
        raise damaged(f"cut short after {length} bytes") from None
    if wrong:
        raise wrong


def read_member(archive: Archive, member: Member) -> io.BytesIO:
    """All bytes of a member.

    Raises:
        DicomError: ARCHIVE_DAMAGED, ARCHIVE_ENCRYPTED, ARCHIVE_UNSUPPORTED, NOT_REGULAR,
            SIZE_LIMIT, INFLATE_LIMIT.
    """
    try:
        if archive.zipped:
            return read_zip_member(archive.read, archive.length, member)
        return read_tar_member(archive.read, member)
    except EOFError:
        raise damaged("cut short within the member") from None
