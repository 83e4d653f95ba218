"""A training step on one GPU: ours by DDP's engine and by ZeRO-1, smp.PSPNet, smp.Unet, in turn.

    python tests/bench/gpu.py [--batch 16] [--size 512] [--steps 20] [--rounds 5]
        [--backbones resnet18 ...] [--eager] [--results FOLDER]

bf16 autocast, channels_last, 1 grey channel, 4 classes, Dice + Focal, clipping at 1, AdamW; the
batch comes from the CPU's memory at every step. Ours is everything that `fit` does in a step. The
peers have a bare loop around them with the same loss, clipping and optimizer. Wall time between two
points where the GPU is idle. MFU: 6 times the multiply-adds of a forward pass, over the data
sheet's dense bf16. Memory: peak above what was there before, weights and optimizer included.
Waits of the host for the GPU are counted by torch's own sync warnings. Results: FOLDER/gpu.json; in
tests/bench/results they are what `page.py` reads.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".venv-bench" / "smp"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from launch.measure import parts_of_fit
from medpsp.config import Config
from medpsp.model.cost import count_macs
from medpsp.model.loss import segmentation_loss
from medpsp.model.psp import build_model
from medpsp.modelconfig import BACKBONES
from medpsp.train.batch import Batch
from medpsp.train.loop import enter_stage, train_step
from medpsp.train.optimizer import no_moments
from medpsp.train.ranks import process_group
from medpsp.train.timing import PEAK_TFLOPS
from medpsp.types import World
from tests.bench.results import FOLDER, Row, machine, paired, report, versions
from tests.bench.train import batch_of

CLASSES, CLIP, GIB = 4, 1.0, 2**30
PEERS = {
    "resnet18": "resnet18",
    "mobilenetv3_large_100": "tu-mobilenetv3_large_100",
    "efficientnet_b0": "efficientnet-b0",
    "convnext_tiny": "tu-convnext_tiny",
}
WAYS: dict[str, tuple[str, str, bool | str]] = {
    "refine": ("refine", "ddp", False),
    "refine, zero1": ("refine", "zero1", False),
    "refine, compiled": ("refine", "ddp", True),
    "refine, graphs": ("refine", "ddp", "reduce-overhead"),
    "shallow": ("shallow", "ddp", False),
    "shallow, compiled": ("shallow", "ddp", True),
    "shallow, graphs": ("shallow", "ddp", "reduce-overhead"),
}
"""Ours: head, engine, `train.compile`."""
THEIRS = ("smp.PSPNet", "smp.PSPNet, compiled", "smp.Unet", "smp.Unet, compiled")
PAIRS = (
    ("smp.PSPNet", "shallow"),
    ("smp.PSPNet, compiled", "shallow, compiled"),
    ("smp.PSPNet, compiled", "shallow, graphs"),
    ("smp.Unet", "refine"),
    ("smp.Unet, compiled", "refine, compiled"),
    ("smp.Unet, compiled", "refine, graphs"),
    ("smp.PSPNet", "refine"),
    ("smp.PSPNet, compiled", "refine, compiled"),
    ("smp.PSPNet, compiled", "refine, graphs"),
    ("refine", "refine, zero1"),
)
"""What is compared: with what, which."""
Step = Callable[[int], None]
"""One step, by its number."""


def config_of(args: argparse.Namespace, backbone: str, way: str) -> Config:
    head, engine, compiled = WAYS[way]
    train = {
        "stages": [{"name": "a", "steps": 10**6, "lr": 1e-3}],
        "size": [args.size, args.size],
        "batch_size": args.batch,
        "engine": engine,
        "precision": "bf16",
        "channels_last": True,
        "compile": compiled,
    }
    tree = {
        "data": {"archive": "none", "classes": ["a", "b", "c", "d"]},
        "model": {"backbone": backbone, "head": head},
        "train": train,
    }
    return Config.model_validate(tree)


def ours(config: Config, batch: Batch, device: torch.device) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES).to(device, memory_format=torch.channels_last)
    run, progress = parts_of_fit(model, config, World(), device)
    engine = enter_stage(model, config.train.stages[0], run, no_moments())
    return model, lambda number: train_step(run, engine, progress, batch, number) and None


def theirs(
    backbone: str, way: str, batch: Batch, config: Config, device: torch.device
) -> tuple[nn.Module, Step]:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    make, compiled = smp.PSPNet if "PSPNet" in way else smp.Unet, "compiled" in way
    model = make(PEERS[backbone], encoder_weights=None, in_channels=1, classes=CLASSES)
    model = model.to(device, memory_format=torch.channels_last).train()
    net: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    weights = torch.ones(CLASSES, device=device)

    def step(number: int) -> None:
        image = batch.image.to(device, non_blocking=True)
        label = batch.label.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(image.contiguous(memory_format=torch.channels_last))
        loss = segmentation_loss(
            logits, label, config.loss, weights, lambda x: x, compiled=compiled
        )
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return model, step


class Way:
    """One way to train, warmed up, with what it takes.

    Args:
        make: Network and step.
        side: Of the image, for the multiply-adds.
    """

    def __init__(self, make: Callable[[], tuple[nn.Module, Step]], side: int) -> None:
        before, began = allocated(), time.perf_counter()
        self.model, self.step = make()
        for number in range(5):
            self.step(number)
        settle()
        self.started = time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.step(5)
        settle()
        self.gib = (peak() - before) / GIB
        self.waits = self._waits()
        plain = copy.deepcopy(self.model).eval()
        one = torch.zeros(1, 1, side, side, device=next(plain.parameters()).device)
        self.macs = count_macs(plain, one)
        self.times: list[float] = []  # ms

    def _waits(self) -> int:
        if not torch.cuda.is_available():
            return 0
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step(6)
            torch.cuda.set_sync_debug_mode("default")
        for warning in found:
            print(f"  wait: {Path(warning.filename).name}:{warning.lineno}")
        return len(found)

    def round(self, steps: int) -> None:
        settle()
        began = time.perf_counter()
        for number in range(steps):
            self.step(10 + number)
        settle()
        self.times.append((time.perf_counter() - began) / steps * 1e3)


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def ways_of(args: argparse.Namespace, backbone: str, device: torch.device) -> dict[str, Any]:
    batch = batch_of(args.size, args.batch, CLASSES)
    if device.type == "cuda":
        batch = Batch(
            image=batch.image.pin_memory(),
            label=batch.label.pin_memory(),
            patients=batch.patients,
            keys=batch.keys,
            samples=batch.samples,
        )
    plain = config_of(args, backbone, "refine")
    ways: dict[str, Any] = {
        way: partial(ours, config_of(args, backbone, way), batch, device) for way in WAYS
    }
    ways |= {way: partial(theirs, backbone, way, batch, plain, device) for way in THEIRS}
    return {
        way: make
        for way, make in ways.items()
        if not (args.eager and way.endswith(("compiled", "graphs")))
    }


def compare(args: argparse.Namespace, backbone: str, device: torch.device) -> None:
    ways: dict[str, Way] = {}
    why: dict[str, str] = {}
    for name, make in ways_of(args, backbone, device).items():
        try:
            ways[name] = Way(make, args.size)
        except Exception as error:  # noqa: BLE001 - a peer or an engine that does not run costs its own row only
            print(f"  {name}: {type(error).__name__} {str(error)[:300]}", flush=True)
            why[name] = f"failed with {type(error).__name__}"
    for number in range(args.rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            ways[name].round(args.steps)
    facts = {"versions": versions("torch", "timm", "segmentation_models_pytorch", "deepspeed")}
    facts["machine"] = f"{gpu_name() or 'no GPU'}, {machine()}"
    facts["setting"] = f"bf16, channels_last; time of a step, {args.rounds} rounds of {args.steps}"
    section = f"{backbone} {args.size} x {args.size}, batch {args.batch}"
    report("gpu", section, list(rows_of(ways, why, args.batch)), facts, folder=args.results)


def rows_of(ways: dict[str, Way], why: dict[str, str], batch: int) -> Iterator[Row]:
    """Ratios that are wanted of each, then what each does in a second and holds."""
    for base, name in PAIRS:
        if name not in ways and name not in why:
            continue  # it was not asked for
        label, least = f"{base} / {name}", 1.0 if "smp" in base else None
        if name in ways and base in ways:
            yield paired(label, ways[name].times, ways[base].times, least=least)
        else:
            yield Row(label=label, value=None, least=least, why=why.get(name) or why.get(base, ""))
    most = next((v for k, v in PEAK_TFLOPS.items() if k in gpu_name()), None)
    for name, way in ways.items():
        seconds = statistics.median(way.times) / 1e3
        share = 6 * way.macs * batch / seconds / 1e10 / most if most else None
        yield Row(label=f"{name}: images a second", value=batch / seconds)
        yield Row(label=f"{name}: multiply-adds of an image", value=way.macs / 1e9, unit="G")
        yield Row(label=f"{name}: MFU", value=share, unit="%")
        yield Row(label=f"{name}: memory", value=way.gib, unit="GiB")
        yield Row(label=f"{name}: waits for the GPU in a step", value=way.waits)
        yield Row(label=f"{name}: start", value=way.started, unit="s")


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of gpu.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with process_group(World(), 2, alone=True) as device:
        for backbone in args.backbones:
            compare(args, backbone, device)


if __name__ == "__main__":
    main()
