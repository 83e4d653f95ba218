"""Windows, percentiles and overlays, with numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_voi_lut

from medpsp.channels import channels_first
from medpsp.errors import DicomError
from medpsp.intensity import (
    CLASS_COLOURS,
    EIGHT_BIT,
    ValueCounts,
    needs_series_values,
    overlay,
    percentile_window,
    series_window,
    to_unit,
    valid_windows,
    voi,
    voi_lut,
)
from medpsp.types import VoiFunction, Window

SOFT = Window(center=40, width=400)  # -160 .. 240


def counted(values: np.ndarray, valid: np.ndarray | None = None) -> ValueCounts:
    counts = ValueCounts()
    counts.add(values, valid)
    return counts


def test_window_by_hand() -> None:
    hu = np.array([-1024, -160, -60, 40, 140, 240, 3071], dtype=np.int16)
    unit = to_unit(hu, SOFT)
    assert unit.dtype == np.float32
    assert unit.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
def test_windows_of_other_functions_are_those_of_a_viewer(function: VoiFunction) -> None:
    """A quarter of LINEAR with centre 50 and width 101 lies at 24.5; turned over it is 0.75."""
    window = Window(center=50, width=101, function=function)
    values = np.array([-900, 24.5, 49.5, 900])
    assert to_unit(values, window).tolist() == voi(values, window).tolist()
    assert to_unit(values, window, inverted=True).tolist() == (1 - voi(values, window)).tolist()
    if function == "LINEAR":
        assert to_unit(values, window, inverted=True).tolist() == [1, 0.75, 0.5, 0]


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


def test_colour_is_shown_whole() -> None:
    """v / 255 in every channel, to the bit."""
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    window = series_window("US", SOFT, ValueCounts(), 3)
    assert window == EIGHT_BIT
    assert not needs_series_values("US", None, 3)
    np.testing.assert_array_equal(to_unit(rgb, window), rgb.astype(np.float32) / np.float32(255))


# VOI, PS3.3 C.11.2 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("center", "width", "black", "half", "white"),
    [
        # C.11.2.1.2.1 gives these three: c 2048, w 4096 is y = x / 4095 of 0..4095; ...
        (2048, 4096, 0, 2047.5, 4095),
        # ... c 2048, w 1 is black up to 2047 and white from 2048 (no half);
        (2048, 1, 2047, math.nan, 2048),
        # ... c 0, w 100: x <= -50 is black, x > 49 is white
        (0, 100, -50, -0.5, 49),
        (0, 2, -1, -0.5, 0),
    ],
)
def test_linear_by_the_examples_of_the_standard(
    center: float, width: float, black: float, half: float, white: float
) -> None:
    window = Window(center=center, width=width, function="LINEAR")
    found = voi(np.array([black - 9, black, half, white, white + 9]), window)
    assert found.dtype == np.float32
    assert found.tolist() == [0, 0, 0 if math.isnan(half) else 0.5, 1, 1]


def test_a_width_of_one_is_a_step_at_half_a_level_below_the_centre() -> None:
    """PS3.3 C.11.2.1.2.1: x <= c - 0.5 is black, and nothing is divided by w - 1."""
    with np.errstate(all="raise"):
        found = voi(np.array([6.4, 6.5, 6.6]), Window(center=7, width=1, function="LINEAR"))
    assert found.tolist() == [0, 0, 1]


def test_the_three_functions_at_one_place() -> None:
    """Centre 50, width 101: a quarter of LINEAR lies at 49.5 - 25, of LINEAR_EXACT at 50 - 25.25.

    The sigmoid at the lower edge of the window, c - w / 2, is 1 / (1 + e^2).
    """
    window = Window(center=50, width=101, function="LINEAR")
    assert voi(np.array([24.5, 49.5, 74.5]), window).tolist() == [0.25, 0.5, 0.75]
    assert voi(np.array([24.75, 50, 75.25]), replace(window, function="LINEAR_EXACT")).tolist() == [
        0.25,
        0.5,
        0.75,
    ]
    edge = 1 / (1 + math.exp(2))
    found = voi(np.array([-0.5, 50, 100.5]), replace(window, function="SIGMOID"))
    np.testing.assert_allclose(found, [edge, 0.5, 1 - edge], rtol=1e-6)
    steep = voi(np.array([-1e30, 1e30]), Window(center=0, width=1e-3, function="SIGMOID"))
    assert steep.tolist() == [0, 1]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_no_number_is_black_and_infinity_has_an_end(function: VoiFunction) -> None:
    values = np.array([math.nan, -math.inf, math.inf])
    for width in (1, 400):
        assert voi(values, Window(center=40, width=width, function=function)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("width", "function"),
    [
        (0.99, "LINEAR"),
        (0, "LINEAR_EXACT"),
        (0, "SIGMOID"),
        (-5, "LINEAR"),
        (math.nan, "LINEAR"),
        (400, "Doe^Jane"),
        (-1, "Doe^Jane"),
    ],
)
def test_widths_and_functions_that_the_standard_forbids(width: float, function: str) -> None:
    with pytest.raises(DicomError, match="VOI_INVALID") as caught:
        voi(np.zeros(1), Window(center=0, width=width, function=function))  # type: ignore[arg-type]
    assert "Jane" not in str(caught.value)


LEVELS = st.integers(-2000, 4000)
WIDTHS = st.integers(1, 5000)


@given(st.lists(LEVELS, min_size=1, max_size=8), LEVELS, WIDTHS)
def test_linear_is_the_formula_of_the_standard(xs: list[int], c: int, w: int) -> None:
    def formula(x: int) -> float:
        if x <= c - 0.5 - (w - 1) / 2:
            return 0
        if x > c - 0.5 + (w - 1) / 2:
            return 1
        return (x - (c - 0.5)) / (w - 1) + 0.5

    found = voi(np.array(xs, dtype=np.int16), Window(center=c, width=w, function="LINEAR"))
    np.testing.assert_allclose(found, [formula(x) for x in xs], rtol=0, atol=1e-7)


@given(st.lists(LEVELS, min_size=2, max_size=8), LEVELS, WIDTHS)
def test_windows_keep_the_order_and_what_the_network_sees_is_linear_exact(
    xs: list[int], c: int, w: int
) -> None:
    values, window = np.array(sorted(xs), dtype=np.int16), Window(center=c, width=w)
    functions: tuple[VoiFunction, ...] = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
    for function in functions:
        shown = voi(values, replace(window, function=function))
        assert (np.diff(shown) >= 0).all()
        assert 0 <= shown.min()
        assert shown.max() <= 1
    np.testing.assert_allclose(voi(values, window), to_unit(values, window), rtol=0, atol=1e-3 / w)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(function: VoiFunction) -> None:
    values = np.arange(-1000, 3000, 7, dtype=np.int16)
    ds = Dataset()
    ds.BitsStored, ds.PixelRepresentation, ds.PhotometricInterpretation = 16, 1, "MONOCHROME2"
    for center, width in ((40, 400), (300.5, 1), (-600, 1500), (50, 2)):
        ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, width, function
        with np.errstate(over="ignore"):  # in its sigmoid
            theirs = (apply_voi_lut(values, ds) + 32768) / 65535
        found = voi(values, Window(center=center, width=width, function=function))
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6)


def test_lut_by_hand() -> None:
    """Four entries of 8 bits from -1 on; below and above, the entry at that end."""
    table = np.array([0, 51, 102, 255], dtype=np.uint8)
    found = voi_lut(np.array([-900, -1, 0, 1, 2, 900], dtype=np.int16), (4, -1, 8), table)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0, 0, 0.2, 0.4, 1, 1], rtol=1e-6)
    fractions = np.array([[0.4, 0.6], [math.nan, math.inf]])
    np.testing.assert_allclose(voi_lut(fractions, (4, -1, 8), table), [[0.2, 0.4], [0, 1]])


def test_lut_of_65536_entries_says_zero() -> None:
    table = np.arange(65536, dtype=np.uint16)[::-1].copy()
    found = voi_lut(np.array([-5, 0, 1, 65535, 70000]), (0, 0, 16), table)
    np.testing.assert_allclose(found, [1, 1, 65534 / 65535, 0, 0], rtol=1e-6)


def test_lut_of_fewer_bits_than_its_words() -> None:
    table = np.array([0, 2047, 4095, 9999], dtype=np.uint16)  # the last has more than 12 bits
    found = voi_lut(np.array([0, 1, 2, 3]), (4, 0, 12), table)
    np.testing.assert_allclose(found, [0, 2047 / 4095, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("descriptor", [(4, 0, 8), (0, 0, 16), (3, 0, 7), (3, 0, 17)])
def test_lut_that_its_descriptor_does_not_fit(descriptor: tuple[int, int, int]) -> None:
    with pytest.raises(DicomError, match="VOI_INVALID: LUTData of 3 entries"):
        voi_lut(np.zeros(1), descriptor, np.zeros(3, np.uint8))


@given(st.lists(LEVELS, min_size=1, max_size=8), LEVELS, st.integers(2, 60), st.data())
def test_lut_agrees_with_pydicom(xs: list[int], first: int, entries: int, data: st.DataObject):
    table = data.draw(st.lists(st.integers(0, 4095), min_size=entries, max_size=entries))
    item, ds = Dataset(), Dataset()
    item.LUTDescriptor, item.LUTData = [entries, first, 12], table
    item["LUTDescriptor"].VR = item["LUTData"].VR = "SS"
    ds.VOILUTSequence, ds.PhotometricInterpretation = [item], "MONOCHROME2"
    values = np.array(xs, dtype=np.int16)
    theirs = apply_voi_lut(values, ds) / 4095
    found = voi_lut(values, (entries, first, 12), np.array(table, dtype=np.uint16))
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6)


def test_valid_pairs_of_several_windows() -> None:
    nan, inf = math.nan, math.inf
    centers = [40, 1, nan, 50, None, 55, 60, 70, 600, 80]
    widths = [400, 0.5, 100, 0, 10, None, -1, inf, 1600]  # one fewer
    assert valid_windows(centers, widths) == (
        Window(center=40, width=400),
        Window(center=1, width=0.5),
        Window(center=600, width=1600),
    )
    assert valid_windows([40], []) == valid_windows([], [400]) == valid_windows([None], [1]) == ()


# windows of a series ----------------------------------------------------------------------------


def test_percentiles_by_hand() -> None:
    # of 1 .. 201 the 0.5 % point is 1 + 0.005 * 200 = 2, the 99.5 % point is 200
    window = percentile_window(counted(np.arange(1, 202)))
    assert (window.center, window.width) == (101, 198)


def test_zero_and_what_is_no_number_count_for_nothing() -> None:
    values = np.concatenate([np.arange(1.0, 202), np.zeros(5000), [np.nan, np.inf, -np.inf]])
    window = percentile_window(counted(values))
    assert (window.center, window.width) == (101, 198)


def test_padding_counts_for_nothing() -> None:
    values = np.concatenate([np.arange(1, 202), np.full(5000, -2000)]).astype(np.int16)
    window = percentile_window(counted(values, values != -2000))
    assert (window.center, window.width) == (101, 198)
    assert percentile_window(counted(values, np.zeros(values.shape, bool))) == Window(
        center=0.5, width=1
    )


def test_the_centre_of_a_window_may_lie_between_two_values() -> None:
    window = percentile_window(counted(np.array([1, 2])))
    assert (window.center, window.width) == pytest.approx((1.5, 0.99))  # 1.005 to 1.995


@pytest.mark.parametrize(
    ("values", "center"),
    [([7, 7, 7], 7.0), ([0, 0], 0.5), ([], 0.5), ([np.nan, np.nan], 0.5), ([0, -3], -3.0)],
)
def test_constant_series_has_a_width(values: list[float], center: float) -> None:
    window = percentile_window(counted(np.array(values, dtype=np.float32)))
    assert (window.center, window.width) == (center, 1)
    assert np.isfinite(to_unit(np.array(values), window)).all()


def test_nearly_constant_series_has_a_width() -> None:
    window = percentile_window(counted(np.array([1.0, 1.0 + 1e-12])))
    assert window.width == 1


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=300), st.integers(1, 4))
def test_counts_give_the_percentiles_of_numpy_however_they_are_added(
    values: list[int], parts: int
) -> None:
    array = np.array(values, dtype=np.int16)
    counts = ValueCounts()
    for part in np.array_split(array, parts):
        counts.add_counts(counted(part).pairs)
    if not (kept := array[array != 0]).size:
        assert counts.pairs == []
        return
    expected = np.percentile(kept.astype(float), (0.5, 99.5))  # in int16 its steps overflow
    np.testing.assert_allclose(counts.percentiles((0.5, 99.5)), expected, rtol=0, atol=1e-9)


def test_counts_of_floats_are_within_half_a_percent() -> None:
    values = np.random.default_rng(0).gamma(2.0, 300.0, 20_000).astype(np.float32)
    found = counted(values).percentiles((0.5, 99.5))
    np.testing.assert_allclose(found, np.percentile(values, (0.5, 99.5)), rtol=4e-3)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1001, 1002, math.nan, math.inf], [1001, 1002]),  # whole: as they are
        ([1001, 0.5], [0.5, 1000]),  # else in steps of bfloat16: of 4 here, ...
        ([1001, 131_071], [1001, 131_071]),
        ([1001, 131_072], [1000, 131_072]),  # ... as for whole numbers from 2^17 on, of 1024 there
        ([1001, 131_073], [1000, 131_072]),
        ([0.5, 3.4e38], [0.5]),  # it would be infinite
    ],
)
def test_steps_in_which_floats_are_counted(values: list[float], kept: list[float]) -> None:
    assert counted(np.array(values, np.float32)).pairs == [(value, 1) for value in kept]


def test_floats_go_to_the_nearer_step_and_up_from_half_way() -> None:
    values = np.array([0x3F807FFF, 0x3F808000], np.uint32).view(np.float32)  # about 1 + 1 / 256
    assert counted(values).pairs == [(1, 1), (1 + 1 / 128, 1)]


@pytest.mark.parametrize(
    ("modality", "fixed", "window", "needs"),
    [
        ("CT", None, SOFT, False),
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
    assert series_window(modality, fixed, counted(values)) == window


def test_overlay_tints_classes_only() -> None:
    image = np.array([[0.5, 0.5, 0.5, 1.0]], dtype=np.float32)
    mask = np.array([[0, 1, 255, 2]], dtype=np.uint8)
    painted = overlay(image, mask, opacity=0.5)
    assert painted.dtype == np.uint8
    assert painted[0, 0].tolist() == painted[0, 2].tolist() == [127, 127, 127]
    # (127.5 + (230, 159, 0)) / 2 and (255 + (86, 180, 233)) / 2, cut to whole numbers
    assert painted[0, 1].tolist() == [178, 143, 63]
    assert painted[0, 3].tolist() == [170, 217, 244]


def test_overlay_leaves_more_than_half_of_the_image_and_no_value_wraps_around() -> None:
    image = np.array([[0, -0.1, 1.2]], dtype=np.float32)
    painted = overlay(image, np.array([[1, 0, 0]], dtype=np.uint8))
    assert painted.tolist() == [[[103, 71, 0], [0] * 3, [255] * 3]]  # 45 % of (230, 159, 0)


def test_overlay_of_a_colour_image() -> None:
    image = np.zeros((1, 2, 3), dtype=np.float32)
    image[0] = [(0.2, 0.4, 1), (0.5, 0.25, 0)]
    painted = overlay(image, np.array([[0, 2]], dtype=np.uint8), opacity=0.5)
    assert painted[0, 0].tolist() == [51, 102, 255]
    # ((127.5, 63.75, 0) + (86, 180, 233)) / 2
    assert painted[0, 1].tolist() == [106, 121, 116]
    assert image[0, 1, 0] == 0.5  # not painted into


def test_channels_come_first_and_grey_is_repeated() -> None:
    grey, colour = np.arange(6.0).reshape(2, 3), np.arange(18.0).reshape(2, 3, 3)
    assert channels_first(grey, 1).shape == (1, 2, 3)
    assert channels_first(grey, 3).shape == (3, 2, 3)
    assert all((plane == grey).all() for plane in channels_first(grey, 3))
    assert channels_first(colour, 3)[1].tolist() == [[1, 4, 7], [10, 13, 16]]


def test_colours_begin_anew_after_the_last() -> None:
    classes = np.array([[1, 7, 8, 254]], dtype=np.uint8)  # 254 = 36 * 7 + 2
    painted = overlay(np.zeros((1, 4), dtype=np.float32), classes, opacity=1)
    assert painted[0].tolist() == CLASS_COLOURS[[1, 7, 1, 2]].tolist()


def test_colours_as_okabe_and_ito_give_them() -> None:
    """Their black, orange, sky blue, green, yellow, purple and blue, and a red of our own."""
    hexes = [bytes(colour).hex() for colour in CLASS_COLOURS.astype(np.uint8).tolist()]
    assert hexes == "000000 e69f00 56b4e9 dc3250 009e73 f0e442 cc79a7 0072b2".split()
    assert CLASS_COLOURS.dtype == np.float32
