"""The dossier of an export: `dossier.json`, `dossier.html`, `sbom.cdx.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.dossiertables import (
    NOT_MEASURED,
    agreement_tables,
    files_table,
    gates_section,
    in_order,
    latency_table,
    parity_tables,
)
from launch.evalfigures import METRICS, estimate, look_section, swatch
from launch.exportpictures import BOTH, FP32, GAP, OTHER, SIDE
from medpsp.deploy.dossier import Facts, OverlayFact, plain
from medpsp.deploy.sbom import bill_of_materials
from medpsp.intensity import CT_WINDOW, PERCENTILES, class_colour
from shards.page import Html, join, page, pairs, picture, table, tag
from shards.sections import section

MODEL = {
    "intended_use": "intended use",
    "licence": "licence",
    "classes": "classes",
    "codes": "coded terms",
    "modalities": "modalities",
    "spacing_mm": "spacing of rows, columns, slices, mm",
    "tile": "tile, rows and columns in pixels",
    "colours": "colours",
    "context": "neighbouring slices",
    "backbone": "backbone",
    "head": "head",
    "stride": "stride",
    "bins": "pyramid bins",
    "step": "training step",
    "weights": "SHA-256 of the weights",
    "tool": "made by",
}
"""Keys of the metadata that are shown, in this order, and their names."""

CHANGED = (
    "The shards have changed since the network was trained: patients and slices under Training "
    "data are those of now, and may not be those that it learnt from."
)


def write_dossier(folder: Path, facts: Facts) -> None:
    """Write the three files; the same facts and the same installed versions give the same bytes.

    Args:
        folder: Exists.
        facts: Plain Python numbers, no numpy ones. What is left out is shown as not measured.

    Raises:
        TypeError: A value that JSON has not.
    """
    digest = facts["training"]["manifest"] if "training" in facts else ""
    bill = bill_of_materials(facts.get("files", ()), facts.get("model", {}), digest)
    for name, tree in (("dossier.json", plain(facts)), ("sbom.cdx.json", bill)):
        text = json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "dossier.html").write_text(dossier_page(facts), encoding="utf-8")


def dossier_page(facts: Facts) -> str:
    """One page: no script, nothing from a network, all text escaped."""
    parts = {
        "Files": files_table(facts),
        "What it is for": _model(facts),
        "Scores": _scores(facts),
        "Parity with the trained network": parity_tables(facts),
        "Quantized against fp32": agreement_tables(facts),
        "Largest disagreements": _overlays(facts),
        "Latency": latency_table(facts),
        "Training data": _training(facts),
        "What was optimised": _steps(facts),
        "Environment": _environment(facts),
    }
    numbered = list(enumerate(parts.items()))
    links = [tag("a", "Gates", href="#allowances")]
    links += [tag("a", title, href=f"#part-{n}") for n, (title, _) in numbered]
    lead = "What the model files are, what was measured of them, and on what."
    header = tag("header", tag("h1", "Dossier"), tag("p", lead, css="lead"), tag("nav", *links))
    sections = (
        section(f"part-{n}", title, *(content or (NOT_MEASURED,)))
        for n, (title, content) in numbered
    )
    doubts = facts.get("model", {}).get("doubts", {})  # what `predict` warns of
    first = [join([tag("strong", name), " is ", doubt, "."]) for name, doubt in doubts.items()]
    if facts.get("training", {}).get("changed"):
        first.append(join([CHANGED]))
    return page("Dossier", (header, look_section(first), gates_section(facts), *sections))


def _model(facts: Facts) -> list[Html]:
    given = facts.get("model")
    if given is None:
        return []
    from medpsp.deploy.segobject import TISSUE

    shown = {key: name for key, name in MODEL.items() if key in given or key == "intended_use"}
    scheme, code, meaning = TISSUE
    without = {"codes": f"{scheme} {code}, {meaning}, for each class"}
    rows = [
        (name, _words(given.get(key)) or without.get(key, "not stated"))
        for key, name in shown.items()
    ]
    if "modalities" in given:
        rows.insert(list(shown).index("modalities") + 1, ("windows", windows_of(given)))
    return [pairs(rows)]


def windows_of(model: Mapping[str, Any]) -> str:
    """What values a network is shown as black to white: of every series, or by modality.

    Args:
        model: Metadata of a file.
    """
    if views := model.get("windows"):
        return f"{', '.join(map(_window, views))}, a channel each"
    if model.get("header_window"):
        other = f"; without one {_window(model['window'])}" if model.get("window") else ""
        return f"of the header of each slice{other}"
    if window := model.get("window"):
        return f"{_window(window)} for all series"
    if (model.get("input") or {}).get("colours", 1) != 1:
        return "0 to 255 (colour)"
    return "; ".join(
        f"{name}: {_window(asdict(CT_WINDOW))}" if name == "CT"
        else f"{name}: 0 to 255" if name == "IMAGE8"
        else f"{name}: percentiles {PERCENTILES[0]:g} to {PERCENTILES[1]:g} of each series"
        for name in model["modalities"]
    )  # fmt: skip


def _window(of: Mapping[str, Any]) -> str:
    return f"{of['center']:g}/{of['width']:g} (centre/width)"


def _words(value: Any) -> str:
    """Nested JSON values in a line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _scores(facts: Facts) -> list[Html]:
    given = facts.get("evaluation")
    if given is None:
        command = tag("code", "medpsp evaluate")
        return [tag("p", "not measured: run ", command, ", then export again", css="quiet")]
    split = "test" if given["split"] == "test" else "validation"
    text = (
        given["patients"], f" held-out patients ({split}), ", given["slices"],
        " slices, network of step ", given["step"], ". Below each value its 95 % interval, a "
        "bootstrap over patients.",
    )  # fmt: skip
    known = in_order(facts, given["classes"])
    blind = all("dice_constant_mask" in of for of in known.values())
    names = {**METRICS, "dice_constant_mask": "constant mask"} if blind else METRICS
    rows = (
        (tag("strong", name), *(estimate(of[key]) for key in names)) for name, of in known.items()
    )
    head = ("class", *names.values())
    floor = (
        " The constant mask never looks at the image: a pooled Dice is worth what it is above that."
    )
    return [
        tag("p", *text, floor if blind else "", css="quiet"),
        table(head, rows, range(1, len(head))),
    ]


def _overlays(facts: Facts) -> list[Html]:
    given = facts.get("overlays", ())
    if not given:
        return []
    text = (
        "The slices of the validation patients where a variant differs most from fp32, of each "
        "series at most one, the largest first. The frame in the first picture is what the others "
        "show: the largest place that differs."
    )
    names = facts.get("model", {}).get("classes", ())[1:]
    classes = [tag("li", swatch(class_colour(k), name)) for k, name in enumerate(names, 1)]
    kinds = ((FP32, "fp32 alone"), (OTHER, "the variant alone"), (BOTH, "two different classes"))
    differ = [tag("li", swatch(colour, name)) for colour, name in kinds]
    return [
        tag("p", text, css="quiet"),
        tag("ul", tag("li", tag("em", "masks")), *classes, css="legend"),
        tag("ul", tag("li", tag("em", "difference")), *differ, css="legend"),
        *map(_overlay, given),
    ]


def _overlay(fact: OverlayFact) -> Html:
    title, wide = fact["title"], "margin:14px 0 0;max-width:100%"
    about = tag("figcaption", title)
    if not fact["png"]:
        return tag("figure", about, style=wide)
    names = ("slice", "fp32", title.partition(":")[0], "difference")
    grid = f"display:grid;grid-template-columns:repeat(4,1fr);gap:0 {GAP}px"
    return tag(
        "figure",
        about,
        tag("div", *(tag("em", name) for name in names), css="quiet", style=grid),
        picture(fact["png"], f"{title}: {', '.join(names)}", "row"),
        style=f"{wide};width:{4 * SIDE + 3 * GAP}px",
    )


def _training(facts: Facts) -> list[Html]:
    given = facts.get("training")
    if given is None:
        return []
    about = (
        ("digest of the manifest", tag("code", given["manifest"])),
        ("label classes", ", ".join(given["classes"])),
    )
    rows = [(name, of["patients"], of["slices"]) for name, of in given["splits"].items()]
    counts = table(("split", "patients", "slices"), rows, (1, 2), "narrow")
    return [pairs(about), counts, *([tag("p", CHANGED)] if given.get("changed") else [])]


def _steps(facts: Facts) -> list[Html]:
    given = facts.get("steps", ())
    return [tag("ul", *(tag("li", step) for step in given))] if given else []


def _environment(facts: Facts) -> list[Html]:
    given = facts.get("environment", {})
    return [pairs((name, tag("code", text)) for name, text in given.items())] if given else []
