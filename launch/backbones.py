"""The table of `medpsp backbones`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from medpsp.config import ModelConfig
from medpsp.model.cost import ARTICLE, USES, cost_table


def show_backbones(height: int, width: int, classes: int) -> None:
    """Print what each backbone costs at a size of image, and what it is for."""
    table = Table(title=f"PSPNet, refine head, {classes} classes; GMACs at {height} x {width}")
    for name in ("backbone", "M params", "of it backbone", "GMACs", "quoted", "use"):
        table.add_column(name, no_wrap=name == "backbone")
    for row in cost_table(ModelConfig(), classes, (height, width)):
        params, macs = ARTICLE[row.backbone]
        table.add_row(
            row.backbone,
            f"{row.params:.2f}",
            f"{row.backbone_params:.2f}",
            f"{row.macs:.2f}",
            f"{params} M, {macs} G",
            USES[row.backbone],
        )
    table.caption = "quoted: the backbone alone at 224 x 224, as usually given; MACs, not FLOPs"
    Console().print(table)
