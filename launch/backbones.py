"""The tables of `medpsp backbones`."""

from __future__ import annotations

import statistics
from itertools import repeat
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.measure import made_batch, step_times
from launch.rundir import find_config
from medpsp.config import BACKBONES, Config, ModelConfig
from medpsp.configio import load_config
from medpsp.model.cost import QUOTED, Cost, model_cost, published_cost
from medpsp.model.psp import build_model
from medpsp.types import World

BATCH, STEPS = 4, 3
"""Of training, timed; the first step does not count."""
CAPTION = (
    "stride: of the map that is classified. MiB: activations an image that training keeps, fp32; "
    "beside them 16 bytes a parameter. Images a second on {where}: predicted one by one, and "
    "trained in fp32, batch {batch}. Training takes about train.steps x train.batch_size / (images "
    "trained a second{cores}), and scoring on top."
)
WHY = (
    "The article gives multiply-adds (it says FLOPs, which would be twice as many). It counts the "
    "classifier of all but MobileNetV3-Large: {whole:.2f} M with it, {bare:.2f} M without. What is "
    "left differs by rounding and by whether normalisation and pooling count. Segmentation needs "
    "no classifier but computes at larger maps: the first table."
)


_NARROW: dict[str, Any] = {
    "box": SIMPLE_HEAD,
    "pad_edge": False,
    "collapse_padding": True,
    "show_edge": False,
}
"""Tables that fit 80 columns."""
_COLUMNS = (
    "M\nparams",
    "of it\nbackb.",
    "GMACs",
    "at\n224²",
    "stride",
    "MiB",
    "img/s",
    "train\nimg/s",
)


def setting(name: str, overrides: tuple[str, ...]) -> tuple[int, int, int, ModelConfig]:
    """Rows, columns, classes and network of a configuration; of none at all, the defaults.

    Raises:
        ConfigError: Not a configuration.
    """
    if not name:
        return 256, 256, 4, ModelConfig()
    config = load_config(find_config(name), overrides)
    return *config.train.size, len(config.data.classes), config.model


def show_backbones(height: int, width: int, classes: int, config: ModelConfig) -> None:
    """Print what each backbone costs at a size of image, beside the article's figures.

    Args:
        height: Rows of the image.
        width: Columns of the image.
        classes: Background included.
        config: Head, widths and channels. A backbone from elsewhere in timm gets a row, too.
    """
    console, size = Console(), (height, width)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(
        title=f"PSPNet, {config.head} head, {classes} classes, {height} x {width}",
        **_NARROW,
    )
    table.add_column("backbone", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for name in dict.fromkeys((*BACKBONES, config.backbone)):
        one = config.model_copy(update={"backbone": name})
        cost = model_cost(one, classes, size, device)
        table.add_row(*_row(cost), _figure(train_speed(one, classes, size, device)))
    console.print(table)
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else "one core of this CPU"
    cores = "" if on_gpu else " x cores"
    console.print(CAPTION.format(where=where, batch=BATCH, cores=cores) + "\n")
    _show_quoted(console)


def train_speed(
    model: ModelConfig, classes: int, size: tuple[int, int], device: torch.device
) -> float:
    """Images a second of training, median of a few steps; on a CPU with one thread."""
    config = Config.model_validate(
        {
            "data": {"archive": "", "classes": [f"{number}" for number in range(classes)]},
            "model": model.untrained,
            "train": {
                "size": size,
                "batch_size": BATCH,
                "stages": [{"name": "timed", "steps": STEPS, "lr": 1e-3}],
            },
        }
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        net = build_model(config.model, classes).to(device)
        batches = repeat(made_batch(config, BATCH), STEPS)
        return BATCH / statistics.median([*step_times(net, config, World(), device, batches)][1:])
    finally:
        torch.set_num_threads(threads)


def _row(cost: Cost) -> list[str]:
    return [
        cost.backbone,
        f"{cost.params:.2f}",
        f"{cost.backbone_params:.2f}",
        f"{cost.macs:.2f}",
        f"{cost.macs_224:.2f}",
        f"{cost.stride}",
        f"{cost.saved_mib:.0f}",
        _figure(cost.speed),
    ]


def _figure(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"


def _show_quoted(console: Console) -> None:
    table = Table(
        title="The backbone alone, 3 channels, 224 x 224: M parameters/G multiply-adds",
        **_NARROW,
    )
    for name in ("backbone", "to last map", "classifier", "article", "use"):
        table.add_column(name, no_wrap=name == "backbone")
    found = {n: (published_cost(n, False), published_cost(n, True)) for n in BACKBONES}
    for name, (bare, whole) in found.items():
        quoted = QUOTED[name]
        table.add_row(
            name,
            f"{bare[0]:.2f}/{bare[1]:.3f}",
            f"{whole[0]:.2f}/{whole[1]:.3f}",
            f"{quoted.params}/{quoted.macs}",
            quoted.use,
        )
    console.print(table)
    bare, whole = found["mobilenetv3_large_100"]
    console.print(WHY.format(bare=bare[0], whole=whole[0]))
