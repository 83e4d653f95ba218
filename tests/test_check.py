"""Each thing that can be wrong with shards is reported, and only that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.jobs import check_job
from medpsp.config import Config
from medpsp.errors import ShardError
from shards.check import check_shards
from shards.index import SliceRow, file_sha256, read_index, write_table

IMAGE, LABEL = "48x48_int16/image", "48x48_int16/label"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def rewrite_index(root: Path, change: Callable[[list[SliceRow]], list[SliceRow]]) -> None:
    """Put other rows into the index, and its new digest into the manifest."""
    rows = [asdict(row) for row in change(list(read_index(root)))]
    write_table(root / "index.parquet", rows, [f.name for f in fields(SliceRow)])
    tree = json.loads((root / "manifest.json").read_text())
    tree["tables"]["index.parquet"] = file_sha256(root / "index.parquet")
    (root / "manifest.json").write_text(json.dumps(tree))


def test_whole_shards_have_no_problem_and_every_slice_is_read(made: Config):
    seen: list[None] = []
    assert check_shards(made.shards, lambda: seen.append(None)) == []
    assert len(seen) == 32


def test_a_flipped_byte_is_found_by_digest_and_by_crc(copied: Config):
    flip(copied.shards / IMAGE / "c/2/0/0", 25)  # in the first slice of the shard: slot 12
    digest, crc = check_shards(copied.shards)
    assert digest == f"{IMAGE}/c/2/0/0: SHA-256 differs from the manifest"
    assert f"{IMAGE} slot 12 cannot be read" in crc


def test_a_missing_shard_is_named_and_its_six_slices_too(copied: Config):
    (copied.shards / LABEL / "c/3/0/0").unlink()
    missing, *slots = check_shards(copied.shards)
    assert missing == f"{LABEL}/c/3/0/0: missing"
    assert [text.split(" slot ")[1].split()[0] for text in slots] == [
        str(slot) for slot in range(18, 24)
    ]


@pytest.mark.parametrize("name", ["index.parquet", "objects.parquet", f"{IMAGE}/zarr.json"])
def test_tables_and_metadata_are_covered_by_digests(copied: Config, name: str):
    path = copied.shards / name
    if name.endswith(".json"):
        path.write_text(path.read_text() + "\n")
    else:  # the same rows in another encoding, as a flipped byte may leave a table readable
        pq.write_table(pq.read_table(path), path, compression="none")
    assert check_shards(copied.shards) == [f"{name}: SHA-256 differs from the manifest"]


def test_an_index_of_another_length_is_reported(copied: Config):
    rewrite_index(copied.shards, lambda rows: rows[:-1])
    assert check_shards(copied.shards) == ["index has 31 rows, manifest says 32"]


def test_a_patient_in_two_splits_is_a_leak(copied: Config):
    rewrite_index(copied.shards, lambda rows: [replace(rows[0], split="val"), *rows[1:]])
    patient, other = read_index(copied.shards)[0].patient, read_index(copied.shards)[1].split
    assert other != "val"
    assert check_shards(copied.shards) == [f"patient {patient} is in {sorted([other, 'val'])}"]


def test_labels_that_do_not_fit_the_index_are_reported(copied: Config):
    rewrite_index(
        copied.shards, lambda rows: [replace(rows[0], histogram=(1, 2, 3, 4, 5)), *rows[1:]]
    )
    assert check_shards(copied.shards) == ["48x48_int16 slot 0: class counts differ from the index"]


def test_the_job_fails_with_the_first_problem(copied: Config):
    (copied.shards / IMAGE / "c/0/0/0").unlink()
    with pytest.raises(ShardError, match=rf"7 problems, the first: {IMAGE}/c/0/0/0: missing"):
        check_job(copied)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"manifest\.json unreadable \(JSONDecodeError\)"),
        ("[]", "manifest format none, expected 2"),
        ('{"version": 9}', "manifest format 9, expected 2"),
        ('{"version": 2}', r"manifest\.json lacks fields \(KeyError\)"),
        ('{"version": 2, "classes": [], "shards": []}', r"lacks fields \(TypeError\)"),
    ],
)
def test_a_manifest_that_is_none_is_refused(copied: Config, text: str, match: str):
    (copied.shards / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=match):
        check_shards(copied.shards)


def test_without_manifest_or_index_the_message_says_what_to_run(copied: Config, tmp_path: Path):
    with pytest.raises(ShardError, match=r"no manifest\.json; run `medpsp shards`"):
        check_shards(tmp_path)
    index = copied.shards / "index.parquet"
    index.write_bytes(b"PAR1")
    with pytest.raises(ShardError, match=r"index\.parquet cannot be read"):
        check_shards(copied.shards)
    write_table(index, [{"bucket": "x"}], ["bucket"])
    with pytest.raises(ShardError, match=r"index\.parquet cannot be read \(KeyError\)"):
        check_shards(copied.shards)
    index.unlink()
    with pytest.raises(ShardError, match=r"\(FileNotFoundError\); run `medpsp shards` first"):
        check_shards(copied.shards)
