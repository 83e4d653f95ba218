"""What a network costs: parameters, multiply-adds, memory and time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from medpsp.config import ModelConfig
from medpsp.model.backbones import timm_name
from medpsp.model.psp import PSPNet, build_model

ROUNDS = 5
"""Timed images; the median counts."""


@dataclass(frozen=True, kw_only=True)
class Quoted:
    """What the article says of a backbone alone at 224 x 224, and what suits it.

    Attributes:
        params: Millions.
        macs: Billions of multiply-adds; called FLOPs there, but FLOPs would be twice as many.
        classifier: Whether the figures count the classifier.
        use: What the backbone is for.
    """

    params: float
    macs: float
    classifier: bool
    use: str


QUOTED = {
    "mobilenetv3_large_100": Quoted(
        params=2.9, macs=0.22, classifier=False, use="mobile, real time"
    ),
    "efficientnet_b0": Quoted(params=5.3, macs=0.39, classifier=True, use="edge devices"),
    "resnet18": Quoted(params=11.7, macs=1.82, classifier=True, use="general"),
    "convnext_tiny": Quoted(params=28.6, macs=4.47, classifier=True, use="high precision, 3-D"),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a network at a size of image.

    Attributes:
        backbone: As in the configuration.
        params: Millions.
        backbone_params: Millions, as far as the head keeps it.
        macs: Billions of multiply-adds for one image.
        macs_224: The same at 224 x 224.
        stride: Of the map that is classified, before upsampling.
        saved_mib: What the forward pass keeps for the backward pass, MiB an image.
        speed: Images a second, as `measure_speed`; NaN where not measured.
        size: Rows and columns.
    """

    backbone: str
    params: float
    backbone_params: float
    macs: float
    macs_224: float
    stride: int
    saved_mib: float
    speed: float
    size: tuple[int, int]


def model_cost(
    config: ModelConfig, classes: int, size: tuple[int, int], device: torch.device | None = None
) -> Cost:
    """Count, and measure on a device if there is one."""
    model = build_model(config.untrained, classes).eval()
    image = torch.rand(1, config.channels, *size, generator=torch.Generator().manual_seed(0))
    return Cost(
        backbone=config.backbone,
        size=size,
        macs=count_macs(model, image) / 1e9,
        macs_224=count_macs(model, torch.zeros(1, config.channels, 224, 224)) / 1e9,
        backbone_params=sum(p.numel() for p in model.backbone.parameters()) / 1e6,
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        stride=model.stride,
        saved_mib=saved_bytes(model, image) / 2**20,
        speed=measure_speed(model, image, device) if device else float("nan"),
    )


def published_cost(backbone: str, classifier: bool) -> tuple[float, float]:
    """Parameters (M) and multiply-adds (G) of the backbone alone at 224 x 224, for colour.

    With its classifier as published, or as a segmentation network takes it, to the last map.
    """
    with torch.device("meta"):  # shapes only
        model = timm.create_model(timm_name(backbone), features_only=not classifier).eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    return sum(p.numel() for p in model.parameters()) / 1e6, macs / 1e9


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of every Conv2d and Linear in one forward pass of ``x``."""
    total = 0

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
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


def saved_bytes(model: PSPNet, image: Tensor) -> int:
    """Bytes that training one image keeps for its backward pass; parameters are not counted.

    Each memory block counts once, however many layers look at it.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x
        return x

    mode, buffers = model.training, {n: b.clone() for n, b in model.named_buffers()}
    pair = image.expand(2, -1, -1, -1).contiguous()  # BatchNorm of a small image asks for two
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = model.train()(pair, torch.arange(2))
    del outputs  # only now: a freed block could be handed out, and counted, again
    model.train(mode)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return sum(x.untyped_storage().nbytes() for at, x in seen.items() if at not in own) // 2


@torch.no_grad()
def measure_speed(model: nn.Module, image: Tensor, device: torch.device) -> float:
    """Images a second of inference one by one: the median of 5, after one that is not counted.

    On a CPU with one thread: several wait for each other at every small layer wherever something
    else runs on the machine (measured: MobileNetV3 50 times slower).
    """
    model, image = model.to(device).eval(), image.to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model(image)
        return 1 / statistics.median(_seconds(model, image) for _ in range(ROUNDS))
    finally:
        torch.set_num_threads(threads)


def _seconds(model: nn.Module, image: Tensor) -> float:
    _wait(image.device)
    began = time.perf_counter()
    model(image)
    _wait(image.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":  # it computes behind our back
        torch.cuda.synchronize(device)
