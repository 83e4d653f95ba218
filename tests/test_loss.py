"""Dice and focal on tensors of four pixels, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medpsp.config import LossConfig
from medpsp.model.loss import _compiled_sums, class_weights, focal_factor, segmentation_loss

# probability of class 1 and truth; p_t is 0.9, 0.8, 0.6, 0.5
P1 = torch.tensor([[0.9, 0.2], [0.6, 0.5]])
TRUTH = torch.tensor([[[1, 0], [1, 0]]], dtype=torch.uint8)
FOCAL = [(1 - p) ** 2 * -math.log(p) for p in (0.9, 0.8, 0.6, 0.5)]
ONES = torch.ones(2)


def logits_of(p1: Tensor) -> Tensor:
    return torch.stack([(1 - p1).log(), p1.log()])[None]


def same(x: Tensor) -> Tensor:
    return x


def test_two_by_two_by_hand() -> None:
    loss = segmentation_loss(logits_of(P1), TRUTH, LossConfig(), ONES, same)
    dice = 1 - (2 * 1.5 + 1) / (2.2 + 2 + 1)  # 0.9 + 0.6 hit of 2.2 predicted and 2 true
    assert float(loss.dice) == pytest.approx(dice, abs=1e-6)
    assert float(loss.focal) == pytest.approx(sum(FOCAL) / 4, abs=1e-6)
    assert float(loss.total) == pytest.approx(0.7 * dice + 0.3 * sum(FOCAL) / 4, abs=1e-6)
    assert float(loss.total) == pytest.approx(0.181413, abs=1e-6)
    assert not loss.detach().total.requires_grad


def test_class_weights_act_on_focal_only_and_divide_out() -> None:
    weights = torch.tensor([1.0, 3.0])
    loss = segmentation_loss(logits_of(P1), TRUTH, LossConfig(), weights, same)
    expected = (3 * FOCAL[0] + FOCAL[1] + 3 * FOCAL[2] + FOCAL[3]) / 8
    assert float(loss.focal) == pytest.approx(expected, abs=1e-6)
    plain = segmentation_loss(logits_of(P1), TRUTH, LossConfig(), ONES, same)
    assert float(loss.dice) == float(plain.dice)


def test_gamma_zero_is_weighted_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 5, 7, 9, generator=generator)).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    target = torch.randint(0, 5, (3, 7, 9), generator=generator)
    target[:, 2] = 255
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 1.7])
    focal = segmentation_loss(logits, target, LossConfig(gamma=0), weights, same).focal
    entropy = F.cross_entropy(twin, target, weights, ignore_index=255)
    focal.backward()
    entropy.backward()
    torch.testing.assert_close(focal, entropy, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-5, atol=1e-9)


def test_ignored_pixels_count_nowhere() -> None:
    target = TRUTH.clone()
    target[0, 1, 1] = 255
    logits = logits_of(P1).requires_grad_()
    loss = segmentation_loss(logits, target, LossConfig(), ONES, same)
    loss.total.backward()
    loss = loss.detach()
    assert float(loss.dice) == pytest.approx(1 - (3 + 1) / (1.7 + 2 + 1), abs=1e-6)
    assert float(loss.focal) == pytest.approx(sum(FOCAL[:3]) / 3, abs=1e-6)
    assert logits.grad is not None
    assert torch.equal(logits.grad[..., 1, 1], torch.zeros(1, 2))
    assert bool((logits.grad[..., 0, :] != 0).all())
    moved = logits.detach().clone()
    moved[..., 1, 1] = 7  # whatever stands there
    again = segmentation_loss(moved, target, LossConfig(), ONES, same)
    assert float(again.total) == pytest.approx(float(loss.total), abs=1e-7)


def test_dice_is_the_mean_of_the_foreground_classes_that_occur() -> None:
    p = torch.tensor([0.1, 0.6, 0.2, 0.1]).view(1, 4, 1, 1).expand(1, 4, 1, 2)
    target = torch.tensor([[[1, 2]]])  # class 3 is absent, class 0 is background
    loss = segmentation_loss(p.log(), target, LossConfig(), torch.ones(4), same)
    first, second = (2 * 0.6 + 1) / (1.2 + 1 + 1), (2 * 0.2 + 1) / (0.4 + 1 + 1)
    assert float(loss.dice) == pytest.approx(1 - (first + second) / 2, abs=1e-6)


def test_background_alone_leaves_the_focal_term() -> None:
    target = torch.zeros(1, 2, 2, dtype=torch.uint8)
    loss = segmentation_loss(logits_of(P1), target, LossConfig(), ONES, same)
    assert float(loss.dice) == 0
    expected = sum((1 - q) ** 2 * -math.log(q) for q in (0.1, 0.8, 0.4, 0.5)) / 4
    assert float(loss.focal) == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_valid_pixels_gives_zero_and_a_zero_gradient() -> None:
    logits = logits_of(P1).requires_grad_()
    target = torch.full((1, 2, 2), 255, dtype=torch.uint8)
    loss = segmentation_loss(logits, target, LossConfig(), ONES, same)
    loss.total.backward()
    assert float(loss.detach().total) == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_sure_pixels_keep_the_gradient_finite(gamma: float) -> None:
    logits = torch.tensor([[40.0, -40.0], [-40.0, 40.0]])[..., None, None].requires_grad_()
    target = torch.tensor([0, 0])[:, None, None]  # surely right and surely wrong
    loss = segmentation_loss(logits, target, LossConfig(gamma=gamma), ONES, same)
    loss.total.backward()
    assert float(loss.detach().focal) == pytest.approx(40)  # 80 nats wrong on one of two pixels
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_focal_factor() -> None:
    log_pt = torch.tensor([0.9, 0.5, 0.1]).log()
    assert focal_factor(log_pt, 2).tolist() == pytest.approx([0.01, 0.25, 0.81])
    log_pt = torch.tensor([0.0, -0.5, -40.0], requires_grad=True)  # the first is quite sure
    even = focal_factor(log_pt, 0)
    assert even.tolist() == [1, 1, 1]
    even.sum().backward()
    assert log_pt.grad is not None
    assert log_pt.grad.tolist() == [0, 0, 0]


def test_sums_of_another_rank_make_it_the_loss_of_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, 6, 5, generator=generator)
    target = torch.randint(0, 3, (4, 6, 5), generator=generator)
    target[0] = 255  # unequal shares: a mean of the two losses would be wrong
    target[2:] = 1
    weights, config = torch.tensor([0.5, 1.0, 1.5]), LossConfig()
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    halves = [
        segmentation_loss(logits[s], target[s], config, weights, keep)
        for s in (slice(0, 2), slice(2, 4))
    ]
    whole = segmentation_loss(logits, target, config, weights, same)
    joined = segmentation_loss(logits[:2], target[:2], config, weights, lambda x: x + seen[1])
    assert float(joined.total) == pytest.approx(float(whole.total), abs=1e-6)
    mean = (float(halves[0].total) + float(halves[1].total)) / 2
    assert abs(mean - float(whole.total)) > 0.01


def test_class_weights_by_hand() -> None:
    pixels = torch.tensor([900, 90, 10, 0])
    raw = [math.sqrt(0.1), 1.0, 3.0]  # the median of 0.9, 0.09, 0.01 over each, square root
    expected = [r / (sum(raw) / 3) for r in raw]
    found = class_weights(pixels, "median_frequency").tolist()
    assert found == pytest.approx([*expected, 0.0])
    raw = [1 / 0.9, 1 / 0.09, 20 / 0.9]  # 100 is cut at 20 times the smallest
    expected = [r / (sum(raw) / 3) for r in raw]
    assert class_weights(pixels, "inverse").tolist() == pytest.approx([*expected, 0.0])
    assert class_weights(pixels, "none").tolist() == [1, 1, 1, 1]
    assert class_weights(torch.zeros(3, dtype=torch.int64), "inverse").tolist() == [1, 1, 1]


def test_effective_number_by_hand() -> None:
    """Mean of 900, 90 and 10 pixels: V = 1000 / 3, so b = 0.997; weights 1 / (1 - b^n)."""
    raw = [1 / (1 - 0.997**n) for n in (900, 90, 10)]
    assert raw == pytest.approx([1.0717, 4.2213, 33.786], abs=1e-3)
    raw[2] = 20 * raw[0]  # 31.5 times the smallest is cut at 20
    expected = [r / (sum(raw) / 3) for r in raw]
    found = class_weights(torch.tensor([900, 90, 10, 0]), "effective_number").tolist()
    assert found == pytest.approx([*expected, 0.0])


def test_effective_number_of_many_pixels_depends_on_shares_only() -> None:
    """As b goes to 1: 1 / (1 - exp(-n / V)); 1 - b^n itself would be rounding for 10^12 pixels."""
    shares = torch.tensor([16, 3, 2, 3])  # mean 6
    raw = [1 / (1 - math.exp(-n / 6)) for n in (16, 3, 2, 3)]
    expected = [4 * r / sum(raw) for r in raw]
    for scale in (10**6, 10**9, 10**12):
        found = class_weights(shares * scale, "effective_number").tolist()
        assert found == pytest.approx(expected, rel=1e-5)
    equal = class_weights(torch.tensor([7, 7, 7]) * 10**9, "effective_number")
    assert equal.tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("kind", ["none", "inverse", "median_frequency", "effective_number"])
@pytest.mark.parametrize("pixels", [[10**12, 1], [1, 1], [5, 0, 0], [0, 1, 10**9, 10**5], [0, 0]])
def test_weights_stay_in_bounds(pixels: list[int], kind: str) -> None:
    weights = class_weights(torch.tensor(pixels), kind)
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    seen = torch.tensor(pixels) > 0
    if kind == "none" or not seen.any():
        assert weights.tolist() == [1] * len(pixels)
        return
    assert weights[~seen].tolist() == [0] * int((~seen).sum())
    assert float(weights[seen].mean()) == pytest.approx(1, rel=1e-6)
    assert float(weights[seen].max() / weights[seen].min()) <= 20 * (1 + 1e-6)
    order = torch.tensor(pixels)[seen].argsort()
    assert (weights[seen][order].diff() <= 0).all()  # never more for a class with more pixels


def test_float64_is_kept() -> None:
    logits = logits_of(P1.double()).requires_grad_()
    loss = segmentation_loss(logits, TRUTH, LossConfig(), torch.tensor([1.0, 3.0]), same)
    loss.total.backward()
    assert {x.dtype for x in (loss.total, loss.dice, loss.focal, logits.grad)} == {torch.float64}
    p = [float(x) for x in P1.double().flatten()]
    focal = [(1 - q) ** 2 * -math.log(q) for q in (p[0], 1 - p[1], p[2], 1 - p[3])]
    expected = (3 * focal[0] + focal[1] + 3 * focal[2] + focal[3]) / 8
    assert float(loss.detach().focal) == pytest.approx(expected, rel=1e-14)


def test_half_precision_counts_in_float32() -> None:
    half = segmentation_loss(logits_of(P1).bfloat16(), TRUTH, LossConfig(), ONES, same)
    assert half.total.dtype == torch.float32


def test_compiled_sums_are_made_once_and_give_the_same_loss() -> None:
    """The code that torch.compile makes takes half a minute, so here it leaves Python's to run."""
    _compiled_sums.cache_clear()
    arguments = logits_of(P1), TRUTH, LossConfig(), ONES, same
    with torch.compiler.set_stance("force_eager"):
        found = [segmentation_loss(*arguments, compiled=True) for _ in range(2)]
    plain = segmentation_loss(*arguments)
    assert [float(loss.total) for loss in found] == [float(plain.total)] * 2
    assert (_compiled_sums.cache_info().misses, _compiled_sums.cache_info().hits) == (1, 1)
