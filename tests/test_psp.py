"""Pooling and heads: exact values, shapes, widths, gradients, what a frozen part keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medpsp.config import BACKBONES, LossConfig, ModelConfig
from medpsp.model.loss import segmentation_loss
from medpsp.model.psp import (
    PSPNet,
    PyramidModule,
    PyramidPooling,
    branch_widths,
    build_model,
    spread,
)

torch.set_num_threads(1)  # small tensors: threads only wait for each other
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 13, 32, 33)


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"psp_channels": 16, "decoder_channels": 8, "aux": True, **changes})


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


def test_spread_by_hand() -> None:
    """Two cells over four places have their centres between the places."""
    grid = torch.tensor([[0.0, 4.0], [8.0, 12.0]])[None, None]
    found = spread(grid, torch.Size((2, 4)))[0, 0]
    assert found.tolist() == [[0, 1, 3, 4], [8, 9, 11, 12]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_spread_equals_the_native_operator(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for cells in (1, 2, 3, 5, 6, 7):
        grid = torch.rand(2, 3, cells, cells, generator=generator, dtype=dtype)
        for height in SIZES:
            for width in SIZES:
                native = F.interpolate(grid, size=(height, width), mode="bilinear")
                found = spread(grid, native.shape[-2:])
                assert found.dtype == dtype
                assert (found - native).abs().max() <= tolerance, (cells, height, width)


def test_spread_places_by_float32_even_in_bfloat16() -> None:
    """bfloat16 has no whole number between 512 and 516."""
    grid = torch.tensor([[0.0, 1.0]]).expand(2, 2)[None, None].bfloat16()
    found = spread(grid, torch.Size((1, 1000)))
    assert found.dtype == torch.bfloat16
    exact = ((torch.arange(1000) + 0.5) / 500 - 0.5).clamp(0, 1)
    assert torch.equal(found[0, 0, 0], exact.bfloat16())


@pytest.mark.parametrize(
    ("channels", "out", "bins", "widths"),
    [
        (2048, 512, (1, 3, 5, 7), [128, 128, 128, 128]),
        (512, 128, (1, 3, 5, 7), [32, 32, 32, 32]),
        (40, 512, (1, 3, 5, 7), [10, 10, 10, 10]),  # no wider than what is pooled
        (130, 512, (1, 3, 5, 7), [33, 33, 32, 32]),
        (64, 31, (1, 2, 3, 6), [8, 8, 8, 7]),
        (64, 11, (1, 2, 3, 5, 7), [3, 2, 2, 2, 2]),
        (9, 64, (4,), [9]),
        (3, 16, (1, 2, 3, 6), [2, 2, 2, 2]),  # one channel alone has no variance
    ],
)
def test_branch_widths_add_up(
    channels: int, out: int, bins: tuple[int, ...], widths: list[int]
) -> None:
    module = PyramidModule(channels, bins, out)
    assert [branch[0].out_channels for branch in module.branches] == widths
    assert branch_widths(min(channels, out), len(bins)) == widths
    assert module.fuse[0].in_channels == channels + sum(widths)
    assert module(torch.rand(2, channels, 4, 3)).shape == (2, out, 4, 3)


def parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module else 0


def test_parameters_of_the_heads_by_hand() -> None:
    """ResNet18 gives 64, 64, 128, 256, 512 channels; branches: weights, and 2 for GroupNorm."""
    wide = {"backbone": "resnet18", "psp_channels": 512}
    classic = build_model(ModelConfig(head="classic", **wide), 5)  # the one with aux by default
    assert parameters(classic.pyramid) == 4 * (512 * 128 + 2 * 128) + 1024 * 512 * 9 + 2 * 512
    assert parameters(classic.classify) == 512 * 5 + 5
    assert parameters(classic.aux) == 256 * 512 * 9 + 2 * 512 + 512 * 5 + 5
    shallow = build_model(ModelConfig(head="shallow", aux=True, **wide), 5)
    assert parameters(shallow.pyramid) == 4 * (128 * 32 + 2 * 32) + 256 * 512 + 2 * 512
    assert parameters(shallow.aux) == 64 * 512 * 9 + 2 * 512 + 512 * 5 + 5
    assert parameters(shallow.decoder) == parameters(classic.decoder) == 0
    refine = build_model(ModelConfig(backbone="resnet18"), 5)
    assert parameters(refine.pyramid) == 4 * (256 * 32 + 2 * 32) + 384 * 128 * 9 + 2 * 128
    levels = ((128, 128, 128), (128, 64, 64), (64, 64, 32))  # from below, the skip, the width
    assert parameters(refine.decoder) == sum(
        (below + 1) * w + (skip + 1) * w + w * w * 9 + 2 * w for below, skip, w in levels
    )
    assert parameters(refine.classify) == 32 * 5 + 5
    assert refine.aux is None


@pytest.mark.parametrize(
    ("head", "stride"),
    [
        *(("refine", 32), ("refine", 8), ("classic", 8), ("classic", 16), ("classic", 32)),
        *(("shallow", 8), ("shallow", 16)),
    ],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_network_runs_and_trains(backbone: str, head: str, stride: int) -> None:
    torch.manual_seed(0)
    model = build_model(small(backbone=backbone, head=head, output_stride=stride), 3)
    x = torch.rand(2, 1, 33, 47)  # becomes 64 x 64
    shapes: list[torch.Size] = []
    hook = model.pyramid.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    logits, aux = model(x, torch.arange(2))
    hook.remove()
    assert shapes[0][-2:] == (64 // stride, 64 // stride)
    assert logits.shape == aux.shape == (2, 3, 33, 47)
    # plain DDP stops at the second step on a parameter without gradient, so: without the
    # auxiliary head none but its own is silent, and with it none at all
    logits.square().mean().backward(retain_graph=True)
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    assert silent == {f"aux.{n}" for n, _ in model.aux.named_parameters()}
    aux.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
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
    logits, aux = model(torch.rand(1, 1, 64, 33), torch.arange(1))
    assert aux is None
    logits.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("backbone", "norm", "head"),
    [
        ("mobilenetv3_large_100", "group", "refine"),
        ("efficientnet_b0", "batch", "shallow"),
        ("resnet18", "group", "classic"),
        ("resnet18", "batch", "refine"),
        ("convnext_tiny", "group", "shallow"),
    ],
)
def test_float64_from_end_to_end(backbone: str, norm: str, head: str) -> None:
    torch.manual_seed(0)
    model = build_model(small(backbone=backbone, head=head, norm=norm), 2).double()
    target = torch.randint(2, (2, 40, 33), generator=torch.Generator().manual_seed(1))
    outputs = model(torch.rand(2, 1, 40, 33, dtype=torch.float64), torch.arange(2))
    weights = torch.ones(2)
    total = sum(
        segmentation_loss(y, target, LossConfig(), weights, lambda z: z).total for y in outputs
    )
    total.backward()
    assert total.dtype == outputs[0].dtype == outputs[1].dtype == torch.float64
    assert {p.grad.dtype for p in model.parameters()} == {torch.float64}


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


def test_strides_of_the_maps_and_of_the_logits() -> None:
    refine = build_model(small(backbone="resnet18"), 2)
    reductions = refine.backbone.feature_info.reduction()
    assert [reductions[i] for i in refine.skips] == [8, 4, 2]
    assert refine.stride == 2
    assert build_model(small(backbone="convnext_tiny"), 2).stride == 4
    short = build_model(small(backbone="mobilenetv3_large_100", output_stride=8), 2)
    assert short.backbone.feature_info.reduction() == [2, 4, 8]
    assert short.skips == [1, 0]
    for head in ("classic", "shallow"):
        model = build_model(small(backbone="resnet18", head=head, output_stride=16), 2)
        assert model.decoder is None
        assert model.stride == 16


def test_parts_share_nothing_and_leave_nothing_out() -> None:
    model = build_model(small(), 2)
    backbone, head = model.part_parameters("backbone"), model.part_parameters("head")
    assert {id(p) for p in backbone} == {id(p) for p in model.backbone.parameters()}
    assert len(backbone) + len(head) == len(list(model.parameters()))
    assert not {id(p) for p in backbone} & {id(p) for p in head}


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_large_100"])
@pytest.mark.parametrize(
    ("frozen", "moving"), [("backbone", {"pyramid", "decoder", "aux"}), ("head", {"backbone"})]
)
def test_a_frozen_part_keeps_its_statistics(backbone: str, frozen: str, moving: set[str]) -> None:
    model = build_model(small(backbone=backbone), 2)
    for parameter in model.part_parameters(frozen):
        parameter.requires_grad_(False)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    model(torch.rand(2, 1, 64, 64), torch.arange(2))
    moved = {n.split(".")[0] for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert moved == moving
    assert model.training  # the auxiliary logits are still asked for
    assert model.dropout.training  # and a frozen head still drops
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    assert all(module.training for module in model.modules())


def test_neighbouring_slices_and_windows_are_channels() -> None:
    config = small(
        backbone="resnet18", context=1, windows=[{"center": 40, "width": 400}] * 2, head="classic"
    )
    model: PSPNet = build_model(config, 2).eval()
    assert config.channels == 6
    assert model.backbone.conv1.in_channels == 6
    assert model(torch.rand(1, 6, 33, 47))[0].shape == (1, 2, 33, 47)
