"""Members of zip and tar files: equal to what zipfile and tarfile read, or a reason code."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from medpsp.dicom import inflate
from medpsp.dicom.archives import archive_in, archive_members
from medpsp.dicom.container import Found, open_place, walk_objects
from medpsp.dicom.members import FREE_OBJECT, PIECE, ReadAt
from medpsp.dicom.zips import zip_members
from medpsp.errors import DicomError
from medpsp.types import Place

NAMES = ("a/1", "a/1", "../up", "/absolute", "line\nbreak", "x" * 250, "dé/日本", "a!//7/b", "z")
Content = list[tuple[str, bytes]]


def content(seed: int, size: int = 3000) -> Content:
    """Half noise, half zeros, so that it shrinks, but not to nothing."""
    draw = random.Random(seed)
    return [(name, draw.randbytes(size + i) + bytes(size)) for i, name in enumerate(NAMES)]


def zip_of(members: Content, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name, data in members:
            with warnings.catch_warnings(action="ignore"):  # one name twice
                archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def tar_of(members: Content, form: int = tarfile.PAX_FORMAT) -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def written(folder: Path, data: bytes) -> Path:
    path = folder / "archive"
    path.write_bytes(data)
    return path


def outcome(path: Path) -> tuple[Content, Counter[str], Found]:
    """Members that can be read, codes of all others, and the row of the archive itself."""
    *members, whole = walk_objects(path.parent)
    assert len({item.name for item in members}) == len(members)
    good, bad = [], Counter[str]()
    for item in members:
        try:
            if item.code:
                raise DicomError(item.code, item.detail)
            good.append((item.place.member.partition("/")[2], open_place(item.place).read()))
        except DicomError as error:
            bad[error.code] += 1
    return good, bad, whole


PACKED: dict[str, Callable[[Content], bytes]] = {
    "zip": zip_of,
    "zip stored": lambda members: zip_of(members, zipfile.ZIP_STORED),
    "zip bzip2": lambda members: zip_of(members, zipfile.ZIP_BZIP2),
    "tar pax": tar_of,
    "tar gnu": lambda members: tar_of(members, tarfile.GNU_FORMAT),
    "tar.gz": lambda members: gzip.compress(tar_of(members), 6),
    "tar.bz2": lambda members: bz2.compress(tar_of(members)),
    "tar.xz": lambda members: lzma.compress(tar_of(members)),
}


@pytest.mark.parametrize("kind", PACKED)
def test_members_have_the_bytes_that_were_put_in(tmp_path: Path, kind: str) -> None:
    members = content(1)
    good, bad, whole = outcome(written(tmp_path, PACKED[kind](members)))
    assert good == members
    assert not bad
    assert (whole.code, whole.detail) == ("ARCHIVE_OPENED", "9 members")


@pytest.mark.parametrize("tool", ["zip -qr - .", "tar cf - .", "tar czf - .", "tar cJf - ."])
def test_archives_that_the_usual_tools_write(tmp_path: Path, tool: str) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for name, data in (("1", b"one"), ("deep/2", b"two" * 999)):
        (tmp_path / "in" / name).write_bytes(data)
    try:
        done = subprocess.run(tool.split(), cwd=tmp_path / "in", capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no such tool")
    good, bad, whole = outcome(written(tmp_path / "out", done.stdout))
    assert {name.removeprefix("./"): data for name, data in good} == {
        "1": b"one",
        "deep/2": b"two" * 999,
    }
    assert (bad, whole.code) == ({}, "ARCHIVE_OPENED")


def test_zip_sizes_of_64_bits_streamed_members_and_something_in_front(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):  # what cannot seek is written with sizes behind the data
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            got.extend(memoryview(data))  # type: ignore[arg-type]
            return len(memoryview(data))  # type: ignore[arg-type]

    got = bytearray()
    with zipfile.ZipFile(Pipe(), "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("wide", "w", force_zip64=True) as file:
            file.write(b"wide" * 1000)
        archive.writestr("after", b"after")
    path = written(tmp_path, bytes(got))
    assert outcome(path)[0] == [("wide", b"wide" * 1000), ("after", b"after")]
    shifted = b"MZ program" + bytes(got)
    listed = list(zip_members(reader(shifted), len(shifted)))
    assert [member.name for member in listed] == ["wide", "after"]


def reader(data: bytes) -> ReadAt:
    return lambda position, size: data[position : position + size]


@pytest.mark.parametrize("kind", PACKED)
def test_cut_anywhere(tmp_path: Path, kind: str) -> None:
    """Plain tar gives what lies before the cut; where a checksum is cut off nothing is given."""
    members = content(2, 20_000)
    whole = PACKED[kind](members)
    given = []
    for eighth in range(1, 8):
        good, bad, last = outcome(written(tmp_path, whole[: len(whole) * eighth // 8]))
        assert good == members[: len(good)]
        assert set(bad) <= {"ARCHIVE_DAMAGED"}
        assert last.code == "ARCHIVE_DAMAGED"
        given.append((len(good), bad.total()))
    if kind in ("tar pax", "tar gnu"):  # 9 members of 41 kB; the last one listed is itself cut
        assert given == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (8, 1)]
    if kind == "tar.gz":
        assert given == [(0, n) for n in (2, 3, 4, 5, 6, 7, 8)]
    if kind.startswith("zip"):
        assert given == [(0, 0)] * 7


@pytest.mark.parametrize("kind", PACKED)
def test_damaged_anywhere(tmp_path: Path, kind: str) -> None:
    """600 mutants: a member is right or refused; only tar itself has no checksum of its data."""
    draw = random.Random(kind)
    members = content(3, 400)
    whole = PACKED[kind](members)
    silent = 0
    for _ in range(75):
        mutant = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            at = draw.randrange(len(mutant))
            mutant[at : at + draw.choice((0, 1, 1, 1, 4))] = draw.randbytes(draw.choice((1, 1, 4)))
        good, _, last = outcome(written(tmp_path, bytes(mutant)))
        if last.code:
            assert last.code.startswith("ARCHIVE_")
        elif good:
            raise AssertionError
        silent += any(data not in [d for _, d in members] for _, data in good)
    assert silent == 0 or kind in ("tar pax", "tar gnu")


def test_a_checksum_that_fails_at_the_end_refuses_all_members(tmp_path: Path) -> None:
    """Stored blocks: the flipped byte inflates well, only the CRC-32 of gzip tells."""
    packed = bytearray(gzip.compress(tar_of(content(4)), 0))
    packed[len(packed) // 2] ^= 1
    good, bad, last = outcome(written(tmp_path, bytes(packed)))
    assert (good, bad, last.code) == ([], {"ARCHIVE_DAMAGED": 9}, "ARCHIVE_DAMAGED")


def test_zip_entries_that_lie(tmp_path: Path) -> None:
    whole = zip_of([("one", b"1" * 5000), ("two", b"2" * 5000)])
    at = whole.index(b"PK\1\2")

    def lying(offset: int, value: int) -> tuple[int, Counter[str], str]:
        changed = bytearray(whole)
        struct.pack_into("<I", changed, at + offset, value)
        good, bad, last = outcome(written(tmp_path, bytes(changed)))
        return len(good), bad, last.code

    opened = "ARCHIVE_OPENED"
    assert lying(16, 1) == (1, {"ARCHIVE_DAMAGED": 1}, opened)  # CRC-32
    assert lying(20, 5) == (1, {"ARCHIVE_DAMAGED": 1}, opened)  # packed size
    assert lying(24, 4999) == (1, {"INFLATE_LIMIT": 1}, opened)  # size
    assert lying(24, 5001) == (1, {"ARCHIVE_DAMAGED": 1}, opened)
    assert lying(24, 2**28 + 1) == (1, {"INFLATE_LIMIT": 1}, opened)
    assert lying(24, 2**30 + 1) == (1, {"SIZE_LIMIT": 1}, opened)
    assert lying(42, 2**31) == (1, {"ARCHIVE_DAMAGED": 1}, opened)  # place of the member
    assert lying(28, 2**15) == (0, {}, "ARCHIVE_DAMAGED")  # length of the name
    counted = bytearray(whole)
    struct.pack_into("<2H", counted, len(whole) - 14, 3, 3)
    good, _, last = outcome(written(tmp_path, bytes(counted)))
    assert (len(good), last.detail) == (2, "2 members, the directory says 3")


def test_a_zip_of_members_that_overlap_is_stopped(tmp_path: Path) -> None:
    """2000 entries that share 1 MiB of zeros, 1 kB packed: 2 GiB from 150 kB, 1 GiB at most."""
    whole = zip_of([("zeros", bytes(2**20))])
    at, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = whole[at:end]
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2000, 2000, 2000 * len(entry), at, 0)
    listed = list(walk_objects(written(tmp_path, whole[:at] + 2000 * entry + tail).parent))
    assert Counter(item.code for item in listed) == {
        "": 1024,
        "INFLATE_LIMIT": 976,
        "ARCHIVE_OPENED": 1,
    }


def test_a_long_directory_takes_no_memory(tmp_path: Path) -> None:
    whole = zip_of([("x" * 60, b"1")])
    at, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    count, size = 20_000, end - at
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, count * size, at, 0)
    path = written(tmp_path, whole[:at] + count * whole[at:end] + tail)
    tracemalloc.start()
    assert sum(1 for _ in walk_objects(path.parent)) == count + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # zipfile: 12 MB


def special(kind: bytes, name: str = "x", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


def test_tar_members_that_are_no_files(tmp_path: Path) -> None:
    kinds = [b"1", b"2", b"3", b"4", b"6", b"?"]  # links, devices, FIFO, unknown
    whole = b"".join(special(kind) for kind in kinds) + special(b"5") + special(b"V")
    whole += special(b"S", "sparse", 5) + bytes(512) + tar_of([("last", b"123")])
    good, bad, last = outcome(written(tmp_path, whole))
    assert good == [("last", b"123")]
    assert bad == {"NOT_REGULAR": 6, "ARCHIVE_UNSUPPORTED": 1}
    assert (last.code, last.detail) == ("ARCHIVE_OPENED", "8 members")


def test_a_damaged_tar_header_is_no_end(tmp_path: Path) -> None:
    """`tarfile` lists two members and says nothing."""
    members = content(5)[-4:]
    whole = bytearray(tar_of(members, tarfile.GNU_FORMAT))
    third = [m.offset for m in tarfile.open(fileobj=io.BytesIO(whole))][2]
    whole[third + 10] ^= 1
    good, _, last = outcome(written(tmp_path, bytes(whole)))
    assert (good, last.code) == (members[:2], "ARCHIVE_DAMAGED")
    assert len(tarfile.open(fileobj=io.BytesIO(whole)).getnames()) == 2

    two = tar_of(members[:2]) + tar_of(members[2:])  # cat, or tar -A on a tape
    assert outcome(written(tmp_path, two))[0] == members
    without = tar_of(members)[: -(tarfile.RECORDSIZE)]
    assert outcome(written(tmp_path, without))[2].code == "ARCHIVE_DAMAGED"


@pytest.mark.parametrize(
    "head",
    [
        special(b"x", size=2**33),  # an extended header of 8 GiB
        special(b"L", size=2**21),
        special(b"x", size=512) + (b"9" * 512),  # a record without a space
        special(b"x", size=512) + b"30 size=-5\n".ljust(512, b"\0"),
        special(b"x", size=512) + b"0 a=b\n".ljust(512, b"\0"),
        special(b"g", size=0) * 2000,  # tarfile recurses once for each
        special(b"x", size=2**20) + b"1" * 2**20,  # quadratic in tarfile before 3.11.10
    ],
)
def test_hostile_tar_headers(tmp_path: Path, head: bytes) -> None:
    whole = tar_of([("first", b"1")])[:1024] + head + tar_of([("last", b"2")])
    good, _, last = outcome(written(tmp_path, whole))
    assert (good, last.code) == ([("first", b"1")], "ARCHIVE_DAMAGED")


def test_a_size_in_an_extended_header_counts(tmp_path: Path) -> None:
    record = b"12 size=700\n".ljust(512, b"\0")
    whole = special(b"x", size=12) + record + special(b"0", "big") + b"7" * 700 + bytes(324) + END
    assert outcome(written(tmp_path, whole))[0] == [("big", b"7" * 700)]
    negative = bytearray(special(b"0", "minus"))
    negative[124:136] = b"\xff" * 11 + b"\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    path = written(tmp_path, tar_of([("a", b"")])[:512] + bytes(negative) + END)
    assert outcome(path)[2].code == "ARCHIVE_DAMAGED"


def test_going_back_in_a_compressed_tar_inflates_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 members of 1 MiB backwards: from the nearest mark, not from the start each time."""
    block = random.Random(6).randbytes(2**10)
    members = [(str(i), bytes([i]) * 2**10 + block * 1023) for i in range(64)]
    path = written(tmp_path, gzip.compress(tar_of(members), 1))
    places = [item.place for item in walk_objects(tmp_path) if not item.code]
    pieces, real = [0], inflate.Unpacked.next_piece

    def counted(stream: inflate.Unpacked) -> bytes:
        pieces[0] += 1
        return real(stream)

    monkeypatch.setattr(inflate.Unpacked, "next_piece", counted)
    for place in places:
        open_place(place)
    assert pieces[0] <= 64 * 2**20 // PIECE + 64
    forward, pieces[0] = pieces[0], 0
    for index in reversed(range(64)):
        assert open_place(places[index]).read() == members[index][1]
    assert pieces[0] < 5 * forward  # 32 times as many from the start
    assert path.stat().st_size < 2**21


def test_bombs_stop_at_their_limit_and_take_no_more_memory(tmp_path: Path) -> None:
    """2.5 GiB of zeros in 2.6 MB of gzip, alone, as a member of a zip, and as a tar.gz."""
    block = gzip.compress(bytes(2**26), 9)
    bomb = block * 40
    (tmp_path / "1.gz").write_bytes(bomb)
    (tmp_path / "2.zip").write_bytes(zip_of([("bomb.gz", bomb)], zipfile.ZIP_STORED))
    (tmp_path / "3.tgz").write_bytes(gzip.compress(special(b"0", "x", 40 * 2**26)) + bomb)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from medpsp.dicom.container import open_place, walk_objects\n"
        "from medpsp.errors import DicomError\n"
        "for item in list(walk_objects(Path(sys.argv[1]))):\n"
        "    try:\n        print(item.code or open_place(item.place))\n"
        "    except DicomError as error:\n        print(error.code)\n"
        # not ru_maxrss: it outlives exec, so it would be the peak of whoever started us
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(status.split('VmHWM:')[1].split()[0]) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    *lines, peak = done.stdout.split()
    assert lines == ["INFLATE_LIMIT", "INFLATE_LIMIT", "ARCHIVE_OPENED", "INFLATE_LIMIT"]
    assert int(peak) < FREE_OBJECT + 2**27


def test_an_xz_header_cannot_ask_for_memory() -> None:
    """A dictionary of 1.5 GiB, as the header of the block says, for 1 kB of data."""
    good = lzma.compress(tar_of([("x", b"1")]))
    archive = archive_in(reader(good), len(good))
    assert archive is not None
    assert [member.name for member in archive_members(archive)] == ["x"]
    block = bytearray(good[12:24])
    assert block[2:4] == b"\x21\x01"  # LZMA2 with one byte of properties
    block[4] = 37  # (2 | 1) << (37 // 2 + 11) bytes
    block[8:] = struct.pack("<I", zlib.crc32(block[:8]))
    bad = good[:12] + bytes(block) + good[24:]
    with pytest.raises(DicomError, match="ARCHIVE_DAMAGED"):
        archive_in(reader(bad), len(bad))
    assert lzma.decompress(bad) == lzma.decompress(good)  # without a limit it is fine


def test_a_thread_reads_its_own_stream(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    members = content(7, 40_000)
    written(tmp_path, gzip.compress(tar_of(members)))
    places = [item.place for item in walk_objects(tmp_path) if not item.code] * 20

    def read(place: Place) -> bytes:
        return open_place(place).read()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, places)) == [data for _, data in members] * 20
