"""The report: its numbers are those of the tables, and it shows nothing that it must not."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image
from typer.testing import CliRunner

from launch.cli import app
from medpsp.config import Config
from medpsp.configio import dump_yaml
from medpsp.errors import ShardError
from medpsp.intensity import overlay
from shards.figures import (
    class_shares,
    count_flags,
    count_lost,
    count_reasons,
    count_splits,
    read_columns,
)
from shards.index import Manifest, ObjectRow, SliceRow, read_manifest, write_manifest
from shards.layout import FORMAT
from shards.page import Html, histogram, html, number, percent, table, tag, tally
from shards.reader import ShardReader
from shards.report import write_report
from shards.tables import INDEX_SCHEMA, OBJECTS_SCHEMA
from shards.thumbs import choose_cases, draw, fitted, withheld
from tests.damage import write_rows

CLASSES = ("background", "organ", "lesion <&>")
AXIAL = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
SAGITTAL = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
GREY = SliceRow(
    bucket="4x8_int16",
    slot=0,
    patient="p1",
    series="s1",
    slice_index=0,
    modality="CT",
    photometric="MONOCHROME2",
    z_mm=0.0,
    spacing=(2.0, 1.0, 5.0),
    affine=AXIAL,
    window_center=40.0,
    window_width=400.0,
    voi_center=float("nan"),
    voi_width=float("nan"),
    split="train",
    order=0.5,
    labelled=True,
    histogram=(32, 0, 0, 0),
    file_id="f",
    spacing_source="patient",
)


def written(root: Path, rows: list[SliceRow], objects: list[ObjectRow], **fields_of: Any) -> Path:
    """Tables and manifest; a slice of series s1 holds ``histogram[1]`` pixels of organ."""
    root.mkdir(exist_ok=True)
    write_rows(root / "index.parquet", map(asdict, rows), INDEX_SCHEMA)
    write_rows(root / "objects.parquet", map(asdict, objects), OBJECTS_SCHEMA)
    counts = {s: 0 for s in ("kept", "skipped", "quarantined", "duplicate")}
    for item in objects:
        counts[item.status] += 1
    tree = {
        "version": FORMAT,
        "tool": "medpsp 0",
        "classes": CLASSES,
        "key_fingerprint": "0badcafe",
        "settings": {"burned_in": "quarantine", "label_names": {"<b>": "organ"}},
        "data_id": "d1",
        "shards": (),
        "slices": len(rows),
        "torn": 0,
        "counts": counts,
        "codes": {},
        "deid": {"profile": "allow-list", "options": []},
        "tables": {},
    }
    write_manifest(root, Manifest(**{**tree, **fields_of}))
    return root


def pixels(root: Path, bucket: str, image: np.ndarray, label: np.ndarray) -> None:
    for name, block in (("image", image), ("label", label)):
        array = zarr.create_array(
            root / bucket / name,
            shape=block.shape,
            dtype=block.dtype,
            chunks=(1, *block.shape[1:]),
            shards=block.shape,
        )
        array[:] = block


def stack(number: int, **changes: Any) -> list[SliceRow]:
    return [replace(GREY, slice_index=i, slot=i, z_mm=5.0 * i, **changes) for i in range(number)]


KEPT = ObjectRow(file_id="a", status="kept", code="", detail="", frames=1, kept=1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Five labelled CT slices, organ in slices 1 to 3, and an MR slice that cannot be read."""
    rows = stack(5)
    rows[1:4] = [replace(r, histogram=(24, 8, 0, 0)) for r in rows[1:4]]
    lost = replace(GREY, bucket="9x9_int16", patient="p2", series="s2", modality="MR", split="val")
    objects = [
        *(replace(KEPT, file_id=f"k{i}") for i in range(5)),
        replace(KEPT, file_id="cine", code="PIX_TRUNCATED", frames=4, kept=1),
        *(
            ObjectRow(
                file_id=f"q{i}",
                status="quarantined",
                code="PIX_TRUNCATED",
                detail=f"{i} bytes",
                frames=1,
                kept=0,
            )
            for i in range(2)
        ),
        ObjectRow(file_id="n", status="skipped", code="NOT_DICOM", detail="no", frames=0, kept=0),
    ]
    root = written(
        tmp_path / "shards",
        [*rows, replace(lost, labelled=False, histogram=(0, 0, 0, 81), flags=("VOI_INVALID",))],
        objects,
    )
    label = np.zeros((5, 4, 8), dtype=np.uint8)
    label[1:4, :, :2] = 1
    image = np.full((5, 4, 8), 40, dtype=np.int16)
    image[:, :, 4:] = 240
    pixels(root, "4x8_int16", image, label)
    return root


class Page(HTMLParser):
    """Checks that elements close in order, and keeps their text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(root: Path) -> Page:
    return Page(write_report(root).read_text(encoding="utf-8"))


def test_the_page_says_what_the_tables_hold(small: Path):
    text = page_of(small).text
    assert "9 objects found, 6 kept: 6 slices of 2 series of 2 patients" in text
    total = "6 kept + 1 skipped + 2 quarantined + 0 duplicate = 9 objects"
    assert total.replace(" ", "") in text.replace(" ", "")
    assert "2 objects were quarantined, 25 % of these and the kept ones" in text  # 2 of 8
    row = (
        "PIX_TRUNCATED for example: 0 bytes quarantined 2 22.2 % The pixels are cut short. "
        "Copy it from its source again."
    )
    assert row in text
    assert "PIX_TRUNCATED 1 3 The pixels are cut short." in text  # one object, three frames
    assert "train 1 1 5 5 100 %" in text
    assert "val 1 1 1 0 0 %" in text
    assert "val has no labelled slice" in text
    assert "train never shows: lesion <&>." in text
    # 3 slices of 8 of 32 pixels: 24 of 160; organ in 3 of 5 slices
    assert "organ 15 % 60 %" in text
    assert "VOI_INVALID 1 16.7 % 1" in text
    assert "slice distance" in text.lower()
    assert "0badcafe" in text


def test_the_page_stands_alone_and_is_escaped(small: Path):
    raw = write_report(small).read_text(encoding="utf-8")
    page = Page(raw)
    assert "lesion &lt;&amp;&gt;" in raw
    assert "&lt;b&gt;" in raw
    assert not re.search(r"https?://|<script|<link|@import|url\(", raw)
    assert all(v.startswith("data:image/png;base64,") for _, k, v in page.attributes if k == "src")
    assert all(v.startswith("#") for _, k, v in page.attributes if k == "href")
    assert {v for _, k, v in page.attributes if k == "href"} <= {
        f"#{v}" for _, k, v in page.attributes if k == "id"
    }
    assert "prefers-color-scheme: dark" in raw
    assert str(small) not in raw


def test_the_same_shards_give_the_same_bytes(small: Path):
    first = write_report(small).read_bytes()
    assert write_report(small).read_bytes() == first


def test_a_slice_that_cannot_be_drawn_is_said_and_no_error(small: Path):
    page = page_of(small)
    assert page.text.count("cannot be drawn") == 1  # s2 has no arrays
    assert sum(tag == "img" for tag, key, _ in page.attributes if key == "src") == 6


def test_a_manifest_that_contradicts_the_objects_is_an_error(small: Path):
    manifest = read_manifest(small)
    manifest.counts["kept"] += 1
    write_manifest(small, manifest)
    with pytest.raises(ShardError, match="the manifest says"):
        write_report(small)


@pytest.mark.parametrize("name", ["index.parquet", "objects.parquet", "manifest.json"])
def test_a_missing_table_is_an_error(small: Path, name: str):
    (small / name).unlink()
    with pytest.raises(ShardError):
        write_report(small)


def test_columns_are_those_of_the_rows(small: Path):
    columns = read_columns(small / "index.parquet", 3)
    assert columns.histogram.tolist()[1] == [24, 8, 0, 0]
    assert columns.spacing.tolist()[0] == [2.0, 1.0, 5.0]
    assert columns.window.tolist()[0] == [40.0, 400.0]
    assert columns.normal.tolist()[0] == [0.0, 0.0, 1.0]
    assert [x.tolist() for x in columns.flags] == [["VOI_INVALID"], [5]]
    with pytest.raises(ShardError, match=r"index\.parquet cannot be read"):
        read_columns(small / "index.parquet", 4)


def test_shares_count_labelled_slices_only(tmp_path: Path):
    rows = [
        replace(GREY, histogram=(2, 1, 1, 4)),
        replace(GREY, histogram=(4, 0, 0, 4)),
        replace(GREY, histogram=(0, 0, 8, 0), labelled=False),
        replace(GREY, histogram=(0, 0, 0, 8), split="val", affine=()),
    ]
    columns = read_columns(written(tmp_path, rows, [KEPT]) / "index.parquet", 3)
    shares = class_shares(columns)
    assert shares["train"][0].tolist() == [0.75, 0.125, 0.125]
    assert shares["train"][1].tolist() == [1.0, 0.5, 0.5]
    assert np.isnan(shares["val"][0]).all()  # all to ignore
    assert shares["val"][1].tolist() == [0, 0, 0]
    assert np.isnan(shares["test"][1]).all()
    assert count_splits(columns)["train"] == (1, 1, 3, 2)
    assert np.isnan(columns.normal).tolist() == [[False] * 3] * 3 + [[True] * 3]


def test_reasons_are_counted_with_their_commonest_details():
    rows = [
        ("kept", "", ""),
        ("skipped", "NOT_DICOM", "x"),
        *[("quarantined", "TS_UNSUPPORTED", "1.2")] * 3,
        *[("quarantined", "TS_UNSUPPORTED", "1.1")] * 3,
        ("quarantined", "TS_UNSUPPORTED", "1.0"),
        ("duplicate", "DUP_IDENTICAL", ""),
    ]
    assert count_reasons(rows) == [
        ("TS_UNSUPPORTED", "quarantined", 7, (("1.1", 3), ("1.2", 3))),
        ("NOT_DICOM", "skipped", 1, (("x", 1),)),
        ("DUP_IDENTICAL", "duplicate", 1, (("", 1),)),
    ]
    lost = count_lost([("kept", "DEC_ERROR", 5, 3), ("kept", "", 2, 2), ("skipped", "X", 4, 0)])
    assert lost == [("DEC_ERROR", 1, 2)]


def test_flags_that_quarantine_elsewhere_come_first(tmp_path: Path):
    rows = [
        replace(GREY, flags=("GZIP",)),
        replace(GREY, flags=("GZIP", "MISSING_SLICES"), series="s2"),
    ]
    columns = read_columns(written(tmp_path, rows, [KEPT]) / "index.parquet", 3)
    assert count_flags(columns) == [("MISSING_SLICES", 1, 1), ("GZIP", 2, 2)]


def test_cases_are_labelled_first_of_many_patients_in_keyed_order(tmp_path: Path):
    rows = [
        replace(GREY, patient=patient, series=series, order=order, labelled=labelled)
        for patient, series, order, labelled in (
            ("p1", "a", 0.9, True),
            ("p1", "b", 0.9, True),
            ("p2", "c", 0.1, True),
            ("p3", "d", 0.0, False),
            ("p4", "e", 0.2, True),
        )
    ]
    columns = read_columns(written(tmp_path, rows, [KEPT]) / "index.parquet", 3)

    def chosen(most: int, hidden: dict[int, str]) -> str:
        return "".join(columns.series[c.row] for c in choose_cases(columns, hidden, most))

    assert chosen(9, {}) == "ceabd"
    assert chosen(2, {}) == "ce"
    assert chosen(9, {2: "may show a name"}) == "eabd"


def test_a_case_shows_quarters_of_what_is_labelled(tmp_path: Path):
    rows = stack(11)
    rows[2:11] = [replace(r, histogram=(31, 0, 1, 0)) for r in rows[2:11]]
    rows = rows[::-1]  # the order of the index is not that of the slices
    columns = read_columns(written(tmp_path, rows, [KEPT]) / "index.parquet", 3)
    (case,) = choose_cases(columns, {}, 3)
    assert columns.slice_index[list(case.shown)].tolist() == [4, 6, 8]
    assert (case.first, case.last, case.slices, case.labelled) == (2, 10, 11, True)
    rows = [replace(GREY, labelled=False)]
    columns = read_columns(written(tmp_path, rows, [KEPT]) / "index.parquet", 3)
    assert choose_cases(columns, {}, 3)[0].shown == (0,)


def test_what_may_show_a_person_is_not_shown(tmp_path: Path):
    face = ("RECOGNIZABLE_FACE_POSSIBLE",)
    rows = [
        replace(GREY, series="0"),
        replace(GREY, series="1", modality="US"),
        replace(GREY, series="2", flags=("PHI_BURNED_IN",)),
        replace(GREY, series="3", flags=face),
        replace(GREY, series="4", flags=face, affine=SAGITTAL),
        replace(GREY, series="5", flags=face, affine=()),
    ]
    root = written(tmp_path, rows, [KEPT], settings={"burned_in": "keep"})
    columns = read_columns(root / "index.parquet", 3)
    name, shown = "may show a name", "may show a face"
    assert withheld(columns, "keep") == {1: name, 2: name, 4: shown, 5: shown}
    assert withheld(columns, "blank") == {2: name, 4: shown, 5: shown}  # 1 was blanked, or is NO
    text = page_of(root).text
    assert "2 of 6 series" in text
    assert "Not shown: 2 that may show a face. Not shown: 2 that may show a name." in text


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_picture_is_windowed_and_true_to_the_spacing(small: Path):
    columns = read_columns(small / "index.parquet", 3)
    thumb = draw(ShardReader(small), columns, 1)
    assert thumb is not None
    image, label = decoded(thumb.image), decoded(thumb.label)
    assert image.shape == (150, 150)  # 4 rows of 2 mm, 8 columns of 1 mm
    assert label.shape == (150, 150, 4)
    assert image[75, 20] == 127  # the centre of the window
    assert image[75, 140] == 255
    assert label[75, 18].tolist() == [230, 159, 0, 115]
    assert label[75, 80, 3] == 0
    assert draw(ShardReader(small), columns, 0).label == b""  # type: ignore[union-attr]


def test_the_layers_look_as_the_overlay_of_the_package(small: Path):
    thumb = draw(ShardReader(small), read_columns(small / "index.parquet", 3), 1)
    assert thumb is not None
    base = Image.open(io.BytesIO(thumb.image)).convert("RGBA")
    seen = np.asarray(Image.alpha_composite(base, Image.open(io.BytesIO(thumb.label))))[75, 18, :3]
    tinted = overlay(np.full((1, 1), 0.5, np.float32), np.ones((1, 1), np.uint8))[0, 0]
    np.testing.assert_allclose(seen, tinted, atol=1)


def test_colour_and_inverted_images_are_drawn(tmp_path: Path):
    change = {"window_center": 127.5, "window_width": 255.0, "labelled": False}
    rows = [
        replace(GREY, bucket="4x8_uint8", photometric="RGB", **change),
        replace(GREY, bucket="4x8_int16", photometric="MONOCHROME1", **change),
    ]
    root = written(tmp_path, rows, [KEPT])
    nothing = np.full((1, 4, 8), 255, dtype=np.uint8)
    pixels(root, "4x8_uint8", np.full((1, 4, 8, 3), (200, 10, 30), dtype=np.uint8), nothing)
    pixels(root, "4x8_int16", np.full((1, 4, 8), -9, dtype=np.int16), nothing)
    columns = read_columns(root / "index.parquet", 3)
    colour, inverted = (draw(ShardReader(root), columns, row) for row in (0, 1))
    assert colour is not None
    assert inverted is not None
    assert decoded(colour.image)[9, 9].tolist() == [200, 10, 30]
    assert decoded(inverted.image)[9, 9] == 255
    assert colour.label == b""


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((512, 512), (0.7, 0.7), (150, 150)),
        ((100, 200), (2.0, 1.0), (150, 150)),
        ((100, 200), (float("nan"), 1.0), (150, 75)),
        ((1, 5000), (1.0, 1.0), (150, 19)),
    ],
)
def test_pictures_keep_the_shape_of_the_body(
    shape: tuple[int, int], spacing: tuple[float, float], size: tuple[int, int]
):
    assert fitted(shape, np.array(spacing)) == size


def test_numbers_read_well():
    shares = [0.0, 1e-6, 0.00123, 0.0994, 0.12345, 0.9999, 1.0, float("nan")]
    assert [percent(s) for s in shares] == [
        *("0 %", "< 0.01 %", "0.12 %", "9.9 %", "12.3 %", "> 99.9 %", "100 %", "–")
    ]
    assert [number(v) for v in (0.70312, 40.0, -1024.0, 123456.7)] == [
        *("0.7031", "40", "-1024", "123457")
    ]
    assert html(1234567) == "1\u202f234\u202f567"
    assert html("<a&'\">") == "&lt;a&amp;&#x27;&quot;&gt;"
    assert html(Html("<b>")) == "<b>"


def test_parts_of_a_page_escape_what_they_are_given():
    evil = "<script>'\""
    parts = (
        tag("p", evil, title=evil),
        table([evil], [[evil]], ()),
        tally([(evil, 3)]),
    )
    for part in parts:
        assert "<script>" not in part
        Page(part)


def test_a_histogram_has_bars_in_proportion_and_says_its_range():
    drawn = histogram(np.array([1.0, 1.0, 2.0, 4.0, float("nan")]), "mm")
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', drawn)]
    assert heights == [68.0, 34.0, 34.0]  # 72 less a margin of 4
    text = Page(drawn).text
    assert "median 1.5 mm" in text
    assert "1 4 mm" in text
    assert "not known for 1 of 5" in text
    assert Page(histogram(np.array([2.5, 2.5]), "mm")).text == "2.5 mm in all"
    assert Page(histogram(np.array([float("nan")]), "mm")).text == "not known for any"


def test_a_tally_puts_the_rest_into_one_line():
    text = Page(tally([("a", 1), ("", 5), ("b", 2), ("c", 2)], most=2)).text
    assert text == "not recorded 50 % 5 b 20 % 2 2 others 30 % 3"


def test_the_command_writes_the_page_of_real_shards_and_names_nobody(
    copied: Config, tmp_path: Path, own_handlers: None
):
    config = tmp_path / "c.yaml"
    config.write_text(dump_yaml(copied))
    result = CliRunner().invoke(app, ["report", str(config)], catch_exceptions=False)
    path = copied.shards / "report.html"
    assert result.output.strip() == str(path)
    raw = path.read_text(encoding="utf-8")
    assert "32 slices of 8 series of 8 patients" in Page(raw).text.replace("\u202f", "")
    images = re.findall(r"base64,([^\"]+)", raw)
    assert len(images) >= 8 * 3
    for text in (raw, *(base64.b64decode(i).decode("latin-1") for i in images)):
        assert "PHANTOM" not in text
        assert str(copied.data.archive) not in text


def test_many_slices_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No loop over slices: twenty times the slices must not take twenty calls as many."""
    import cProfile

    def calls(number: int) -> int:
        rows = [
            replace(r, series=f"s{i // 100}", patient=f"p{i // 100}")
            for i, r in enumerate(stack(number))
        ]
        columns = read_columns(written(tmp_path, rows, [KEPT]) / "index.parquet", 3)
        profile = cProfile.Profile()
        profile.runcall(use, columns)
        return sum(entry.callcount for entry in profile.getstats())

    def use(columns: Any) -> None:
        for count in COUNTS:
            count(columns)

    calls(100)  # what is imported on the first call
    assert calls(2000) < 6 * calls(100)


COUNTS: tuple[Callable[..., Any], ...] = (
    class_shares,
    count_flags,
    count_splits,
    lambda c: choose_cases(c, withheld(c, "keep"), 3),
)
