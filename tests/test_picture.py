"""The picture of a series: which slices it shows, and whether their numbers can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from medpsp.deploy.picture import COLUMNS, LEGEND, TILE, TITLE, Sheet, number_slice
from medpsp.deploy.stream import Segmented


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_a_number_is_read_on_any_ground(ground: int) -> None:
    sheet = Image.new("RGB", (80, 30), (ground, ground, ground))
    number_slice(sheet, (5, 3), 17)
    drawn = np.asarray(sheet).astype(int)[..., 0]
    bright = drawn > 230
    if ground < 230:  # the letters against the ground
        assert bright.sum() > 60
    if ground > 20:  # and their outline
        assert (drawn < 30).sum() > 60
    # around each letter it is dark, whatever the ground
    plain = Image.new("L", (80, 30))
    number_slice(plain, (5, 3), 17)
    letters = np.asarray(plain) > 230
    ring = np.zeros_like(letters)
    for dy, dx in ((0, 2), (0, -2), (2, 0), (-2, 0)):
        ring |= np.roll(letters, (dy, dx), (0, 1))
    assert np.median(drawn[ring & ~letters & (np.asarray(plain) < 5)]) < 30


def sheet_of(path: Path, title: str, masks: int) -> NDArray[np.uint8]:
    sheet = Sheet(("background", "liver"), title)
    for place in range(12):
        mask = np.zeros((64, 64), np.uint8)
        mask[20:30, 20:30] = place < masks
        sheet.add(Segmented(place, place, np.ones((64, 64), np.float32), mask))
    sheet.save(path)
    return np.asarray(Image.open(path))


def test_the_series_stands_below_its_slices(tmp_path: Path) -> None:
    drawn = sheet_of(tmp_path / "a.png", "series-003, CT", 8)
    assert drawn.shape == (2 * TILE + TITLE + LEGEND, COLUMNS * TILE, 3)
    line = drawn[2 * TILE : 2 * TILE + TITLE].max(axis=(0, 2)) > 128
    wide = ImageFont.load_default(size=15).getlength("series-003, CT, 8 of 12 slices")
    assert np.flatnonzero(line).max() == pytest.approx(10 + wide, abs=4)
    other = sheet_of(tmp_path / "b.png", "series-004, MR", 8)
    rows = np.flatnonzero((drawn != other).any(axis=(1, 2)))
    assert 2 * TILE <= rows.min() <= rows.max() < 2 * TILE + TITLE
