"""Pictures of the slices where an exported file differs most from fp32."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from launch import exportpictures
from launch.exportpictures import BOTH, FP32, GAP, OTHER, SIDE, cut_of, draw_largest, draw_row
from launch.trained import labelled_rows
from medpsp.config import Config
from medpsp.deploy.gates import Differing
from shards.figures import Columns


def test_a_cut_is_around_the_largest_place_and_square_in_mm() -> None:
    differ = np.zeros((100, 100), np.bool_)
    differ[40:60, 50:54] = True
    differ[5, 5:20] = True  # smaller
    assert cut_of(differ, (1.0, 1.0)) == (slice(25, 75), slice(27, 77))  # 2.5 times 20
    assert cut_of(differ, (1.0, 2.0)) == (slice(25, 75), slice(40, 65))  # 50 mm: 25 columns
    assert cut_of(differ, (float("nan"), 1.0)) == (slice(25, 75), slice(27, 77))
    one = np.zeros((100, 100), np.bool_)
    one[0, 99] = True
    assert cut_of(one, (1.0, 1.0)) == (slice(0, 25), slice(75, 100))  # a quarter, inside


def panels(png: bytes) -> list[NDArray[np.uint8]]:
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    assert sheet.shape == (SIDE, 4 * SIDE + 3 * GAP, 3)
    return [sheet[:, n * (SIDE + GAP) : n * (SIDE + GAP) + SIDE] for n in range(4)]


def test_what_differs_is_drawn_in_its_colour() -> None:
    unit = np.full((80, 80), 0.5, np.float32)
    fp32, other = np.zeros((2, 80, 80), np.uint8)
    fp32[30:40, 30:40] = 1
    other[30:40, 32:42] = 1  # two columns gone, two new
    other[30:32, 36:38] = 2
    whole, before, after, differ = panels(draw_row(unit, fp32, other, (1.0, 1.0)))
    rows, _ = cut_of(fp32 != other, (1.0, 1.0))
    scale = (SIDE / (rows.stop - rows.start)) ** 2
    for colour, pixels in ((FP32, 20), (OTHER, 20), (BOTH, 4)):
        assert (differ == colour).all(-1).sum() == pytest.approx(pixels * scale, rel=0.1)
        assert not (whole == colour).all(-1).any()
    assert (before != after).any(-1).sum() > 20 * scale
    assert (whole == 255).all(-1).any()  # the frame


def test_rows_name_their_slice_and_what_may_show_a_name_is_not_drawn(
    made: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in labelled_rows(made) if row.split == "val"]
    masks = np.zeros((2, 48, 48), np.uint8)
    masks[1, 10:14, 10:13] = 1
    places = (1, len(rows) - 1)
    worst = [Differing(number=n, fp32=masks[0], other=masks[1]) for n in places]
    assert rows[1].series != rows[-1].series
    found = draw_largest(made, rows, {"int8": worst})
    for fact, row in zip(found, (rows[1], rows[-1]), strict=True):
        assert fact["title"] == (
            f"int8: patient {row.patient}, series {row.series} (CT), slice {row.slice_index}: "
            "12 pixels of 2304 differ (0.52 %)"
        )
        assert len(panels(fact["png"])) == 4
    find = exportpictures.withheld

    def withheld(columns: Columns, burned_in: str) -> dict[int, str]:
        row = columns.series.tolist().index(rows[1].series)
        return {**find(columns, burned_in), row: "may show a name"}

    monkeypatch.setattr(exportpictures, "withheld", withheld)
    hidden, shown = draw_largest(made, rows, {"int8": worst})
    assert hidden["png"] == b""
    assert hidden["title"].endswith("; not shown: may show a name")
    assert shown == found[1]
