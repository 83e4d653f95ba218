"""What a network costs: parameters and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medpsp.config import BACKBONES, ModelConfig
from medpsp.model.psp import build_model

ARTICLE = {
    "mobilenetv3_large_100": (2.9, 0.22),
    "efficientnet_b0": (5.3, 0.39),
    "resnet18": (11.7, 1.82),
    "convnext_tiny": (28.6, 4.47),
}
"""Parameters (M) and multiply-adds (G, called FLOPs there) of the backbone alone at 224 x 224, as
usually quoted. MobileNetV3's counts Large without its classifier; the others count it."""

USES = {
    "mobilenetv3_large_100": "mobile, real time",
    "efficientnet_b0": "edge",
    "resnet18": "general",
    "convnext_tiny": "high precision",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Millions of parameters and billions of multiply-adds at a size."""

    backbone: str
    backbone_params: float
    params: float
    macs: float
    size: tuple[int, int]


def model_cost(config: ModelConfig, classes: int, size: tuple[int, int]) -> Cost:
    """Count parameters and multiply-adds of convolutions and linear layers for one image."""
    model = build_model(config, classes).eval()
    macs = count_macs(model, torch.zeros(1, config.in_channels, *size))
    return Cost(
        backbone=config.backbone,
        size=size,
        macs=macs / 1e9,
        backbone_params=sum(p.numel() for p in model.backbone.parameters()) / 1e6,
        params=sum(p.numel() for p in model.parameters()) / 1e6,
    )


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of every Conv2d and Linear in one forward pass of ``x``."""
    total = 0

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            total += out.numel() * kernel * module.in_channels // module.groups
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def cost_table(config: ModelConfig, classes: int, size: tuple[int, int]) -> list[Cost]:
    """One row for each of the four backbones with the head of ``config``."""
    return [
        model_cost(config.model_copy(update={"backbone": name, "pretrained": False}), classes, size)
        for name in BACKBONES
    ]
