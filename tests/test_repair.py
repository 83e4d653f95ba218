"""Damaged shards come back byte by byte, and the others are not touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread

from launch.jobs import check_job
from launch.phantom import Phantom, write_archive
from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.identity import load_key, pseudonym
from shards.build import build_shards
from shards.check import check_shards
from shards.commit import commit_name
from shards.index import read_index
from shards.problem import Problem
from shards.repair import damaged_shards
from shards.report import write_report
from tests.damage import files_below, flip

BUCKET = "48x48_int16"
IMAGE, LABELS = f"{BUCKET}/image", f"{BUCKET}/label"


def shard_state(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of a shard."""
    names = [f for f in files_below(root) if "/c/" in f.as_posix() or "commits" in f.as_posix()]
    return {f.relative_to(root).as_posix(): (f.stat().st_ino, f.stat().st_mtime_ns) for f in names}


def contents(root: Path) -> dict[str, bytes]:
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files_below(root)}


def flipped(name: str) -> Callable[[Path], None]:
    return lambda root: flip(root / name, 8 * ((root / name).stat().st_size // 2) + 3)


def cut(root: Path) -> None:
    (root / "manifest.json").write_text("{")


DAMAGE: dict[str, tuple[Callable[[Path], None], set[int]]] = {
    "image": (flipped(f"{IMAGE}/c/2/0/0"), {2}),
    "label": (flipped(f"{LABELS}/c/3/0/0"), {3}),
    "commit": (flipped(commit_name(f"{BUCKET}-1")), {1}),
    "no commit": (lambda root: (root / commit_name(f"{BUCKET}-4")).unlink(), {4}),
    "index": (flipped("index.parquet"), set()),
    "objects": (lambda root: (root / "objects.parquet").unlink(), set()),
    "shard table": (flipped("shards.parquet"), set()),
    "plan": (flipped("plan.parquet"), set()),
    "manifest": (flipped("manifest.json"), set()),
    "half a manifest": (cut, set()),
    "report": (flipped("report.html"), set()),
    "zarr.json": (flipped(f"{IMAGE}/zarr.json"), set()),
    "root": (lambda root: (root / "zarr.json").unlink(), set()),
    "folder": (lambda root: shutil.rmtree(root / LABELS), {0, 1, 2, 3, 4, 5}),
    "partial": (lambda root: (root / "commits/.a.1.partial").write_bytes(b"x") and None, set()),
}


@pytest.fixture
def whole(copied: Config) -> Config:
    write_report(copied.shards)
    return copied


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_made_anew_and_nothing_else(whole: Config, name: str):
    before, state = contents(whole.shards), shard_state(whole.shards)
    damage, shards = DAMAGE[name]
    damage(whole.shards)
    assert list(check_shards(whole.shards))
    check_job(whole, repair=True)
    assert contents(whole.shards) == before
    changed = {n for n, s in shard_state(whole.shards).items() if state[n] != s}
    of = {
        number: {f"{kind}/c/{number}/0/0" for kind in (IMAGE, LABELS)}
        | {commit_name(f"{BUCKET}-{number}")}
        for number in range(6)
    }
    assert changed == set().union(*(of[number] for number in shards))


def test_several_at_once(whole: Config, caplog: pytest.LogCaptureFixture):
    before = contents(whole.shards)
    for name in ("image", "commit", "index", "manifest"):
        DAMAGE[name][0](whole.shards)
    with caplog.at_level("INFO", "medpsp"):
        check_job(whole, repair=True)
    assert contents(whole.shards) == before
    said = f"repair: 2 shards converted again ({BUCKET}-1, {BUCKET}-2); tables, plan and"
    assert said in caplog.text


def test_without_the_archive_nothing_is_touched(whole: Config, tmp_path: Path):
    DAMAGE["image"][0](whole.shards)
    before = contents(whole.shards)
    data = whole.data.model_copy(update={"archive": tmp_path / "gone"})
    with pytest.raises(ShardError, match=r"data\.archive: no such folder"):
        check_job(whole.model_copy(update={"data": data}), repair=True)
    assert contents(whole.shards) == before


@pytest.fixture
def own(
    tmp_path: Path, phantom: Phantom, make_config: Callable[..., Config], ray_once: None
) -> Config:
    """Shards of an archive that may be changed."""
    write_archive(tmp_path, 8, phantom)
    config = make_config(tmp_path, tmp_path / "out")
    build_shards(config)
    return config


def sources(config: Config, patient: str) -> list[Path]:
    """Files of a patient in the archive."""
    key = load_key(config.data.key_file)
    files = config.data.archive.glob("*/S*/IM*")
    return [f for f in files if pseudonym(key, "patient", str(dcmread(f).PatientID)) == patient]


def test_a_source_that_is_gone_is_said_and_nothing_is_deleted(own: Config):
    flip(own.shards / IMAGE / "c/5/0/0", 99)  # slots 30 and 31, of the last patient
    before = contents(own.shards)
    found = sources(own, read_index(own.shards)[-1].patient)
    assert len(found) == 4
    for file in found:
        file.unlink()
    with pytest.raises(
        ShardError, match=rf"{BUCKET}-5: is damaged, and its sources in data\.archive are gone"
    ):
        check_job(own, repair=True)
    assert contents(own.shards) == before


def test_another_archive_changes_no_whole_shard(own: Config):
    flip(own.shards / IMAGE / "c/5/0/0", 99)
    before = contents(own.shards)
    for file in sources(own, read_index(own.shards)[0].patient):  # in shard 0 alone
        file.touch()
    with pytest.raises(ShardError, match=rf"{BUCKET}-0: .* repair would change it"):
        check_job(own, repair=True)
    assert contents(own.shards) == before


def test_what_no_conversion_mends_starts_none(whole: Config, monkeypatch: pytest.MonkeyPatch):
    (whole.shards / "notes.txt").write_text("mine")
    monkeypatch.setattr("shards.repair.repair_shards", None)  # would not be callable
    with pytest.raises(ShardError, match=r"1 problem, the first: notes\.txt: belongs to no shard"):
        check_job(whole, repair=True)
    assert (whole.shards / "notes.txt").read_text() == "mine"


def test_rows_that_disagree_are_a_fault_of_the_table():
    def problem(kind: str, path: str, shard: str) -> Problem:
        return Problem(kind=kind, path=path, text="", shard=shard)  # type: ignore[arg-type]

    found = damaged_shards(
        [
            problem("rows", "index.parquet", "9x9_int16-1"),
            problem("rows", "9x9_int16/image/c/2/0/0", "9x9_int16-2"),
            problem("damaged", "commits/9x9_int16-0.json", "9x9_int16-0"),
            problem("surplus", "9x9_int16/image/c/7/0/0", ""),
        ]
    )
    assert found == ["9x9_int16-0", "9x9_int16-2"]
