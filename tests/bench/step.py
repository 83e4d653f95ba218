"""A training step (forward and backward) against segmentation_models.pytorch, in turn.

Equal encoder, size, batch, classes, one thread, CPU time. `shallow` against smp.PSPNet of depth 3
with our bins and width made equal to its own; `refine` as it comes against smp.Unet as it comes.
smp is a peer for this bench only: it lies in .venv-bench/smp and shares torch and timm with us.
Arguments: rounds, then parts of row names.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medpsp.config import ModelConfig
from medpsp.model.cost import count_macs
from medpsp.model.psp import build_model
from tests.bench.results import Row, paired, report, versions

PEERS = Path(__file__).resolve().parents[2] / ".venv-bench" / "smp"
BATCH, SIZE, CLASSES, ROUNDS = 4, 256, 4, 9
WIDTH, BINS = 512, (1, 2, 3, 6)  # of smp's PSPNet, which cannot be given other bins
SMP_NAME = {
    "resnet18": "resnet18",
    "mobilenetv3_large_100": "tu-mobilenetv3_large_100",
    "efficientnet_b0": "efficientnet-b0",
    "convnext_tiny": "tu-convnext_tiny",
}
ROWS = (
    *(("shallow", name, 1.0) for name in SMP_NAME),
    *(("refine", name, 0.65) for name in ("resnet18", "mobilenetv3_large_100")),
)
Forward = Callable[[Tensor], Tensor]


def ours(head: str, backbone: str) -> tuple[nn.Module, Forward]:
    """Our network without the auxiliary head, which smp's have not."""
    if head == "shallow":
        config = ModelConfig(
            backbone=backbone, head="shallow", aux=False, psp_channels=WIDTH, bins=BINS
        )
    else:
        config = ModelConfig(backbone=backbone, head="refine", aux=False)
    model = build_model(config, CLASSES)
    keys = torch.arange(BATCH)
    return model, lambda x: model(x, keys)[0]


def theirs(head: str, backbone: str) -> tuple[nn.Module, Forward]:
    import segmentation_models_pytorch as smp

    common = {"encoder_weights": None, "in_channels": 1, "classes": CLASSES}
    name = SMP_NAME[backbone]
    model = smp.PSPNet(name, **common) if head == "shallow" else smp.Unet(name, **common)
    return model, model


def step(model: nn.Module, forward: Forward, x: Tensor, target: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    F.cross_entropy(forward(x), target).backward()
    return time.process_time() - began


def row(head: str, backbone: str, limit: float, rounds: int) -> tuple[Row, Row]:
    """The ratio of times of an image, and how much each multiplies."""
    torch.manual_seed(0)
    x, target = torch.rand(BATCH, 1, SIZE, SIZE), torch.randint(CLASSES, (BATCH, SIZE, SIZE))
    pair = ours(head, backbone), theirs(head, backbone)
    macs = [count_macs(model.eval(), x[:1]) / 1e9 for model, _ in pair]
    for model, forward in pair:
        model.train()
        step(model, forward, x, target)
    times = []
    for number in range(rounds):
        first = number % 2  # whoever comes second finds other things in the cache
        found = {i: step(*pair[i], x, target) for i in (first, 1 - first)}
        times.append((found[0], found[1]))
    mine, other = ([t[i] / BATCH * 1e3 for t in times] for i in (0, 1))
    peer = "smp.PSPNet" if head == "shallow" else "smp.Unet"
    name = f"{head} {backbone} / {peer}"
    return paired(f"{name}, time of an image", mine, other, most=limit), Row(
        label=f"{name}, multiply-adds",
        value=macs[0] / macs[1],
        ours=f"{macs[0]:.2f} G",
        theirs=f"{macs[1]:.2f} G",
    )


def main() -> None:
    sys.path.append(str(PEERS))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        version("segmentation_models_pytorch")
    except ImportError:
        report("train", "step", [], {"not measured": "segmentation_models_pytorch is not there"})
        return
    rounds = int(sys.argv[1]) if sys.argv[1:] else ROUNDS
    facts = {
        "versions": versions("torch", "timm", "segmentation_models_pytorch"),
        "setting": f"1 thread, batch {BATCH}, {SIZE} x {SIZE}, 1 channel, {CLASSES} classes, "
        f"float32, {rounds} pairs",
    }
    found = [
        row(head, backbone, limit, rounds)
        for head, backbone, limit in ROWS
        if not sys.argv[2:] or any(part in f"{head} {backbone}" for part in sys.argv[2:])
    ]
    report("train", "step", [*(time for time, _ in found), *(macs for _, macs in found)], facts)


if __name__ == "__main__":
    main()
