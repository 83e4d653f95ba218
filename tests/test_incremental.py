"""An archive that grows: what is written stays, and nobody changes sides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from launch.phantom import Phantom, draw, write_mask, write_series
from medpsp.config import Config
from medpsp.identity import pseudonym
from shards.build import build_shards
from shards.check import check_shards
from shards.index import SliceRow, read_index
from tests.killing import contents, state

Make = Callable[..., Config]
BUCKET = "48x48_int16"
FILES = f"{BUCKET}/*/c/**/*"


def add(root: Path, number: int, phantom: Phantom, folder: str = "new") -> None:
    patient = f"PHANTOM{number:03d}"
    hu, label = draw(phantom, number)
    write_series(root / "dicom" / folder / patient, patient, hu, phantom)
    write_mask(root / "masks" / f"{patient}.nii.gz", label, phantom)


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
