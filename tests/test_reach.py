"""What is out of reach for a while costs nothing that is written, and what is not ours stays."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from launch.jobs import check_job
from launch.phantom import Phantom, draw, write_mask, write_series
from medpsp.config import Config
from medpsp.dicom.sandbox import Sandbox
from medpsp.errors import DicomError, ShardError
from medpsp.identity import pseudonym
from medpsp.types import SliceRef
from shards import repair
from shards.build import build_shards, convert_part, plan_shards, publish_shards
from shards.check import check_shards
from shards.index import REPORT, read_index
from shards.slots import PLAN
from tests.damage import flip
from tests.killing import contents

BUCKET = "48x48_int16"


@pytest.fixture
def own(own: Config) -> Config:
    """Converted."""
    build_shards(own)
    return own


def slices(config: Config) -> Counter[str]:
    return Counter(row.patient for row in read_index(config.shards))


def masks_of_shard(config: Config, key: bytes, number: int) -> list[Path]:
    """Of the patients that share a shard."""
    assert config.data.labels
    here = {row.patient for row in read_index(config.shards) if row.slot // 6 == number}
    masks = sorted(config.data.labels.glob("*.nii.gz"))
    return [m for m in masks if pseudonym(key, "patient", m.name.split(".")[0]) in here]


def test_another_try_loses_no_neighbour(own: Config, key: bytes, tmp_path: Path) -> None:
    """What one run could not read is asked for again, while a neighbour is out of reach."""
    first, second, *_ = masks_of_shard(own, key, 0)
    whole, everybody = contents(own.shards), slices(own)
    shutil.rmtree(own.shards)
    missing = []
    for mask in (first, second, first):
        plan_shards(own)
        mask.rename(tmp_path / "away")
        convert_part(own, 1, 1)
        (tmp_path / "away").rename(mask)
        publish_shards(own)
        missing.append(everybody.total() - slices(own).total())
    assert missing[0] == 4
    assert missing == sorted(missing, reverse=True)  # a shard stays until no slice of it would go
    build_shards(own)
    assert contents(own.shards) == whole


def test_a_shard_that_must_change_waits_for_what_it_holds(
    own: Config, key: bytes, tmp_path: Path
) -> None:
    first, second, *_ = masks_of_shard(own, key, 0)
    before = slices(own)
    first.touch()
    plan_shards(own)
    second.rename(tmp_path / "away")
    with pytest.raises(
        ShardError,
        match=rf"shard {BUCKET}-\d: must be made anew, and slices of series that it holds "
        r"cannot be read now \(\d FILE_UNREADABLE; .*; shards that wait for such: \d",
    ):
        convert_part(own, 1, 1)
    (tmp_path / "away").rename(second)
    build_shards(own)
    assert slices(own) == before
    assert list(check_shards(own.shards)) == []


def test_a_moved_study_is_known_by_its_place(own: Config, key: bytes, tmp_path: Path) -> None:
    """Names of its files shift; while its mask is out of reach the old slices stay."""
    first, *_ = masks_of_shard(own, key, 0)
    before = slices(own)
    patient = first.name.split(".")[0]
    files = [f for f in own.data.archive.rglob("IM*") if dcmread(f).PatientID == patient]
    files = sorted(files, reverse=True)
    names = [files[0].with_name("IM99"), *files[:-1]]  # each has the name of the next one
    for file, name in zip(files, names, strict=True):
        file.rename(name)
    plan_shards(own)
    first.rename(tmp_path / "away")
    with pytest.raises(ShardError, match="slices of series that it holds cannot be read now"):
        convert_part(own, 1, 1)
    (tmp_path / "away").rename(first)
    build_shards(own)
    assert slices(own) == before


def test_repair_keeps_what_it_cannot_read(
    own: Config, key: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks go away between its plan and its conversion."""
    first, *_ = masks_of_shard(own, key, 0)
    whole = contents(own.shards)
    flip(own.shards / BUCKET / "image/c/0/0/0", 99)
    damaged, real = contents(own.shards), repair._forget

    def planned(*arguments: Any) -> None:
        real(*arguments)
        first.rename(tmp_path / "away")

    monkeypatch.setattr(repair, "_forget", planned)
    with pytest.raises(ShardError, match="slices of series that it holds cannot be read now"):
        check_job(own, repair=True)
    monkeypatch.undo()
    now = contents(own.shards)
    assert {k: v for k, v in now.items() if k.startswith(BUCKET)} == {
        k: v for k, v in damaged.items() if k.startswith(BUCKET)
    }
    (tmp_path / "away").rename(first)
    build_shards(own)  # it knows that the shard is damaged
    assert list(check_shards(own.shards)) == []
    assert {k: v for k, v in contents(own.shards).items() if k != REPORT} == whole


def test_a_copy_that_cannot_be_compared_now_is_no_conflict(
    own: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted((own.data.archive).rglob("IM*"))[5]
    shutil.copy2(file, file.with_name("COPY"))
    build_shards(own)
    before = contents(own.shards)
    assert len(read_index(own.shards)) == 32

    def digest(box: Sandbox, ref: SliceRef) -> str:
        raise DicomError("DEC_TIMEOUT", "a busy machine")

    monkeypatch.setattr(Sandbox, "digest", digest)
    with pytest.raises(ShardError, match=r"2 objects .*cannot be read now \(2 DEC_TIMEOUT; "):
        build_shards(own)
    monkeypatch.undo()
    build_shards(own)
    assert contents(own.shards) == before


def add(config: Config, folder: Path, phantom: Phantom) -> list[Path]:
    """The series of one more patient."""
    hu, label = draw(phantom, 20)
    write_series(folder, "PHANTOM020", hu, phantom)
    assert config.data.labels
    write_mask(config.data.labels / "PHANTOM020.nii.gz", label, phantom)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_second_name_of_a_study_keeps_it(own: Config, tmp_path: Path, phantom: Phantom) -> None:
    files = add(own, tmp_path / "store", phantom)
    for name in ("A", "B"):
        (own.data.archive / name).mkdir()
        for path in files:
            (own.data.archive / name / path.name).symlink_to(path)
    build_shards(own)
    before = contents(own.shards)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    shutil.rmtree(own.data.archive / "A")
    with pytest.raises(ShardError, match=r"4 objects .*cannot be read now \(4 NOT_REGULAR; "):
        build_shards(own)
    (tmp_path / "unmounted").rename(tmp_path / "store")
    build_shards(own)
    assert contents(own.shards).keys() == before.keys()
    assert len(read_index(own.shards)) == 36


@pytest.mark.parametrize("lost", ["", PLAN])
def test_tables_of_an_earlier_run_are_not_asked(
    own: Config, tmp_path: Path, phantom: Phantom, lost: str
) -> None:
    """Links to a known file became a study of its own, which nobody has published yet."""
    files = add(own, tmp_path / "store", phantom)
    known = sorted(own.data.archive.rglob("IM*"))[0]
    links = [own.data.archive / "z" / path.name for path in files]
    links[0].parent.mkdir()
    for link in links:
        link.symlink_to(known)
    build_shards(own)
    for link, path in zip(links, files, strict=True):
        link.unlink()
        link.symlink_to(path)
    plan_shards(own)
    convert_part(own, 1, 1)
    before = {k: v for k, v in contents(own.shards).items() if k.startswith((BUCKET, "commits"))}
    if lost:
        (own.shards / lost).unlink()
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with pytest.raises(
        ShardError, match="4 objects that are new or could be read cannot be read now"
    ):
        build_shards(own)
    (tmp_path / "unmounted").rename(tmp_path / "store")
    build_shards(own)
    assert {k: v for k, v in contents(own.shards).items() if k in before} == before
    assert len(read_index(own.shards)) == 36


@pytest.mark.parametrize("place", ["commits", f"{BUCKET}/image"])
def test_shards_on_a_disk_that_is_not_mounted_are_not_missing(
    own: Config, tmp_path: Path, place: str
) -> None:
    path = own.shards / place
    path.rename(tmp_path / "disk")
    path.symlink_to(tmp_path / "disk")
    plan_shards(own)
    before = contents(own.shards)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    for run in (lambda c: convert_part(c, 1, 1), publish_shards, build_shards):
        with pytest.raises(ShardError, match=rf"{place} is a link to nowhere; is its disk mounted"):
            run(own)
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert contents(own.shards) == before


def write(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")


def test_what_is_not_ours_stays(own: Config, tmp_path: Path) -> None:
    """Names like ours in buckets that no plan needs, and whatever else lies about."""
    root = own.shards
    theirs = (
        "stranger/.film.mkv.partial",
        ".mine.partial",
        "12x12_uint16/image/c/0/0/0",
        "64x64_int16/notes.txt",
        f"{BUCKET}/notes.txt",
        f"{BUCKET}/image/c/99/0/film.mkv",
        "commits/12x12_uint16-0.json",
        "commits/notes.txt",
        "65x65_int16/image",
        "66x66_int16/zarr.json/notes.txt",
    )
    ours = (
        f"{BUCKET}/image/c/99/0/0",
        "64x64_int16/zarr.json",
        "64x64_int16/label/c/0/0/0",
        "commits/64x64_int16-0.json",
        "commits/.64x64_int16-0.json.7.partial",
        "64x64_float32/zarr.json",
    )
    write(root, theirs)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/.film.mkv.partial").write_bytes(b"film")
    (root / "away").symlink_to(tmp_path / "disk")
    flip(root / BUCKET / "image/c/0/0/0", 99)
    with pytest.raises(ShardError, match=r"11 problems, the first: \.mine"):
        check_job(own, repair=True)
    assert [name for name in theirs if not (root / name).exists()] == []
    write(root, ours)
    build_shards(own)
    assert [name for name in theirs if not (root / name).exists()] == []
    assert [name for name in ours if (root / name).exists()] == []
    assert not (root / "64x64_float32").exists()
    assert (tmp_path / "disk/.film.mkv.partial").read_bytes() == b"film"
    left = {p.path: p.kind for p in check_shards(root)}
    assert left == {**dict.fromkeys(theirs, "surplus"), "away": "surplus"}


def test_a_spare_link_is_told_before_anything_is_published(own: Config, tmp_path: Path) -> None:
    plan_shards(own)
    convert_part(own, 1, 1)
    (tmp_path / "mine").mkdir()
    (own.shards / "64x64_int16").symlink_to(tmp_path / "mine")
    with pytest.raises(ShardError, match="64x64_int16 is a link, and no slice goes there any mor"):
        publish_shards(own)
