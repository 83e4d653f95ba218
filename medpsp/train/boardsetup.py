"""What a board says of a run before its first step and after its last one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import custom_scalars, hparams

from medpsp.config import Config
from medpsp.configio import without_paths
from medpsp.train.board import Board

Plain = str | float
SECTIONS = ("model", "train", "loss")
"""Of the configuration whose values are compared between runs."""


def open_board(
    folder: Path | None, first_step: int, config: Config, facts: Mapping[str, str]
) -> Board:
    """A board with its layout, texts and hyper-parameters.

    Args:
        folder: Of the events; None on ranks that write nothing.
        first_step: Steps that are done.
        config: Resolved, stages in steps.
        facts: Further texts in Markdown, by name.
    """
    board = Board(folder, first_step, marks_of(config))
    board.text("config", f"```\n{without_paths(config)}\n```")
    for name, text in facts.items():
        board.text(name, text)
    metrics = dict.fromkeys(metrics_of(config), 0.0)
    experiment, start, _ = hparams(hparams_of(config), metrics)  # type: ignore[no-untyped-call]
    layout = custom_scalars(layout_of(config))  # type: ignore[no-untyped-call]
    board.summaries(layout, experiment, start)
    return board


def finish(board: Board, config: Config, step: int, best: float) -> None:
    """Say that the run reached its end, and its best mean Dice.

    Args:
        board: Of the run.
        config: As given to `open_board`.
        step: Steps that are done.
        best: Mean Dice of the best evaluation, below 0 if there was none.
    """
    if best >= 0:
        board.scalars(step, {"val/dice_best": best})
    _, _, end = hparams(hparams_of(config), {})  # type: ignore[no-untyped-call]
    board.summaries(end)


def data_text(content: str, names: Sequence[str], weights: Sequence[float]) -> str:
    """Which data: digest of all shards, classes and their weights in the loss; Markdown."""
    rows = [f"| {name} | {w:.4g} |" for name, w in zip(names, weights, strict=True)]
    head = f"digest of all shards `{content}`\n\n| class | weight |\n|---|---|\n"
    return head + "\n".join(rows)


def marks_of(config: Config) -> dict[int, str]:
    """First step of each stage to a line about it."""
    found, start = {}, 0
    for stage in config.train.stages:
        found[start] = (
            f"**{stage.name}**: steps {start} to {start + stage.steps - 1}, lr {stage.lr:g}, "
            f"{stage.fraction:.0%} of the patients, augment {stage.augment}, trains {stage.trains}"
        )
        start += stage.steps
    return found


def metrics_of(config: Config) -> list[str]:
    """Scalars whose last points stand beside the hyper-parameters."""
    dice = [f"val/dice/{name}" for name in config.data.classes[1:]]
    return ["val/dice_best", "val/dice_mean", *dice, "val/ece", "train/loss"]


def hparams_of(config: Config) -> dict[str, Plain]:
    """Flat names to numbers and short texts; lists as JSON, no paths."""
    tree = config.model_dump(mode="json", include=set(SECTIONS))
    found = dict(leaf for section in SECTIONS for leaf in _leaves(section, tree[section]))
    return {"seed": config.seed, "data/classes": len(config.data.classes), **found}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}", inner)
    elif isinstance(value, bool):
        yield name, str(value).lower()
    elif isinstance(value, int | float):
        yield name, value
    elif isinstance(value, str) and "/" not in value.removeprefix("timm/"):
        yield name, value
    elif isinstance(value, list):
        if value and isinstance(value[0], dict):
            for number, inner in enumerate(value):
                yield from _leaves(f"{name}/{inner.get('name', number)}", inner)
        elif value:
            yield name, json.dumps(value)


def layout_of(config: Config) -> dict[str, dict[str, list[Any]]]:
    """Charts that hold several curves, by category."""
    tags = {
        "loss": {"terms": ["train/loss", "train/dice_loss", "train/focal_loss"]},
        "validation": {
            "Dice": ["val/dice_mean", *(f"val/dice/{n}" for n in config.data.classes[1:])]
        },
        "schedule": {
            "learning rate": ["train/lr/backbone", "train/lr/head"],
            "stage": ["stage/index"],
        },
        "speed": {
            "step, ms": ["perf/step_ms_min", "perf/step_ms_median", "perf/step_ms_max"],
            "waiting for data": ["perf/data_wait_frac"],
        },
    }
    return {
        category: {
            title: ["Multiline", [f"^{re.escape(tag)}$" for tag in of]]
            for title, of in charts.items()
        }
        for category, charts in tags.items()
    }
