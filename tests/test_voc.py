"""VOC-style archives: class values from PNG, patients and splits from names and lists."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medpsp.dataconfig import VocConfig
from medpsp.dicom.voc import read_image, read_mask, scan_voc
from medpsp.errors import ArchiveError, ConfigError, DicomError, LabelError
from medpsp.types import Place, ScanRow, Series

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
MASK = (np.arange(48, dtype=np.uint8).reshape(6, 8) % 3).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
PATIENTS = VocConfig(patient_pattern="^(p[0-9]+)-")


def save(path: Path, values: NDArray[Any], mode: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    return path


def archive(root: Path, *stems: str) -> Path:
    for stem in stems:
        save(root / "JPEGImages" / f"{stem}.png", GREY)
        save(root / "SegmentationClass" / f"{stem}.png", MASK)
    return root


def lists(root: Path, **stems: str) -> None:
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in stems.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def scan(root: Path, voc: VocConfig = PATIENTS) -> tuple[list[Series], list[ScanRow]]:
    return scan_voc(root, voc, lambda relative: f"id of {relative}")


def test_images_and_masks_pair_by_stem(tmp_path: Path) -> None:
    archive(tmp_path, "p1-b", "p1-a", "p2-a")
    series, rows = scan(tmp_path)
    assert not rows
    assert [s.first.patient_id for s in series] == ["p1", "p2"]
    assert [Path(ref.path).name for ref in series[0].slices] == ["p1-a.png", "p1-b.png"]
    folder = tmp_path / "SegmentationClass"
    assert series[0].masks == (Place(str(folder / "p1-a.png")), Place(str(folder / "p1-b.png")))
    assert series[0].mask_kind == "png"
    assert series[0].slices[0].file_id == "id of JPEGImages/p1-a.png"
    assert (series[0].first.rows, series[0].first.columns) == (6, 8)
    assert (series[0].affine, series[0].z_mm, series[0].split) == (None, (), None)


def test_without_a_pattern_every_image_is_a_patient(tmp_path: Path) -> None:
    series, _ = scan(archive(tmp_path, "a", "b"), VocConfig())
    assert [s.first.patient_id for s in series] == ["a", "b"]


def test_sizes_and_types_of_one_patient_are_series_of_their_own(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a", "p1-b")
    save(tmp_path / "JPEGImages" / "p1-c.png", GREY[:4])
    save(tmp_path / "JPEGImages" / "p1-d.png", GREY[:, :5])
    save(tmp_path / "JPEGImages" / "p1-e.png", GREY.astype(np.uint16) * 256)
    save(tmp_path / "JPEGImages" / "p1-f.png", COLOUR)
    save(tmp_path / "JPEGImages" / "p1-g.png", GREY, "RGB")
    save(tmp_path / "JPEGImages" / "p1-h.png", COLOUR)
    series, _ = scan(tmp_path)
    found = [(s.first.rows, s.first.columns, s.first.dtype, len(s.slices)) for s in series]
    assert found == [
        (4, 8, "int16", 1),
        (6, 5, "int16", 1),
        (6, 8, "float32", 1),
        (6, 8, "int16", 3),
        (6, 8, "uint8", 2),
    ]
    kinds = [(s.first.modality, s.first.photometric, s.first.channels) for s in series[2:]]
    assert kinds == [
        ("OT", "MONOCHROME2", 1),
        ("IMAGE8", "MONOCHROME2", 1),
        ("IMAGE8", "RGB", 3),
    ]
    assert len({s.first.series_uid for s in series}) == 5
    for item in series:
        for ref in item.slices:
            assert read_image(Path(ref.path)).dtype == ref.dtype


def test_deep_images_are_alone_for_their_window(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a", "p1-b")
    for stem in ("p1-a", "p1-b"):
        save(tmp_path / "JPEGImages" / f"{stem}.png", GREY.astype(np.uint16) * 256)
    series, _ = scan(tmp_path)
    assert [(s.first.patient_id, len(s.slices)) for s in series] == [("p1", 1)] * 2
    assert len({s.first.series_uid for s in series}) == 2


def test_split_lists(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a", "p2-a", "p3-a", "p4-a")
    lists(tmp_path, train="\ufeffp1-a\n", val="p2-a 1\n\n", test="p3-a\r\n")
    series, rows = scan(tmp_path)
    assert [(s.first.patient_id, s.split) for s in series] == [
        ("p1", "train"),
        ("p2", "val"),
        ("p3", "test"),
    ]
    assert [(row.code, row.status) for row in rows] == [("NOT_LISTED", "skipped")]


def test_listed_names_with_blanks(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a 1", "p2-a")
    lists(tmp_path, train="p1-a 1\n", val="p2-a 1\n")
    series, rows = scan(tmp_path)
    assert [(s.first.patient_id, s.split) for s in series] == [("p1", "train"), ("p2", "val")]
    assert rows == []


@pytest.mark.parametrize("second", ["p1-b", "p1-a"], ids=["other image", "same image"])
def test_patient_in_two_lists_is_refused(tmp_path: Path, second: str) -> None:
    archive(tmp_path, "p1-a", "p1-b", "p2-a")
    lists(tmp_path, train="p1-a\np2-a\n", val=f"{second}\n")
    with pytest.raises(ConfigError, match=r"one patient is in \['train', 'val'\]") as caught:
        scan(tmp_path)
    assert "p1" not in str(caught.value)


def test_list_that_is_no_text(tmp_path: Path) -> None:
    lists(archive(tmp_path, "p1-a"), train="")
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"split list .*train\.txt: not UTF-8 text"):
        scan(tmp_path)


@pytest.mark.parametrize("pattern", ["(", "^p[0-9]+-"])
def test_pattern_without_a_group(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.voc\.patient_pattern"):
        scan(archive(tmp_path, "p1-a"), VocConfig(patient_pattern=pattern))


@pytest.mark.parametrize("pattern", ["^(p[0-9]+)-", "^(p[0-9]+-)?", "^(x*)"])
def test_name_without_a_patient_is_a_row(tmp_path: Path, pattern: str) -> None:
    series, rows = scan(archive(tmp_path, "other"), VocConfig(patient_pattern=pattern))
    assert not series
    assert [(row.code, row.status) for row in rows] == [("NAME_NO_PATIENT", "quarantined")]
    assert rows[0].file_id == "id of JPEGImages/other.png"


@pytest.mark.parametrize("missing", ["JPEGImages", "SegmentationClass"])
def test_missing_and_empty_folders(tmp_path: Path, missing: str) -> None:
    archive(tmp_path, "p1-a")
    (tmp_path / missing / "p1-a.png").unlink()
    with pytest.raises(ArchiveError, match=f"{missing} holds no image"):
        scan(tmp_path)
    (tmp_path / missing).rmdir()
    with pytest.raises(ArchiveError, match=f"no folder .*{missing}"):
        scan(tmp_path)


def test_two_images_of_one_stem(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a")
    save(tmp_path / "SegmentationClass" / "p1-a.bmp", MASK)
    with pytest.raises(ArchiveError, match="holds 1 images whose name differs"):
        scan(tmp_path)


def png_claiming(rows: int, columns: int) -> bytes:
    """A PNG of under 100 bytes with one bit a pixel."""
    parts = (
        b"IHDR" + struct.pack(">IIBBBBB", columns, rows, 1, 0, 0, 0, 0),
        b"IDAT" + zlib.compress(b"\0"),
        b"IEND",
    )
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("content", [b"", b"no image", png_claiming(60000, 60000)])
def test_broken_images_are_rows(tmp_path: Path, content: bytes) -> None:
    archive(tmp_path, "p1-a")
    (tmp_path / "JPEGImages" / "p1-b.png").write_bytes(content)
    series, rows = scan(tmp_path)
    assert [len(s.slices) for s in series] == [1]
    assert [row.code for row in rows] == ["IMAGE_UNREADABLE"]
    with pytest.raises(DicomError, match="IMAGE_UNREADABLE"):
        read_image(tmp_path / "JPEGImages" / "p1-b.png")
    with pytest.raises(LabelError, match="MASK_UNREADABLE"):
        read_mask(tmp_path / "JPEGImages" / "p1-b.png", (6, 8))


def test_image_of_many_frames_is_a_row(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a")
    frames = [Image.fromarray(GREY), Image.fromarray(GREY)]
    frames[0].save(tmp_path / "JPEGImages" / "p1-b.tif", save_all=True, append_images=frames[1:])
    _, rows = scan(tmp_path)
    assert [(row.code, row.detail) for row in rows] == [
        ("MULTIFRAME_UNSUPPORTED", "2 frames, expected 1")
    ]


def test_cut_png(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = save(tmp_path / "a.png", rng.integers(0, 255, (20, 20), dtype=np.uint8))
    whole = path.read_bytes()
    for length in range(0, len(whole) - 16, 11):
        path.write_bytes(whole[:length])
        with pytest.raises(DicomError, match="IMAGE_UNREADABLE"):
            read_image(path)
        with pytest.raises(LabelError, match="MASK_UNREADABLE"):
            read_mask(path, (20, 20))


@pytest.mark.parametrize("mode", ["", "RGB", "RGBA", "LA", "P"])
def test_grey_in_any_clothes(tmp_path: Path, mode: str) -> None:
    values = read_image(save(tmp_path / "a.png", GREY, mode))
    assert values.dtype == np.int16
    assert (values == GREY).all()


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint16, 256), (np.int32, 1000)])
def test_deep_images_keep_their_values(tmp_path: Path, dtype: type, scale: int) -> None:
    deep = GREY.astype(dtype) * dtype(scale)
    values = read_image(save(tmp_path / "a.tif", deep))
    assert values.dtype == np.float32
    assert (values == deep).all()


def test_float_image(tmp_path: Path) -> None:
    values = read_image(save(tmp_path / "a.tif", GREY.astype(np.float32) / 4))
    assert values[1, 3] == 13.75  # 11 * 5 / 4


@pytest.mark.parametrize("mode", ["", "RGBA"])
def test_colour_image(tmp_path: Path, mode: str) -> None:
    colour = np.repeat(GREY[..., None], 3, axis=2)
    colour[2, 2, 1] += 1  # one pixel is enough
    values = read_image(save(tmp_path / "a.png", colour, mode))
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, colour)


def test_colour_may_be_taken_as_brightness(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a")
    save(tmp_path / "JPEGImages" / "p1-a.png", COLOUR)
    ((series,), _) = scan_voc(tmp_path, PATIENTS, str, grey=True)
    assert (series.first.dtype, series.first.photometric) == ("int16", "MONOCHROME2")


def test_what_is_transparent_lies_on_black(tmp_path: Path) -> None:
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[0], alpha[1] = 0, 51
    values = read_image(save(tmp_path / "a.png", np.dstack([COLOUR, alpha])))
    np.testing.assert_array_equal(values[2:], COLOUR[2:])
    assert not values[0].any()
    np.testing.assert_allclose(values[1], COLOUR[1] / 5, atol=0.51)  # 51 of 255
    grey = read_image(save(tmp_path / "b.png", np.dstack([GREY, alpha])))
    assert grey.dtype == np.int16
    assert (grey[2:] == GREY[2:]).all()
    assert not grey[0].any()


def test_palette_gives_its_colours_and_black_for_the_transparent_one(tmp_path: Path) -> None:
    image = Image.fromarray(MASK).convert("P")
    image.putdata(MASK.ravel().tolist())
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=0)
    colours = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 50]])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours[MASK])
    colours[0] = 0
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), colours[MASK])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colour_of_sixteen_bits_is_refused_and_not_cut_to_eight(
    tmp_path: Path, suffix: str
) -> None:
    archive(tmp_path, "p1-a")
    path = tmp_path / "JPEGImages" / f"p1-b{suffix}"
    cv2.imwrite(str(path), COLOUR.astype(np.uint16) * 257)
    with pytest.raises(DicomError, match="BITS_UNSUPPORTED: 16 bits a channel"):
        read_image(path)
    series, rows = scan(tmp_path)
    assert [len(s.slices) for s in series] == [1]
    assert [(row.code, row.status) for row in rows] == [("BITS_UNSUPPORTED", "quarantined")]


def test_ink_is_not_taken_for_light(tmp_path: Path) -> None:
    ink = np.zeros((6, 8, 4), dtype=np.uint8)
    ink[..., 3] = GREY  # no colour, only black
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "a.tif")
    assert (read_image(tmp_path / "a.tif") == 255 - GREY).all()


def test_palette_mask_gives_the_index(tmp_path: Path) -> None:
    image = Image.fromarray(MASK)
    image = image.convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # as VOC paints classes 0, 1 and 2
    image.putdata(MASK.ravel().tolist())
    image.save(tmp_path / "m.png")
    values = read_mask(tmp_path / "m.png", (6, 8))
    assert values.dtype == np.int64
    assert (values == MASK).all()


@pytest.mark.parametrize("mode", ["", "RGB", "RGBA", "LA"])
def test_mask_of_equal_channels(tmp_path: Path, mode: str) -> None:
    assert (read_mask(save(tmp_path / "m.png", MASK, mode), (6, 8)) == MASK).all()


def test_mask_of_one_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", MASK > 0)
    assert (read_mask(path, (6, 8)) == (MASK > 0)).all()


def test_mask_of_sixteen_bits(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", MASK.astype(np.uint16) * 500)
    assert (read_mask(path, (6, 8)) == MASK.astype(int) * 500).all()


def test_colour_mask_is_refused(tmp_path: Path) -> None:
    colour = np.repeat(MASK[..., None], 3, axis=2)
    colour[0, 0] = [128, 0, 0]
    with pytest.raises(LabelError, match="MASK_UNREADABLE: colour mask"):
        read_mask(save(tmp_path / "m.png", colour), (6, 8))


def test_fractional_mask_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.tif", MASK.astype(np.float32) / 2)
    with pytest.raises(LabelError, match="MASK_NOT_INTEGRAL"):
        read_mask(path, (6, 8))


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", MASK)
    with pytest.raises(LabelError, match=r"MASK_GRID_MISMATCH: mask \(6, 8\), image \(8, 6\)"):
        read_mask(path, (8, 6))


def test_image_without_mask(tmp_path: Path) -> None:
    archive(tmp_path, "p1-a", "p1-b")
    (tmp_path / "SegmentationClass" / "p1-a.png").unlink()
    (series,), _ = scan(tmp_path)
    with pytest.raises(LabelError, match="MASK_MISSING"):
        read_mask(Path(series.masks[0].path), (6, 8))
    assert (read_mask(Path(series.masks[1].path), (6, 8)) == MASK).all()


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass"])
def test_links_to_nowhere_are_told(tmp_path: Path, folder: str) -> None:
    """A disk that is not mounted must not look like images or labels that never were."""
    archive(tmp_path, "p1-a", "p2-a")
    path = tmp_path / folder / "p2-a.png"
    path.unlink()
    path.symlink_to("/mnt/store/gone")
    series, (row,) = scan(tmp_path)
    assert [s.first.patient_id for s in series] == ["p1"]
    assert (row.file_id, row.code) == ("id of JPEGImages/p2-a.png", "FILE_UNREADABLE")
    assert "No such file or directory" in row.detail


def test_a_link_above_the_lists_that_leads_nowhere(tmp_path: Path) -> None:
    """All patients would change sides."""
    archive(tmp_path, "p1-a", "p2-a")
    (tmp_path / "ImageSets").symlink_to("/mnt/store/gone")
    with pytest.raises(ConfigError, match=r"split list .*: a link to nowhere; is its disk mounted"):
        scan(tmp_path)


def test_lists_elsewhere_that_are_a_link_to_nowhere(tmp_path: Path) -> None:
    archive(tmp_path / "a", "p1-a", "p2-a")
    (tmp_path / "lists").symlink_to("/mnt/store/gone")
    with pytest.raises(ConfigError, match="a link to nowhere"):
        scan(tmp_path / "a", PATIENTS.model_copy(update={"lists": str(tmp_path / "lists")}))
