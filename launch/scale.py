"""How training scales: measured at a few numbers of ranks, calculated for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

GPUS = (8, 16, 32, 64, 128, 256, 512)
_DATA, _REDUCE = 0.1, 0.2
"""Shares of a step's time from which on waiting for data, or for others, is what holds it up."""


def rate(found: dict[str, Any]) -> float:
    """Images a second of all ranks; a step waits for its data first."""
    return float(found["batch"] / (found["step_s"] + found["data_s"]))


def bottleneck(found: dict[str, Any]) -> str:
    """What a step mostly waits for."""
    whole = found["step_s"] + found["data_s"]
    if found["data_s"] > _DATA * whole:
        return "data"
    return "all-reduce" if found["reduce_s"] > _REDUCE * whole else "compute"


def measured_table(found: Sequence[dict[str, Any]]) -> Table:
    """Of each backbone and number of ranks; each rank has the same batch.

    Efficiency is images/s over ranks times images/s of the fewest ranks measured.
    """
    table = Table(title="Measured; the same batch on every rank", pad_edge=False)
    names = ("backbone", "ranks", "images/s", "efficiency", "step ms", "data ms", "all-reduce ms")
    for name in (*names, "share", "held up by"):
        left = name in ("backbone", "held up by")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for one in sorted(found, key=lambda f: (f["backbone"], f["ranks"])):
        fewest = min((f for f in found if f["backbone"] == one["backbone"]), key=_ranks)
        fair = rate(fewest) / fewest["ranks"] * one["ranks"]
        table.add_row(
            one["backbone"],
            str(one["ranks"]),
            f"{rate(one):.1f}",
            f"{rate(one) / fair:.0%}",
            *(f"{1e3 * one[key]:.1f}" for key in ("step_s", "data_s", "reduce_s")),
            f"{one['reduce_s'] / (one['step_s'] + one['data_s']):.0%}",
            bottleneck(one),
        )
    return table


def calculated_table(found: Sequence[dict[str, Any]], link_gb: float) -> Table:
    """Efficiency at many GPUs from the step of the fewest ranks measured.

    Args:
        found: Of `launch.measure`.
        link_gb: Bytes that a GPU sends and receives at once, 10^9 a second.
    """
    table = Table(title="CALCULATED, not measured: efficiency", pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    for count in GPUS:
        table.add_column(f"{count} GPUs", justify="right")
    for backbone in sorted({one["backbone"] for one in found}):
        one = min((f for f in found if f["backbone"] == backbone), key=_ranks)
        table.add_row(backbone, *(f"{efficiency(one, n, link_gb):.0%}" for n in GPUS))
    table.caption = (
        "A step as measured with the fewest ranks, then a ring all-reduce of its gradients over "
        f"links of {link_gb:g} GB/s, 2 (n - 1) / n times their bytes, that does not overlap with "
        "it. Latency, other jobs on the network and the storage are left out."
    )
    return table


def efficiency(one: dict[str, Any], ranks: int, link_gb: float) -> float:
    """Share of a step that is not the all-reduce, at a number of ranks."""
    alone = one["step_s"] + one["data_s"]
    if one["ranks"] > 1:
        alone -= min(one["reduce_s"], one["step_s"] / 2)
    reduce = 2 * (ranks - 1) / ranks * one["gradient_bytes"] / (link_gb * 1e9)
    return float(alone / (alone + reduce))


def _ranks(found: dict[str, Any]) -> int:
    return int(found["ranks"])
