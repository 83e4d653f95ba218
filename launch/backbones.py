"""The tables of `medpsp backbones`."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from launch.rundir import find_config
from medpsp.config import BACKBONES, ModelConfig
from medpsp.configio import load_config
from medpsp.model.cost import QUOTED, Cost, model_cost, published_cost

WHY = (
    "The article gives multiply-adds (it says FLOPs, which would be twice as many). It counts the "
    "classifier of all but MobileNetV3-Large: {whole:.2f} M with it, {bare:.2f} M without. What is "
    "left differs by rounding and by whether normalisation and pooling count. Segmentation needs "
    "no classifier but computes at larger maps: the first table."
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
    names = dict.fromkeys((*BACKBONES, config.backbone))
    console = Console()
    console.print(
        _costs([config.model_copy(update={"backbone": n}) for n in names], classes, (height, width))
    )
    console.print(_quoted())


def _costs(configs: list[ModelConfig], classes: int, size: tuple[int, int]) -> Table:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core of this CPU"
    head = configs[0].head
    table = Table(
        title=f"PSPNet, {head} head, {classes} classes, {size[0]} x {size[1]}",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("backbone", no_wrap=True)
    for name in ("M params", "of it backbone", "GMACs", "at 224²", "stride", "MiB", "img/s"):
        table.add_column(name, justify="right")
    for config in configs:
        table.add_row(*_row(model_cost(config, classes, size, device)))
    table.caption = (
        "stride: of the map that is classified. MiB: activations an image that training keeps, "
        f"fp32; beside them 16 bytes a parameter. img/s: inference one by one, {where}."
    )
    return table


def _row(cost: Cost) -> list[str]:
    return [
        cost.backbone,
        f"{cost.params:.2f}",
        f"{cost.backbone_params:.2f}",
        f"{cost.macs:.2f}",
        f"{cost.macs_224:.2f}",
        f"{cost.stride}",
        f"{cost.saved_mib:.0f}",
        f"{cost.speed:.1f}",
    ]


def _quoted() -> Table:
    table = Table(title="The backbone alone, 3 channels, 224 x 224: parameters, multiply-adds")
    for name in ("backbone", "to the last map", "with classifier", "article", "use"):
        table.add_column(name, no_wrap=name == "backbone")
    found = {n: (published_cost(n, False), published_cost(n, True)) for n in BACKBONES}
    for name, (bare, whole) in found.items():
        quoted = QUOTED[name]
        table.add_row(
            name,
            f"{bare[0]:.2f} M, {bare[1]:.3f} G",
            f"{whole[0]:.2f} M, {whole[1]:.3f} G",
            f"{quoted.params} M, {quoted.macs} G",
            quoted.use,
        )
    bare, whole = found["mobilenetv3_large_100"]
    table.caption = WHY.format(bare=bare[0], whole=whole[0])
    return table
