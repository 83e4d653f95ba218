"""Keyed dropout: known hashes, rates by counting, masks that follow the sample."""

from __future__ import annotations

import pytest
import torch

from medpsp.config import ModelConfig
from medpsp.model.dropout import GOLDEN, KeyedDropout2d, channel_words, keep_channels, mix
from medpsp.model.psp import build_model

torch.set_num_threads(1)


def test_mix_is_splitmix64() -> None:
    """The published sequence of seed 1234567 (Vigna's splitmix64.c)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = mix(1234567 + torch.arange(1, 6) * GOLDEN)
    assert [x % 2**64 for x in found.tolist()] == expected


def test_mix_by_python_integers() -> None:
    def slow(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    values = [0, 1, -1, 2**62, 2**63 - 1, -(2**63), -123456789, 987654321012345678]
    found = mix(torch.tensor(values)).tolist()
    assert [x % 2**64 for x in found] == [slow(x % 2**64) for x in values]


def kept(keys: torch.Tensor, channels: int, p: float, salt: int) -> torch.Tensor:
    return keep_channels(keys, channel_words(channels), p, int(mix(torch.tensor(salt))))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    samples, channels = 1000, 100
    layer = KeyedDropout2d(p, 1, 100)
    out = layer(torch.ones(samples, channels, 2, 1), torch.arange(samples))
    assert torch.equal(out[..., 0, :], out[..., 1, :])  # whole channels
    stays = out[..., 0, 0] != 0
    assert torch.unique(out).tolist() == pytest.approx([0, 1 / (1 - p)])
    slack = 4 * (samples * channels * p * (1 - p)) ** 0.5  # four standard deviations
    assert abs(int(stays.sum()) - samples * channels * (1 - p)) < slack
    for each, count in ((stays.sum(0), samples), (stays.sum(1), channels)):
        assert abs(float(each.double().var() / (count * p * (1 - p))) - 1) < 0.5  # as if by coin


def test_a_mask_belongs_to_its_sample() -> None:
    """Any batch, any order, any rank: the same key has the same channels."""
    layer, keys = KeyedDropout2d(0.3, 1, 64), torch.tensor([5, -7, 2**62, 0, 123])
    x = torch.rand(5, 64, 3, 3)
    whole = layer(x, keys)
    for chosen in ([0], [3, 1], [4, 4, 2], [2, 3, 4]):
        assert torch.equal(layer(x[chosen], keys[chosen]), whole[chosen])
    torch.manual_seed(99)
    torch.rand(1000)
    assert torch.equal(layer(x, keys), whole)


def test_keys_and_salts_give_other_masks() -> None:
    first = kept(torch.arange(100), 128, 0.5, 1)
    second = kept(torch.arange(100), 128, 0.5, 2)
    shifted = kept(torch.arange(1, 101), 128, 0.5, 1)
    assert len(torch.unique(first, dim=0)) == 100
    for other in (second, shifted, torch.roll(first, 1, dims=1)):
        assert abs(float((first == other).double().mean()) - 0.5) < 0.02  # 4.5 sigma of 12800
    # more channels: the first ones stay
    assert torch.equal(kept(torch.arange(100), 200, 0.5, 1)[:, :128], first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_is_kept(dtype: torch.dtype) -> None:
    out = KeyedDropout2d(0.5, 1, 8)(torch.ones(4, 8, 1, 1, dtype=dtype), torch.arange(4))
    assert out.dtype == dtype
    assert set(out.flatten().tolist()) == {0, 2}


def test_gradient_is_the_mask() -> None:
    x = torch.rand(3, 16, 2, 2, requires_grad=True)
    KeyedDropout2d(0.25, 1, 16)(x, torch.arange(3)).sum().backward()
    assert x.grad is not None
    mask = kept(torch.arange(3), 16, 0.25, 1) / 0.75
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x))


def test_keys_are_asked_for_only_where_channels_drop() -> None:
    x = torch.rand(2, 4, 1, 1)
    layer = KeyedDropout2d(0.5, 1, 4)
    wrong = (None, torch.arange(3), torch.arange(2, dtype=torch.int32), torch.zeros(2, 1).long())
    for keys in wrong:
        with pytest.raises(ValueError, match=r"2 samples needs int64 keys \(2,\), got"):
            layer(x, keys)
    assert layer.eval()(x, None) is x
    assert KeyedDropout2d(0, 1, 4)(x, None) is x
    with pytest.raises(ValueError, match="expected 0 <= p < 1"):
        KeyedDropout2d(1, 1, 4)


def test_network_drops_by_the_keys() -> None:
    """Without batch statistics a sample's logits depend on itself and its key only."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="resnet18", norm="group", psp_channels=16, decoder_channels=8, head="classic"
    )
    model, x = build_model(config, 2), torch.rand(3, 1, 64, 64)
    keys = torch.tensor([11, 22, 33])
    whole = model(x, keys)
    part = model(x[1:], keys[1:])
    for ours, alone in zip(whole, part, strict=True):
        torch.testing.assert_close(ours[1:], alone, rtol=1e-4, atol=1e-5)
    moved = model(x, keys + 1)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(whole, moved, strict=True))
    with pytest.raises(ValueError, match="keys"):
        model(x)
