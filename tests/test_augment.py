"""Augmentation: what it may change, what it must not, and that it repeats."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medpsp.train.augment import AugmentOptions, Draw, apply_draw, augment, draw
from medpsp.train.batch import crop_or_pad
from medpsp.train.warp import Lines
from medpsp.types import IGNORE
from tests.kernels import prints

LEVELS = ("low", "mid", "high")
ALL = AugmentOptions(always=True)
Pair = tuple[NDArray[np.float32], NDArray[np.uint8]]


def sample() -> Pair:
    y, x = np.mgrid[:96, :80].astype(np.float32)
    image = (0.15 + 0.7 * (x + y) / 174).astype(np.float32)
    label = np.zeros((96, 80), dtype=np.uint8)
    label[20:60, 20:50], label[30:40, 30:40], label[70:90, 5:70] = 2, 7, 5
    return image, label


def run(level: str, seed: int, options: AugmentOptions | None = None) -> Pair:
    options = options or AugmentOptions()
    return augment(*sample(), level, np.random.default_rng(seed), options=options)


def shifted(shape: tuple[int, int], columns: float, **rest: float) -> Draw:
    """Every pixel shows what lies some columns to its right."""
    across = Lines(0.0, 1000.0, np.full(2, columns))
    return Draw(shape=shape, grid=(across, Lines(0.0, 1000.0, np.zeros(2))), **rest)


@pytest.mark.parametrize("options", [AugmentOptions(), ALL])
@pytest.mark.parametrize("level", LEVELS)
def test_no_label_is_invented_and_the_image_stays_an_image(
    level: str, options: AugmentOptions
) -> None:
    changed = 0
    for seed in range(40):
        image, label = run(level, seed, options)
        assert image.shape == label.shape == (96, 80)
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        assert set(np.unique(label)) <= {0, 2, 5, 7, IGNORE}
        inside = image[label != IGNORE]
        assert len(np.unique(inside)) >= 170  # all greys of the ramp, not black and white
        assert inside.std() > 0.1
        changed += not np.array_equal(image, sample()[0])
    assert changed >= (40 if options.always else 24)  # 1 - 0.5 * 0.5 of them, or more


@pytest.mark.parametrize("level", LEVELS)
def test_image_and_label_agree(level: str) -> None:
    """A label that is a threshold of the image is one afterwards, but for a pixel at edges."""
    y, x = np.mgrid[:160, :200].astype(np.float32)
    image = (np.sin(x / 9) + np.cos(y / 11) + 3).astype(np.float32)
    for seed in range(20):
        drawn = replace(draw(level, np.random.default_rng(seed), image.shape, ALL), gain=1.0)
        drawn = replace(drawn, offset=0.0)
        found, label = apply_draw(image, (image > 3).astype(np.uint8), drawn)
        # the outermost pixels mix with 0
        known = cv2.erode((label != IGNORE).astype(np.uint8), np.ones((3, 3)), borderValue=0)
        sure = (known == 1) & (np.abs(found - 3) > 0.25)  # slopes are below 0.15 a pixel
        assert sure.mean() > 0.5
        assert np.array_equal(found[sure] > 3, label[sure] == 1)


def test_a_shift_by_hand() -> None:
    """Ten columns come from outside: 0 and 255; brightness leaves that 0 as it is."""
    image, label = sample()
    drawn = shifted((96, 80), 10, gain=1.1, offset=0.05)
    found, mask = apply_draw(image, label, drawn)
    assert (found[:, 70:] == 0).all()
    assert (mask[:, 70:] == IGNORE).all()
    np.testing.assert_allclose(found[:, :70], image[:, 10:] * 1.1 + 0.05, atol=1e-5)
    assert np.array_equal(mask[:, :70], label[:, 10:])
    half, mask = apply_draw(image, label, shifted((96, 80), 0.25))
    np.testing.assert_allclose(half[:, :79], 0.75 * image[:, :79] + 0.25 * image[:, 1:], atol=1e-5)
    assert np.array_equal(mask, label)


@pytest.mark.parametrize("shape", [(6, 6), (7, 7)])
def test_a_quarter_turn_by_hand(shape: tuple[int, int]) -> None:
    image = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    turned, mask = apply_draw(
        image, image.astype(np.uint8), Draw(shape=shape, turn=((0.0, -1.0), (1.0, 0.0)))
    )
    assert np.array_equal(turned, np.rot90(image))
    assert np.array_equal(mask, np.rot90(image))


def test_pixels_from_outside_are_air_and_ignored() -> None:
    turned = [run("low", seed) for seed in range(20)]
    outside = [(image[label == IGNORE], label) for image, label in turned]
    assert sum((label == IGNORE).any() for _, label in outside) >= 6
    for pixels, label in outside:
        assert label[48, 40] != IGNORE
        assert pixels.size == 0 or np.median(pixels) == 0


@pytest.mark.parametrize("level", LEVELS)
def test_the_seed_alone_decides(level: str) -> None:
    first, second = run(level, 11), run(level, 11)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    different = {run(level, seed, ALL)[0].tobytes() for seed in range(12)}
    assert len(different) == 12


def test_another_process_makes_the_same_bits() -> None:
    """Loader workers have one thread of BLAS, the main process may have many, nodes other CPUs."""
    code = (
        "import hashlib\nfrom tests.test_augment import ALL, augment, np\n"
        "rng = np.random.default_rng(5)\n"
        "image, label = rng.random((512, 512), np.float32), np.zeros((512, 512), np.uint8)\n"
        "done = augment(image, label, 'high', rng, options=ALL)\n"
        "print(hashlib.sha256(done[0].tobytes() + done[1].tobytes()).hexdigest())\n"
    )
    assert len(prints(code)) == 1


def test_none_changes_nothing_and_nothing_is_changed_in_place() -> None:
    image, label = sample()
    rng = np.random.default_rng(0)
    same = augment(image, label, "none", rng)
    assert same[0] is image
    assert same[1] is label
    assert rng.random() == np.random.default_rng(0).random()  # drew nothing
    for seed in range(5):
        augment(image, label, "high", np.random.default_rng(seed), options=ALL)
    assert np.array_equal(image, sample()[0])
    assert np.array_equal(label, sample()[1])
    first = augment(image, label, "high", np.random.default_rng(1), options=ALL)
    kept = first[0].copy()
    augment(image, label, "high", np.random.default_rng(2), options=ALL)
    assert np.array_equal(first[0], kept)  # memory of the maps is used again, results are not


def test_where_nothing_is_drawn_the_arrays_come_back() -> None:
    image, label = sample()
    quiet = [
        seed
        for seed in range(400)
        if augment(image, label, "high", np.random.default_rng(seed))[0] is image
    ]
    assert 25 <= len(quiet) <= 75  # 0.5 * 0.5 * 0.7 * 0.7 = 0.12 of them, four deviations of 6.6


def test_brightness_moves_by_a_tenth_at_most() -> None:
    image, label = np.full((64, 64), 0.5, np.float32), np.zeros((64, 64), np.uint8)
    middles = np.array(
        [augment(image, label, "low", np.random.default_rng(s))[0][32, 32] for s in range(40)]
    )
    assert middles.min() >= 0.5 * 0.9 - 0.1 - 1e-6
    assert middles.max() <= 0.5 * 1.1 + 0.1 + 1e-6
    assert middles.std() > 0.01


def test_values_beyond_0_and_1_are_not_clipped() -> None:
    label = np.zeros((96, 80), np.uint8)
    for mean in (-1000.0, 0.0, 3000.0):  # HU as well as z-scores
        image = np.full((96, 80), mean, np.float32)
        image[:, :40] += 4
        image[:, 40:] -= 4
        for seed in range(10):
            drawn = draw("high", np.random.default_rng(seed), (96, 80), ALL)
            found, _ = apply_draw(image, label, drawn)
            expected = (mean + np.array([4.0, -4.0])) * drawn.gain + drawn.offset
            np.testing.assert_allclose(found[48, [15, 65]], expected, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 27])
@pytest.mark.parametrize("level", LEVELS)
def test_channels_move_together(level: str, channels: int) -> None:
    """Each channel comes out as a grey image would; a remap takes four at most."""
    grey, label = sample()
    factors = np.arange(1, channels + 1, dtype=np.float32)
    for seed in range(4):
        drawn = replace(draw(level, np.random.default_rng(seed), (96, 80), ALL), offset=0.0)
        expected, mask = apply_draw(grey, label, drawn)
        found, same_mask = apply_draw(grey[..., None] * factors, label, drawn)
        assert found.shape == (96, 80, channels)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(same_mask, mask)
        np.testing.assert_allclose(found, expected[..., None] * factors, rtol=1e-4, atol=1e-4)
    image = np.ones((96, 80, channels), np.float32)
    filled, _ = apply_draw(image, label, shifted((96, 80), 20))
    assert (filled[:, :60] == 1).all()
    assert (filled[:, 60:] == 0).all()


def test_opencv_takes_no_threads() -> None:
    run("low", 0, ALL)
    assert cv2.getNumThreads() == 1


def test_crop_or_pad_places_pixels_and_labels_alike() -> None:
    image = np.arange(1, 61, dtype=np.float32).reshape(6, 10)
    label = image.astype(np.uint8)
    offsets = set()
    for seed in range(30):
        cut, mask = crop_or_pad(image, label, (8, 4), np.random.default_rng(seed))
        assert cut.shape == mask.shape == (8, 4)
        inside = mask != IGNORE
        assert inside.sum() == 6 * 4  # all rows, four of ten columns
        assert np.array_equal(cut[inside], mask[inside])
        assert not cut[~inside].any()
        offsets.add((int(np.argmax(inside.any(1))), int(cut[inside][0]) - 1))
    rows, columns = zip(*offsets, strict=True)
    assert set(rows) == {0, 1, 2}
    assert set(columns) == set(range(7))


def test_crop_or_pad_takes_colour_as_it_takes_grey() -> None:
    grey = np.arange(1, 61, dtype=np.float32).reshape(6, 10)
    colour = np.stack([grey, grey + 100, -grey], axis=2)
    for seed in range(5):
        expected, mask = crop_or_pad(
            grey, grey.astype(np.uint8), (8, 4), np.random.default_rng(seed)
        )
        found, same_mask = crop_or_pad(
            colour, grey.astype(np.uint8), (8, 4), np.random.default_rng(seed)
        )
        assert found.shape == (8, 4, 3)
        np.testing.assert_array_equal(same_mask, mask)
        np.testing.assert_array_equal(found[..., 0], expected)
        np.testing.assert_array_equal(found[..., 1], np.where(mask == IGNORE, 0, expected + 100))
