"""One row for every file that is not kept, whatever lies in the archive."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.phantom import Phantom, draw, write_archive, write_series
from medpsp.dicom.container import walk_objects
from medpsp.dicom.sandbox import SandboxPool
from medpsp.dicom.scan import scan_folder
from medpsp.errors import ArchiveError
from medpsp.identity import pseudonym
from medpsp.types import ReadPolicy, ScanRow, Series
from tests.factory import one_slice, set_raw

SMALL = Phantom(shape=(4, 48, 40))


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with SandboxPool(1) as made:
        yield made


@pytest.fixture
def scan(pool: SandboxPool) -> Callable[..., tuple[list[Series], list[ScanRow]]]:
    def run(
        root: Path, modalities: tuple[str, ...] | None = ("CT", "MR")
    ) -> tuple[list[Series], list[ScanRow]]:
        policy = ReadPolicy(modalities=modalities)
        found = scan_folder(root, policy, lambda name: pseudonym(b"k" * 16, "file", name), pool)
        objects = {row.file_id for row in found.rows}
        objects |= {ref.file_id for item in found.series for ref in item.slices}
        assert len(objects) == found.objects == len(list(walk_objects(root)))
        return found.series, found.rows

    return run


Scanner = Callable[..., tuple[list[Series], list[ScanRow]]]


def codes(rows: list[ScanRow]) -> dict[str, int]:
    return dict(Counter(row.code for row in rows))


def add_series(folder: Path, patient: str, phantom: Phantom = SMALL) -> list[Path]:
    return write_series(folder, patient, draw(phantom, 1)[0], phantom)


def test_messy_archive_adds_up(tmp_path: Path, pool: SandboxPool) -> None:
    dicom, _ = write_archive(tmp_path, 3, SMALL)
    seen: list[None] = []
    policy = ReadPolicy(modalities=("CT",))
    found = scan_folder(dicom, policy, lambda name: name, pool, lambda: seen.append(None))
    assert [len(item.slices) for item in found.series] == [4, 4, 4]
    assert {(row.file_id, row.code, row.status) for row in found.rows} == {
        ("README.txt", "NOT_DICOM", "skipped"),
        ("0/EMPTY", "FILE_EMPTY", "quarantined"),
        ("0/CUT", "HDR_TRUNCATED", "quarantined"),
    }
    assert len(seen) == 3 * 4 + 3 == found.objects


def test_everything_at_once_adds_up(tmp_path: Path, scan: Scanner) -> None:
    whole = add_series(tmp_path / "a", "A")
    (tmp_path / "a" / "copy").write_bytes(whole[0].read_bytes())
    add_series(tmp_path / "b", "B")[1].unlink()
    add_series(tmp_path / "c", "C", Phantom(shape=(4, 48, 40), modality="MR"))
    one_slice(tmp_path / "d", lambda ds: setattr(ds, "Modality", "PT"))
    one_slice(tmp_path / "e", lambda ds: set_raw(ds, "PixelSpacing", b"CANARY"))
    (tmp_path / "broken-link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    series, rows = scan(tmp_path)
    # B has a hole: it becomes two series, as data.gaps says
    assert [len(item.slices) for item in series] == [4, 1, 2, 4]
    assert ["MISSING_SLICES" in item.flags for item in series] == [False, True, True, False]
    assert codes(rows) == {
        "DUP_IDENTICAL": 1,
        "MODALITY_SKIPPED": 1,
        "ELEM_INVALID": 1,
        "NOT_REGULAR": 2,
    }


@pytest.mark.parametrize(
    ("modalities", "kept"), [(("CT",), ["CT"]), (("MR", "CT"), ["CT", "MR"]), (None, ["CT", "MR"])]
)
def test_modalities(
    tmp_path: Path, scan: Scanner, modalities: tuple[str, ...] | None, kept: list[str]
) -> None:
    add_series(tmp_path / "a", "A")
    add_series(tmp_path / "b", "B", Phantom(shape=(4, 48, 40), modality="MR"))
    series, rows = scan(tmp_path, modalities)
    assert [item.first.modality for item in series] == kept
    assert codes(rows) == ({} if len(kept) == 2 else {"MODALITY_SKIPPED": 4})


def test_order_is_fixed_by_patient_and_series(tmp_path: Path, scan: Scanner) -> None:
    for folder, patient in (("z", "A"), ("m", "C"), ("a", "B")):
        add_series(tmp_path / folder, patient)
    series, _ = scan(tmp_path)
    assert [item.first.patient_id for item in series] == ["A", "B", "C"]


def test_no_row_names_a_patient_or_a_place(tmp_path: Path, scan: Scanner) -> None:
    add_series(tmp_path / "CANARY", "CANARY")[1].unlink()
    for number, keyword in enumerate(("Rows", "PixelSpacing", "PhotometricInterpretation")):
        edit_value = (keyword, b"CANARY")
        one_slice(tmp_path / f"CANARY{number}", lambda ds, v=edit_value: set_raw(ds, *v))
    (tmp_path / "CANARY.txt").write_text("CANARY", encoding="utf-8")
    _, rows = scan(tmp_path)
    assert len(rows) == 4
    assert "CANARY" not in repr(rows)


def test_file_name_that_is_no_utf8(tmp_path: Path, scan: Scanner) -> None:
    paths = add_series(tmp_path / "a", "A")
    odd = os.fsencode(tmp_path) + b"/m\xfcller"
    os.rename(os.fsencode(paths[0]), odd)
    series, rows = scan(tmp_path)
    assert not rows
    assert [len(item.slices) for item in series] == [4]


def test_links_to_folders_are_not_followed(tmp_path: Path, scan: Scanner) -> None:
    add_series(tmp_path / "root" / "a", "A")
    add_series(tmp_path / "other", "B")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "other")
    series, rows = scan(tmp_path / "root")
    assert codes(rows) == {"SYMLINK_LOOP": 1, "SYMLINK_OUTSIDE": 1}  # not followed, but told
    assert [item.first.patient_id for item in series] == ["A"]


def test_missing_and_empty_archives(tmp_path: Path, scan: Scanner) -> None:
    with pytest.raises(ArchiveError, match="no such folder"):
        scan(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ArchiveError, match="no such folder"):
        scan(tmp_path / "file")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(ArchiveError, match="holds no file"):
        scan(tmp_path / "empty")
