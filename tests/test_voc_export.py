"""Shards to a VOC folder and back."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import shards.voc
from launch.cli import app
from medpsp.config import Config
from medpsp.configio import dump_yaml
from medpsp.errors import ConfigError, ShardError
from medpsp.identity import pseudonym
from shards.bucket import create_bucket
from shards.index import INDEX, MANIFEST, Manifest, SliceRow, read_index, read_manifest
from shards.layout import FORMAT
from shards.reader import ShardReader
from shards.sealed import sealed_bytes
from shards.settings import write_settings
from shards.tables import INDEX_SCHEMA
from shards.voc import INT16_OFFSET, coded, export_voc, slice_names, voc_palette
from tests.damage import write_rows

Pixels = NDArray[Any]
HU = np.array([[-32768, -160, -120], [40, 41, 32767]], dtype=np.int16)
"""Window 40/400 is -160..240: 0, 0, 25.5, 127.5, 128.1 and 255 of 255."""
RGB = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
LABEL = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)
ROW = SliceRow(
    bucket="2x3_int16",
    slot=0,
    patient="00000000000000aa",
    series="00000000000000b1",
    slice_index=7,
    modality="CT",
    photometric="MONOCHROME2",
    z_mm=12.5,
    spacing=(0.5, 0.25, 2.0),
    affine=tuple(float(i) for i in range(16)),
    window_center=40.0,
    window_width=400.0,
    voi_center=float("nan"),
    voi_width=float("nan"),
    split="train",
    order=0.5,
    labelled=True,
    histogram=(2, 1, 2, 1),
    file_id="00000000000000f1",
    flags=("GANTRY_TILT", "RESCALE_ABSENT"),
)


def make(root: Path, items: list[tuple[SliceRow, Pixels]], **data: Any) -> Config:
    """Shards of given rows and images, all of 2 x 3; the label of each is LABEL."""
    config = Config.model_validate(
        {
            "out": root / "run",
            "data": {"archive": root / "archive", "classes": ["background", "a", "b"], **data},
        }
    )
    buckets: dict[str, list[tuple[SliceRow, Pixels]]] = defaultdict(list)
    for row, image in items:
        buckets[row.bucket].append((row, image))
    rows = []
    for bucket, members in buckets.items():
        settings = replace(write_settings(config.data), shard_slices=8)
        create_bucket(config.shards, bucket, len(members), settings)
        for name, values in (
            ("image", [image for _, image in members]),
            ("label", [LABEL] * len(members)),
        ):
            zarr.open_array(config.shards / bucket / name, mode="r+")[:] = np.stack(values)
        rows += [replace(row, slot=slot) for slot, (row, _) in enumerate(members)]
    write_rows(config.shards / INDEX, map(asdict, rows), INDEX_SCHEMA)
    write_manifest(config, len(rows))
    return config


def write_manifest(config: Config, slices: int) -> None:
    empty: dict[str, Any] = {
        f.name: {} for f in fields(Manifest) if f.name not in ("version", "classes", "shards")
    }
    tree = {**empty, "version": FORMAT, "classes": config.data.classes, "shards": 0}
    (config.shards / MANIFEST).write_bytes(sealed_bytes({**tree, "slices": slices}))


def table(out: Path) -> list[dict[str, str]]:
    with (out / "slices.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def png(path: Path) -> tuple[str, Pixels]:
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


def files(out: Path) -> dict[str, str]:
    """Digest of every file by its place."""
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*"))
        if p.is_file()
    }


def test_palette_is_that_of_voc() -> None:
    """Aeroplane to tv monitor, as the development kit prints them."""
    first = [
        *([0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]),
        *([0, 128, 128], [128, 128, 128], [64, 0, 0], [192, 0, 0], [64, 128, 0], [192, 128, 0]),
        *([64, 0, 128], [192, 0, 128], [64, 128, 128], [192, 128, 128], [0, 64, 0], [128, 64, 0]),
        *([0, 192, 0], [128, 192, 0], [0, 64, 128]),
    ]
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette[:21].tolist() == first
    assert palette[255].tolist() == [224, 224, 192]
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_eight_bits_are_what_the_network_sees() -> None:
    stored, coding = coded(HU, ROW, 8)
    assert stored.dtype == np.uint8
    assert stored.tolist() == [[0, 0, 26], [128, 128, 255]]  # 25.5 and 127.5 go to the even one
    assert coding == (8, 400 / 255, -160.0)
    inverted, back = coded(HU, replace(ROW, photometric="MONOCHROME1"), 8)
    assert inverted.tolist() == [[255, 255, 230], [128, 127, 0]]
    assert back == (8, -400 / 255, 240.0)
    inside = (HU > -160) & (HU < 240)
    for values, (_, scale, offset) in ((stored, coding), (inverted, back)):
        np.testing.assert_allclose((values * scale + offset)[inside], HU[inside], atol=400 / 510)


def test_windows_of_headers_keep_their_function() -> None:
    """LINEAR 3/5 is black at 0.5 and white at 4.5; 1 to 4 lie in between."""
    values = np.array([[-9, 0, 1], [2, 3, 9]], dtype=np.int16)
    row = replace(ROW, window_center=3.0, window_width=5.0, window_function="LINEAR")
    stored, coding = coded(values, row, 8)
    assert stored.tolist() == [[0, 0, 32], [96, 159, 255]]  # 31.875, 95.625, 159.375
    assert coding == (8, 4 / 255, 0.5)
    inverted, back = coded(values, replace(row, photometric="MONOCHROME1"), 8)
    assert inverted.tolist() == [[255, 255, 223], [159, 96, 0]]
    assert back == (8, -4 / 255, 4.5)
    stored, coding = coded(values, replace(row, window_function="SIGMOID"), 8)
    assert stored[1, 1] == 128  # the center; 127.5 goes to the even one
    assert np.isnan([coding.scale, coding.offset]).all()
    deep, coding = coded(values.astype(np.float32), row, 16)  # a line that leads back
    assert deep[1, 1] == 32768
    assert coding == (16, 5 / 65535, 0.5)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_sixteen_bits_keep_every_int16(photometric: str) -> None:
    row = replace(ROW, photometric=photometric)
    every = np.arange(-32768, 32768, dtype=np.int64).astype(np.int16).reshape(256, 256)
    stored, coding = coded(every, row, 16)
    assert stored.dtype == np.uint16
    assert coding == (16, 1.0, -32768.0)
    assert (stored[0, 0], stored[255, 255]) == (0, 65535)
    np.testing.assert_array_equal(stored * coding.scale + coding.offset, every)


def test_sixteen_bits_of_floating_point_are_the_window() -> None:
    values = np.array([[-1.0, 0.0, 0.25], [0.5, 2.0, np.nan]], dtype=np.float32)
    row = replace(ROW, window_center=0.5, window_width=1.0, photometric="MONOCHROME1")
    stored, coding = coded(values, row, 16)
    assert stored.tolist() == [[0, 0, 16384], [32768, 65535, 0]]  # 16383.75, 32767.5
    assert coding == (16, 1 / 65535, 0.0)


@pytest.mark.parametrize("bits", [8, 16])
def test_colour_stays_as_it_is(bits: int) -> None:
    stored, coding = coded(RGB, ROW, bits)
    np.testing.assert_array_equal(stored, RGB)
    assert coding == (8, 1.0, 0.0)


def test_names_are_unique() -> None:
    name = "00000000000000aa_00000000000000b1_0007"
    rows = (ROW, replace(ROW, slice_index=12345), replace(ROW, bucket="other"))
    assert slice_names(rows) == (name, name[:-4] + "12345", name + "_2")


def test_tree(tmp_path: Path) -> None:
    nan = float("nan")
    loose = replace(
        ROW,
        bucket="2x3_uint8",
        series="00000000000000b2",
        slice_index=0,
        modality="ES",
        photometric="RGB",
        z_mm=nan,
        spacing=(nan, nan, nan),
        affine=(),
        frame=3,
        flags=(),
    )
    bare = replace(ROW, patient="00000000000000cc", split="val", labelled=False)
    config = make(tmp_path, [(ROW, HU), (bare, HU), (loose, RGB)])
    out = tmp_path / "voc"
    assert export_voc(config, out) == (3, 2)
    grey, colour, other = (
        "00000000000000aa_00000000000000b1_0007",
        "00000000000000aa_00000000000000b2_0000",
        "00000000000000cc_00000000000000b1_0007",
    )
    lists = "ImageSets/Segmentation"
    assert sorted(files(out)) == [
        *(f"{lists}/{name}.txt" for name in ("test", "train", "trainval", "val")),
        *(f"JPEGImages/{name}.png" for name in (grey, colour, other)),
        "README.txt",
        *(f"SegmentationClass/{name}.png" for name in (grey, colour)),
        "classes.txt",
        "slices.csv",
    ]
    mode, values = png(out / f"JPEGImages/{grey}.png")
    assert (mode, values.tolist()) == ("L", [[0, 0, 26], [128, 128, 255]])
    mode, values = png(out / f"JPEGImages/{colour}.png")
    assert mode == "RGB"
    np.testing.assert_array_equal(values, RGB)
    with Image.open(out / f"SegmentationClass/{grey}.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), LABEL)
        shown = np.asarray(mask.convert("RGB"))
    assert shown[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert shown[1, 1].tolist() == [224, 224, 192]
    for name in ("train", "trainval"):
        assert (out / lists / f"{name}.txt").read_text() == f"{grey}\n{colour}\n"
    for name in ("val", "test"):  # what has no mask is in no list
        assert (out / lists / f"{name}.txt").read_text() == ""
    assert (out / "classes.txt").read_text() == "background\na\nb\n"
    one, two, three = table(out)
    assert [row["name"] for row in (one, two, three)] == [grey, colour, other]
    assert one["patient"] + one["series"] == "00000000000000aa00000000000000b1"
    assert (one["file_id"], one["frame"], one["slice_index"]) == ("00000000000000f1", "0", "7")
    assert (one["z_mm"], one["window_center"], one["window_width"]) == ("12.5", "40.0", "400.0")
    spacing = ("spacing_row_mm", "spacing_column_mm", "spacing_slice_mm")
    assert [one[key] for key in spacing] == ["0.5", "0.25", "2.0"]
    affine = [f"affine_{row}{column}" for row in range(4) for column in range(4)]
    assert [float(one[key]) for key in affine] == list(range(16))
    assert one["flags"] == "GANTRY_TILT RESCALE_ABSENT"
    assert [(row["split"], row["labelled"]) for row in (one, two, three)] == [
        ("train", "1"),
        ("train", "1"),
        ("val", "0"),
    ]
    assert {two[key] for key in (*affine, *spacing, "z_mm", "flags")} == {""}
    assert (two["bits"], two["scale"], two["offset"], two["frame"]) == ("8", "1.0", "0.0", "3")


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    items = [(replace(ROW, slice_index=n), HU + np.int16(n)) for n in range(40)]
    config = make(tmp_path, items, workers=1)
    export_voc(config, tmp_path / "one")
    many = config.model_copy(update={"data": config.data.model_copy(update={"workers": 8})})
    export_voc(many, tmp_path / "many")
    assert files(tmp_path / "one") == files(tmp_path / "many")
    names = [p.read_bytes() for p in sorted((tmp_path / "one" / "JPEGImages").iterdir())]
    chunks = {name: b"".join(names).count(name) for name in (b"tIME", b"tEXt", b"iTXt", b"IDAT")}
    assert chunks == {b"tIME": 0, b"tEXt": 0, b"iTXt": 0, b"IDAT": 40}


def test_where_it_may_go(tmp_path: Path) -> None:
    config = make(tmp_path, [(ROW, HU)])
    taken, empty, file = tmp_path / "taken", tmp_path / "empty", tmp_path / "file"
    for folder in (taken, empty, tmp_path / "late.partial"):
        folder.mkdir()
    (taken / "mine.txt").write_text("mine")
    file.write_text("mine")
    for out, said in {
        taken: "not empty",
        file: "a file, expected a folder",
        config.shards / "voc": "inside the shards",
        config.data.archive / "voc": "inside data.archive",
        tmp_path / "late": r"late\.partial: left by an export that was stopped",
    }.items():
        with pytest.raises(ConfigError, match=said):
            export_voc(config, out)
    with pytest.raises(ConfigError, match="--bits 12: expected 8 or 16"):
        export_voc(config, empty, 12)
    assert export_voc(config, empty) == (1, 1)
    assert export_voc(config, tmp_path / "new" / "voc") == (1, 1)
    assert files(empty) == files(tmp_path / "new" / "voc")
    assert (taken / "mine.txt").read_text() == file.read_text() == "mine"


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path, [(replace(ROW, slice_index=n), HU) for n in range(30)])
    out = tmp_path / "voc"

    def full(values: Pixels, palette: bytes = b"") -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.voc, "_png", full)
        with pytest.raises(OSError, match="No space left on device: ") as caught:
            export_voc(config, out)
    assert (caught.value.errno, caught.value.filename) == (28, str(out))
    assert not list(tmp_path.glob("voc*"))
    (config.shards / ROW.bucket / "label" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(ShardError, match="2x3_int16/label slot 8 cannot be read"):
        export_voc(config, out)
    assert not list(tmp_path.glob("voc*"))


def read_back(out: Path, config: Config, **changes: Any) -> Config:
    """The configuration that README.txt tells to use."""
    text = (out / "README.txt").read_text(encoding="utf-8")
    told = yaml.safe_load(text[text.index("data:\n") :])["data"]
    assert told["archive"] == "<this folder>"
    tree = {**told, "archive": out, "key_file": config.data.key_file, "shard_slices": 6, **changes}
    return Config.model_validate({"out": out.with_name(out.name + "-run"), "data": tree})


def by_name(config: Config, names: list[str]) -> dict[str, SliceRow]:
    """Rows of shards that were read back, by the name of their image."""
    assert config.data.key_file
    key = config.data.key_file.read_bytes().strip()
    found = {row.file_id: row for row in read_index(config.shards)}
    ids = {name: pseudonym(key, "file", f"JPEGImages/{name}.png") for name in names}
    return {name: found.pop(file_id) for name, file_id in ids.items() if file_id in found}


def test_round_trip(made: Config, tmp_path: Path) -> None:
    """Read back as ``data.source: voc``: every class count, pixel and split is the same."""
    from shards.build import build_shards

    out = tmp_path / "voc"
    rows = read_index(made.shards)
    assert export_voc(made, out) == (32, 32)
    before = dict(zip(slice_names(rows), rows, strict=True))
    back = read_back(out, made)
    manifest = build_shards(back)
    assert manifest.counts == {"kept": 32, "skipped": 0, "quarantined": 0, "duplicate": 0}
    assert manifest.classes == read_manifest(made.shards).classes
    after = by_name(back, list(before))
    assert sorted(after) == sorted(before)
    first, second = ShardReader(made.shards), ShardReader(back.shards)
    for name, row in before.items():
        again = after[name]
        assert (again.histogram, again.split) == (row.histogram, row.split)
        image, label = first.read(row.bucket, row.slot)
        shown, mask = second.read(again.bucket, again.slot)
        np.testing.assert_array_equal(mask, label)
        np.testing.assert_array_equal(shown, coded(image, row, 8)[0])
        assert (again.window_center, again.window_width) == (127.5, 255.0)
    pairs = {(before[name].patient, after[name].patient) for name in before}
    assert len(pairs) == 8  # patients stay apart and whole


def test_sixteen_bits_restore_int16(made: Config, tmp_path: Path) -> None:
    out = tmp_path / "voc"
    export_voc(made, out, 16)
    reader, rows = ShardReader(made.shards), read_index(made.shards)
    records = {record["name"]: record for record in table(out)}
    for name, row in zip(slice_names(rows), rows, strict=True):
        mode, stored = png(out / "JPEGImages" / f"{name}.png")
        assert mode == "I;16"
        values = stored * float(records[name]["scale"]) + float(records[name]["offset"])
        image, _ = reader.read(row.bucket, row.slot)
        np.testing.assert_array_equal(values.astype(np.int16), image)
        assert float(records[name]["offset"]) == INT16_OFFSET


def test_sixteen_bits_come_back_through_the_source(tmp_path: Path, made: Config) -> None:
    from shards.build import build_shards

    out = tmp_path / "voc"
    export_voc(made, out, 16)
    window = {"center": 40 + 32768, "width": 400}
    back = read_back(out, made, window=window)
    assert build_shards(back).counts["kept"] == 32
    rows = read_index(made.shards)
    after = by_name(back, list(slice_names(rows)))
    first, second = ShardReader(made.shards), ShardReader(back.shards)
    for name, row in zip(slice_names(rows), rows, strict=True):
        image, _ = first.read(row.bucket, row.slot)
        values, _ = second.read(after[name].bucket, after[name].slot)
        np.testing.assert_array_equal(values - 32768, image)
        np.testing.assert_array_equal(coded(values, after[name], 8)[0], coded(image, row, 8)[0])


@pytest.mark.usefixtures("own_handlers")
def test_command(tmp_path: Path) -> None:
    config = make(tmp_path, [(ROW, HU)])
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    out = tmp_path / "voc"
    command = ["voc", str(tmp_path / "c.yaml"), str(out), "data.workers=1", "--bits", "16"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout == f"{out}  1 image, 1 mask\n"
    assert table(out)[0]["bits"] == "16"
    assert (config.out / "logs" / "voc.log").is_file()
    with pytest.raises(ConfigError, match="not empty"):
        CliRunner().invoke(app, command, catch_exceptions=False)
