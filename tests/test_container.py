"""Every object of a folder tree once, whatever lies in it, and its bytes."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import socket
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from medpsp.dicom.container import Found, open_place, walk_objects
from medpsp.errors import ArchiveError, DicomError
from medpsp.identity import pseudonym
from medpsp.types import Place

DICOM = bytes(128) + b"DICM" + b"the rest of it"


def walked(root: Path) -> dict[str, Found]:
    """By name, which is unique."""
    found = list(walk_objects(root))
    names = {item.name: item for item in found}
    assert len(names) == len(found)
    assert len({item.place for item in found}) == len(found)
    assert all(pseudonym(b"k" * 16, "file", name) for name in names)
    return names


def codes(root: Path) -> dict[str, str]:
    return {name: item.code for name, item in walked(root).items()}


def code_of(place: Place) -> str:
    """Code with which opening is refused, or nothing."""
    try:
        open_place(place).close()
    except DicomError as error:
        return error.code if place.path not in str(error) else "names the path"
    return ""


def test_files_come_in_order_of_name_with_their_bytes(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a", "c", "b/d/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(DICOM + name.encode())
    found = list(walk_objects(tmp_path))
    assert [item.name for item in found] == ["a", "b/1", "b/2", "b/d/x", "c"]
    for item in found:
        with open_place(item.place) as stream:
            assert (stream.seek(132), stream.read()) == (132, DICOM[132:] + item.name.encode())
            assert not getattr(stream, "gzip", False)


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"a\nb", b"-rf *", b"..x", b"x" * 255, b"\xe2\x80\xae", b" ", b"c.zip!"]
)
def test_hostile_names(tmp_path: Path, name: bytes) -> None:
    inner = os.path.join(os.fsencode(tmp_path), name, name)
    os.mkdir(os.path.dirname(inner))
    with open(inner, "wb") as file:
        file.write(DICOM)
    [item] = walked(tmp_path).values()
    assert os.fsencode(item.name) == name + b"/" + name
    assert open_place(item.place).read() == DICOM


def test_links_pipes_and_sockets_are_listed_and_only_files_opened(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "in" / "deep").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "in" / "1", outside / "2"):
        path.write_bytes(DICOM)
    (root / "in" / "deep" / "loop").symlink_to(root / "in")
    (root / "in" / "up").symlink_to("..")
    (root / "folder").symlink_to(root / "in")
    (root / "away").symlink_to(outside)
    (root / "same").symlink_to(root / "in" / "1")
    (root / "out1").symlink_to(outside / "2")
    (root / "out2").symlink_to(outside / "2")
    (root / "self").symlink_to(root / "self")
    (root / "nowhere").symlink_to(root / "no" / "where")
    os.link(root / "in" / "1", root / "in" / "hard")
    os.link(outside / "2", root / "out3")
    os.mkfifo(root / "pipe")
    (root / "to-pipe").symlink_to(root / "pipe")
    (root / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(root / "plug"))
        assert codes(root) == {
            "away": "SYMLINK_OUTSIDE",
            "folder": "SYMLINK_FOLDER",
            "in/1": "",
            "in/deep/loop": "SYMLINK_LOOP",
            "in/hard": "SAME_FILE",
            "in/up": "SYMLINK_LOOP",
            "nowhere": "NOT_REGULAR",
            "null": "NOT_REGULAR",
            "out1": "",
            "out2": "SAME_FILE",
            "out3": "SAME_FILE",
            "pipe": "NOT_REGULAR",
            "plug": "NOT_REGULAR",
            "same": "SYMLINK_DUPLICATE",
            "self": "SYMLINK_LOOP",
            "to-pipe": "NOT_REGULAR",
        }
        for name in ("pipe", "plug", "in", "null", "to-pipe"):
            assert code_of(Place(str(root / name))) == "NOT_REGULAR"


def test_a_root_that_is_a_link_and_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "1").write_bytes(DICOM)
    (tmp_path / "root" / "2").symlink_to(tmp_path / "root" / "1")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert codes(tmp_path / "link") == {"1": "", "2": "SYMLINK_DUPLICATE"}
    with pytest.raises(ArchiveError, match="no such folder"):
        next(walk_objects(tmp_path / "nothing"))


def failing(monkeypatch: pytest.MonkeyPatch, call: str, name: str, errors: list[int]) -> None:
    """One entry fails with these errors, one after another, and then works."""
    real = getattr(os, call)

    def fail(path: Any, *args: Any) -> Any:
        if os.fspath(path).endswith(name) and errors:
            raise OSError(errors.pop(0), "planted")
        return real(path, *args)

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize(
    ("errors", "code", "detail"),
    [
        ([errno.EACCES], "UNREADABLE", "EACCES"),
        ([errno.EIO], "", ""),
        ([errno.ESTALE], "", ""),
        ([errno.EIO, errno.EIO], "UNREADABLE", "EIO"),
    ],
)
def test_what_cannot_be_read_has_a_row_and_the_walk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[int], code: str, detail: str
) -> None:
    for name in ("a/1", "bad/2", "c/3"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(DICOM)
    failing(monkeypatch, "scandir", "bad", list(errors))
    found = walked(tmp_path)
    if code:
        assert (found["bad"].code, found["bad"].detail) == ("FOLDER_UNREADABLE", detail)
    assert list(found) == ["a/1", "bad" if code else "bad/2", "c/3"]

    failing(monkeypatch, "open", "3", list(errors))
    assert walked(tmp_path)["c/3"].code == (f"FILE_{code}" if code else "")
    failing(monkeypatch, "open", "3", list(errors))
    assert code_of(Place(str(tmp_path / "c/3"))) == (f"FILE_{code}" if code else "")


def test_a_path_too_long_to_list(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(20):  # 20 x 256 bytes, PATH_MAX is 4096
            os.mkdir("d" * 255)
            os.chdir("d" * 255)
    finally:
        os.chdir(here)
    (tmp_path / "e").write_bytes(DICOM)
    [deep, plain] = walked(tmp_path).values()
    assert (deep.code, deep.detail, plain.name) == ("FOLDER_UNREADABLE", "ENAMETOOLONG", "e")


def test_empty_and_vanished(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "none.gz").write_bytes(gzip.compress(b""))
    assert [code_of(item.place) for item in walk_objects(tmp_path)] == ["FILE_EMPTY"] * 2
    assert code_of(Place(str(tmp_path / "gone"))) == "FILE_UNREADABLE"


def test_a_gzipped_object_reads_like_a_plain_one(tmp_path: Path) -> None:
    whole = Path(str(get_testdata_file("zipMR.gz")))
    stream: Any = open_place(Place(str(whole)))
    assert stream.gzip
    assert stream.read() == gzip.decompress(whole.read_bytes())
    assert stream.getvalue()[128:132] == b"DICM"

    several = tmp_path / "several.dcm"  # as pigz, bgzip and cat make them, padded as on tape
    several.write_bytes(gzip.compress(DICOM) + gzip.compress(b"more") + bytes(700))
    assert open_place(Place(str(several))).read() == DICOM + b"more"
    for cut in (gzip.compress(DICOM)[:-1], gzip.compress(DICOM) + b"x", b"\x1f\x8b\x08\xff"):
        several.write_bytes(cut)
        assert code_of(Place(str(several))) == "GZIP_DAMAGED"


def test_content_decides_what_a_file_is(tmp_path: Path) -> None:
    def zipped(data: bytes) -> bytes:
        with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
            archive.writestr("x", data)
        return out.getvalue()

    files = {
        "dicom.zip": DICOM,
        "preamble.zip": b"PK\3\4" + DICOM[4:],
        "preamble.gz": b"\x1f\x8b\x08" + DICOM[3:],
        "zeros.tar": bytes(10240),
        "text.tar.bz2": b"BZh: a note",
        "image.dcm": zipped(DICOM),
        "a.7z": b"7z\xbc\xaf\x27\x1c" + bytes(200),
        "a.rar": b"Rar!\x1a\x07\x01\0" + bytes(200),
        "b.bz2": bz2.compress(DICOM),
        "b.xz": lzma.compress(DICOM),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = codes(tmp_path)
    [member] = [name for name in found if "!//" in name]
    assert (member[:12], found.pop(member)) == ("image.dcm!//", "")
    assert Counter(found.values()) == {"": 5, "ARCHIVE_OPENED": 1, "ARCHIVE_UNSUPPORTED": 4}
    assert found["image.dcm"] == "ARCHIVE_OPENED"
    for name in ("dicom.zip", "preamble.zip", "preamble.gz"):
        assert open_place(Place(str(tmp_path / name))).read() == files[name]


def test_a_folder_cannot_pose_as_a_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c", "w") as archive:
        archive.writestr("x", DICOM)
    [place] = [item.place for item in walk_objects(tmp_path) if item.place.member]
    posing = tmp_path / "c!" / place.member
    posing.parent.mkdir(parents=True)
    posing.write_bytes(DICOM)
    assert sorted(walked(tmp_path)) == ["c", f"c!//{place.member}", f"c!/{place.member}"]


def test_what_an_archive_holds_that_is_no_object_for_us(tmp_path: Path) -> None:
    with tarfile.open(fileobj=(inner := io.BytesIO()), mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.mkdir("folder")
        archive.writestr("1 nested", inner.getvalue())
        archive.writestr("2 gzip", gzip.compress(DICOM))
        archive.writestr("3 empty", b"")
        archive.writestr("4 lzma", DICOM, zipfile.ZIP_LZMA)
        link = zipfile.ZipInfo("5 link")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        secret = zipfile.ZipInfo("6 secret")
        archive.writestr(secret, DICOM)
        secret.flag_bits |= 1
    outcome = {
        name.rpartition("/")[2]: item.code or code_of(item.place)
        for name, item in walked(tmp_path).items()
    }
    assert outcome == {
        "1 nested": "ARCHIVE_NESTED",
        "2 gzip": "",
        "3 empty": "FILE_EMPTY",
        "4 lzma": "ARCHIVE_UNSUPPORTED",
        "5 link": "NOT_REGULAR",
        "6 secret": "ARCHIVE_ENCRYPTED",
        "z": "ARCHIVE_OPENED",
    }
    [packed] = [item.place for name, item in walked(tmp_path).items() if name.endswith("2 gzip")]
    stream: Any = open_place(packed)
    assert stream.gzip
    assert stream.read() == DICOM


def test_an_archive_that_changed_between_the_walk_and_the_reading(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> None:
        with zipfile.ZipFile(tmp_path / "z", "w") as archive:
            archive.writestr(name, data)

    write("x", DICOM)
    [place] = [item.place for item in walk_objects(tmp_path) if item.place.member]
    assert open_place(place).read() == DICOM
    write("y", DICOM)
    assert code_of(place) == "ARCHIVE_DAMAGED"
    write("x", DICOM + b"longer")
    assert code_of(place) == "ARCHIVE_DAMAGED"
    (tmp_path / "z").write_bytes(DICOM)
    assert code_of(place) == "ARCHIVE_DAMAGED"
    (tmp_path / "z").unlink()
    assert code_of(place) == "FILE_UNREADABLE"
