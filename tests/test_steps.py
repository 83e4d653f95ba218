"""Steps as commands of their own: what may happen between them."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.phantom import Phantom, draw
from medpsp.config import Config
from medpsp.errors import ConfigError, MedpspError, ShardError
from medpsp.identity import pseudonym
from shards.build import build_shards, convert_part, plan_shards, publish_shards
from shards.check import check_shards
from shards.index import read_index, read_objects
from shards.reader import ShardReader
from tests.killing import command, contents, state, wait_for, workers

Make = Callable[..., Config]


@pytest.fixture
def own(archive: Path, tmp_path: Path, make_config: Make, ray_once: None) -> Config:
    """An archive of its own, free to be changed."""
    shutil.copytree(archive, tmp_path / "archive")
    return make_config(tmp_path / "archive", tmp_path / "out", index=tmp_path / "index")


def codes(config: Config) -> dict[str, str]:
    return {row.file_id: row.code for row in read_objects(config.shards) if row.code}


def test_a_file_that_changes_after_the_scan_is_refused_and_read_the_next_time(
    own: Config, key: bytes, phantom: Phantom
):
    plan_shards(own)
    dicom = own.data.archive
    for name in ("IM0001", "IM0002"):  # another patient's slice under this one's name
        shutil.copy(dicom / "1/S00001" / name, dicom / "0/S00000" / name)
    convert_part(own, 1, 1)
    publish_shards(own)
    changed = [pseudonym(key, "file", f"0/S00000/{n}") for n in ("IM0001", "IM0002")]
    assert {codes(own)[name] for name in changed} == {"SOURCE_CHANGED"}
    patient = pseudonym(key, "patient", "PHANTOM000")
    rows = [row for row in read_index(own.shards) if row.patient == patient]
    assert len(rows) == 2
    reader, (hu, _) = ShardReader(own.shards), draw(phantom, 0)
    for row in rows:
        image, _ = reader.read(row.bucket, row.slot)
        np.testing.assert_array_equal(image, hu[row.slice_index])
    build_shards(own)
    assert sorted(codes(own).values()).count("DUP_IDENTICAL") == 2  # the copy or what it is of
    assert "SOURCE_CHANGED" not in codes(own).values()


def test_a_mask_that_changes_after_the_scan_is_not_used(own: Config, key: bytes):
    plan_shards(own)
    assert own.data.labels is not None
    mask = own.data.labels / "PHANTOM000.nii.gz"
    shutil.copy(own.data.labels / "PHANTOM001.nii.gz", mask)
    convert_part(own, 1, 1)
    publish_shards(own)
    mine = [pseudonym(key, "file", f"0/S00000/IM{n:04d}") for n in range(1, 5)]
    assert {codes(own)[name] for name in mine} == {"SOURCE_CHANGED"}


def test_a_file_that_vanishes_after_the_scan_does_not_hold_up_the_rest(own: Config, key: bytes):
    plan_shards(own)
    (own.data.archive / "2/S00002/IM0003").unlink()
    convert_part(own, 1, 1)
    manifest = publish_shards(own)
    assert manifest.slices == 31
    assert codes(own)[pseudonym(key, "file", "2/S00002/IM0003")] == "FILE_UNREADABLE"
    assert list(check_shards(own.shards)) == []


def test_a_plan_serves_its_own_shards_only(own: Config, make_config: Make, tmp_path: Path):
    build_shards(own)
    before = contents(own.shards)
    other = own.model_copy(update={"out": tmp_path / "other"})
    shutil.rmtree(own.data.archive / "2/S00002")
    plan_shards(other)
    for config in (own, own.model_copy(update={"out": tmp_path / "fresh"})):
        with pytest.raises(ShardError, match=r"^out: the plan in data\.index is not of the shards"):
            convert_part(config, 1, 1)
        with pytest.raises(ShardError, match=r"^out: the plan in data\.index is not of the shards"):
            publish_shards(config)
    assert contents(own.shards) == before
    assert not (tmp_path / "fresh").exists()


def test_no_manifest_stands_over_shards_that_change(own: Config):
    build_shards(own)
    (own.shards / "commits/48x48_int16-2.json").unlink()
    convert_part(own, 1, 1)
    assert not (own.shards / "manifest.json").exists()
    publish_shards(own)
    assert list(check_shards(own.shards)) == []


@pytest.mark.parametrize("name", ["plan.json", "heads.npy", "records", "rows"])
def test_a_flipped_bit_of_the_plan_is_noticed(own: Config, name: str):
    plan_shards(own)
    path = own.data.index / "plan" / name  # type: ignore[operator]
    assert path.stat().st_mode & 0o777 == 0o600
    whole, rng = path.read_bytes(), random.Random(name)
    for _ in range(40):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ShardError, match=r"plan"):
            _use(own)
    path.write_bytes(whole)
    _use(own)


def _use(config: Config) -> None:
    from medpsp.identity import load_key
    from shards.planstate import open_plan

    plan = open_plan(config.data, load_key(config.data.key_file), config.shards)
    list(plan.gathered.rows)
    for entry in plan.shards:
        plan.load(entry)


@pytest.mark.parametrize("place", ["out", "labels", "archive", "shards", "file"])
def test_the_index_has_a_place_of_its_own(
    archive: Path, make_config: Make, tmp_path: Path, place: str
):
    shutil.copytree(archive, tmp_path / "archive")
    (tmp_path / "file").write_text("")
    where = {
        "out": tmp_path / "out",
        "labels": tmp_path / "archive/masks/index",
        "archive": tmp_path / "archive/dicom/index",
        "shards": tmp_path / "out/shards/index",
        "file": tmp_path / "file",
    }
    config = make_config(tmp_path / "archive", tmp_path / "out", index=where[place])
    with pytest.raises(ConfigError, match=r"^data\.index "):
        build_shards(config)


def test_the_signal_of_a_scheduler_ends_it_in_one_line(own: Config):
    config = own.model_copy(
        update={"data": own.data.model_copy(update={"shard_slices": 1, "workers": 1})}
    )
    with command(config) as process:
        wait_for(lambda: bool(workers(process.pid)), "a shard task")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    lines = (config.out / "command.log").read_text().splitlines()
    assert [line for line in lines if "SIGTERM" in line or "Traceback" in line] == []
    assert lines[-1] == "medpsp: interrupted; run the same command again to go on"
    assert len(state(config.shards, "commits/*")) < 32


def faults() -> list[tuple[str, Any]]:
    """Kinds of settings that cannot work."""
    return [("memory_mib", 600), ("ray_address", "127.0.0.1:9"), ("ray_address", "nonsense")]


@pytest.mark.parametrize(("name", "value"), faults())
def test_means_are_asked_for_before_anything_is_touched(own: Config, name: str, value: Any):
    build_shards(own)
    before = contents(own.shards)
    config = own.model_copy(update={"data": own.data.model_copy(update={name: value})})
    with pytest.raises(MedpspError, match=rf"^data\.{name} "):
        build_shards(config)
    assert contents(own.shards) == before


def test_what_a_killed_part_left_does_not_stay(own: Config):
    plan_shards(own)
    convert_part(own, 1, 1)
    half = own.shards / "48x48_int16/image/c/0/0" / f".0.{'a' * 32}.partial"
    half.write_bytes(b"half")
    publish_shards(own)
    assert not half.exists()
    assert list(check_shards(own.shards)) == []
