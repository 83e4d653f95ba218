"""Pooling, heads and backbones: exact values, shapes, gradients, weights from a file, cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from medpsp.config import BACKBONES, ModelConfig
from medpsp.errors import ConfigError
from medpsp.model.backbones import build_backbone
from medpsp.model.cost import count_macs, model_cost
from medpsp.model.psp import PSPNet, PyramidModule, PyramidPooling, build_model

torch.set_num_threads(1)  # small tensors: threads only wait for each other
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 13, 32, 33)


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"psp_channels": 16, "decoder_channels": 8, **changes})


def test_bins_by_hand() -> None:
    line = torch.arange(5.0).view(1, 1, 1, 5)
    one, two, three = PyramidPooling((1, 2, 3))(line)
    assert one.flatten().tolist() == [2]
    assert two[0, 0, 0].tolist() == [1, 3]  # columns 0-2 and 2-4 share the middle one
    assert three[0, 0, 0].tolist() == [0.5, 2, 3.5]  # 0-1, 1-3, 3-4
    assert torch.equal(three[0, 0, 0], three[0, 0, 2])  # one row fills three


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_pooling_equals_the_native_operator(dtype: torch.dtype, tolerance: float) -> None:
    bins = (1, 2, 3, 5, 6, 7)
    pool, generator = PyramidPooling(bins), torch.Generator().manual_seed(0)
    for height in SIZES:
        for width in SIZES:
            x = torch.rand(2, 3, height, width, generator=generator, dtype=dtype)
            for size, found in zip(bins, pool(x), strict=True):
                assert found.dtype == dtype
                native = nn.AdaptiveAvgPool2d(size)(x)
                assert (found - native).abs().max() <= tolerance, (height, width, size)


def test_pooling_keeps_float32_under_autocast() -> None:
    pool, x = PyramidPooling((1, 3)), torch.rand(1, 4, 9, 11) + 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = pool(x)
    for half, full in zip(halves, pool(x), strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("channels", "bins", "widths"),
    [
        (128, (1, 3, 5, 7), [32, 32, 32, 32]),
        (130, (1, 3, 5, 7), [33, 33, 32, 32]),
        (31, (1, 2, 3, 6), [8, 8, 8, 7]),
        (11, (1, 2, 3, 5, 7), [3, 2, 2, 2, 2]),
        (9, (4,), [9]),
    ],
)
def test_branch_widths_add_up(channels: int, bins: tuple[int, ...], widths: list[int]) -> None:
    module = PyramidModule(6, bins, channels)
    assert [branch[0].out_channels for branch in module.branches] == widths
    assert module.fuse[0].in_channels == 6 + channels
    assert module(torch.rand(2, 6, 4, 3)).shape == (2, channels, 4, 3)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("head", ["refine", "classic"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_network_runs_and_trains(backbone: str, head: str, stride: int) -> None:
    torch.manual_seed(0)
    model = build_model(small(backbone=backbone, head=head, output_stride=stride), 3)
    assert model.backbone.feature_info.reduction()[-1] == stride
    x = torch.rand(2, 1, 33, 47)
    logits, aux = model(x)
    assert aux is not None
    assert logits.shape == aux.shape == (2, 3, 33, 47)
    (logits.square().mean() + aux.square().mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == []  # plain DDP stops at the second step on one of these
    model.eval()
    with torch.no_grad():
        logits, aux = model(x)
    assert aux is None
    assert logits.shape == (2, 3, 33, 47)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_batch_of_one_trains(backbone: str) -> None:
    model = build_model(small(backbone=backbone, aux=False), 2)
    logits, aux = model(torch.rand(1, 1, 64, 33))
    assert aux is None
    logits.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [(1, 1), (31, 1), (32, 32), (33, 65)])
def test_odd_sizes_are_padded_by_the_edge_and_cropped(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    model = build_model(small(backbone="resnet18"), 2).eval()
    image = torch.rand(1, 1, *size)
    pad = [-length % 32 for length in size]
    padded = F.pad(image, (0, pad[1], 0, pad[0]), mode="replicate")
    with torch.no_grad():
        direct, by_hand = model(image)[0], model(padded)[0]
    assert torch.equal(direct, by_hand[..., : size[0], : size[1]])


def test_refine_ends_at_stride_two_and_classic_at_the_backbone() -> None:
    refine = build_model(small(backbone="resnet18"), 2)
    reductions = refine.backbone.feature_info.reduction()
    assert [reductions[i] for i in refine.skips] == [16, 8, 4, 2]
    assert build_model(small(backbone="resnet18", head="classic"), 2).decoder is None
    dilated = build_model(small(backbone="mobilenetv3_large_100", output_stride=8), 2)
    assert dilated.backbone.feature_info.reduction() == [2, 4, 8, 8, 8]
    assert dilated.skips == [1, 0]  # never a map as coarse as the deepest


def test_parts_share_nothing_and_leave_nothing_out() -> None:
    model = build_model(small(), 2)
    backbone, head = model.part_parameters("backbone"), model.part_parameters("head")
    assert {id(p) for p in backbone} == {id(p) for p in model.backbone.parameters()}
    assert len(backbone) + len(head) == len(list(model.parameters()))
    assert not {id(p) for p in backbone} & {id(p) for p in head}


def test_a_frozen_backbone_keeps_its_statistics() -> None:
    model = build_model(small(), 2)
    for parameter in model.part_parameters("backbone"):
        parameter.requires_grad_(False)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    model(torch.rand(2, 1, 64, 64))
    moved = {n.split(".")[0] for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {"pyramid", "decoder", "aux"}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert model.train().backbone.training


def weights_file(path: Path, backbone: str) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    state = timm.create_model(backbone).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path, state


@pytest.mark.parametrize(
    ("backbone", "suffix", "stem", "deep"),
    [
        ("mobilenetv3_large_100", ".safetensors", "conv_stem.weight", "blocks.6.0.conv.weight"),
        ("efficientnet_b0", ".pth", "conv_stem.weight", "blocks.6.0.conv_pwl.weight"),
        ("resnet18", ".pth", "conv1.weight", "layer4.1.conv2.weight"),
        ("convnext_tiny", ".safetensors", "stem.0.weight", "stages.3.blocks.2.mlp.fc2.weight"),
    ],
)
def test_weights_from_a_file(
    tmp_path: Path, backbone: str, suffix: str, stem: str, deep: str
) -> None:
    path, state = weights_file(tmp_path / f"w{suffix}", backbone)
    torch.manual_seed(6)
    built = build_backbone(small(backbone=backbone, pretrained=path)).state_dict()
    found = {name.replace("_", "."): tensor for name, tensor in built.items()}
    summed = state[stem].sum(dim=1, keepdim=True)  # a grey image gives what three equal ones gave
    torch.testing.assert_close(found[stem.replace("_", ".")], summed)
    assert torch.equal(found[deep.replace("_", ".")], state[deep])


def test_colour_takes_the_stem_as_it_is(tmp_path: Path) -> None:
    path, state = weights_file(tmp_path / "w.pth", "resnet18")
    config = small(backbone="resnet18", pretrained=path, in_channels=3)
    model = build_model(config, 2)
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], state["conv1.weight"])
    assert model.eval()(torch.rand(1, 3, 33, 47))[0].shape == (1, 2, 33, 47)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    other, _ = weights_file(tmp_path / "resnet18.pth", "resnet18")
    unrelated = tmp_path / "unrelated.safetensors"  # a mobile net would load it and stay random
    save_file({"layer": torch.zeros(2)}, unrelated)
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "cut.pth").write_bytes(other.read_bytes()[:5000])
    expected = {
        "resnet18.pth": "weights of mobilenetv3_large_100 are not there, the first: conv_stem",
        "unrelated.safetensors": "weights of mobilenetv3_large_100 are not there",
        "list.pth": "not a file of weights",
        "text.pth": "not a file of weights",
        "empty.pth": "not a file of weights",
        "text.safetensors": "not a file of weights",
        "cut.pth": "not a file of weights",
        "none.pth": "no such file",
    }
    for name, text in expected.items():
        config = small(backbone="mobilenetv3_large_100", pretrained=tmp_path / name)
        with pytest.raises(ConfigError, match=text):
            build_backbone(config)
    _, state = weights_file(tmp_path / "right.pth", "mobilenetv3_large_100")
    torch.save({**state, "conv_stem.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "shape.pth")
    with pytest.raises(ConfigError, match="no weights for mobilenetv3_large_100"):
        build_backbone(small(backbone="mobilenetv3_large_100", pretrained=tmp_path / "shape.pth"))


def test_multiply_adds_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Linear(6, 3))
    # convolution: 4 x 5 x 6 outputs of 9 x 1 products; linear: 4 x 5 x 3 outputs of 6
    assert count_macs(layers, torch.zeros(1, 2, 5, 6)) == 120 * 9 + 60 * 6
    assert not any(m._forward_hooks for m in layers.modules())


def test_cost_of_a_resnet() -> None:
    cost = model_cost(small(backbone="resnet18", aux=False), 2, (64, 64))
    # 11,689,512 as published, without its classifier (513,000) and two of three stem planes
    assert cost.backbone_params == pytest.approx((11_689_512 - 513_000 - 2 * 64 * 49) / 1e6)
    model: PSPNet = build_model(small(backbone="resnet18", aux=False), 2)
    head = sum(p.numel() for p in model.part_parameters("head"))
    assert cost.params - cost.backbone_params == pytest.approx(head / 1e6)
    # the stem alone: 32 x 32 outputs of 64 channels, 49 products each
    assert cost.macs > 64 * 32 * 32 * 49 / 1e9
