"""Hostile files: an outcome for each, at a bounded cost; bombs before any memory is taken.

The long run is `bench/fuzz.py`.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pydicom
import pytest

from medpsp.dicom.codes import CODES
from medpsp.dicom.container import walk_objects
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.scan import scan_folder
from tests.encoded import ENCODERS, fragmented, rle, write_object
from tests.fuzzed import KEEP, child_of, cpu_seconds, forget_peak, fuzz, outcome, peak_mib
from tests.mutate import damaged, sources

INPUTS, SEED = 800, 3
GREY = np.arange(40 * 36, dtype="<u2").reshape(40, 36)
RLE, DEFLATED_FRAME = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.8.1"
BASELINE, LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"
JPEG_LS, J2K, HTJ2K = (f"1.2.840.10008.1.2.4.{n}" for n in (80, 90, 201))


def test_sources_are_the_same_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = sources(tmp_path / "a")
    assert found == sources(tmp_path / "b")
    assert {source.kind for source in found} == {
        "dicom", "seg", "rtstruct", "nifti", "image", "archive"
    }  # fmt: skip


def test_damaged_files_have_an_outcome_each(tmp_path: Path) -> None:
    tally = fuzz(sources(tmp_path), range(INPUTS), SEED, tmp_path / "fuzz")
    assert tally.escapes == []
    assert tally.inputs == sum(tally.outcomes.values()) == INPUTS
    assert set(tally.outcomes) <= {"read", *CODES}
    assert tally.deaths == []
    assert tally.outcomes["read"] > INPUTS // 20  # the damage is not so crude that nothing is read
    assert len(tally.outcomes) > 20
    assert tally.seconds < 2, tally.slowest
    assert tally.peak_mib < 1024, tally.largest


def test_a_scan_of_damaged_files_loses_none(tmp_path: Path) -> None:
    found, folder = sources(tmp_path), tmp_path / "fuzz"
    folder.mkdir()
    for n in range(400):
        rng = Random(f"{SEED} scan {n}")
        (folder / f"{n}").write_bytes(damaged(found[n % len(found)], rng.choice(found), rng))
    with SandboxPool(1) as pool:
        scan = scan_folder(folder, KEEP, str, pool)
    kept = {ref.file_id for series in scan.series for ref in series.slices}
    assert kept
    assert kept | {row.file_id for row in scan.rows} == {o.name for o in walk_objects(folder)}
    assert {row.code for row in scan.rows} <= set(CODES)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def zeros(mib: int) -> bytes:
    """A raw deflate stream of so many MiB; blocks behind a full flush can be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (mib // 16) + packer.flush()


def deflated_data_set(path: Path) -> None:
    data = write_object(path, GREY, "1.2.840.10008.1.2.1.99").read_bytes()
    meta = 144 + int.from_bytes(data[140:144], "little")  # FileMetaInformationGroupLength
    path.write_bytes(data[:meta] + zeros(1104))
    assert path.stat().st_size < 1_200_000


def absurd(path: Path, syntax: str, rows: int = 60000, **fields: Any) -> None:
    """A small codestream whose header, and that of the object, claim 60000 x 60000 pixels."""
    stream = patched(ENCODERS[syntax](GREY.astype(np.uint8) if syntax == BASELINE else GREY), rows)
    data = fragmented([stream])
    write_object(path, GREY, syntax, Rows=rows, Columns=rows, PixelData=data, **fields)


def patched(stream: bytes, size: int) -> bytes:
    """The size in SOF (lines, columns) or in SIZ (columns, lines, each 32 bits)."""
    for marker in (0xC0, 0xC1, 0xC3, 0xF7):
        at = stream.find(bytes([0xFF, marker, 0]))
        if stream[:3] == b"\xff\xd8\xff" and at > 0:
            return stream[: at + 5] + struct.pack(">2H", size, size) + stream[at + 9 :]
    at = stream.find(b"\xff\x51")
    if at == 2:
        stream = stream[: at + 6] + struct.pack(">2I", size, size) + stream[at + 14 :]
    return stream


def codestream_only(path: Path, syntax: str) -> None:
    """The object says 40 x 36, its codestream 60000 x 60000."""
    stream = patched(ENCODERS[syntax](GREY.astype(np.uint8) if syntax == BASELINE else GREY), 60000)
    write_object(path, GREY, syntax, PixelData=fragmented([stream]))


def png(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">2I5B", 60000, 60000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(2**20))))


def nifti(path: Path, gz: bool) -> None:
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, 2000, 2000, 2000, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    path.write_bytes(gzip.compress(bytes(header) + bytes(2**22)) if gz else bytes(header))


def too_many_frames(path: Path) -> None:
    write_object(path, GREY, RLE, NumberOfFrames=1000, Rows=60000, Columns=60000)


def too_many_small_frames(path: Path) -> None:
    write_object(path, GREY, RLE, NumberOfFrames=199999)


def rle_of_a_large_image(path: Path) -> None:
    write_object(path, GREY, RLE, Rows=16000, Columns=16000)


def rle_header(path: Path) -> None:
    stream = rle(GREY)
    stream = stream[:4] + struct.pack("<2I", 64, 2**32 - 2) + stream[12:]
    write_object(path, GREY, RLE, PixelData=fragmented([stream]))


def deflated_frame(path: Path) -> None:
    data = fragmented([zeros(512)])
    write_object(path, GREY, DEFLATED_FRAME, PixelData=data, Rows=16384, Columns=16384)


def fragments(path: Path) -> None:
    write_object(path, GREY, JPEG_LS, PixelData=b"\xfe\xff\x00\xe0\0\0\0\0" * 1_100_000)


def nested(path: Path) -> None:
    write_object(path, GREY)
    data, item = path.read_bytes(), b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    at = data.index(b"\x28\x00\x02\x00")
    level = b"\x21\x00\x40\x91SQ\0\0\xff\xff\xff\xff" + item
    path.write_bytes(data[:at] + level * 50_000 + data[at:])


def native_frames(path: Path) -> None:
    write_object(path, GREY, NumberOfFrames=199999)


BOMBS: dict[str, tuple[Any, str]] = {
    "deflated data set": (deflated_data_set, "INFLATE_LIMIT"),
    "RLE of 1000 frames of 60000 x 60000": (too_many_frames, "SIZE_LIMIT"),
    "RLE of 199999 frames": (too_many_small_frames, "PIX_TRUNCATED"),
    "RLE too short for its size": (rle_of_a_large_image, "PIX_TRUNCATED"),
    "RLE with an offset of 4 GiB": (rle_header, "DEC_ERROR"),
    "deflated frame": (deflated_frame, "INFLATE_LIMIT"),
    "a million fragments": (fragments, "SIZE_LIMIT"),
    "50000 sequences deep": (nested, "HDR_DEPTH"),
    "native of 199999 frames": (native_frames, "PIX_TRUNCATED"),
    "image.png": (png, "IMAGE_UNREADABLE"),
    "mask.nii": (lambda path: nifti(path, False), "MASK_SIZE_LIMIT"),
    "mask.nii.gz": (lambda path: nifti(path, True), "MASK_SIZE_LIMIT"),
    **{
        f"{syntax} of 60000 x 60000": (lambda path, s=syntax: absurd(path, s), "SIZE_LIMIT")
        for syntax in (BASELINE, LOSSLESS, JPEG_LS, J2K, HTJ2K)
    },
    **{
        f"{syntax} against its header": (
            lambda path, s=syntax: codestream_only(path, s),
            "DEC_ERROR",
        )
        for syntax in (BASELINE, LOSSLESS, JPEG_LS, J2K, HTJ2K)
    },
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_memory_is_taken(box: Sandbox, tmp_path: Path, name: str) -> None:
    write, code = BOMBS[name]
    path = tmp_path / (name if "." in name and " " not in name else "bomb")
    write(path)
    kind = {".png": "image", ".nii": "nifti", ".gz": "nifti"}.get(path.suffix, "dicom")
    cost, pid = cost_of(box, kind, path, code)
    assert cost[0] < 2, "CPU seconds"
    assert cost[1] < 200, "MiB above what the child has"
    assert pid == child_of(box)


def cost_of(box: Sandbox, kind: str, path: Path, code: str) -> tuple[tuple[float, float], int]:
    pid = child_of(box)
    forget_peak(pid)
    before, base = cpu_seconds(pid), peak_mib(pid)
    assert outcome(box, kind, path) == code
    return (cpu_seconds(pid) - before, peak_mib(pid) - base), pid


def test_a_gzip_bomb_stops_at_the_limit_of_its_container(box: Sandbox, tmp_path: Path) -> None:
    """An object may inflate to 256 MiB whatever its ratio."""
    path = tmp_path / "bomb"
    path.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + zeros(1104))
    assert path.stat().st_size < 1_200_000
    (seconds, mib), pid = cost_of(box, "dicom", path, "INFLATE_LIMIT")
    assert seconds < 2
    assert mib < 350
    assert pid == child_of(box)


def test_an_honest_file_is_read_after_all_that(box: Sandbox, tmp_path: Path) -> None:
    assert outcome(box, "dicom", write_object(tmp_path / "f", GREY)) == "read"
    assert pydicom.dcmread(tmp_path / "f").Rows == 40
