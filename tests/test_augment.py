"""Augmentation: what it may change, what it must not, and that it repeats."""

from __future__ import annotations

import albumentations as A
import numpy as np
import pytest
from numpy.typing import NDArray

from medpsp.train.augment import _pipeline, augment
from medpsp.train.batch import crop_or_pad
from medpsp.types import IGNORE

LEVELS = ("low", "mid", "high")
Pair = tuple[NDArray[np.float32], NDArray[np.uint8]]


def sample() -> Pair:
    y, x = np.mgrid[:96, :80].astype(np.float32)
    image = (0.15 + 0.7 * (x + y) / 174).astype(np.float32)
    label = np.zeros((96, 80), dtype=np.uint8)
    label[20:60, 20:50], label[30:40, 30:40], label[70:90, 5:70] = 2, 7, 5
    return image, label


def run(level: str, seed: int) -> Pair:
    return augment(*sample(), level, np.random.default_rng(seed))


@pytest.mark.parametrize("level", LEVELS)
def test_no_label_is_invented_and_the_image_stays_an_image(level: str) -> None:
    changed = 0
    for seed in range(20):
        image, label = run(level, seed)
        assert image.shape == label.shape == (96, 80)
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        assert set(np.unique(label)) <= {0, 2, 5, 7, IGNORE}
        assert 0 <= image.min()
        assert image.max() <= 1
        inside = image[label != IGNORE]
        assert len(np.unique(inside)) >= 170  # all greys of the ramp, not black and white
        assert inside.std() > 0.1
        changed += not np.array_equal(image, sample()[0])
    assert changed >= 15  # 1 - 0.3 * 0.5 of them, or more


def test_pixels_from_outside_are_black_and_ignored() -> None:
    turned = [run("low", seed) for seed in range(20)]
    outside = [(image[label == IGNORE], label) for image, label in turned]
    assert sum((label == IGNORE).any() for _, label in outside) >= 10
    for pixels, label in outside:
        assert label[48, 40] != IGNORE
        assert pixels.size == 0 or np.median(pixels) < 0.1  # brightness may lift the black a bit


@pytest.mark.parametrize("level", LEVELS)
def test_the_seed_alone_decides(level: str) -> None:
    first, second = run(level, 11), run(level, 11)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    different = {run(level, seed)[0].tobytes() for seed in range(12)}
    assert len(different) >= 8  # a few draw no change at all


def test_none_changes_nothing_and_nothing_is_changed_in_place() -> None:
    image, label = sample()
    rng = np.random.default_rng(0)
    same = augment(image, label, "none", rng)
    assert same[0] is image
    assert same[1] is label
    assert rng.random() == np.random.default_rng(0).random()  # drew nothing
    for seed in range(5):
        augment(image, label, "high", np.random.default_rng(seed))
    assert np.array_equal(image, sample()[0])
    assert np.array_equal(label, sample()[1])


def test_brightness_moves_by_a_tenth_at_most() -> None:
    image, label = np.full((64, 64), 0.5, np.float32), np.zeros((64, 64), np.uint8)
    middles = np.array(
        [augment(image, label, "low", np.random.default_rng(s))[0][32, 32] for s in range(40)]
    )
    assert middles.min() >= 0.5 * 0.9 - 0.1 - 1e-6
    assert middles.max() <= 0.5 * 1.1 + 0.1 + 1e-6
    assert middles.std() > 0.01


def test_elastic_really_moves_pixels() -> None:
    size = 256
    elastic = next(t for t in _pipeline("high").transforms if isinstance(t, A.ElasticTransform))
    elastic.set_random_seed(3)
    ramp = np.broadcast_to(np.arange(size, dtype=np.float32) / size, (size, size))
    out = elastic(image=np.ascontiguousarray(ramp)[..., None], force_apply=True)["image"]
    inner = slice(32, -32)  # what comes from outside is black, not moved
    moved = (out.reshape(size, size) - ramp)[inner, inner] * size  # columns
    assert 1 < np.sqrt((moved**2).mean()) < 10
    assert np.abs(moved).max() < 20


@pytest.mark.parametrize("level", LEVELS)
def test_the_channels_of_a_colour_image_move_together(level: str) -> None:
    """Three equal channels come out equal, and as the grey image does."""
    grey, label = sample()
    rgb = np.repeat(grey[..., None], 3, axis=2)
    for seed in range(6):
        expected, mask = run(level, seed)
        found, same_mask = augment(rgb, label, level, np.random.default_rng(seed))
        assert found.shape == (96, 80, 3)
        np.testing.assert_array_equal(same_mask, mask)
        np.testing.assert_allclose(found, np.repeat(expected[..., None], 3, axis=2), atol=1e-6)


def test_levels_are_nested() -> None:
    names = {level: [type(t).__name__ for t in _pipeline(level).transforms] for level in LEVELS}
    assert names["low"] == ["Rotate", "RandomBrightnessContrast"]
    assert set(names["mid"]) - set(names["low"]) == {"GridDistortion"}
    assert set(names["high"]) - set(names["mid"]) == {"ElasticTransform"}


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
