"""Which layers normalise, and what is lost with BatchNorm."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import nn

from medpsp.config import BACKBONES, ModelConfig
from medpsp.errors import ConfigError
from medpsp.model.norm import check_device, count_groups
from medpsp.model.psp import build_model

torch.set_num_threads(1)


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"psp_channels": 16, "decoder_channels": 8, "aux": True, **changes})


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        *((512, 32), (128, 32), (64, 16), (960, 32), (672, 32), (480, 32), (112, 28), (40, 10)),
        *((24, 6), (200, 25), (184, 23), (8, 2), (9, 1), (31, 1), (3, 1)),
    ],
)
def test_groups_divide_and_hold_four_channels(channels: int, groups: int) -> None:
    assert count_groups(channels) == groups
    assert channels % groups == 0
    assert groups == 1 or channels // groups >= 4


@pytest.mark.parametrize("backbone", BACKBONES)
def test_group_leaves_no_batch_statistics(backbone: str) -> None:
    torch.manual_seed(0)
    batch = build_model(small(backbone=backbone), 2)
    torch.manual_seed(0)
    group = build_model(small(backbone=backbone, norm="group"), 2)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in group.modules())
    # scale and shift stay, the zeros that timm gives the last norm of a block too
    ours, theirs = dict(group.named_parameters()), dict(batch.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pairs = list(zip(batch.modules(), group.modules(), strict=True))
    swapped = [(old, new) for old, new in pairs if isinstance(old, nn.BatchNorm2d)]
    assert len(swapped) >= 4  # of the head; ConvNeXt has LayerNorm
    for old, new in swapped:
        assert isinstance(new, GroupNormAct if isinstance(old, BatchNormAct2d) else nn.GroupNorm)
        assert new.eps == old.eps
        assert new.num_groups == count_groups(old.num_features)
        if isinstance(old, BatchNormAct2d):
            assert type(new.act) is type(old.act)


@pytest.mark.parametrize("head", ["refine", "classic", "shallow"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_group_norm_is_the_same_for_any_batch(backbone: str, head: str) -> None:
    """A batch of one at one cell of stride 32, where BatchNorm raises; and eval is train."""
    torch.manual_seed(0)
    model = build_model(small(backbone=backbone, head=head, norm="group", dropout=0), 2)
    x = torch.rand(3, 1, 32, 32)
    whole, aux = model(x)
    alone, _ = model(x[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)
    (whole.square().mean() + aux.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(x)[0], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_large_100", "efficientnet_b0"])
def test_sync_is_batch_norm_with_the_same_weights(backbone: str) -> None:
    torch.manual_seed(0)
    batch = build_model(small(backbone=backbone), 2)
    sync = build_model(small(backbone=backbone, norm="sync"), 2)
    sync.load_state_dict(batch.state_dict())  # a checkpoint fits either
    norms = [m for m in sync.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(sync.eval()(x)[0], batch.eval()(x)[0])


def test_sync_needs_cuda() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"model\.norm sync: needs CUDA, training runs on cpu"):
        check_device(small(norm="sync"), cpu)
    check_device(small(norm="sync"), cuda)
    check_device(small(norm="batch"), cpu)
    check_device(small(norm="group"), cpu)


@pytest.mark.parametrize(
    ("backbone", "norm", "warnings"),
    [("resnet18", "group", 1), ("resnet18", "batch", 0), ("convnext_tiny", "group", 0)],
)
def test_lost_statistics_are_worth_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    backbone: str,
    norm: str,
    warnings: int,
) -> None:
    torch.save(timm.create_model(backbone).state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, logger="medpsp"):
        build_model(small(backbone=backbone, norm=norm, pretrained=tmp_path / "w.pth"), 2)
        build_model(small(backbone=backbone, norm=norm), 2)  # nothing to lose
    found = [r.getMessage() for r in caplog.records if "pretrained statistics" in r.getMessage()]
    assert len(found) == warnings
    assert all(backbone in text for text in found)
