"""Windows, percentiles and overlays, with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medpsp.intensity import (
    CLASS_COLOURS,
    CT_WINDOW,
    EIGHT_BIT,
    needs_series_values,
    overlay,
    percentile_window,
    series_window,
    to_unit,
)
from medpsp.types import Window

SOFT = Window(center=40, width=400)  # -160 .. 240


def test_window_by_hand() -> None:
    hu = np.array([-1024, -160, -60, 40, 140, 240, 3071], dtype=np.int16)
    unit = to_unit(hu, SOFT)
    assert unit.dtype == np.float32
    assert unit.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_inverted_window_by_hand() -> None:
    hu = np.array([-1024, -60, 40, 3071], dtype=np.int16)
    assert to_unit(hu, SOFT, inverted=True).tolist() == [1, 0.75, 0.5, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_window_of_any_type_leaves_its_input(dtype: type) -> None:
    values = np.array([[0, 50], [100, 120]], dtype=dtype)
    before = values.copy()
    unit = to_unit(values, Window(center=50, width=100))
    assert unit.tolist() == [[0, 0.5], [1, 1]]
    assert (values == before).all()


def test_window_of_width_one_does_not_divide_by_zero() -> None:
    unit = to_unit(np.array([6.0, 6.75, 7.0, 8.0]), Window(center=7, width=1))
    assert unit.tolist() == [0, 0.25, 0.5, 1]


def test_numbers_that_are_none_stay_in_range() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 40.0], dtype=np.float32)
    assert to_unit(values, SOFT).tolist() == [0, 1, 0, 0.5]


def test_eight_bit_images_use_their_whole_range() -> None:
    values = np.array([0, 51, 255], dtype=np.int16)
    assert to_unit(values, EIGHT_BIT).tolist() == pytest.approx([0, 0.2, 1])


def test_percentiles_by_hand() -> None:
    # of 1 .. 201 the 0.5 % point is 1 + 0.005 * 200 = 2, the 99.5 % point is 200
    window = percentile_window(np.arange(1, 202))
    assert (window.center, window.width) == (101, 198)


def test_zero_and_what_is_no_number_count_for_nothing() -> None:
    values = np.concatenate([np.arange(1.0, 202), np.zeros(5000), [np.nan, np.inf, -np.inf]])
    window = percentile_window(values)
    assert (window.center, window.width) == (101, 198)


@pytest.mark.parametrize(
    ("values", "center"),
    [([7, 7, 7], 7.0), ([0, 0], 0.5), ([], 0.5), ([np.nan, np.nan], 0.5), ([0, -3], -3.0)],
)
def test_constant_series_has_a_width(values: list[float], center: float) -> None:
    window = percentile_window(np.array(values, dtype=np.float32))
    assert (window.center, window.width) == (center, 1)
    assert np.isfinite(to_unit(np.array(values), window)).all()


def test_nearly_constant_series_has_a_width() -> None:
    window = percentile_window(np.array([1.0, 1.0 + 1e-12]))
    assert window.width == 1e-6


@pytest.mark.parametrize(
    ("modality", "fixed", "window", "needs"),
    [
        ("CT", None, CT_WINDOW, False),
        ("IMAGE8", None, EIGHT_BIT, False),
        ("MR", None, Window(center=101, width=198), True),
        ("OT", None, Window(center=101, width=198), True),
        ("CT", Window(center=1, width=2), Window(center=1, width=2), False),
        ("MR", Window(center=1, width=2), Window(center=1, width=2), False),
    ],
)
def test_which_window_a_series_gets(
    modality: str, fixed: Window | None, window: Window, needs: bool
) -> None:
    assert needs_series_values(modality, fixed) is needs
    values = np.arange(1, 202) if needs else np.zeros(0)
    assert series_window(modality, fixed, values) == window


def test_overlay_tints_classes_only() -> None:
    image = np.array([[0.5, 0.5, 0.5, 1.0]], dtype=np.float32)
    mask = np.array([[0, 1, 255, 2]], dtype=np.uint8)
    painted = overlay(image, mask, opacity=0.5)
    assert painted.dtype == np.uint8
    assert painted[0, 0].tolist() == painted[0, 2].tolist() == [127, 127, 127]
    # (127.5 + (230, 159, 0)) / 2 and (255 + (86, 180, 233)) / 2, cut to whole numbers
    assert painted[0, 1].tolist() == [178, 143, 63]
    assert painted[0, 3].tolist() == [170, 217, 244]


def test_colours_begin_anew_after_the_last() -> None:
    classes = np.array([[1, 7, 8, 254]], dtype=np.uint8)  # 254 = 36 * 7 + 2
    painted = overlay(np.zeros((1, 4), dtype=np.float32), classes, opacity=1)
    assert painted[0].tolist() == CLASS_COLOURS[[1, 7, 1, 2]].tolist()
