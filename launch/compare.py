"""Several runs beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.rundir import SAID
from launch.runfacts import Lack, config_of, dossier_of, evaluation_of
from launch.runtypes import Evaluation
from medpsp.deploy.dossier import Facts

COLUMNS = (
    "run",
    "backbone",
    "seed",
    "step",
    "mean Dice",
    "HD95 mm",
    "NSD",
    "int8 Dice",
    "int8 MiB",
)
NAMES, FOLDS, WIDE = 2, 3, 1000
"""Columns of names, lines that one may take in a table, and more columns than a table has."""
Mean = Literal["dice", "hd95_mm", "nsd"]
MEANS: tuple[Mean, ...] = ("dice", "hd95_mm", "nsd")
"""Over the classes."""


def compare(roots: Sequence[Path]) -> list[tuple[str, ...]]:
    """A row for each run, best Dice first; a dash where a run has not come so far.

    Dice, HD95 and NSD are means over the classes; ``int8 Dice`` is that of the int8 masks against
    the fp32 masks.

    Args:
        roots: Folders of runs.

    Raises:
        ConfigError: One of them is no run.
    """
    return [_row(root) for root in best_first(roots)]


def best_first(roots: Sequence[Path]) -> list[Path]:
    """Runs in the order of their mean Dice; those without one keep theirs, at the end."""

    def dice(root: Path) -> float:
        _, run = config_of(root)
        mean = _mean(evaluation_of(run), "dice")
        return -math.inf if mean is None else mean

    return sorted(roots, key=dice, reverse=True)


def scored_alike(roots: Sequence[Path]) -> bool:
    """Whether those that say what they were scored on have the same classes and patients."""
    found = set[tuple[tuple[str, ...], ...]]()
    for root in roots:
        config, run = config_of(root)
        scores = evaluation_of(run)
        if not isinstance(scores, Lack) and "held_out" in scores:
            found.add((config.data.classes, tuple(scores["held_out"])))
    return len(found) < 2


def _row(root: Path) -> tuple[str, ...]:
    config, run = config_of(root)
    scores = evaluation_of(run)
    dossier = dossier_of(run)
    size, agreement = _int8(dossier)
    return (
        root.name,
        config.model.backbone,
        str(config.seed),
        "-" if isinstance(scores, Lack) else str(scores["step"]),
        *(_shown(_mean(scores, key)) for key in MEANS),
        _shown(agreement),
        f"{size / 2**20:.1f}" if size else "refused" if _refused(dossier) else "-",
    )


def _refused(dossier: Facts | Lack) -> bool:
    known = () if isinstance(dossier, Lack) else dossier.get("refusals", ())
    return any(one["variant"] == SAID["cpu"] for one in known)


def _int8(dossier: Facts | Lack) -> tuple[int | None, float | None]:
    """Bytes of the int8 file for CPUs, and the Dice of its masks against those of fp32."""
    if isinstance(dossier, Lack):
        return None, None
    files = {file["variant"]: file["bytes"] for file in dossier.get("files", ())}
    means = {row["variant"]: row["mean"] for row in dossier.get("agreement", ())}
    return files.get(SAID["cpu"]), means.get(SAID["cpu"])


def _mean(scores: Evaluation | Lack, key: Mean) -> float | None:
    values = (
        [] if isinstance(scores, Lack) else [of[key]["value"] for of in scores["classes"].values()]
    )
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def show_comparison(rows: Sequence[tuple[str, ...]], console: Console) -> None:
    """The table, or, where its figures leave too little for names, each run as lines of its own."""
    table = comparison_table(rows)
    names = sum(max((cell_len(row[n]) for row in rows), default=0) for n in range(NAMES))
    whole = console.measure(table, options=console.options.update(width=WIDE)).maximum
    if FOLDS * (console.width - (whole - names)) >= names:
        console.print(table)
        return
    for name, *values in rows:
        console.print(Text(name, style="bold"))
        for column, value in zip(COLUMNS[1:], values, strict=True):
            console.print(Text(f"  {column:10} {value}"))


def comparison_table(rows: Iterable[tuple[str, ...]]) -> Table:
    """In a narrow terminal long names take several lines, and figures stay whole."""
    table = Table()
    for place, name in enumerate(COLUMNS):
        if place < NAMES:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def comparison_text(rows: Sequence[tuple[str, ...]]) -> str:
    """The same as Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
