"""From an archive to shards: every file accounted for, nothing done twice, nobody named."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import zarr
from PIL import Image

from launch.jobs import shards_job
from launch.phantom import Phantom, draw, to_mr, write_archive, write_mask, write_series
from medpsp.config import Config
from medpsp.errors import ArchiveError, ConfigError, ShardError
from medpsp.identity import pseudonym
from medpsp.intensity import ValueCounts, percentile_window
from shards.build import build_shards
from shards.check import check_shards
from shards.commit import read_commit, write_commit
from shards.index import Manifest, SliceRow, read_index, read_manifest, reject_fraction

Make = Callable[..., Config]
BUCKET = "48x48_int16"


def objects(config: Config) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(config.shards / "objects.parquet").to_pylist()
    return rows


def shard_files(config: Config) -> dict[str, tuple[int, bytes]]:
    """Path to (time of writing, bytes) of every shard."""
    return {
        p.relative_to(config.shards).as_posix(): (p.stat().st_mtime_ns, p.read_bytes())
        for p in config.shards.rglob("c/*/0/0")
    }


def contents(config: Config) -> dict[str, bytes]:
    return {name: data for name, (_, data) in shard_files(config).items()}


def images(config: Config, rows: list[SliceRow]) -> list[np.ndarray]:
    return [zarr.open_array(config.shards / r.bucket / "image", mode="r")[r.slot] for r in rows]


def rewrite(paths: list[Path], **changes: Any) -> None:
    for path in paths:
        ds = pydicom.dcmread(path)
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        ds.save_as(path)


# an archive with everything wrong that can be


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory, phantom: Phantom) -> Path:
    """Eight whole patients, and six more things; see the test below for what becomes of each."""
    root = tmp_path_factory.mktemp("messy")
    dicom, masks = write_archive(root, 8, phantom)
    hu, label = draw(phantom, 50)
    for name in ("NOMASK", "GRID", "CUTPIX", "SLOPE"):
        paths = write_series(dicom / name, f"PHANTOM{name}", hu, phantom)
        if name != "NOMASK":
            grid = phantom if name != "GRID" else replace(phantom, spacing=(5.0, 3.0, 3.0))
            write_mask(masks / f"PHANTOM{name}.nii.gz", label, grid)
        if name == "CUTPIX":  # written last to first: this is the third along the body
            paths[2].write_bytes(paths[2].read_bytes()[:-100])
        if name == "SLOPE":
            rewrite(paths, RescaleSlope="2")
    write_series(dicom / "ESCAPES", "../../PHANTOM", hu, phantom)
    shutil.copy(dicom / "0/S00000/IM0001", dicom / "PHANTOM copy")
    (dicom / os.fsdecode(b"PHANTOM\xff")).write_text("a name that is not UTF-8")
    return root


@pytest.fixture(scope="module")
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, logger = Keep(), logging.getLogger("medpsp")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def messy_made(
    messy: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Make,
    log_lines: list[str],
    ray_once: None,
) -> Config:
    config = make_config(messy, tmp_path_factory.mktemp("out"), max_reject_fraction=1)
    shards_job(config)
    return config


def test_every_file_is_in_one_row_and_the_rows_add_up(messy: Path, messy_made: Config):
    manifest = read_manifest(messy_made.shards)
    assert manifest.counts == {"kept": 39, "skipped": 6, "quarantined": 11, "duplicate": 1}
    assert manifest.codes == {
        "DUP_IDENTICAL": 1,
        "FILE_EMPTY": 1,
        "HDR_TRUNCATED": 1,  # the file called CUT
        "LABEL_NONE": 4,
        "MASK_GRID_MISMATCH": 4,
        "MASK_OUTSIDE_ROOT": 4,
        "NOT_DICOM": 2,  # README.txt and the odd name
        "PIX_TRUNCATED": 1,
    }
    found = sum(len(files) for _, _, files in os.walk(messy / "dicom"))
    assert sum(manifest.counts.values()) == found == 57
    rows = objects(messy_made)
    assert len({r["file_id"] for r in rows}) == len(rows) == 57
    kept = {r["file_id"] for r in rows if r["status"] == "kept"}
    assert kept == {r.file_id for r in read_index(messy_made.shards)}
    assert reject_fraction(manifest) == 11 / (11 + 39)
    # CUTPIX and SLOPE are one scan with two slopes, one of them in val, one in test
    assert [problem.kind for problem in check_shards(messy_made.shards)] == ["copy"]


def test_a_row_names_its_file_by_pseudonym_and_its_reason_by_code(messy_made: Config, key: bytes):
    rows = {r["file_id"]: (r["status"], r["code"]) for r in objects(messy_made)}
    for path, expected in {
        "README.txt": ("skipped", "NOT_DICOM"),
        "0/EMPTY": ("quarantined", "FILE_EMPTY"),
        "NOMASK/IM0003": ("skipped", "LABEL_NONE"),
        "ESCAPES/IM0001": ("quarantined", "MASK_OUTSIDE_ROOT"),
        "CUTPIX/IM0002": ("quarantined", "PIX_TRUNCATED"),
    }.items():
        assert rows[pseudonym(key, "file", path)] == expected


def test_a_broken_slice_leaves_the_rest_of_its_series_in_place(
    messy_made: Config, key: bytes, phantom: Phantom
):
    patient = pseudonym(key, "patient", "PHANTOMCUTPIX")
    rows = [r for r in read_index(messy_made.shards) if r.patient == patient]
    assert [r.slice_index for r in rows] == [0, 1, 3]
    assert [r.slot - rows[0].slot for r in rows] == [0, 1, 3]
    hu, _ = draw(phantom, 50)
    np.testing.assert_array_equal(images(messy_made, rows), hu[[0, 1, 3]])


def test_a_slope_that_is_not_1_goes_to_a_float32_bucket_exactly(
    messy_made: Config, key: bytes, phantom: Phantom
):
    rows = [r for r in read_index(messy_made.shards) if r.bucket == "48x48_float32"]
    assert {r.patient for r in rows} == {pseudonym(key, "patient", "PHANTOMSLOPE")}
    hu, _ = draw(phantom, 50)
    stored = hu.astype(np.int32) + 1024
    found = np.stack(images(messy_made, rows))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored * 2 - 1024)


def strings(config: Config) -> str:
    """All that can be decoded below the shards."""
    import pyarrow.parquet as pq

    texts = [json.dumps(pq.read_table(p).to_pylist()) for p in config.shards.rglob("*.parquet")]
    texts += [json.dumps(json.loads(p.read_text())) for p in config.shards.rglob("*.json")]
    return "\n".join(texts)


def test_nothing_that_names_a_patient_leaves_the_archive(
    messy: Path, messy_made: Config, log_lines: list[str]
):
    series = {
        str(pydicom.dcmread(p, stop_before_pixels=True).SeriesInstanceUID)
        for p in messy.rglob("IM0001")
    }
    assert len(series) == 13
    canaries = ["PHANTOM", "Phantom", "ACCPH", "S0000", "IM00", "ESCAPES", "NOMASK", *series]
    whole = {p: p.read_bytes() for p in messy_made.shards.rglob("*") if p.is_file()}
    assert len(whole) > 20
    for canary in canaries:
        assert [p.name for p, data in whole.items() if canary.encode() in data] == []
        assert [p.name for p in whole if canary in str(p.relative_to(messy_made.shards))] == []
    decoded, logged = strings(messy_made), "\n".join(log_lines)
    assert "MASK_OUTSIDE_ROOT" in decoded
    assert "shards:" in logged
    for canary in canaries:
        assert canary not in decoded
        assert canary not in logged


# again, and again after a fault


def test_a_second_run_converts_nothing_and_says_the_same(copied: Config):
    before, manifest = shard_files(copied), (copied.shards / "manifest.json").read_bytes()
    assert build_shards(copied) == read_manifest(copied.shards)
    assert shard_files(copied) == before  # the times too
    assert (copied.shards / "manifest.json").read_bytes() == manifest


def test_only_what_is_missing_or_cut_short_is_made_again(made: Config, copied: Config):
    (copied.shards / BUCKET / "image/c/1/0/0").unlink()
    damaged = copied.shards / BUCKET / "label/c/4/0/0"
    damaged.write_bytes(damaged.read_bytes()[:-1])  # a byte of another value is for `check` to find
    before = shard_files(copied)
    build_shards(copied)
    after = shard_files(copied)
    assert contents(copied) == contents(made)
    renewed = {name for name in after if after[name] != before.get(name)}
    assert renewed == {f"{BUCKET}/{n}/c/{k}/0/0" for n in ("image", "label") for k in (1, 4)}


def test_a_changed_mask_renews_the_shards_of_its_series_only(
    archive: Path, make_config: Make, tmp_path: Path, key: bytes, phantom: Phantom, ray_once: None
):
    shutil.copytree(archive, tmp_path / "archive")
    config = make_config(tmp_path / "archive", tmp_path / "out")
    build_shards(config)
    before = shard_files(config)
    _, label = draw(phantom, 4)
    write_mask(config.data.labels / "PHANTOM004.nii.gz", label * 0 + 1, phantom)  # type: ignore[operator]
    build_shards(config)
    patient = pseudonym(key, "patient", "PHANTOM004")
    rows = [r for r in read_index(config.shards) if r.patient == patient]
    assert {r.histogram for r in rows} == {(0, 48 * 48, 0, 0, 0)}
    renewed = {name for name, state in shard_files(config).items() if state != before[name]}
    numbers = {r.slot // 6 for r in rows}
    assert renewed == {f"{BUCKET}/{n}/c/{k}/0/0" for n in ("image", "label") for k in numbers}


def test_a_patient_taken_out_of_the_archive_leaves_no_byte_behind(
    archive: Path, make_config: Make, tmp_path: Path, key: bytes, ray_once: None
):
    shutil.copytree(archive, tmp_path / "archive")
    config = make_config(tmp_path / "archive", tmp_path / "out")
    build_shards(config)
    before, files = read_index(config.shards), shard_files(config)
    shutil.rmtree(config.data.archive / "0/S00006")
    manifest = build_shards(config)
    assert manifest.counts["kept"] == 28
    gone = pseudonym(key, "patient", "PHANTOM006")
    assert gone not in strings(config)
    numbers = {row.slot // 6 for row in before if row.patient == gone}
    after = shard_files(config)
    touched = {name for name, state in files.items() if after.get(name) != state}
    assert touched == {f"{BUCKET}/{n}/c/{k}/0/0" for n in ("image", "label") for k in numbers}
    kept = [row for row in before if row.patient != gone]
    assert list(read_index(config.shards)) == kept  # each in its slot
    assert list(check_shards(config.shards)) == []


def test_the_same_archive_under_another_key_shares_no_pseudonym(
    archive: Path, made: Config, tmp_path: Path
):
    secret = tmp_path / "other"
    secret.write_text("key of the tests 12")
    secret.chmod(0o600)
    config = made.model_copy(
        update={"out": tmp_path, "data": made.data.model_copy(update={"key_file": secret})}
    )
    assert build_shards(config).key_fingerprint != read_manifest(made.shards).key_fingerprint
    for field in ("patient", "series", "file_id"):
        ours, theirs = (
            {getattr(row, field) for row in read_index(c.shards)} for c in (made, config)
        )
        assert len(ours) == len(theirs) > 0
        assert ours.isdisjoint(theirs)


def test_a_shard_that_cannot_be_written_says_which_and_why(copied: Config):
    folder = copied.shards / BUCKET / "image/c/2"
    shutil.rmtree(folder)
    folder.write_text("a file where a folder should be")
    with pytest.raises(ShardError, match=rf"^shard {BUCKET}-2: Not a directory; mend it"):
        build_shards(copied)
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        read_manifest(copied.shards)
    folder.unlink()
    build_shards(copied)
    assert list(check_shards(copied.shards)) == []


# MR, VOC, unlabelled


def test_mr_gets_one_percentile_window_a_series_in_whatever_shards_it_lies(
    make_config: Make, tmp_path: Path, key: bytes, phantom: Phantom, ray_once: None
):
    mr = replace(phantom, modality="MR")
    write_archive(tmp_path / "a", 8, mr)
    config = make_config(tmp_path / "a", tmp_path / "out", shard_slices=3)
    build_shards(config)
    rows = read_index(config.shards)
    assert len(rows) == 32
    for number in range(8):
        patient = pseudonym(key, "patient", f"PHANTOM{number:03d}")
        mine = [row for row in rows if row.patient == patient]
        assert len({row.slot // 3 for row in mine}) == 2  # 4 slices never fit a shard of 3
        values = to_mr(draw(mr, number)[0], number)
        counts = ValueCounts()
        counts.add(values)
        assert {row.window for row in mine} == {percentile_window(counts)}
        assert all(np.isnan(row.voi_center) for row in mine)
        np.testing.assert_array_equal(images(config, mine), values)


def two_patients(root: Path, phantom: Phantom) -> Path:
    """Patient 3, who is in train, and patient 1, in val, without masks; returns their folder."""
    for number in (1, 3):
        hu, _ = draw(phantom, number)
        write_series(root / "dicom" / f"P{number}", f"PHANTOM{number:03d}", hu, phantom)
    return root / "dicom"


def test_without_labels_every_pixel_is_ignored_and_planes_of_one_uid_stay_apart(
    make_config: Make, tmp_path: Path, phantom: Phantom, ray_once: None
):
    dicom = two_patients(tmp_path, phantom)
    uid = pydicom.dcmread(dicom / "P3/IM0001").SeriesInstanceUID
    other = write_series(
        dicom / "P3b", "PHANTOM003", draw(phantom, 3)[0], replace(phantom, oblique_deg=90)
    )
    rewrite(other, SeriesInstanceUID=uid)
    config = make_config(tmp_path, tmp_path / "out", labels=None)
    build_shards(config)
    rows = read_index(config.shards)
    assert len({(row.series, row.slice_index) for row in rows}) == len(rows) == 12
    assert len({(row.series, row.affine) for row in rows}) == 3
    assert {(row.labelled, row.histogram) for row in rows} == {(False, (0, 0, 0, 0, 48 * 48))}


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """p1 to p4 of two images; and an image without a mask, one in colour; p5 has one in 16 bits."""
    root = tmp_path / "voc"
    places = [root / n for n in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")]
    for place in places:
        place.mkdir(parents=True)
    pictures, masks, lists = places
    names = [f"p{p}-{i}" for p in range(1, 5) for i in range(2)]
    for number, name in enumerate(names):
        image = np.arange(12, dtype=np.uint8).reshape(3, 4) + number * 20
        Image.fromarray(image).save(pictures / f"{name}.png")
        mask = Image.fromarray((np.arange(12, dtype=np.uint8) % 2).reshape(3, 4), mode="P")
        mask.putpalette([0, 0, 0, 200, 0, 0])
        mask.save(masks / f"{name}.png")
    Image.fromarray(np.full((3, 4), 7, np.uint8)).save(pictures / "p1-nomask.png")
    colour = np.full((3, 4, 3), (1, 2, 3), np.uint8)
    Image.fromarray(colour).save(pictures / "p2-colour.png")
    deep = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(deep).save(pictures / "p5-deep.png")
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(masks / "p5-deep.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(masks / "p4-1.png")
    (lists / "train.txt").write_text("p1-0\np1-1\np3-0\np3-1\np1-nomask\np5-deep\n")
    (lists / "val.txt").write_text("p2-0\np2-1\np2-colour\n")
    (lists / "test.txt").write_text("p4-0\np4-1\n")
    return root


def test_voc_archives_go_the_same_way(
    voc: Path, make_config: Make, tmp_path: Path, key: bytes, ray_once: None
):
    config = make_config(
        tmp_path,
        tmp_path / "out",
        source="voc",
        archive=voc,
        labels=None,
        classes=["background", "organ"],
        voc={"patient_pattern": "^(p[0-9])-"},
    )
    manifest = build_shards(config)
    assert manifest.codes == {
        "MASK_GRID_MISMATCH": 1,
        "MASK_MISSING": 2,
    }
    rows = {row.file_id: row for row in read_index(config.shards)}
    assert list(check_shards(config.shards)) == []
    for number, name in enumerate([f"p{p}-{i}" for p in range(1, 5) for i in range(2)]):
        row = rows.get(pseudonym(key, "file", f"JPEGImages/{name}.png"))
        if name == "p4-1":
            assert row is None  # its mask is 5 x 5
            continue
        assert row is not None
        (image,) = images(config, [row])
        np.testing.assert_array_equal(image, np.arange(12).reshape(3, 4) + number * 20)
        assert (row.histogram, row.labelled) == ((6, 6, 0), True)
        assert row.patient == pseudonym(key, "patient", name[:2])
        assert row.split == {"1": "train", "2": "val", "3": "train", "4": "test"}[name[1]]
        assert (row.window_center, row.window_width) == (127.5, 255.0)
    assert manifest.counts["kept"] == len(rows) == 8
    deep = rows[pseudonym(key, "file", "JPEGImages/p5-deep.png")]
    (image,) = images(config, [deep])
    np.testing.assert_array_equal(image, np.arange(12).reshape(3, 4) * 5000)
    assert (deep.bucket, deep.histogram) == ("3x4_float32", (12, 0, 0))
    counts = ValueCounts()
    counts.add(image)
    assert deep.window == percentile_window(counts)


# refused before anything is written


def refused(config: Config, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        build_shards(config)
    assert not (config.shards / "manifest.json").exists()


def test_a_split_without_patients_is_a_configuration_error(
    archive: Path, make_config: Make, tmp_path: Path
):
    config = make_config(archive, tmp_path, split={"val": 0.0, "test": 0.25})
    refused(config, ConfigError, r"^data\.split: .*'val': 0.*raise data\.split\.val")
    config = make_config(archive, tmp_path, split={"val": 0.98, "test": 0.01})
    refused(config, ConfigError, r"^data\.split: .*'train': 0.*lower data\.split\.val and \.test")
    assert not config.shards.exists()


def test_a_split_whose_patients_all_turn_out_bad_is_an_error_with_the_reason(
    make_config: Make, tmp_path: Path, phantom: Phantom, ray_once: None
):
    two_patients(tmp_path, phantom)
    _, label = draw(phantom, 3)
    write_mask(tmp_path / "masks/PHANTOM003.nii.gz", label, phantom)
    coarse = replace(phantom, spacing=(5.0, 3.0, 3.0))
    write_mask(tmp_path / "masks/PHANTOM001.nii.gz", label, coarse)
    config = make_config(tmp_path, tmp_path / "out")
    refused(config, ArchiveError, "no usable slice for val; found 4 MASK_GRID_MISMATCH$")


@pytest.mark.parametrize(
    ("data", "kind", "match"),
    [
        ({"archive": Path("/nowhere")}, ArchiveError, "/nowhere: no such folder"),
        ({"labels": Path("/nowhere")}, ConfigError, r"^data\.labels /nowhere: no such folder"),
        ({"label_pattern": "no/{PatientID}"}, ArchiveError, "nothing usable; .*32 LABEL_NONE"),
        ({"modalities": ["MR"]}, ArchiveError, "nothing usable; .*32 MODALITY_SKIPPED"),
    ],
)
def test_what_cannot_become_shards_is_refused(
    archive: Path,
    make_config: Make,
    tmp_path: Path,
    data: dict[str, Any],
    kind: type[Exception],
    match: str,
):
    refused(make_config(archive, tmp_path, **data), kind, match)


def test_what_is_not_ours_is_never_deleted(
    archive: Path, make_config: Make, tmp_path: Path, ray_once: None
):
    """The folder of the shards is swept: an archive in it, or anything else, must not be."""
    inside = tmp_path / "out" / "shards" / "hosp2020x2021_archive"
    shutil.copytree(archive / "dicom", inside)
    files = sum(1 for path in inside.rglob("*") if path.is_file())
    config = make_config(archive, tmp_path / "out", archive=inside)
    refused(config, ConfigError, r"data\.archive .* lies inside the shards; move it out")
    other = make_config(archive, tmp_path / "out")
    refused(other, ConfigError, "holds something that is no shards of medpsp")
    assert sum(1 for path in inside.rglob("*") if path.is_file()) == files


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "plan.parquet", "commits/a.json"])
def test_a_folder_of_others_is_not_ours_for_the_name_of_a_file(
    archive: Path, make_config: Make, tmp_path: Path, name: str
):
    shards = tmp_path / "out" / "shards"
    for place in (name, f"{BUCKET}/image/c/0/0/0"):
        (shards / place).parent.mkdir(parents=True, exist_ok=True)
        (shards / place).write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(ConfigError, match="holds something that is no shards of medpsp"):
        build_shards(make_config(archive, tmp_path / "out"))
    assert all((shards / place).is_file() for place in (name, f"{BUCKET}/image/c/0/0/0"))


def test_a_failure_that_may_pass_is_tried_again(copied: Config):
    commit = read_commit(copied.shards, f"{BUCKET}-2")
    assert commit is not None
    row = {name: values.pop() for name, values in commit.columns.items()}
    lost = {"file_id": row["file_id"], "status": "quarantined", "code": "DEC_OOM", "detail": ""}
    commit.refused.append({**lost, "frame": 0})
    write_commit(copied.shards, commit)
    assert build_shards(copied).counts["quarantined"] == 2  # as the archive has it
    assert list(check_shards(copied.shards)) == []


def test_nothing_is_written_into_the_archive(archive: Path, make_config: Make):
    config = make_config(archive, archive / "dicom" / "runs")
    refused(config, ConfigError, r"^out: .* lies inside data\.archive")
    assert not config.out.exists()


def test_labels_that_are_scanned_lie_apart(archive: Path, make_config: Make, tmp_path: Path):
    wish = {"label_format": "seg", "unlabelled": "keep"}
    config = make_config(archive, tmp_path / "out", labels=archive, **wish)
    refused(config, ConfigError, r"data\.labels .*: data\.archive lies inside it")
    (tmp_path / "seg").mkdir()
    config = make_config(archive, tmp_path / "seg/out", labels=tmp_path / "seg", **wish)
    refused(config, ConfigError, r"^out: .* lies inside data\.labels")


def test_what_a_kill_at_the_very_start_left_is_no_stranger(copied: Config):
    shutil.rmtree(copied.shards)
    copied.shards.mkdir()
    (copied.shards / ".zarr.json.123.partial").write_bytes(b"{")
    build_shards(copied)
    (copied.shards / "zarr.json").unlink()
    build_shards(copied)
    assert list(check_shards(copied.shards)) == []


def test_a_ray_that_does_not_come_up_is_one_line(
    archive: Path, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(
        ShardError, match=r"^ray: does not start here \(Exception\); its files go to"
    ):
        build_shards(make_config(archive, tmp_path / "out"))


def test_labels_that_are_not_mounted_are_not_gone(archive: Path, make_config: Make, tmp_path: Path):
    (tmp_path / "mount").mkdir()
    config = make_config(archive, tmp_path / "out", labels=tmp_path / "mount", unlabelled="keep")
    refused(config, ConfigError, r"^data\.labels .*: an empty folder; is it mounted\?")


# the crosswalk


def test_a_crosswalk_is_written_over_nothing_else(copied: Config, tmp_path: Path):
    key = copied.data.key_file
    assert key is not None
    before = key.read_bytes()
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    (tmp_path / "link").symlink_to(key)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for place, words in (
        (Path("/dev/null"), "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "empty", "a file that is no crosswalk is there"),
        (key, "is data.key_file; take another file"),
        (tmp_path / "link", "is data.key_file; take another file"),
        (notes, "a file that is no crosswalk is there"),
    ):
        data = copied.data.model_copy(update={"crosswalk": place})
        with pytest.raises(ConfigError, match=words):
            build_shards(copied.model_copy(update={"data": data}))
    assert key.read_bytes() == before
    assert notes.read_text() == "mine"


def test_the_crosswalk_is_written_on_request_for_the_owner_alone(
    made: Config, copied: Config, key: bytes, tmp_path: Path
):
    assert not list(made.out.glob("*cross*"))
    target = tmp_path / "vault" / "crosswalk.tsv"
    data = copied.data.model_copy(update={"crosswalk": target})
    mask = os.umask(0)
    try:
        manifest = build_shards(copied.model_copy(update={"data": data}))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    lines = [line.split("\t") for line in target.read_text().splitlines()]
    table = {line[0]: line[1] for line in lines}
    assert len(table) == sum(manifest.counts.values()) == 35
    assert table[pseudonym(key, "file", "0/S00006/IM0001")] == "'0/S00006/IM0001'"
    whose = {line[0]: tuple(line[2:]) for line in lines if line[2:]}
    index = read_index(copied.shards)
    assert whose.items() >= {r.file_id: (r.patient, r.series, r.split) for r in index}.items()
    assert len(whose) < len(table)


@pytest.mark.parametrize("place", ["shards", "archive"])
def test_the_crosswalk_may_lie_neither_in_the_shards_nor_in_the_archive(
    copied: Config, tmp_path: Path, place: str
):
    folder = copied.shards if place == "shards" else copied.data.archive
    (tmp_path / "link").symlink_to(folder)
    target = tmp_path / "link" / "crosswalk.tsv"
    data = copied.data.model_copy(update={"crosswalk": target})
    with pytest.raises(ConfigError, match=r"^data\.crosswalk .*: lies inside"):
        build_shards(copied.model_copy(update={"data": data}))
    assert not target.exists()


def test_the_manifest_counts_what_the_index_holds(made: Config):
    manifest = read_manifest(made.shards)
    assert isinstance(manifest, Manifest)
    assert manifest.classes == ("background", "liver", "kidney", "lesion")
    assert manifest.counts == {"kept": 32, "skipped": 1, "quarantined": 2, "duplicate": 0}
    assert manifest.shards == 6
    assert Counter(r.split for r in read_index(made.shards)) == {"train": 16, "val": 8, "test": 8}
