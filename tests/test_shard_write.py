"""What lies in the shards, read back with plain zarr-python and pyarrow."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from launch.phantom import Phantom, draw
from medpsp.config import Config
from medpsp.dicom.names import NameRule
from medpsp.errors import ShardError
from medpsp.identity import pseudonym, split_of, unit_hash
from medpsp.types import Series, SliceRef
from shards.bucket import clear_stale, create_bucket
from shards.commit import committed, read_commit
from shards.index import SliceRow, read_index, write_bytes_durably
from shards.layout import PlannedSeries, plan_shards
from shards.reader import ShardReader
from shards.settings import WriteSettings
from shards.tables import OBJECTS_SCHEMA
from shards.write import write_shard
from tests import dying
from tests.damage import write_rows

BUCKET = "48x48_int16"


def patient(key: bytes, number: int) -> str:
    return pseudonym(key, "patient", f"PHANTOM{number:03d}")


def volume(made: Config, name: str, rows: list[SliceRow]) -> np.ndarray:
    array = zarr.open_array(made.shards / BUCKET / name, mode="r")
    return np.stack([array[row.slot] for row in rows])


@pytest.mark.parametrize("number", range(8))
def test_images_are_the_phantoms_hu_and_labels_its_classes(
    made: Config, key: bytes, phantom: Phantom, number: int
):
    hu, label = draw(phantom, number)
    rows = [row for row in read_index(made.shards) if row.patient == patient(key, number)]
    assert [row.slice_index for row in rows] == [0, 1, 2, 3]
    image = volume(made, "image", rows)
    assert image.dtype == np.int16
    np.testing.assert_array_equal(image, hu)
    stored = volume(made, "label", rows)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, label)
    assert [row.histogram for row in rows] == [
        (*(int((one == k).sum()) for k in range(4)), 0) for one in label
    ]
    assert all(row.labelled for row in rows)


def test_index_rows_say_where_each_slice_lies(made: Config, key: bytes):
    rows = read_index(made.shards)
    assert [(row.bucket, row.slot) for row in rows] == [(BUCKET, slot) for slot in range(32)]
    assert len({(row.series, row.slice_index) for row in rows}) == 32
    assert len({row.series for row in rows}) == 8
    row = next(r for r in rows if r.patient == patient(key, 6) and r.slice_index == 3)
    expected = {
        "modality": "CT",
        "photometric": "MONOCHROME2",
        "z_mm": -685.0,  # -700 mm and three steps of 5 mm
        "spacing": (2.6, 2.6, 5.0),
        "window_center": 40.0,
        "window_width": 400.0,
        "voi_center": 40.0,
        "voi_width": 400.0,
        "split": "train",
        "order": unit_hash(key, "stage", "PHANTOM006"),
        # index 3 of four is written as the first file
        "file_id": pseudonym(key, "file", "0/S00006/IM0001"),
    }
    assert {name: asdict(row)[name] for name in expected} == expected
    half = 48 * 2.6 / 2
    np.testing.assert_allclose(
        np.array(row.affine).reshape(4, 4),
        [[2.6, 0, 0, -half], [0, 2.6, 0, -half], [0, 0, 5, -700], [0, 0, 0, 1]],
        atol=1e-6,
    )
    for number in range(8):
        splits = {r.split for r in rows if r.patient == patient(key, number)}
        assert splits == {split_of(key, f"PHANTOM{number:03d}", 0.25, 0.25)}
    assert len(read_index(made.shards, "val")) == 8


def test_the_store_is_zarr_3_with_the_codecs_of_the_contract(made: Config):
    def codec(name: str, **configuration: Any) -> dict[str, Any]:
        return {"name": name, "configuration": configuration} if configuration else {"name": name}

    for name, dtype, level, shuffle in (
        ("image", "int16", 1, "shuffle"),
        ("label", "uint8", 3, "noshuffle"),
    ):
        tree = json.loads((made.shards / BUCKET / name / "zarr.json").read_text())
        assert (tree["zarr_format"], tree["shape"], tree["data_type"]) == (3, [36, 48, 48], dtype)
        assert tree["chunk_grid"]["configuration"]["chunk_shape"] == [6, 48, 48]
        (sharding,) = tree["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["chunk_shape"] == [1, 48, 48]
        assert sharding["configuration"]["index_location"] == "end"
        assert [c["name"] for c in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
        to_bytes, blosc, crc = sharding["configuration"]["codecs"]
        assert crc == codec("crc32c")
        assert (to_bytes["name"], blosc["name"]) == ("bytes", "blosc")
        assert dtype == "uint8" or to_bytes["configuration"] == {"endian": "little"}
        assert blosc["configuration"] == {
            "cname": "zstd",
            "clevel": level,
            "shuffle": shuffle,
            "typesize": np.dtype(dtype).itemsize,
            "blocksize": 0,
        }
    files = sorted(p.relative_to(made.shards).as_posix() for p in made.shards.rglob("c/*/0/0"))
    assert files == sorted(f"{BUCKET}/{n}/c/{k}/0/0" for n in ("image", "label") for k in range(6))
    assert zarr.open_group(made.shards, mode="r")[BUCKET]["image"].shape == (36, 48, 48)


def test_the_reader_equals_zarr_python_on_every_slice(made: Config):
    reader = ShardReader(made.shards)
    image = zarr.open_array(made.shards / BUCKET / "image", mode="r")[:]
    label = zarr.open_array(made.shards / BUCKET / "label", mode="r")[:]
    for slot in range(32):
        one, mask = reader.read(BUCKET, slot)
        np.testing.assert_array_equal(one, image[slot])
        np.testing.assert_array_equal(mask, label[slot])


def test_the_reader_survives_a_fork(made: Config):
    reader = ShardReader(made.shards)
    expected = int(reader.read(BUCKET, 9)[0].astype(np.int64).sum())
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion here: a child that raised would go on as a second pytest
        total = int(reader.read(BUCKET, 9)[0].astype(np.int64).sum())
        os.write(write_end, str(total).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == str(expected)
    assert os.waitpid(child, 0)[1] == 0


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_missing, damage_empty, damage_cut, damage_byte])
@pytest.mark.parametrize("name", ["image", "label"])
def test_a_damaged_shard_is_never_read_as_fill_values(copied: Config, damage: Any, name: str):
    damage(copied.shards / BUCKET / name / "c/1/0/0")
    reader = ShardReader(copied.shards)
    with pytest.raises(ShardError, match=f"{BUCKET}/{name} slot 6 cannot be read"):
        reader.read(BUCKET, 6)
    reader.read(BUCKET, 12)  # the others are whole


def test_reading_what_was_never_there_says_so(made: Config, tmp_path: Path):
    with pytest.raises(ShardError, match="slot 99 cannot be read"):
        ShardReader(made.shards).read(BUCKET, 99)
    with pytest.raises(ShardError, match="slot 0 cannot be read"):
        ShardReader(tmp_path).read(BUCKET, 0)


# one shard by hand


def one_series(folder: Path, count: int, images: dict[int, bytes]) -> Series:
    """Plain images of 2 x 3 grey pixels; those not in ``images`` do not exist."""
    refs = []
    for number in range(count):
        path = folder / f"{number}.pgm"
        if number in images:
            path.write_bytes(b"P5 3 2 255\n" + images[number])
        refs.append(
            SliceRef(
                path=str(path),
                file_id=f"{number:016x}",
                patient_id="Doe",
                series_uid="1.2.3",
                modality="IMAGE8",
                rows=2,
                columns=3,
                dtype="int16",
                photometric="MONOCHROME2",
            )
        )
    return Series(slices=tuple(refs), affine=None, z_mm=())


SETTINGS = WriteSettings(
    source="voc",
    labels=NameRule(classes=("background", "organ")),
    label_map=(),
    mask_geometry="affine",
    mask_resample="never",
    window=None,
    header_window=False,
    padding="background",
    shard_slices=4,
)


def plan_of(series: Series, shard_slices: int = 4) -> Any:
    item = PlannedSeries(series=series, patient="p", name="s", split="train", order=0.25, stamp="0")
    (plan,) = plan_shards([item], shard_slices)
    return plan


def test_a_bad_source_leaves_an_empty_slot_and_a_row(tmp_path: Path):
    series = one_series(tmp_path, 3, {0: bytes(range(6)), 2: b"\xff" * 6})
    plan = plan_of(series)
    root = tmp_path / "shards"
    create_bucket(root, "2x3_int16", 3, SETTINGS)
    commit = write_shard(root, plan, SETTINGS)
    assert [row["slot"] for row in commit.rows] == [0, 2]
    assert [(r["file_id"], r["status"], r["code"]) for r in commit.refused] == [
        (f"{1:016x}", "quarantined", "FILE_UNREADABLE")
    ]
    image = zarr.open_array(root / "2x3_int16/image", mode="r")[:]
    assert image.tolist() == [[[0, 1, 2], [3, 4, 5]], [[0] * 3] * 2, [[255] * 3] * 2]
    label = zarr.open_array(root / "2x3_int16/label", mode="r")[:]
    assert (label == 255).all()  # no mask: ignored everywhere
    row = commit.rows[0]
    assert (list(row["histogram"]), row["labelled"]) == ([0, 0, 6], False)
    assert (row["window_center"], row["window_width"]) == (127.5, 255.0)
    assert row["affine"] == ()
    assert all(math.isnan(row[k]) for k in ("z_mm", "voi_center", "voi_width"))


def test_an_image_unlike_its_header_is_refused_and_not_cut_to_fit(tmp_path: Path):
    series = one_series(tmp_path, 2, {0: bytes(6), 1: bytes(6)})
    (tmp_path / "1.pgm").write_bytes(b"P5 3 2 65535\n" + b"\xff" * 12)  # 16 bits since the scan
    commit = write_shard(tmp_path / "shards", plan_of(series), SETTINGS)
    assert [row["slot"] for row in commit.rows] == [0]
    assert [r["code"] for r in commit.refused] == ["PIX_UNLIKE_SERIES"]


def test_a_slice_that_kills_its_child_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The third and the twentieth, each within an answer of many slices."""
    monkeypatch.setattr("shards.write.CHILD", "tests.dying")
    images = {n: bytes([n]) * 6 for n in range(40)}
    series = one_series(tmp_path, 40, images)
    slices = list(series.slices)
    for number in (2, 19):
        deadly = tmp_path / f"{dying.ALWAYS}{number}.pgm"
        Path(slices[number].path).rename(deadly)
        slices[number] = replace(slices[number], path=str(deadly))
    plan = plan_of(replace(series, slices=tuple(slices)), 64)
    settings = replace(SETTINGS, shard_slices=64)
    create_bucket(tmp_path, plan.bucket, 64, settings)
    commit = write_shard(tmp_path, plan, settings)
    assert [(row["file_id"], row["code"]) for row in commit.refused] == [
        (f"{n:016x}", "DEC_OOM")
        for n in (2, 19)  # what SIGKILL is taken for
    ]
    assert commit.columns["slot"] == [n for n in range(40) if n not in (2, 19)]
    reader = ShardReader(tmp_path)
    for slot in commit.columns["slot"]:
        assert set(reader.read(plan.bucket, slot)[0].ravel()) == {slot}
    again = write_shard(tmp_path, plan_of(one_series(tmp_path, 1, {0: bytes(6)})), SETTINGS)
    assert len(again.columns["slot"]) == 1  # the next child is a new one


def test_a_commit_counts_only_with_its_plan_and_whole_files(tmp_path: Path):
    series = one_series(tmp_path, 1, {0: bytes(6)})
    plan = plan_of(series)
    digest = plan.digest(SETTINGS.text)
    assert not committed(tmp_path, plan.name, digest)
    commit = write_shard(tmp_path, plan, SETTINGS)
    again = read_commit(tmp_path, plan.name)
    assert again is not None
    assert (again.files, again.digest) == (commit.files, digest)
    assert committed(tmp_path, plan.name, digest)
    assert not committed(tmp_path, plan.name, "another plan")
    (tmp_path / "2x3_int16/label/c/0/0/0").write_bytes(b"x")
    assert not committed(tmp_path, plan.name, digest)
    write_shard(tmp_path, plan, SETTINGS)
    assert committed(tmp_path, plan.name, digest)
    (tmp_path / "commits/2x3_int16-0.json").write_text("{")
    assert not committed(tmp_path, plan.name, digest)


def test_making_a_bucket_again_leaves_its_shards(tmp_path: Path):
    plan = plan_of(one_series(tmp_path, 1, {0: bytes(6)}))
    create_bucket(tmp_path, "2x3_int16", 1, SETTINGS)
    write_shard(tmp_path, plan, SETTINGS)
    create_bucket(tmp_path, "2x3_int16", 1, SETTINGS)
    assert committed(tmp_path, plan.name, plan.digest(SETTINGS.text))


def test_what_no_plan_names_is_deleted_and_nothing_else(tmp_path: Path):
    plan = plan_of(one_series(tmp_path, 1, {0: bytes(6)}))
    root = tmp_path / "shards"
    create_bucket(root, "2x3_int16", 1, SETTINGS)
    write_shard(root, plan, SETTINGS)
    keep = sorted(p for p in root.rglob("*") if p.is_file())
    for stale in (
        "2x3_int16/image/c/1/0/0",
        "2x3_int16/image/c/0/0/.0.77.partial",
        "9x9_int16/image/c/0/0/0",
        "9x9_int16/zarr.json",
        "commits/2x3_int16-1.json",
        ".manifest.json.77.partial",
    ):
        (root / stale).parent.mkdir(parents=True, exist_ok=True)
        (root / stale).write_bytes(b"x")
    mine = root / "notes.txt"
    mine.write_text("not ours")
    clear_stale(root, [plan])
    assert sorted(p for p in root.rglob("*") if p.is_file()) == sorted([*keep, mine])


def test_files_appear_whole_and_with_their_mode(tmp_path: Path):
    """With umask 0 and no chmod on the way, a file of mode 0600 can only have been born so."""
    target, events, watching = tmp_path / "deep" / "file", [], [True]

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in ("os.chmod", "os.rename"):
            events.append((event, target.exists()))

    sys.addaudithook(audit)
    mask = os.umask(0)
    try:
        write_bytes_durably(target, b"secret", mode=0o600)
    finally:
        os.umask(mask)
        watching.clear()
    assert events == [("os.rename", False)]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert target.read_bytes() == b"secret"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path):
    target = tmp_path / "file"
    target.mkdir()  # a file cannot be renamed onto a folder
    with pytest.raises(OSError, match="directory"):
        write_bytes_durably(target, b"new")
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_table_keeps_its_columns(tmp_path: Path):
    import pyarrow.parquet as pq

    write_rows(tmp_path / "t.parquet", [], OBJECTS_SCHEMA)
    table = pq.read_table(tmp_path / "t.parquet")
    assert (table.num_rows, table.schema) == (0, OBJECTS_SCHEMA)
