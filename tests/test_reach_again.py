"""A second incident does not undo the look for what is out of reach; see test_reach.py."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import pytest

from medpsp.config import Config
from medpsp.dicom import walk
from medpsp.dicom.sandbox import Sandbox
from medpsp.dicom.scan import ScanRow
from medpsp.errors import DicomError, ShardError
from medpsp.types import SliceRef
from shards.build import build_shards, plan_shards
from shards.commit import committed_names, read_commit, write_commit
from shards.headers import file_id
from shards.index import read_index
from shards.slots import PLAN
from shards.write import Unreachable, _kept
from tests.damage import flip
from tests.trapmaker import Archive, Volume, enhanced

NOT_NOW = "objects that are new or could be read cannot be read now"


def behind_links(config: Config, key: bytes, store: Path) -> Path:
    """A study of which a second copy, on another disk, is the one that is not taken; its folder."""
    study = min(config.data.archive.rglob("IM0001")).parent
    shutil.copytree(study, store)
    names = [path.relative_to(config.data.archive).as_posix() for path in study.iterdir()]

    def behind(folder: str) -> bool:
        return all(file_id(key, f"{folder}/{Path(n).name}") > file_id(key, n) for n in names)

    links = config.data.archive / next(f"L{n}" for n in count() if behind(f"L{n}"))
    links.mkdir()
    for path in store.iterdir():
        (links / path.name).symlink_to(path)
    return study


def test_a_run_that_changes_nothing_does_not_get_used_to_it(
    own: Config, key: bytes, tmp_path: Path
) -> None:
    study = behind_links(own, key, tmp_path / "store")
    build_shards(own)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    build_shards(own)
    shutil.rmtree(study)
    for _ in range(2):
        with pytest.raises(ShardError, match=f"4 {NOT_NOW}"):
            build_shards(own)
    (tmp_path / "unmounted").rename(tmp_path / "store")
    build_shards(own)
    assert len(read_index(own.shards)) == 32


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_without_a_plan_second_copies_are_not_taken_for_unreadable(
    own: Config, key: bytes, tmp_path: Path, how: str
) -> None:
    study = behind_links(own, key, tmp_path / "store")
    build_shards(own)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    if how == "gone":
        (own.shards / PLAN).unlink()
    else:
        flip(own.shards / PLAN, -160)
    shutil.rmtree(study)
    with pytest.raises(ShardError, match=f"4 {NOT_NOW}"):
        build_shards(own)
    (tmp_path / "unmounted").rename(tmp_path / "store")
    build_shards(own)
    assert len(read_index(own.shards)) == 32


def test_a_shard_without_its_commit_is_written_all_the_same(own: Config, tmp_path: Path) -> None:
    study = min(own.data.archive.rglob("IM0001")).parent
    study.rename(tmp_path / "store")
    study.mkdir()
    for path in (tmp_path / "store").iterdir():
        (study / path.name).symlink_to(path)
    build_shards(own)
    for name in committed_names(own.shards):
        (own.shards / f"commits/{name}.json").unlink()
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with pytest.raises(ShardError, match=f"4 {NOT_NOW}"):
        build_shards(own)
    (tmp_path / "unmounted").rename(tmp_path / "store")
    build_shards(own)
    assert len(read_index(own.shards)) == 32


def refusal(name: str, frame: int) -> ScanRow:
    """Of a slice that killed its decoder."""
    blank = {f.name: None for f in fields(ScanRow)}
    return replace(ScanRow(**blank), file_id=name, frame=frame, code="DEC_OOM", detail="")


def test_a_slice_that_a_shard_never_held_stops_no_renamed_study(own: Config) -> None:
    build_shards(own)
    study = min(own.data.archive.rglob("IM0001")).parent
    study.rename(study.with_name("moved"))
    plan = plan_shards(own)
    held = {name: read_commit(own.shards, name) for name in committed_names(own.shards)}
    (shard, moved), *_ = [
        (shard, part)
        for shard in map(plan.load, plan.shards)
        for part in shard.parts
        if (commit := held[shard.name])
        and part.planned.series.slices[part.start].file_id not in commit.columns["file_id"]
    ]
    old = held[shard.name]
    assert old
    place = old.columns["series"].index(moved.planned.name)
    columns = {k: [v for n, v in enumerate(vs) if n != place] for k, vs in old.columns.items()}
    write_commit(own.shards, replace(old, columns=columns))  # as if one had been refused then
    here = moved.planned.series.slices[moved.start : moved.stop]
    refused = [refusal(ref.file_id, ref.frame) for ref in here]
    slots = range(moved.slot, moved.slot + len(here))
    assert _kept(own.shards, shard, "another", refused[:1], slots[1:]) is None
    with pytest.raises(Unreachable, match="2 DEC_OOM"):
        _kept(own.shards, shard, "another", refused[:2], slots[2:])
    for empty in (slots[0:3:2], slots[2:3]):  # the first one lost for good, or there again
        with pytest.raises(Unreachable, match="1 DEC_OOM"):
            _kept(own.shards, shard, "another", [refused[2]], {*slots} - {*empty})


def test_a_frame_that_was_missing_does_not_excuse_the_others(
    own: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own.model_copy(update={"data": own.data.model_copy(update={"unlabelled": "keep"})})
    store = tmp_path / "store"
    volumes = [Volume(code=n, shape=(6, 48, 64)) for n in (0, 1)]
    enhanced(Archive(store), volumes, [*((0, k) for k in range(6)), (1, 5)])
    (own.data.archive / "MF").symlink_to(store / "enhanced")

    def digest(box: Sandbox, ref: object) -> str:
        raise DicomError("DEC_TIMEOUT", "a busy machine")

    monkeypatch.setattr(Sandbox, "digest", digest)
    build_shards(own)
    assert len(read_index(own.shards)) == 37
    store.rename(tmp_path / "unmounted")
    for _ in range(2):
        with pytest.raises(ShardError, match=f"1 {NOT_NOW}"):
            build_shards(own)
    (tmp_path / "unmounted").rename(store)
    min(own.data.labels.glob("*.nii.gz")).touch()  # type: ignore[union-attr]
    build_shards(own)
    assert len(read_index(own.shards)) == 37


def test_a_folder_that_hides_nothing_of_ours(own: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    build_shards(own)
    study = min(own.data.archive.rglob("IM0001")).parent
    shut = [".Trash-1000"]
    (own.data.archive / shut[0]).mkdir()
    real = walk._listed

    def listed(folder: str) -> object:
        if Path(folder).name in shut:
            raise DicomError("FOLDER_UNREADABLE", "EACCES")
        return real(folder)

    monkeypatch.setattr(walk, "_listed", listed)
    min(own.data.labels.glob("*.nii.gz")).touch()  # type: ignore[union-attr]
    build_shards(own)
    shut.append(study.name)
    with pytest.raises(ShardError, match=f"1 {NOT_NOW}"):
        build_shards(own)


def test_a_folder_that_hid_something_stays_a_loss(
    own: Config, key: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = behind_links(own, key, tmp_path / "store")
    build_shards(own)
    (links,) = (path for path in own.data.archive.iterdir() if path.name.startswith("L"))
    real = walk._listed

    def listed(folder: str) -> object:
        if Path(folder).name == links.name:
            raise DicomError("FOLDER_UNREADABLE", "EACCES")
        return real(folder)

    monkeypatch.setattr(walk, "_listed", listed)
    for _ in range(3):
        build_shards(own)
    shutil.rmtree(study)
    for _ in range(2):
        with pytest.raises(ShardError, match=f"1 {NOT_NOW}"):
            build_shards(own)


def test_an_object_that_gave_nothing_may_get_worse(
    own: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted(own.data.archive.rglob("IM*"))[5]
    copy = Path(shutil.copy2(file, file.with_name("COPY")))
    real = Sandbox.digest

    def digest(box: Sandbox, ref: SliceRef) -> str:
        if ref.path.endswith("COPY"):
            raise DicomError("FILE_UNREADABLE", "EIO")
        return real(box, ref)

    monkeypatch.setattr(Sandbox, "digest", digest)
    build_shards(own)
    count = len(read_index(own.shards))
    copy.unlink()
    copy.symlink_to("/mnt/gone/COPY")
    min(own.data.labels.glob("*.nii.gz")).touch()  # type: ignore[union-attr]
    build_shards(own)
    assert len(read_index(own.shards)) == count


def test_what_was_out_of_reach_stays_known_without_a_plan(own: Config) -> None:
    (own.data.archive / "dead").symlink_to("/mnt/gone/IM9")
    build_shards(own)
    (own.shards / PLAN).unlink()
    build_shards(own)
    min(own.data.labels.glob("*.nii.gz")).touch()  # type: ignore[union-attr]
    build_shards(own)
    assert len(read_index(own.shards)) == 32
