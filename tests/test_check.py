"""Each thing that can be wrong with shards is reported, where it is, and only that."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numcodecs import blosc

from launch.jobs import SHOWN, check_job, setup_logging
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.errors import ShardError
from shards import check as check_module
from shards.check import check_shards
from shards.codec import LABEL, Codec, image_codec, with_crc
from shards.commit import Commit, commit_name
from shards.index import SHARDS, file_sha256, read_index, read_manifest, write_manifest
from shards.layout import FORMAT
from shards.problem import Problem
from shards.sealed import sealed_bytes
from shards.shardfile import ABSENT, ShardWriter, read_shard_index
from shards.tables import SHARDS_SCHEMA
from tests.damage import (
    flip,
    found_in,
    random_flips,
    rewrite_commit,
    rewrite_index,
    seal_table,
    write_rows,
)

BUCKET = "48x48_int16"
IMAGE, LABELS = f"{BUCKET}/image", f"{BUCKET}/label"
SHARD2 = f"{IMAGE}/c/2/0/0"  # slots 12 to 17


def chunk_of(path: Path, within: int) -> tuple[int, int]:
    with path.open("rb") as file:
        offset, size = read_shard_index(file.fileno(), 6)[within].tolist()
    return offset, size


def rewrite_shard(root: Path, path: str, change: Callable[[dict[int, bytes]], object]) -> None:
    """Other chunks in a shard file of slots 12 to 17; its commit and the shard table know it."""
    data, chunks = (root / path).read_bytes(), {}
    for within in range(6):
        offset, size = chunk_of(root / path, within)
        chunks[within] = data[offset : offset + size]
    change(chunks)
    writer = ShardWriter(root / path, 6)
    for within, chunk in chunks.items():
        writer.append(within, chunk)
    writer.commit()
    believe(root, path)


def believe(root: Path, path: str) -> None:
    """Make commit and shard table say of a shard file what it is now."""
    now = file_sha256(root / path), (root / path).stat().st_size
    rewrite_commit(root, f"{BUCKET}-2", lambda commit: commit.files.update({path: now}))
    rows = pq.read_table(root / SHARDS).to_pylist()
    for row in rows:
        if row["path"] == path:
            row["sha256"], row["bytes"] = now
    write_rows(root / SHARDS, rows, SHARDS_SCHEMA)
    seal_table(root, SHARDS)


def test_whole_shards_have_no_problem_and_every_slice_is_counted(made: Config):
    seen: list[int] = []
    assert list(check_shards(made.shards, advance=seen.append)) == []
    assert sum(seen) == 32
    assert list(check_shards(made.shards, quick=True)) == []


def test_several_processes_say_the_same(copied: Config, monkeypatch: pytest.MonkeyPatch):
    flip(copied.shards / SHARD2, 200)
    (copied.shards / LABELS / "c/3/0/0").unlink()
    alone = list(check_shards(copied.shards))
    monkeypatch.setattr(check_module, "_ALONE", 0)
    assert list(check_shards(copied.shards, workers=2)) == alone
    assert len(alone) == 2


# bytes


def test_a_flipped_bit_names_the_slice_and_its_bytes(copied: Config):
    offset, size = chunk_of(copied.shards / SHARD2, 1)
    flip(copied.shards / SHARD2, 8 * offset + 77)
    (problem,) = check_shards(copied.shards)
    assert problem == Problem(
        kind="damaged",
        path=SHARD2,
        text=f"chunk, bytes {offset} to {offset + size}: CRC32C does not match",
        shard=f"{BUCKET}-2",
        slot=13,
    )
    assert str(problem).startswith(f"{SHARD2} slot 13: chunk, bytes ")


def test_a_flipped_bit_in_the_index_of_a_shard_names_its_bytes(copied: Config):
    size = (copied.shards / SHARD2).stat().st_size
    for byte in (1, 99):  # its CRC32C is the last four bytes
        flip(copied.shards / SHARD2, 8 * (size - byte))
        (problem,) = check_shards(copied.shards)
        assert problem.text == f"its index, bytes {size - 100} to {size}: CRC32C does not match"
        flip(copied.shards / SHARD2, 8 * (size - byte))


def test_two_hundred_flipped_bits_are_all_found_where_they_are(copied: Config):
    from shards.report import write_report

    write_report(copied.shards)
    missed = [f for f in random_flips(copied.shards, 200, seed=4) if f[0] not in f[2]]
    assert missed == []


def test_bytes_of_no_chunk_and_of_two_are_named(copied: Config):
    path = copied.shards / SHARD2
    data = path.read_bytes()
    body, pairs = data[:-100], np.frombuffer(data[-100:-4], "<u8").reshape(6, 2).copy()
    offset, size = pairs[3].tolist()
    pairs[3] = ABSENT
    path.write_bytes(body + with_crc(pairs.tobytes()))
    believe(copied.shards, SHARD2)
    gap, chunk = check_shards(copied.shards)
    assert str(gap) == f"{SHARD2}: bytes {offset} to {offset + size} belong to no chunk"
    assert str(chunk) == f"{SHARD2} slot 15: has a row, but no chunk"
    pairs[3] = pairs[2]
    path.write_bytes(body + with_crc(pairs.tobytes()))
    believe(copied.shards, SHARD2)
    texts = [problem.text for problem in check_shards(copied.shards)]
    first, end = pairs[2].tolist()
    assert f"bytes {first} to {first + end}: two chunks share them" in texts


def test_what_only_the_digest_tells(copied: Config):
    """A chunk that decodes to the same values from other bytes."""

    def change(chunks: dict[int, bytes]) -> None:
        values = np.empty((48, 48), "<i2")
        image_codec("default", "int16").decode_into(chunks[0], values)
        chunks[0] = Codec(level=9).encode(values)

    rewrite_shard(copied.shards, SHARD2, change)
    assert list(check_shards(copied.shards)) == []
    size = (copied.shards / SHARD2).stat().st_size

    def lie(commit: Commit) -> None:
        commit.files[SHARD2] = ("0" * 64, size)

    rewrite_commit(copied.shards, f"{BUCKET}-2", lie)
    assert ("damaged", SHARD2, -1) in found_in(copied.shards)


def test_a_file_that_is_cut_or_longer_is_named_at_any_length(copied: Config):
    rng = random.Random(5)
    for name in (SHARD2, f"{LABELS}/c/0/0/0", commit_name(f"{BUCKET}-1")):
        path = copied.shards / name
        data = path.read_bytes()
        for length in (0, 1, len(data) - 1, *(rng.randrange(len(data)) for _ in range(5))):
            path.write_bytes(data[:length])
            assert [(kind, where) for kind, where, _ in found_in(copied.shards)] == [
                ("damaged", name)
            ]
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 99)))
        assert [where for _, where, _ in found_in(copied.shards)] == [name]
        path.write_bytes(data)
    path = copied.shards / SHARD2
    path.write_bytes(path.read_bytes()[:1000])
    (problem,) = check_shards(copied.shards)
    size = next(
        row["bytes"]
        for row in pq.read_table(copied.shards / SHARDS).to_pylist()
        if row["path"] == SHARD2
    )
    assert problem.text == f"truncated: 1000 bytes, expected {size} (bytes 1000 on)"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{IMAGE}/c/1/0/0", SHARD2),
        (f"{IMAGE}/c/1/0/0", f"{LABELS}/c/1/0/0"),
        (commit_name(f"{BUCKET}-1"), commit_name(f"{BUCKET}-2")),
    ],
)
def test_files_that_changed_places_are_named_both(copied: Config, one: str, other: str):
    a, b = (copied.shards / name for name in (one, other))
    data = a.read_bytes()
    shutil.copy(b, a)
    b.write_bytes(data)
    assert {path for _, path, _ in found_in(copied.shards)} == {one, other}


# files


def test_a_missing_file_is_one_problem(copied: Config):
    for name in (SHARD2, f"{LABELS}/c/3/0/0", commit_name(f"{BUCKET}-1"), "plan.parquet"):
        path = copied.shards / name
        data = path.read_bytes()
        path.unlink()
        assert found_in(copied.shards) == [("missing", name, -1)]
        path.write_bytes(data)


def test_a_folder_that_is_gone_names_all_its_files(copied: Config):
    shutil.rmtree(copied.shards / LABELS)
    found = found_in(copied.shards)
    assert {kind for kind, _, _ in found} == {"missing"}
    names = {f"{LABELS}/c/{n}/0/0" for n in range(6)} | {f"{LABELS}/zarr.json"}
    assert {path for _, path, _ in found} == names


def test_files_that_nothing_owns(copied: Config):
    surplus = ("notes.txt", f"{IMAGE}/c/9/0/0", "1x1_int16/zarr.json", "commits/x.json")
    partial = ("commits/.a.json.7.partial", f"{IMAGE}/c/0/0/.0.ab.partial", ".index.7.partial")
    for name in (*surplus, *partial):
        (copied.shards / name).parent.mkdir(parents=True, exist_ok=True)
        (copied.shards / name).write_bytes(b"x")
    found = found_in(copied.shards)
    assert sorted(path for kind, path, _ in found if kind == "surplus") == sorted(surplus)
    assert sorted(path for kind, path, _ in found if kind == "partial") == sorted(partial)
    assert len(found) == 7


@pytest.mark.parametrize(
    "name", ["index.parquet", "objects.parquet", "shards.parquet", "plan.parquet"]
)
def test_a_table_of_other_bytes_is_named(copied: Config, name: str):
    path = copied.shards / name  # the same rows, as a flipped bit may leave a table readable
    pq.write_table(pq.read_table(path), path, compression="none")
    assert found_in(copied.shards) == [("damaged", name, -1)]


@pytest.mark.parametrize("name", ["zarr.json", f"{BUCKET}/zarr.json", f"{IMAGE}/zarr.json"])
def test_metadata_of_other_bytes_is_named(copied: Config, name: str):
    path = copied.shards / name
    path.write_text(path.read_text() + "\n")
    assert found_in(copied.shards) == [("damaged", name, -1)]


def test_the_report_is_sealed(copied: Config):
    from shards.report import write_report

    path = write_report(copied.shards)
    assert found_in(copied.shards) == []
    for bit in (0, 8 * 500, 8 * (path.stat().st_size - 3)):
        flip(path, bit)
        assert found_in(copied.shards) == [("damaged", "report.html", -1)]
        flip(path, bit)


# rows


def test_rows_that_differ_from_the_commit_name_their_columns(copied: Config):
    def change(rows: list[Any]) -> list[Any]:
        rows[0] = replace(rows[0], histogram=(1, 2, 3, 4, 5), crc32c=7)
        rows[9] = replace(rows[9], z_mm=rows[9].z_mm + 1)
        return rows

    rewrite_index(copied.shards, change)
    first, second = check_shards(copied.shards)
    assert str(first) == (
        f"index.parquet slot 0: {BUCKET}: histogram, crc32c differ from the commit of {BUCKET}-0"
    )
    assert str(second) == (
        f"index.parquet slot 9: {BUCKET}: z_mm differ from the commit of {BUCKET}-1"
    )


def test_rows_that_are_missing_twice_or_nowhere(copied: Config):
    rewrite_index(copied.shards, lambda rows: [*rows[:7], *rows[8:]])
    assert found_in(copied.shards) == [
        ("rows", "index.parquet", -1),  # 31 rows, the manifest says 32
        ("rows", "index.parquet", 7),
    ]
    row = replace(read_index(copied.shards)[7], slot=7)  # was 8
    rewrite_index(copied.shards, lambda rows: [*rows[:7], row, row, *rows[7:]])
    slots = [slot for _, _, slot in found_in(copied.shards)]
    assert slots == [-1, 7, 7]  # 33 rows; twice; not that of the commit


def test_rows_of_no_shard_and_rows_out_of_order(copied: Config):
    rewrite_index(copied.shards, lambda rows: [*rows[:-1], replace(rows[-1], slot=600)])
    assert [str(p) for p in check_shards(copied.shards)] == [
        f"index.parquet slot 31: {BUCKET} has a slice here in its commit, but no row",
        f"index.parquet slot 600: 1 rows of {BUCKET} from here on belong to no shard",
    ]
    rewrite_index(copied.shards, lambda rows: [*rows[6:12], *rows[:6], *rows[12:]])
    texts = [p.text for p in check_shards(copied.shards)]
    assert f"6 rows of {BUCKET} from here on are out of order" in texts


def test_values_that_are_not_those_of_the_row(copied: Config):
    """Two chunks that changed places in a shard whose commit knows no better."""

    def swap(chunks: dict[int, bytes]) -> None:
        chunks[0], chunks[1] = chunks[1], chunks[0]

    rewrite_shard(copied.shards, SHARD2, swap)
    first, second = check_shards(copied.shards)
    assert (first.slot, second.slot) == (12, 13)
    assert first.text == "CRC32C of the values differs from those of its row"


def test_labels_that_are_no_class_or_counted_wrongly(copied: Config):
    path = f"{LABELS}/c/2/0/0"
    label = np.full((48, 48), 255, np.uint8)
    label[0, :3] = 200

    def change(chunks: dict[int, bytes]) -> None:
        chunks[4] = LABEL.encode(label)

    rewrite_shard(copied.shards, path, change)
    first, second = check_shards(copied.shards)
    assert str(first) == (f"{path} slot 16: 3 pixels hold a value that is neither a class nor 255")
    assert first.kind == "label"
    assert str(second) == f"{path} slot 16: class counts differ from those of its row"


def test_a_chunk_of_another_size_is_named(copied: Config):
    def change(chunks: dict[int, bytes]) -> None:
        chunks[5] = with_crc(blosc.compress(bytes(9), b"zstd", 1, 0, 0, 1))

    rewrite_shard(copied.shards, SHARD2, change)
    (problem,) = check_shards(copied.shards)
    assert problem.slot == 17
    assert "a chunk of 9 bytes, expected 4608" in problem.text


def test_a_chunk_without_a_row(copied: Config):
    def drop(commit: Commit) -> None:
        for values in commit.columns.values():
            del values[2]

    rewrite_commit(copied.shards, f"{BUCKET}-2", drop)
    rewrite_index(copied.shards, lambda rows: [*rows[:14], *rows[15:]])
    assert found_in(copied.shards) == [
        ("rows", "index.parquet", -1),
        ("rows", "shards.parquet", -1),
        ("rows", SHARD2, 14),
        ("rows", f"{LABELS}/c/2/0/0", 14),
    ]


def test_a_shard_table_that_disagrees(copied: Config):
    rows = pq.read_table(copied.shards / SHARDS).to_pylist()
    rows[4]["sha256"] = "0" * 64
    write_rows(copied.shards / SHARDS, rows, SHARDS_SCHEMA)
    seal_table(copied.shards, SHARDS)
    (problem,) = check_shards(copied.shards)
    text = f"says something else of shard {BUCKET}-2 than its commit"
    assert str(problem) == f"shards.parquet: {text}"
    write_rows(copied.shards / SHARDS, rows[:4], SHARDS_SCHEMA)
    seal_table(copied.shards, SHARDS)
    texts = [p.text for p in check_shards(copied.shards)]
    assert "has 2 shards, the manifest says 6" in texts
    surplus = "belongs to no shard; delete it if it is nothing of yours"
    assert texts.count(surplus) == 4 * 3


# the manifest


def test_a_flipped_bit_in_the_manifest_is_one_problem(copied: Config):
    path = copied.shards / "manifest.json"
    size = path.stat().st_size
    for bit in (*range(0, 8 * 40, 5), *range(8 * (size - 90), 8 * size, 7)):
        flip(path, bit)
        assert found_in(copied.shards) == [("damaged", "manifest.json", -1)], bit
        flip(path, bit)


def test_a_damaged_manifest_hides_nothing_else(copied: Config):
    flip(copied.shards / "manifest.json", 99)
    flip(copied.shards / SHARD2, 300)
    found = {(kind, path) for kind, path, _ in found_in(copied.shards)}
    assert found == {("damaged", "manifest.json"), ("damaged", SHARD2)}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"[]", f"manifest format none, expected {FORMAT}"),
        (b'{"version": 9}', f"manifest format 9, expected {FORMAT}"),
        (sealed_bytes({"version": 2}), f"manifest format 2, expected {FORMAT}"),
        (sealed_bytes({"version": FORMAT}), r"manifest\.json lacks fields \(KeyError\)"),
        (sealed_bytes({"version": FORMAT, "classes": []}), r"lacks fields \(TypeError\)"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(copied: Config, data: bytes, match: str):
    (copied.shards / "manifest.json").write_bytes(data)
    with pytest.raises(ShardError, match=match):
        list(check_shards(copied.shards))


def test_who_needs_the_manifest_is_told_what_to_run(copied: Config, tmp_path: Path):
    with pytest.raises(ShardError, match=r"no manifest\.json; run `medpsp shards`"):
        list(check_shards(tmp_path))
    path = copied.shards / "manifest.json"
    flip(path, 8 * path.stat().st_size // 2)
    with pytest.raises(ShardError, match=r"medpsp check --repair|unreadable"):
        read_manifest(copied.shards)
    path.write_text("{")
    with pytest.raises(ShardError, match=r"manifest\.json unreadable \(JSONDecodeError\)"):
        read_manifest(copied.shards)


def test_counts_that_the_tables_do_not_have(copied: Config):
    manifest = read_manifest(copied.shards)
    write_manifest(copied.shards, replace(manifest, slices=33, shards=7))
    assert [str(p) for p in check_shards(copied.shards)] == [
        "index.parquet: has 32 rows, the manifest says 33",
        "shards.parquet: has 6 shards, the manifest says 7",
    ]


# the command


def test_the_job_fails_with_the_first_problem(copied: Config):
    (copied.shards / IMAGE / "c/0/0/0").unlink()
    with pytest.raises(ShardError, match=rf"1 problem, the first: {IMAGE}/c/0/0/0: missing; run"):
        check_job(copied)


@pytest.mark.usefixtures("own_handlers")
def test_the_terminal_shows_the_first_problems_the_file_all(
    copied: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    setup_logging()
    handler = logging.FileHandler(tmp_path / "all.log")
    logging.getLogger("medpsp").addHandler(handler)
    for number in range(SHOWN + 5):
        (copied.shards / f"surplus{number:02d}").write_bytes(b"")
    with pytest.raises(ShardError, match=f"{SHOWN + 5} problems"):
        check_job(copied)
    shown = capsys.readouterr().err
    assert shown.count("belongs to no shard") == SHOWN
    assert "and 5 more, all in logs/check.log" in shown
    assert (tmp_path / "all.log").read_text().count("belongs to no shard") == SHOWN + 5


def test_names_that_are_no_text_can_be_logged(copied: Config):
    (copied.shards / os.fsdecode(b"a\xff\nb")).touch()
    logger, run = logging.getLogger("medpsp"), RunDir(copied.out)
    run.logs.mkdir(parents=True)
    before = list(logger.handlers)
    run.log_to("check")
    try:
        with pytest.raises(ShardError, match=r"a\\udcff\\nb: belongs to no shard"):
            check_job(copied)
    finally:
        logger.handlers[:] = before
    (line,) = (run.logs / "check.log").read_text().splitlines()
    assert r"a\udcff\nb: belongs to no shard" in line
