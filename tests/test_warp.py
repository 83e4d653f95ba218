"""What is drawn: lengths in mm, chances, levels; and the torch path against OpenCV's."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medpsp.train.augment import AugmentOptions, Draw, apply_draw, draw
from medpsp.train.warp import ELASTIC_MM, Lines, Nodes
from medpsp.train.warptorch import apply_batch
from medpsp.types import IGNORE

ALL = AugmentOptions(always=True)
STILL = ((1.0, 0.0), (0.0, 1.0))


def drawn_at(seed: int, shape: tuple[int, int], **options: object) -> Draw:
    chosen = replace(ALL, **options)  # type: ignore[arg-type]
    return draw("high", np.random.default_rng(seed), shape, chosen)


def displacement(drawn: Draw) -> NDArray[np.float64]:
    """Columns and rows, in px, of every pixel; (2, H, W)."""
    columns, rows = drawn.axes()
    source = columns[:, None, :] + rows[:, :, None]
    bend = drawn.bend()
    if bend is not None:
        source = source + bend.dense() @ bend.along.swapaxes(0, 1)
    here = np.indices(drawn.shape)[::-1]
    return source - here


def rms(fields: list[NDArray[np.float64]], spacing: tuple[float, float]) -> float:
    """mm; of the length of the displacement."""
    mm = np.array(spacing[::-1])[:, None, None]
    return float(np.sqrt(np.mean([((field * mm) ** 2).sum(0).mean() for field in fields])))


CASES = [
    ((256, 256), (1.0, 1.0), 1.0),
    ((512, 300), (0.5, 0.8), 1.0),  # sides of 256 and 240 mm
    ((128, 128), (2.0, 2.0), 1.3),  # coarse pixels: 0.65 px is the least a drawn mm may be
    ((128, 128), (0.5, 0.5), 0.5),  # 64 mm in all, half of 128
]


@pytest.mark.parametrize(("shape", "spacing", "unit"), CASES)
def test_elastic_moves_by_2_mm_and_more_than_a_pixel(
    shape: tuple[int, int], spacing: tuple[float, float], unit: float
) -> None:
    """Nodes within +- a have a^2 / 3; the spline leaves 0.479 of it along an axis; a: 4 to 6 mm."""
    draws = [drawn_at(seed, shape, spacing=spacing) for seed in range(60)]
    fields = [displacement(replace(d, turn=STILL, grid=None)) for d in draws]
    expected = unit * np.sqrt(2 * (4**2 + 4 * 6 + 6**2) / 3 / 3) * 151 / 315
    assert expected / unit == pytest.approx(1.97, abs=0.01)
    assert rms(fields, spacing) == pytest.approx(expected, rel=0.08)
    assert rms(fields, (1.0, 1.0)) > 1  # px


@pytest.mark.parametrize(("shape", "spacing", "unit"), CASES)
def test_the_grid_moves_by_4_mm(
    shape: tuple[int, int], spacing: tuple[float, float], unit: float
) -> None:
    """Lines within +- 6.4 mm have 6.4^2 / 3; linear in between leaves two thirds of it."""
    draws = [drawn_at(seed, shape, spacing=spacing) for seed in range(200)]
    fields = [displacement(replace(d, turn=STILL, elastic=None)) for d in draws]
    assert rms(fields, spacing) == pytest.approx(unit * 6.4 * 2 / 3, rel=0.08)
    assert rms(fields, (1.0, 1.0)) > 1  # px


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.4, 0.4), (3.0, 0.8)])
def test_nothing_folds(spacing: tuple[float, float]) -> None:
    for seed in range(40):
        field = displacement(drawn_at(seed, (200, 180), spacing=spacing))
        x, y = field + np.indices((200, 180))[::-1]
        area = np.diff(x, axis=1)[:-1] * np.diff(y, axis=0)[:, :-1]
        area -= np.diff(x, axis=0)[:, :-1] * np.diff(y, axis=1)[:-1]
        assert area.min() > 0


def test_lines_and_nodes_by_hand() -> None:
    lines = Lines(-2.0, 4.0, np.array([0.0, 8.0, 0.0]))
    np.testing.assert_allclose(lines.at(5), [4, 6, 8, 6, 4])
    moved = np.zeros((2, 5, 6))
    moved[0] = 3.0  # all nodes alike: the plane moves as one
    moved[1, 2, 2] = 36.0  # one node: 4/6 * 4/6 of it at the node, 1/6 at its neighbours
    field = displacement(Draw(shape=(8, 10), elastic=Nodes((4.0, 4.0), moved)))
    np.testing.assert_allclose(field[0], 3.0)
    assert field[1, 4, 4] == pytest.approx(16)
    assert field[1, 4, 8] == field[1, 0, 4] == pytest.approx(4)
    assert field[1, 0, 0] == pytest.approx(1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.5, 0.5)])
def test_a_rotation_keeps_lengths_in_mm(spacing: tuple[float, float]) -> None:
    mm = np.diag(spacing[::-1])
    angles = []
    for seed in range(50):
        turn = mm @ np.array(drawn_at(seed, (64, 64), spacing=spacing).turn) @ np.linalg.inv(mm)
        np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-12)
        angles.append(np.degrees(np.arctan2(turn[1, 0], turn[0, 0])))
    assert 10 < max(np.abs(angles)) <= 15


def test_every_change_has_its_chance() -> None:
    """Of 800 samples, within four standard deviations of 0.018 and 0.016."""
    options = AugmentOptions()
    draws = [draw("high", np.random.default_rng(s), (64, 64), options) for s in range(800)]
    assert np.mean([d.turn != STILL for d in draws]) == pytest.approx(0.5, abs=0.072)
    assert np.mean([d.brightens for d in draws]) == pytest.approx(0.5, abs=0.072)
    assert np.mean([d.grid is not None for d in draws]) == pytest.approx(0.3, abs=0.066)
    assert np.mean([d.elastic is not None for d in draws]) == pytest.approx(0.3, abs=0.066)
    assert np.mean([d.moves for d in draws]) == pytest.approx(0.755, abs=0.061)


def test_levels_are_nested() -> None:
    for seed in range(100):
        low, mid, high = (
            draw(level, np.random.default_rng(seed), (64, 64), AugmentOptions())
            for level in ("low", "mid", "high")
        )
        assert low.turn == mid.turn == high.turn
        assert (low.gain, low.offset) == (high.gain, high.offset)
        assert low.grid is low.elastic is mid.elastic is None
        assert (mid.grid is None) == (high.grid is None)
    nothing = draw("none", np.random.default_rng(0), (64, 64), ALL)
    assert not nothing.moves
    assert not nothing.brightens


def test_flips_only_when_asked_for() -> None:
    image = np.arange(35, dtype=np.float32).reshape(5, 7)
    label = image.astype(np.uint8)
    seen = set()
    for seed in range(60):
        plain = draw("low", np.random.default_rng(seed), (5, 7), AugmentOptions())
        assert np.linalg.det(plain.turn) == pytest.approx(1)
        assert plain.turn[0][0] > 0.9
        flipped = draw("low", np.random.default_rng(seed), (5, 7), AugmentOptions(flips=True))
        if plain.moves:  # a rotation as well
            continue
        (across, _), (_, down) = flipped.turn
        found, mask = apply_draw(image, label, replace(flipped, gain=1.0, offset=0.0))
        assert np.array_equal(found, image[:: int(down), :: int(across)])
        assert np.array_equal(mask, label[:: int(down), :: int(across)])
        seen.add((across, down))
    assert len(seen) == 4


@pytest.mark.parametrize("spacing", [(np.nan, 1.0), (0.0, 0.7), (-1.0, 1.0), (np.inf, 2.0)])
def test_unknown_spacing_counts_as_1_mm(spacing: tuple[float, float]) -> None:
    found, expected = drawn_at(3, (90, 70), spacing=spacing), drawn_at(3, (90, 70))
    assert np.array_equal(displacement(found), displacement(expected))


def test_a_large_picture_of_unknown_spacing_has_32_cells_at_most() -> None:
    elastic = drawn_at(0, (4096, 3000)).elastic
    assert elastic is not None
    assert elastic.steps == (4 * ELASTIC_MM, 4 * ELASTIC_MM)
    assert elastic.moved.shape == (2, 32 + 3, 24 + 3)  # three nodes overhang


def test_a_draw_travels_by_pickle() -> None:
    drawn = drawn_at(1, (64, 48))
    copy = pickle.loads(pickle.dumps(drawn))  # noqa: S301
    assert np.array_equal(displacement(copy), displacement(drawn))


def batch(
    shape: tuple[int, int], channels: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], list[Draw]]:
    """White noise, the hardest picture, of standard deviation 1; a third of it undrawn."""
    rng = np.random.default_rng(8)
    images = rng.standard_normal((6, *shape, channels)).astype(np.float32)
    labels = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), size=(6, *shape))
    spacings = ((1.0, 1.0), (0.7, 0.7), (1.2, 0.9))
    draws = [drawn_at(n, shape, spacing=spacings[n % 3], flips=True) for n in range(4)]
    draws += [Draw(shape=shape, gain=1.1, offset=-0.1), Draw(shape=shape)]
    return images, labels, draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "channels"), [((128, 128), 1), ((90, 131), 5)])
def test_torch_does_what_opencv_does(
    shape: tuple[int, int], channels: int, dtype: torch.dtype
) -> None:
    """Images within 1e-3 (3e-4 was seen), labels but for 1 in 10 000: where places round apart."""
    images, labels, draws = batch(shape, channels)
    expected = [apply_draw(i, m, d) for i, m, d in zip(images, labels, draws, strict=True)]
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)
    found, masks = apply_batch(given, torch.from_numpy(labels), draws)
    assert found.dtype == dtype
    wanted = np.stack([pair[0] for pair in expected])
    np.testing.assert_allclose(found.numpy().transpose(0, 2, 3, 1), wanted, atol=1e-3)
    apart = (masks.numpy() != np.stack([pair[1] for pair in expected])).mean()
    assert apart <= 1e-4
    assert torch.equal(given, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype))
    assert torch.equal(found[5], given[5])
    assert torch.equal(masks[4:], torch.from_numpy(labels[4:]))


def test_autocast_does_not_coarsen_places() -> None:
    images, labels, draws = batch((64, 64), 1)
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    plain = apply_batch(*given, draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = apply_batch(*given, draws)
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])


def test_a_batch_without_draws_comes_back() -> None:
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    found = apply_batch(images, labels, [Draw(shape=(8, 8))] * 2)
    assert found[0] is images
    assert found[1] is labels
