"""Several runs beside each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.rundir import RunDir
from medpsp.errors import ConfigError

COLUMNS = ("run", "backbone", "seed", "step", "Dice", "HD95 mm", "NSD", "int8 Dice", "int8 MiB")


def compare(roots: Sequence[Path]) -> list[tuple[str, ...]]:
    """A row for each run, best Dice first; a dash where a run has not come so far.

    Dice, HD95 and NSD are means over the classes; ``int8 Dice`` is that of the int8 masks against
    the fp32 masks.

    Args:
        roots: Folders of runs.

    Raises:
        ConfigError: One of them is no run.
    """
    rows = [_row(root) for root in roots]
    return [cells for _, cells in sorted(rows, key=lambda row: row[0], reverse=True)]


def _row(root: Path) -> tuple[float, tuple[str, ...]]:
    from medpsp.configio import load_config

    run = RunDir(root)
    if not run.config.is_file():
        raise ConfigError(f"{root}: no config.yaml there, so it is no run of medpsp")
    config = load_config(run.config)
    scores, export = _read(run.evaluation), _read(run.export_report)
    means = [_mean(scores, key) for key in ("dice", "hd95_mm", "nsd")]
    size, agreement = _int8(export)
    cells = (
        root.name,
        config.model.backbone,
        str(config.seed),
        str(scores.get("step", "-")),
        *(_shown(mean) for mean in means),
        _shown(agreement),
        f"{size / 2**20:.1f}" if size else "-",
    )
    return (means[0] if means[0] is not None else -math.inf), cells


def _int8(dossier: dict[str, Any]) -> tuple[int | None, float | None]:
    """Bytes of the int8 file for CPUs, and the Dice of its masks against those of fp32."""
    files = {file["variant"]: file["bytes"] for file in dossier.get("files", ())}
    means = {row["variant"]: row["mean"] for row in dossier.get("agreement", ())}
    name = "int8 QDQ U8S8"
    return files.get(name), means.get(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _mean(scores: dict[str, Any], key: str) -> float | None:
    values = [of[key]["value"] for of in scores.get("classes", {}).values()]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def comparison_table(rows: Iterable[tuple[str, ...]]) -> Table:
    """For the terminal."""
    table = Table(pad_edge=False)
    for place, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if place < 2 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    return table


def comparison_text(rows: Sequence[tuple[str, ...]]) -> str:
    """The same as Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
