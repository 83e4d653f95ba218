"""The catalogue of an archive: a scan finds all, reads nothing twice and loses nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydicom.data import get_testdata_file

from launch.phantom import Phantom, draw, write_series
from medpsp.config import Config
from medpsp.dataconfig import DataConfig
from medpsp.dicom.container import walk_objects
from medpsp.dicom.read import read_headers
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.scan import LabelFile, read_object
from medpsp.dicom.walk import walk_files
from medpsp.errors import ArchiveError, DicomError, ShardError
from medpsp.types import Place, ReadPolicy, ScanRow, SliceRef
from shards import merge
from shards.build import plan_shards
from shards.catalog import FOLDER, SCANNER, Catalog
from shards.headers import FRAME, LABEL, REFUSED, RowBuffer, RowReader, file_id
from shards.partition import lists
from shards.partstore import LIST, locked
from shards.rescan import BatchReader
from tests import dying
from tests.factory import one_slice, set_raw

KEY = b"k" * 32
SMALL = Phantom(shape=(3, 16, 12))
PART = 6


class Found(NamedTuple):
    refs: list[SliceRef]
    rows: list[ScanRow]
    labels: list[LabelFile]
    objects: int


def found_in(catalog: Catalog) -> Found:
    return Found(
        [ref for batch in catalog.batches(FRAME) for ref in catalog._reader.refs(lists(batch))],
        [row for batch in catalog.batches(REFUSED) for row in catalog.rows_of(batch)],
        [file for batch in catalog.batches(LABEL) for file in catalog.labels_of(batch)],
        catalog.objects,
    )


def one_by_one(root: Path, policy: ReadPolicy, pool: SandboxPool, key: bytes = KEY) -> Found:
    """What the long way finds."""
    reads = [
        item
        for _, item in pool.map(
            lambda box, found: read_object(box, found, file_id(key, found.name), policy),
            walk_objects(root),
        )
    ]
    return Found(
        [ref for item in reads for ref in item.refs],
        [item.row for item in reads if item.row],
        [item.label for item in reads if item.label],
        len(reads),
    )


def config(archive: Path, index: Path | None = None, **data: Any) -> DataConfig:
    return DataConfig(archive=archive, index=index, classes=("background", "a"), **data)


def add(folder: Path, patient: str, slices: int = 3) -> list[Path]:
    phantom = Phantom(shape=(slices, 16, 12))
    return write_series(folder, patient, draw(phantom, 1)[0], phantom)


def partitions(index: Path) -> dict[str, tuple[int, int, bytes]]:
    """Name to (inode, time of writing, bytes)."""
    return {
        p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes())
        for p in (index / FOLDER).glob("*.parquet")
    }


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(1, module=SCANNER) as made:
        yield made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are sent to a child to be read."""
    names: list[str] = []
    real = Sandbox.stream

    def stream(self: Sandbox, task: str, **request: Any) -> Any:
        names.extend(name for name, code, _ in request["files"] if not code)
        return real(self, task, **request)

    monkeypatch.setattr(Sandbox, "stream", stream)
    monkeypatch.setattr(merge, "FILES_AT_ONCE", 4)
    return names


Scan = Callable[..., Found]


@pytest.fixture
def scan(pool: SandboxPool) -> Scan:
    def run(data: DataConfig, key: bytes = KEY, part_rows: int = PART) -> Found:
        return found_in(Catalog.scan(data, key, pool, lambda count, note: None, part_rows))

    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Eight folders of 3 slices: 4 partitions of 6 rows."""
    for number in range(8):
        add(tmp_path / "tree" / f"f{number}", f"P{number}")
    return tmp_path / "tree"


def odd(root: Path) -> Path:
    """One of everything that may lie in an archive."""
    whole = add(root / "a", "A")
    add(root / "b.0", "B")
    (root / "b").write_bytes(whole[0].read_bytes())  # before the folder b.0
    one_slice(root / "c", lambda ds: set_raw(ds, "PixelSpacing", b"CANARY"))
    one_slice(root / "d", lambda ds: setattr(ds, "Modality", "PT"))
    one_slice(root / "e", lambda ds: setattr(ds, "SeriesInstanceUID", ""))
    one_slice(root / "f", lambda ds: setattr(ds, "PatientID", "M\xfcller\u65e5"))
    data = (root / "f").read_bytes()
    (root / "cut").write_bytes(data[:300])
    (root / "short").write_bytes(data[:-500])
    (root / "empty").touch()
    (root / "note.txt").write_text("no image")
    (root / "link").symlink_to(root / "a")
    (root / "nowhere").symlink_to(root / "no")
    os.link(root / "f", root / "g")
    os.mkfifo(root / "pipe")
    os.rename(root / "c", os.fsdecode(os.fsencode(root) + b"/m\xfcll\xff\ner"))
    with zipfile.ZipFile(root / "z.zip", "w") as archive:
        for number, path in enumerate(whole):
            archive.write(path, f"in/{number}")
        archive.writestr("note", "no image")
    for name in ("emri_small.dcm", "rtstruct.dcm", "MR_small_bigendian.dcm", "zipMR.gz",
                 "liver_1frame.dcm", "image_dfl.dcm", "no_meta.dcm", "DICOMDIR"):  # fmt: skip
        if source := get_testdata_file(name, download=False):
            shutil.copy(str(source), root / name)
    rtstruct = Path(str(get_testdata_file("rtstruct.dcm"))).read_bytes()
    (root / "cut label").write_bytes(rtstruct[: len(rtstruct) * 7 // 10])
    shutil.make_archive(str(root / "t"), "gztar", root / "a")
    return root


@pytest.mark.parametrize("modalities", [("CT", "MR"), None])
@pytest.mark.parametrize("with_index", [False, True])
def test_a_scan_finds_what_reading_one_by_one_finds(
    tmp_path: Path, pool: SandboxPool, scan: Scan, modalities: Any, with_index: bool
) -> None:
    root = odd(tmp_path / "odd")
    data = config(
        root, tmp_path / "index" if with_index else None, modalities=modalities or ("OT",)
    )
    if modalities is None:
        data = data.model_copy(update={"modalities": None, "non_volumes": "keep"})
    expected = one_by_one(root, data.policy, pool)
    assert {row.code for row in expected.rows} > {"NOT_DICOM", "SAME_FILE", "LABEL_OBJECT"}
    assert len({ref.file_id for ref in expected.refs}) > 8
    assert {label.code for label in expected.labels} == {"", "HDR_TRUNCATED"}
    assert scan(data) == expected
    assert scan(data, part_rows=100_000) == expected
    with SandboxPool(2, module=SCANNER) as two:
        again = Catalog.scan(data.model_copy(update={"index": None}), KEY, two, lambda *_: None, 1)
        assert found_in(again) == expected


def test_the_phantom_archive(archive: Path, pool: SandboxPool, scan: Scan) -> None:
    data = config(archive / "dicom")
    assert scan(data) == one_by_one(archive / "dicom", data.policy, pool)


def test_a_second_scan_opens_nothing_and_writes_nothing(
    tmp_path: Path, tree: Path, scan: Scan, sent: list[str]
) -> None:
    data = config(tree, tmp_path / "index")
    first = scan(data)
    assert sorted(sent) == sorted(set(sent))
    assert len(sent) == 24 == first.objects
    before, listed = partitions(data.index), (data.index / FOLDER / LIST).stat()  # type: ignore[arg-type, operator]
    assert len(before) == 4
    sent.clear()
    assert scan(data) == first
    assert sent == []
    assert partitions(data.index) == before  # type: ignore[arg-type]
    assert (data.index / FOLDER / LIST).stat() == listed  # type: ignore[operator]


def test_only_what_changed_is_read_again(
    tmp_path: Path, tree: Path, pool: SandboxPool, scan: Scan, sent: list[str]
) -> None:
    index = tmp_path / "index"
    data = config(tree, index)
    scan(data)

    def after(change: Callable[[], object], read: int, renewed: int) -> None:
        old = partitions(index)
        change()
        sent.clear()
        assert scan(data) == one_by_one(tree, data.policy, pool)
        assert len(sent) == read
        assert len(old.items() & partitions(index).items()) == len(old) - renewed
        sent.clear()
        scan(data)
        assert sent == []

    after(lambda: os.utime(tree / "f3" / "IM0001"), 1, 1)
    after(lambda: add(tree / "f4a", "new"), 3, 1)
    after(lambda: shutil.rmtree(tree / "f0"), 0, 1)
    after(lambda: shutil.rmtree(tree / "f1"), 0, 1)  # nothing is left of the first partition
    assert len(partitions(index)) == 3
    after(lambda: add(tree / "f4b", "many", 20), 20, 1)
    assert len(partitions(index)) > 4  # it was split
    after(lambda: add(tree / "z", "last"), 3, 0)
    after(lambda: add(tree / "z2", "later"), 3, 1)  # the last one was not full
    after(lambda: (tree / "f2" / "more").symlink_to(tree / "f3"), 0, 1)
    after((tree / "f2" / "more").unlink, 0, 1)
    after(lambda: add(tree, "first", 2), 2, 1)


def test_a_changed_zip_is_read_anew(
    tmp_path: Path, pool: SandboxPool, scan: Scan, sent: list[str]
) -> None:
    paths = add(tmp_path / "whole", "A")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "other").write_bytes(paths[2].read_bytes())
    data = config(tmp_path / "tree", tmp_path / "index")
    for count in (3, 2):
        with zipfile.ZipFile(tmp_path / "tree" / "z", "w") as file:
            for path in paths[:count]:
                file.write(path, path.name)
        sent.clear()
        found = scan(data)
        assert sent == ["other", "z"][-count + 1 :]
        assert found == one_by_one(tmp_path / "tree", data.policy, pool)
        assert len(found.refs) == count + 1


def test_what_could_not_be_read_is_tried_again(
    tmp_path: Path, tree: Path, scan: Scan, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(tree, tmp_path / "index")
    whole = scan(data)
    shutil.rmtree(tmp_path / "index")
    (tree / "f5" / "IM0002").rename(tree / "f5" / dying.ALWAYS)
    with SandboxPool(1, module="tests.dying") as pool:
        lost = found_in(Catalog.scan(data, KEY, pool, lambda *_: None, PART))
    assert [row.code for row in lost.rows] == ["DEC_OOM"]
    sent.clear()
    found = scan(data)
    assert sent == [f"f5/{dying.ALWAYS}"]
    assert (len(found.refs), found.rows) == (len(whole.refs), [])


# killed


def test_a_child_that_is_killed_costs_the_object_that_it_was_at(
    tmp_path: Path, pool: SandboxPool, scan: Scan
) -> None:
    root = odd(tmp_path / "odd")
    shutil.copy(root / "f", root / dying.ONCE)
    data = config(root)
    (root / f"{dying.ONCE}.met").mkdir()
    expected = scan(data)
    (root / f"{dying.ONCE}.met").rmdir()
    with SandboxPool(1, module="tests.dying") as killed:
        found = found_in(Catalog.scan(data, KEY, killed, lambda *_: None))
    assert (root / f"{dying.ONCE}.met").exists()  # it was met, and read at the second try
    assert found == expected

    (root / dying.ONCE).rename(root / dying.ALWAYS)
    alike = scan(data)
    with SandboxPool(1, module="tests.dying") as killed:
        found = found_in(Catalog.scan(data, KEY, killed, lambda *_: None))
        assert found == one_by_one(root, data.policy, killed)
    name = file_id(KEY, dying.ALWAYS)
    assert [row.code for row in found.rows if row.file_id == name] == ["DEC_OOM"]
    assert [r for r in found.rows if r.file_id != name] == alike.rows
    assert [r for r in alike.refs if r.file_id != name] == found.refs
    assert found.objects == alike.objects


class Failing:
    """A child that answers for one file and a half, and then ends or talks nonsense."""

    def __init__(self, arrays: Callable[[], list[Any]], done: object, *, ends: bool) -> None:
        self._answer, self._ends = (done, arrays()), ends

    def stream(self, task: str, **request: Any) -> Iterator[Any]:
        yield self._answer
        if self._ends:
            raise DicomError("DEC_CRASH", "the decoder ended with -11")

    def headers(self, place: Place, file_id: str, policy: ReadPolicy) -> list[SliceRef]:
        return read_headers(place, file_id, policy)


def one_and_a_half(refs: list[SliceRef]) -> list[Any]:
    buffer = RowBuffer()
    buffer.add_frames(0, refs[:1])
    buffer.add_frames(1, [replace(refs[1], patient_id="never finished")])
    return list(buffer.take())


@pytest.mark.parametrize(
    ("done", "ends", "spoil"),
    [
        (1, True, lambda arrays: arrays),
        (9, False, lambda arrays: arrays),
        ("1", False, lambda arrays: arrays),
        (2, False, lambda arrays: arrays[:3]),
        (2, False, lambda arrays: [arrays[0] + 1, *arrays[1:]]),
        (2, False, lambda arrays: [-arrays[0], *arrays[1:]]),
        (1, True, lambda arrays: [*arrays[:2], arrays[2][1:], arrays[3]]),
        (2, False, lambda arrays: [*arrays[:2], arrays[2] + 1, arrays[3]]),
        (2, False, lambda arrays: [*arrays[:3], arrays[3].astype("<f8")]),
        (2, False, lambda arrays: [*arrays[:3], arrays[3] | 0xC0]),  # no UTF-8
    ],
)
def test_a_file_that_a_child_did_not_finish_is_read_again(
    tmp_path: Path, done: object, ends: bool, spoil: Callable[[list[Any]], list[Any]]
) -> None:
    add(tmp_path, "A")
    entries, policy = list(walk_files(tmp_path)), ReadPolicy()
    refs = [ref for e in entries for ref in read_headers(Place(e.path), "", policy)]
    box: Any = Failing(lambda: spoil(one_and_a_half(refs)), done, ends=ends)
    batches = BatchReader(os.path.join(tmp_path, ""), policy)(box, merge.Piece(None, None, entries))
    columns = [batch.to_pydict() for batch in batches]
    assert list(RowReader(os.path.join(tmp_path, ""), str).refs(columns[0])) == [
        replace(refs[0], file_id="IM0001")
    ]
    assert [name for column in columns for name in column["patient_id"]] == ["A"] * 3
    assert [name for column in columns for name in column["file"]] == [
        os.fsencode(entry.name) for entry in entries
    ]


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("read", 1),
        ("before rename", 1),  # of a partition
        ("after rename", 1),
        ("before rename", 2),  # of the list
        ("after rename", 2),
        ("after rename", 5),
        ("read", 5),
    ],
)
def test_a_killed_scan_goes_on_where_it_was(
    tmp_path: Path, tree: Path, scan: Scan, sent: list[str], point: str, count: int
) -> None:
    fresh = config(tree, tmp_path / "fresh")
    expected, killed = scan(fresh), config(tree, tmp_path / "index")
    kill(killed, point, count)
    # renames take turns: partition, list
    listed = (count - (point == "before rename")) // 2 if "rename" in point else (count - 1) // 2
    sent.clear()
    if "rename" in point:
        before = partitions(tmp_path / "index")
    assert scan(killed) == expected
    if "rename" in point:
        assert len(sent) == 24 - PART * listed
        kept = before.items() & partitions(tmp_path / "index").items()
        assert len(kept) >= listed
    assert contents(killed) == contents(fresh)


@pytest.mark.parametrize("point", ["before rename", "after rename", "before delete"])
def test_a_killed_rescan_goes_on_too(
    tmp_path: Path, tree: Path, pool: SandboxPool, scan: Scan, sent: list[str], point: str
) -> None:
    data = config(tree, tmp_path / "index")
    scan(data)
    add(tree / "f2a", "new", 10)
    shutil.rmtree(tree / "f6")
    kill(data, point, 1)
    sent.clear()
    assert scan(data) == one_by_one(tree, data.policy, pool)
    assert len(sent) == (0 if point == "before delete" else 10)
    files = {p.name for p in (tmp_path / "index" / FOLDER).iterdir()}
    assert files == {LIST, *partitions(tmp_path / "index")}  # nothing half written, nothing old


def kill(data: DataConfig, point: str, count: int) -> None:
    """Start a scan and kill it where it says that it is at a point."""
    assert data.index
    arguments = [str(data.archive), str(data.index), point, str(count)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.dying", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout
        assert child.stdout.readline() == "here\n"
        child.kill()


def contents(data: DataConfig) -> set[tuple[str, bytes]]:
    assert data.index
    return {(name, data) for name, (_, _, data) in partitions(data.index).items()}


# damaged, of another, shared


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "swapped"])
def test_a_damaged_partition_is_read_anew(
    tmp_path: Path, tree: Path, scan: Scan, sent: list[str],
    caplog: pytest.LogCaptureFixture, how: str,
) -> None:  # fmt: skip
    data = config(tree, tmp_path / "index")
    first, before = scan(data), partitions(tmp_path / "index")
    other, name = sorted(before)[:2]
    path, whole = tmp_path / "index" / FOLDER / name, before[name][2]
    if how == "flipped":
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    elif how == "cut":
        path.write_bytes(whole[:-1])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(before[other][2])
    sent.clear()
    assert scan(data) == first
    assert len(sent) == PART
    assert "a partition of 6 objects is damaged" in caplog.text
    assert {n: d for n, (_, _, d) in partitions(tmp_path / "index").items()} == {
        n: d for n, (_, _, d) in before.items()
    }
    sent.clear()
    assert (scan(data), sent) == (first, [])


def test_a_damaged_list_is_made_anew(
    tmp_path: Path, tree: Path, scan: Scan, sent: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = config(tree, tmp_path / "index")
    first = scan(data)
    path = tmp_path / "index" / FOLDER / LIST
    path.write_bytes(path.read_bytes().replace(b"f", b"g", 1))
    sent.clear()
    assert scan(data) == first
    assert len(sent) == 24
    assert "its list is damaged" in caplog.text


def test_damage_that_comes_after_the_scan_is_an_error(
    tmp_path: Path, tree: Path, pool: SandboxPool
) -> None:
    catalog = Catalog.scan(config(tree, tmp_path / "index"), KEY, pool, lambda *_: None, PART)
    for name in partitions(tmp_path / "index"):
        (tmp_path / "index" / FOLDER / name).write_bytes(b"")
    with pytest.raises(ShardError, match="a partition is not what was written"):
        found_in(catalog)


def test_another_policy_or_archive_begins_anew_and_another_key_reads_nothing(
    tmp_path: Path, tree: Path, pool: SandboxPool, scan: Scan, sent: list[str]
) -> None:
    data = config(tree, tmp_path / "index")
    first = scan(data)
    sent.clear()
    other = scan(data, b"another key of the tests")
    assert sent == []  # pseudonyms are made when rows are read
    assert other == one_by_one(tree, data.policy, pool, b"another key of the tests")
    assert not {r.file_id for r in other.refs} & {r.file_id for r in first.refs}
    mr = data.model_copy(update={"modalities": ("MR",)})
    assert {row.code for row in scan(mr).rows} == {"MODALITY_SKIPPED"}
    assert len(sent) == 24
    sent.clear()
    shutil.copytree(tree, tmp_path / "copy")
    moved = config(tmp_path / "copy", data.index, modalities=("MR",))
    assert {row.code for row in scan(moved).rows} == {"MODALITY_SKIPPED"}
    assert len(sent) == 24
    sent.clear()
    with pytest.raises(ArchiveError, match="no such folder"):
        scan(config(tmp_path / "gone", data.index))
    (tmp_path / "none").mkdir()
    with pytest.raises(ArchiveError, match="holds no file"):
        scan(config(tmp_path / "none", data.index))
    scan(moved)
    assert sent == []  # a wrong path costs nothing


def test_only_what_is_ours_is_swept_away(tmp_path: Path, tree: Path, scan: Scan) -> None:
    folder = tmp_path / "index" / FOLDER
    scan(config(tree, tmp_path / "index"))
    (folder / f"{'0' * 64}.parquet").touch()
    (folder / f".{LIST}.123.partial").touch()
    (folder / "table.parquet").write_text("of somebody")
    scan(config(tree, tmp_path / "index"))
    assert len(list(folder.iterdir())) == 4 + 2
    assert (folder / "table.parquet").read_text() == "of somebody"


def test_what_an_index_holds_is_for_its_owner_alone(tmp_path: Path, tree: Path, scan: Scan) -> None:
    mask = os.umask(0)
    try:
        scan(config(tree, tmp_path / "index"))
    finally:
        os.umask(mask)
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "index", *(tmp_path / "index").rglob("*"))
    }
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_without_an_index_nothing_has_a_name(
    tmp_path: Path, tree: Path, pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    seen: list[list[str]] = []
    catalog = Catalog.scan(
        config(tree), KEY, pool, lambda *_: seen.append(os.listdir(tmp_path / "tmp")), PART
    )
    assert catalog.objects == 24
    assert seen
    assert not any(seen)
    assert sorted(os.listdir(tmp_path)) == ["tmp", "tree"]


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "FILES_AT_ONCE", 3)
    root = odd(tmp_path / "odd")
    for workers in (1, 2):
        data = config(root, tmp_path / f"index{workers}")
        with SandboxPool(workers, module=SCANNER) as pool:
            Catalog.scan(data, KEY, pool, lambda *_: None, PART)
    one, two = (contents(config(root, tmp_path / f"index{n}")) for n in (1, 2))
    assert len(one) > 4
    assert one == two


def test_a_changed_file_renews_its_series_alone(
    tmp_path: Path, archive: Path, make_config: Callable[..., Config]
) -> None:
    shutil.copytree(archive, tmp_path / "archive")
    made = make_config(tmp_path / "archive", tmp_path / "out", index=tmp_path / "index")

    def stamps() -> dict[str, str]:
        planned = plan_shards(made).gathered.planned
        return {item.series.first.patient_id: item.stamp for item in planned}

    before = stamps()
    assert stamps() == before
    assert len(before) == 8
    os.utime(made.data.archive / "0/S00006/IM0001")
    assert {name for name, stamp in stamps().items() if stamp != before[name]} == {"PHANTOM006"}


def test_two_commands_in_one_index(
    tmp_path: Path, archive: Path, make_config: Callable[..., Config]
) -> None:
    index = tmp_path / "index"
    made = make_config(archive, tmp_path / "out", index=index)
    with locked(index), pytest.raises(ShardError, match=r"^data\.index: another command"):
        plan_shards(made)
    assert not made.shards.exists()
    first = plan_shards(made)
    assert len(plan_shards(made).shards) == len(first.shards)
