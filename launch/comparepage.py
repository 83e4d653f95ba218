"""Several runs on one page: scores with intervals, curves in one plot, what was set otherwise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.compare import COLUMNS, best_first, compare
from launch.evalfigures import METRICS, estimate
from launch.plot import Line, plot
from launch.runfacts import (
    Lack,
    checkpoints_of,
    config_of,
    curves_of,
    evaluation_of,
    stages_of,
)
from medpsp.configio import tree_without_paths
from medpsp.words import many
from shards.index import write_bytes_durably
from shards.page import Html, coded, join, page, table, tag
from shards.sections import section

CURVES = {"train/loss": "Loss", "val/dice_mean": "Validation Dice, mean of classes"}


MEANING = (
    "Mean Dice, HD95 and NSD: of the held-out patients, of each class the mean of cases, and of "
    "that the mean of the classes but the background. Step: of the network that was scored. int8 "
    "Dice: its masks against those of fp32, of validation patients."
)


def write_comparison(path: Path, roots: Sequence[Path]) -> None:
    """Write the page of runs, the best Dice first.

    Raises:
        ConfigError: One of them is no run.
    """
    write_bytes_durably(path, comparison_page(best_first(roots)).encode())


def comparison_page(roots: Sequence[Path]) -> str:
    """The page: no script, nothing from a network, no path of a machine.

    Args:
        roots: In the order to show.
    """
    runs = dict(zip(names_of(roots), roots, strict=True))
    parts = {
        "runs": ("Runs", join([tag("p", MEANING, css="quiet"), _runs(roots)])),
        "scores": ("Scores", join(_scores(runs))),
        "curves": ("Curves", join(_curves(runs))),
        "settings": ("What was set otherwise", _settings(runs)),
    }
    nav = tag("nav", *(tag("a", title, href=f"#{name}") for name, (title, _) in parts.items()))
    lead = tag("p", f"{many(len(runs), 'run')}, the best mean Dice first.", css="lead")
    header = tag("header", tag("h1", "Runs side by side"), lead, nav)
    sections = (section(name, title, content) for name, (title, content) in parts.items())
    return page("Runs side by side", (header, *sections))


def _runs(roots: Sequence[Path]) -> Html:
    return table(COLUMNS, compare(roots), range(2, len(COLUMNS)))


def names_of(roots: Sequence[Path]) -> list[str]:
    """Names of the folders; of equal ones each with its number."""
    names = [root.resolve().name for root in roots]
    often, seen = Counter(names), Counter[str]()
    told = []
    for name in names:
        seen[name] += 1
        told.append(f"{name} ({seen[name]})" if often[name] > 1 else name)
    return told


def _scores(runs: dict[str, Path]) -> Iterator[Html]:
    rows: list[tuple[object, ...]] = []
    for name, root in runs.items():
        scores = evaluation_of(config_of(root)[1])
        if isinstance(scores, Lack):
            yield tag("p", tag("strong", name), ": ", coded(scores.line), css="quiet")
            continue
        about = f"{scores['split']}, {many(scores['patients'], 'patient')}, step {scores['step']}"
        for label, of in scores["classes"].items():
            values: dict[str, Any] = {**of}
            said = join([name, tag("small", about)])
            rows.append((label, said, *(estimate(values[key]) for key in METRICS)))
    if rows:
        order = {label: place for place, label in enumerate(dict.fromkeys(row[0] for row in rows))}
        rows.sort(key=lambda row: order[row[0]])
        text = "With 95 % intervals over patients; those of other patients are no comparison."
        yield tag("p", text, css="quiet")
        head = ("class", "run", *METRICS.values())
        yield table(head, rows, range(2, len(head)))


def _curves(runs: dict[str, Path]) -> Iterator[Html]:
    lines: dict[str, list[Line]] = {tag_of: [] for tag_of in CURVES}
    for name, root in runs.items():
        curves = curves_of(*config_of(root))
        if isinstance(curves, Lack):
            yield tag("p", tag("strong", name), ": ", coded(curves.line), css="quiet")
            continue
        for tag_of, found in lines.items():
            found.append(Line(name, curves.of(tag_of)))
    boxes = (
        plot(f"curve-{n}", title, lines[tag_of], top=1.0 if tag_of.startswith("val/") else None)
        for n, (tag_of, title) in enumerate(CURVES.items())
    )
    yield tag("div", *boxes, css="boxes")


def _settings(runs: dict[str, Path]) -> Html:
    flat = [_settings_of(root) for root in runs.values()]
    keys = list(dict.fromkeys(key for leaves in flat for key in leaves))
    rows = [
        (tag("code", key), *(leaves.get(key, "–") for leaves in flat))
        for key in keys
        if len({leaves.get(key) for leaves in flat}) > 1
    ]
    return table(("key", *runs), rows, ()) if rows else tag("p", "Nothing but paths.")


def _settings_of(root: Path) -> dict[str, str]:
    """Keys and values, each stage in a line, and how many steps that makes and were done."""
    config, run = config_of(root)
    tree = tree_without_paths(config)
    stages = stages_of(config, checkpoints_of(run)[0])
    train = {k: v for k, v in tree.get("train", {}).items() if k not in ("stages", "steps")}
    curves = curves_of(config, run)
    told = {"train.steps": str(sum(steps for *_, steps in stages) or "not known yet")}
    told["steps done"] = "0" if isinstance(curves, Lack) else str(curves.last)
    for stage in tree.get("train", {}).get("stages", ()):
        words = (f"{key} {value}" for key, value in _leaves("", stage) if key != "name")
        told[f"train.stages.{stage['name']}"] = ", ".join(words)
    return told | dict(_leaves("", {**tree, "train": train}))


def _leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Keys and values, lists of values in a line."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for place, inner in enumerate(value):
            yield from _leaves(f"{name}.{inner.get('name', place)}", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
