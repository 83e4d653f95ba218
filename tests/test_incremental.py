"""An archive that grows: what is written stays, and nobody changes sides."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import zarr

from launch.jobs import check_job
from launch.phantom import Phantom, draw, write_mask, write_series
from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.identity import pseudonym
from shards.build import build_shards, convert_part, plan_shards
from shards.check import check_shards
from shards.index import REPORT, SliceRow, read_index
from shards.masks import is_there
from shards.planfile import meaning
from shards.slots import PLAN, read_slots, stay
from tests.damage import flip
from tests.killing import contents, state

Make = Callable[..., Config]
BUCKET = "48x48_int16"
FILES = f"{BUCKET}/*/c/**/*"


def add(root: Path, number: int, phantom: Phantom, folder: str = "new") -> None:
    patient = f"PHANTOM{number:03d}"
    hu, label = draw(phantom, number)
    write_series(root / "dicom" / folder / patient, patient, hu, phantom)
    write_mask(root / "masks" / f"{patient}.nii.gz", label, phantom)


def of_patient(path: Path, patient: str) -> bool:
    return bool(pydicom.dcmread(path, force=True).get("PatientID") == patient)


def by_patient(rows: tuple[SliceRow, ...]) -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {}
    for row in rows:
        found.setdefault(row.patient, (row.split, []))[1].append(row.slot)
    return found


def test_new_studies_begin_new_shards_and_leave_the_others_alone(
    archive: Path, make_config: Make, tmp_path: Path, phantom: Phantom, key: bytes, ray_once: None
):
    """8 patients of 4 slices in shards of 6: slots 0 to 31, so shard 5 is short."""
    shutil.copytree(archive, tmp_path / "archive")
    config = make_config(tmp_path / "archive", tmp_path / "out", index=tmp_path / "index")
    build_shards(config)
    before, rows = state(config.shards, FILES), by_patient(read_index(config.shards))
    # one folder sorts before all others, one behind them
    add(tmp_path / "archive", 20, phantom, "!")
    add(tmp_path / "archive", 21, phantom, "~")
    build_shards(config)
    after = state(config.shards, FILES)
    assert {name: after[name] for name in before} == before
    new = set(after) - set(before)
    assert new == {f"{BUCKET}/{n}/c/{k}/0/0" for n in ("image", "label") for k in (6, 7)}
    grown = by_patient(read_index(config.shards))
    assert {name: grown[name] for name in rows} == rows
    slots = sorted(
        slot
        for number in (20, 21)
        for slot in grown[pseudonym(key, "patient", f"PHANTOM{number:03d}")][1]
    )
    assert slots == list(range(36, 44))  # 32 to 35 stay empty
    assert list(check_shards(config.shards)) == []
    image = zarr.open_array(config.shards / BUCKET / "image", mode="r")
    assert image.shape == (48, 48, 48)
    number = grown[pseudonym(key, "patient", "PHANTOM020")][1][0]
    np.testing.assert_array_equal(image[number : number + 4], draw(phantom, 20)[0])


def test_growing_in_steps_splits_and_stages_as_at_once(
    archive: Path, make_config: Make, tmp_path: Path, phantom: Phantom, ray_once: None
):
    shutil.copytree(archive, tmp_path / "archive")
    steps = make_config(tmp_path / "archive", tmp_path / "steps")
    build_shards(steps)
    add(tmp_path / "archive", 20, phantom)
    build_shards(steps)
    once = make_config(tmp_path / "archive", tmp_path / "once")
    build_shards(once)
    facts = [
        {(row.file_id, row.patient, row.split, row.order) for row in read_index(c.shards)}
        for c in (steps, once)
    ]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 36


def test_nothing_new_changes_no_byte_and_no_time(
    archive: Path, make_config: Make, tmp_path: Path, ray_once: None
):
    config = make_config(archive, tmp_path / "out", index=tmp_path / "index")
    build_shards(config)
    files, bytes_, headers = (
        state(config.shards, FILES) | state(config.shards, "commits/*"),
        contents(config.shards),
        state(tmp_path / "index", "catalog/*.parquet"),
    )
    build_shards(config)
    assert state(config.shards, FILES) | state(config.shards, "commits/*") == files
    assert contents(config.shards) == bytes_
    assert state(tmp_path / "index", "catalog/*.parquet") == headers
    assert len(headers) == 1


@pytest.fixture
def grown(
    archive: Path, make_config: Make, tmp_path: Path, phantom: Phantom, ray_once: None
) -> Config:
    """Shards that took three runs, so that they are laid out as no single run would."""
    shutil.copytree(archive, tmp_path / "archive")
    config = make_config(tmp_path / "archive", tmp_path / "out")
    build_shards(config)
    for number, folder in ((20, "!"), (21, "~")):
        add(tmp_path / "archive", number, phantom, folder)
        build_shards(config)
    return config


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_without_its_plan_everything_stays_where_it_is(grown: Config, how: str):
    before, files = contents(grown.shards), state(grown.shards, FILES)
    if how == "lost":
        (grown.shards / PLAN).unlink()
    else:
        flip(grown.shards / PLAN, 8 * ((grown.shards / PLAN).stat().st_size // 2))
    check_job(grown, repair=True)
    assert state(grown.shards, FILES) == files
    assert {k: v for k, v in contents(grown.shards).items() if k != REPORT} == {
        k: v for k, v in before.items() if k != REPORT
    }


def test_no_flipped_bit_of_the_plan_is_taken_for_another_plan(grown: Config, key: bytes):
    path, means = grown.shards / PLAN, meaning(grown.data, key)
    whole, data = read_slots(path, means), path.read_bytes()
    assert whole
    other = 0
    for bit in range(0, 8 * len(data), 3):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = read_slots(path, means)
        if found is None:
            other += 1
            continue
        assert list(found) == list(whole), bit  # never "another plan": all would be laid out anew
        for bucket, columns in whole.items():
            for one, same in zip(found[bucket], columns, strict=True):
                np.testing.assert_array_equal(one, same)
    assert other > len(data) // 2
    path.unlink()
    path.mkdir()
    assert read_slots(path, means) is None


def test_a_lost_plan_between_two_layouts_gives_no_slot_twice(grown: Config):
    """Killed half way to another shard size: commits of both are there, and no plan."""
    data = grown.data.model_copy(update={"shard_slices": 8, "index": grown.out / "index"})
    other = grown.model_copy(update={"data": data})
    plan_shards(other)
    convert_part(other, 1, 2)
    (grown.shards / PLAN).unlink()
    build_shards(other)
    places = [(row.bucket, row.slot) for row in read_index(grown.shards)]
    assert len(places) == len(set(places)) == 40
    assert list(check_shards(grown.shards)) == []


def test_commits_that_contradict_each_other_are_no_plan(caplog: pytest.LogCaptureFixture):
    names = np.array([3, 7], np.uint64)
    last = names, np.array([0, 3]), np.array([4, 4])
    kept, end = stay(last, names, np.array([4, 4]))
    assert (kept.tolist(), end) == ([-1, -1], 0)
    assert "slots of two series" in caplog.text
    kept, end = stay((names, np.array([0, 4]), last[2]), names, np.array([4, 4]))
    assert (kept.tolist(), end) == ([0, 4], 8)


def test_a_series_that_lost_its_last_slice_stays_without_its_plan(
    archive: Path, make_config: Make, tmp_path: Path, ray_once: None
):
    shutil.copytree(archive, tmp_path / "archive")
    config = make_config(tmp_path / "archive", tmp_path / "out", max_reject_fraction=0.5)
    last = max(
        (
            path
            for path in tmp_path.glob("archive/dicom/?/S*/IM*")
            if of_patient(path, "PHANTOM003")
        ),
        key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]),
    )
    last.write_bytes(last.read_bytes()[:-100])  # found out when it is decoded
    build_shards(config)
    rows, files = read_index(config.shards), state(config.shards, FILES)
    assert len(rows) == 31
    (config.shards / PLAN).unlink()
    check_job(config, repair=True)
    build_shards(config)
    assert read_index(config.shards) == rows
    assert state(config.shards, FILES) == files


def test_a_copy_of_the_archive_is_the_same_archive(grown: Config, tmp_path: Path):
    """Sizes and times of its files are kept, as `cp -a` and a restored backup do."""
    before, files = contents(grown.shards), state(grown.shards, FILES)
    shutil.copytree(tmp_path / "archive", tmp_path / "copy")
    update = {"archive": tmp_path / "copy/dicom", "labels": tmp_path / "copy/masks"}
    moved = grown.model_copy(update={"data": grown.data.model_copy(update=update)})
    build_shards(moved)
    assert state(grown.shards, FILES) == files
    assert contents(grown.shards) == before
    image = next((grown.shards / BUCKET / "image").glob("c/2/0/0"))
    flip(image, 4096)
    check_job(moved, repair=True)
    assert {k: v for k, v in contents(grown.shards).items() if k != REPORT} == before


def test_a_folder_that_cannot_be_listed_takes_no_patient_away(
    grown: Config, monkeypatch: pytest.MonkeyPatch
):
    before, real = contents(grown.shards), os.scandir

    def scandir(path: Any = ".") -> Any:
        if "PHANTOM020" in os.fsdecode(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        ShardError, match=r"\(1 FOLDER_UNREADABLE; .*\), and 1 of 8 shards would change"
    ):
        build_shards(grown)
    monkeypatch.undo()
    assert contents(grown.shards) == before
    shutil.rmtree(grown.data.archive / "!")  # a folder that is gone is another matter
    build_shards(grown)
    assert len(by_patient(read_index(grown.shards))) == 9


def half_unlisted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last slices of a series in a folder of their own, which cannot be listed now."""
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if os.fsdecode(path).endswith("half"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def links_to_nowhere(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (config.data.archive / "!" / "PHANTOM020").iterdir():
        if path.is_file():
            path.unlink()
            path.symlink_to("/mnt/store/gone")


def masks_out_of_reach(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.data.labels
    path = config.data.labels / "PHANTOM020.nii.gz"
    path.unlink()
    path.symlink_to("/mnt/store/gone")


@pytest.mark.parametrize("how", [half_unlisted, links_to_nowhere, masks_out_of_reach])
@pytest.mark.parametrize("unlabelled", ["skip", "keep"])
def test_what_cannot_be_read_today_takes_no_slice_away(
    grown: Config,
    how: Callable[[Config, pytest.MonkeyPatch], None],
    unlabelled: str,
    monkeypatch: pytest.MonkeyPatch,
):
    data = grown.data.model_copy(update={"unlabelled": unlabelled, "workers": 1})
    grown = grown.model_copy(update={"data": data})
    folder = grown.data.archive / "!" / "PHANTOM020"
    (folder / "half").mkdir()
    for path in sorted(p for p in folder.iterdir() if p.is_file())[2:]:
        path.rename(folder / "half" / path.name)
    build_shards(grown)
    before = contents(grown.shards)
    how(grown, monkeypatch)
    with pytest.raises(
        ShardError, match="objects that are new or could be read cannot be read now"
    ):
        build_shards(grown)
    monkeypatch.undo()
    assert contents(grown.shards) == before


def test_masks_that_vanish_after_the_plan_are_asked_for_again(
    archive: Path, make_config: Make, tmp_path: Path, ray_once: None
):
    shutil.copytree(archive, tmp_path / "archive")
    config = make_config(tmp_path / "archive", tmp_path / "out", index=tmp_path / "index")
    plan_shards(config)
    (tmp_path / "archive/masks").rename(tmp_path / "elsewhere")
    convert_part(config, 1, 2)
    (tmp_path / "elsewhere").rename(tmp_path / "archive/masks")
    build_shards(config)
    assert len(read_index(config.shards)) == 32
    assert list(check_shards(config.shards)) == []


@pytest.mark.parametrize("link", ["PHANTOM000.nii.gz", "PHANTOM000"])
def test_a_link_on_the_way_to_a_mask(tmp_path: Path, link: str):
    path = tmp_path / "PHANTOM000" / "a.nii.gz" if link == "PHANTOM000" else tmp_path / link
    assert not is_there(path, tmp_path)
    (tmp_path / link).symlink_to("/mnt/store/gone")
    with pytest.raises(FileNotFoundError):
        is_there(path, tmp_path)


def test_what_was_out_of_reach_all_along_stops_nobody(grown: Config):
    (grown.data.archive / "IM9").symlink_to("/mnt/store/gone")
    build_shards(grown)  # no shard changes
    shutil.rmtree(grown.data.archive / "~")
    build_shards(grown)  # known from the last run
    assert len(by_patient(read_index(grown.shards))) == 9
    (grown.shards / "objects.parquet").unlink()  # the plan says it as well
    (grown.data.archive / "IM8").symlink_to("/mnt/store/gone")
    shutil.rmtree(grown.data.archive / "!")
    with pytest.raises(ShardError, match=r"1 objects .* \(1 NOT_REGULAR; .*\), and 1 of 7 shards"):
        build_shards(grown)


def test_links_to_folders_are_followed_where_arrays_may_lie_alone(grown: Config, tmp_path: Path):
    """Another disk may hold an array; what no plan needs goes, and nothing behind other links."""
    mine = tmp_path / "mine"
    for place in ("a/0", "b"):
        (mine / place).mkdir(parents=True)
    for place in ("a/0/0", "b/x.json"):
        (mine / place).write_bytes(b"mine")
    image = grown.shards / BUCKET / "image"
    (image / "c/99").symlink_to(mine / "a")
    image.rename(tmp_path / "image")
    image.symlink_to(tmp_path / "image")
    (image / "c/98/0").mkdir(parents=True)
    (image / "c/98/0/0").write_bytes(b"stale")
    (grown.shards / BUCKET / ".zarr.json.7.partial").write_bytes(b"{")
    assert {p.path for p in check_shards(grown.shards)} == {
        f"{BUCKET}/image/c/98/0/0",
        f"{BUCKET}/image/c/99",
        f"{BUCKET}/.zarr.json.7.partial",
    }
    build_shards(grown)
    assert (mine / "a/0/0").read_bytes() == b"mine"
    assert not (image / "c/98/0/0").exists()  # pixels of somebody who was taken out
    assert image.is_symlink()
    assert [p.path for p in check_shards(grown.shards)] == [f"{BUCKET}/image/c/99"]
    (image / "c/99").unlink()
    before = contents(grown.shards)
    for spare in ("64x64_int16", "65x64_int16/image"):
        place = grown.shards / spare
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(mine)
        with pytest.raises(ShardError, match=f"{spare} is a link, and no slice goes there any mo"):
            build_shards(grown)
        place.unlink()
    assert contents(grown.shards) == before
    assert (mine / "b/x.json").read_bytes() == b"mine"
