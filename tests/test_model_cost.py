"""What a network costs: counted by hand, and the article's figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from launch.backbones import show_backbones
from medpsp.config import BACKBONES, ModelConfig
from medpsp.model.cost import QUOTED, count_macs, model_cost, published_cost, saved_bytes
from medpsp.model.psp import PSPNet, build_model

torch.set_num_threads(1)


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"psp_channels": 16, "decoder_channels": 8, "aux": True, **changes})


def test_multiply_adds_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Linear(6, 3))
    # convolution: 4 x 5 x 6 outputs of 9 x 1 products; linear: 4 x 5 x 3 outputs of 6
    assert count_macs(layers, torch.zeros(1, 2, 5, 6)) == 120 * 9 + 60 * 6
    assert not any(m._forward_hooks for m in layers.modules())


def test_cost_of_a_resnet() -> None:
    whole = small(backbone="resnet18", aux=False, output_stride=32)
    cost = model_cost(whole, 2, (64, 64))
    # 11,689,512 as published, without its classifier (513,000) and two of three stem planes
    assert cost.backbone_params == pytest.approx((11_689_512 - 513_000 - 2 * 64 * 49) / 1e6)
    model: PSPNet = build_model(whole, 2)
    head = sum(p.numel() for p in model.part_parameters("head"))
    assert cost.params - cost.backbone_params == pytest.approx(head / 1e6)
    # the stem alone: 32 x 32 outputs of 64 channels, 49 products each
    assert cost.macs > 64 * 32 * 32 * 49 / 1e9
    assert cost.stride == 2
    assert math.isnan(cost.speed)  # not measured
    assert cost.macs_224 / cost.macs == pytest.approx(12.25, rel=0.01)  # (224 / 64)^2; bins stay


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_figures_of_the_article(backbone: str) -> None:
    """They are multiply-adds, of the whole net but for MobileNetV3, and agree within 3 %."""
    quoted = QUOTED[backbone]
    params, macs = published_cost(backbone, quoted.classifier)
    assert params == pytest.approx(quoted.params, rel=0.03)
    assert macs == pytest.approx(quoted.macs, rel=0.03)
    other, _ = published_cost(backbone, not quoted.classifier)
    assert abs(other / quoted.params - 1) > 0.025  # the other way of counting does not fit


def test_published_parameters() -> None:
    for name, count in (
        ("mobilenetv3_large_100", 5_483_032),
        ("efficientnet_b0", 5_288_548),
        ("resnet18", 11_689_512),
        ("convnext_tiny", 28_589_128),
    ):
        assert published_cost(name, True)[0] == pytest.approx(count / 1e6, rel=1e-9)


def test_saved_memory_grows_with_the_image_and_leaves_the_network_as_it_was() -> None:
    model = build_model(small(backbone="resnet18"), 2).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    one, two, three = (saved_bytes(model, torch.zeros(1, 1, n, n)) for n in (64, 128, 192))
    # areas of 1, 4 and 9; the bins of the pyramid are the same for all
    assert (three - two) / (two - one) == pytest.approx(5 / 3, rel=1e-3)
    assert one > 2 * 64 * 32 * 32 * 4  # stem: 64 channels at stride 2 before and after its norm
    assert not model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    other = small(backbone="timm/resnet10t", head="shallow", context=1)
    show_backbones(64, 96, 3, other)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    first, second = out.split("The backbone alone")
    assert "shallow head, 3 classes, 64 x 96" in first
    for name in (*BACKBONES, "timm/resnet10t"):
        cells = next(line for line in first.splitlines() if line.startswith(name)).split()[1:]
        params, backbone, macs, at_224, stride, mib, speed, trained = map(float, cells)
        assert params >= backbone > 0  # of two digits
        assert at_224 > macs
        assert stride == 8
        assert mib > 0
        assert speed > 0
        assert trained > 0
    for name, quoted in QUOTED.items():
        line = next(line for line in second.splitlines() if name in line)
        assert f" {quoted.params}/{quoted.macs} " in line
        assert quoted.use in line
