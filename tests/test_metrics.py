"""Counts, Dice and the mask that never looks at the image."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from medpsp.train.metrics import ConstantMask, confusion, dice_per_class, mean_foreground


def disc(size: int, radius: float, row: float, column: float) -> NDArray[np.uint8]:
    y, x = np.mgrid[:size, :size] + 0.5
    return ((y - row) ** 2 + (x - column) ** 2 <= radius**2).astype(np.uint8)


def test_confusion_by_hand() -> None:
    truth = np.array([[0, 0, 1], [1, 2, 255]], dtype=np.uint8)
    predicted = np.array([[0, 1, 1], [1, 0, 2]], dtype=np.uint8)
    expected = [[1, 1, 0], [0, 2, 0], [1, 0, 0]]  # truth in rows; the ignored pixel is nowhere
    assert confusion(truth, predicted, 3).tolist() == expected


def test_confusion_adds_up_over_slices() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    parts = sum(confusion(t, p, 4) for t, p in zip(truth, predicted, strict=True))
    assert np.array_equal(confusion(truth, predicted, 4), parts)
    assert parts.sum() == 5 * 6 * 7


def test_dice_by_hand_and_nan_for_what_is_nowhere() -> None:
    counts = np.array([[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    dice = dice_per_class(counts)
    assert dice[:3].tolist() == pytest.approx([2 * 1 / (2 + 2), 2 * 2 / (2 + 3), 0.0])
    assert np.isnan(dice[3])
    assert mean_foreground(dice) == pytest.approx((0.8 + 0.0) / 2)  # class 3 does not count
    assert np.isnan(mean_foreground(np.array([0.9, np.nan])))


@pytest.mark.parametrize("size", [64, 100, 33])
def test_constant_mask_finds_a_disc_that_never_moves(size: int) -> None:
    blind = ConstantMask(2)
    label = disc(size, size / 4, size / 2, size / 2)
    for _ in range(3):
        blind.add(label)
    found = blind.predict(1, (size, size)).astype(np.uint8)
    assert dice_per_class(confusion(label, found, 2))[1] > (0.999 if size == 64 else 0.95)
    assert blind.threshold(1) == 1


def test_constant_mask_takes_the_threshold_of_the_best_dice() -> None:
    blind = ConstantMask(2)
    for index in range(10):  # 8 rows always, 8 more in six of ten slices, 8 more in one of ten
        label = np.zeros((64, 64), dtype=np.uint8)
        label[: 8 + 8 * (index < 6) + 8 * (index < 1)] = 1
        blind.add(label)
    # of 8 (1 + .6 + .1) true rows: Dice 2*8/(8+13.6), 2*12.8/(16+13.6), 2*13.6/(24+13.6)
    assert blind.threshold(1) == pytest.approx(0.6)
    assert blind.predict(1, (64, 64)).sum() == 16 * 64
    assert blind.predict(1, (32, 128)).sum() == 8 * 128


def test_constant_mask_of_scattered_discs_is_poor() -> None:
    rng, blind = np.random.default_rng(1), ConstantMask(2)
    labels = [disc(64, 5, *rng.uniform(8, 56, 2)) for _ in range(40)]
    for label in labels:
        blind.add(label)
    found = np.broadcast_to(blind.predict(1, (64, 64)), (40, 64, 64)).astype(np.uint8)
    assert dice_per_class(confusion(np.stack(labels), found, 2))[1] < 0.3


def test_constant_mask_predicts_nothing_of_a_class_it_never_saw() -> None:
    blind = ConstantMask(3)
    blind.add(disc(64, 10, 32, 32))
    assert not blind.predict(2, (64, 64)).any()
    assert not ConstantMask(2).predict(1, (8, 8)).any()
