"""The page ``docs/configuration.md``, made from the types: a table a section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from launch.profile import Profile
from medpsp.config import Config
from medpsp.stages import FINAL_LR_RATIO
from medpsp.trainconfig import PRESETS, TrainConfig

HEAD = """# Configuration

One YAML file says everything that decides a run. `medpsp config list` names the shipped ones, and
`medpsp config show NAME` prints one with all its defaults. On the command line a value is changed
by its dotted name, `train.batch_size=8`; items of a list have numbers, `train.stages.0.lr=3e-4`;
lists and mappings are YAML, in quotes that the shell takes away:
`'data.classes=[background, liver]'`. An unknown key, a wrong type or a value out of range ends the
command with code 2 and one line, before anything is written. What a run was made with lies in its
folder, as `config.yaml`.

```sh
medpsp config show resnet18 data.archive=/archive/ct > whole.yaml
medpsp config schema > schema.json    # JSON Schema, for editors
```

These tables are made from the types in the code.
"""
PRESET_HEAD = """## Presets

What `train.preset` makes of `train.steps` (here {steps}) where no stages are given. `progressive`
needs no pretrained weights; `article` is a common recipe taken literally, for pretrained ones;
`onecycle` is the control.

| preset | stage | steps | lr | to | shape | patients | augment | trains |
|---|---|---|---|---|---|---|---|---|
"""
PROFILE_HEAD = """## Site profile

What `--cluster FILE` reads; see [On your cluster](cluster.md).
"""
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above"}
BOUNDS |= {"maximum": "to", "exclusiveMaximum": "below"}
_Schema = dict[str, Any]


def config_markdown() -> str:
    """The whole page."""
    whole, profile = Config.model_json_schema(), Profile.model_json_schema()
    presets = PRESET_HEAD.format(steps=TrainConfig().steps) + _presets()
    parts = [HEAD, "## The top\n", _table(whole, ""), *_sections(whole, whole, "", 2), presets]
    parts += [PROFILE_HEAD, _table(profile, ""), *_sections(profile, profile, "", 3)]
    return "\n".join(parts)


def _sections(node: _Schema, whole: _Schema, above: str, level: int) -> Iterator[str]:
    """Heading, sentence and table of every section below one, each before its own sections."""
    for kind, place in _places(node, above).items():
        inner = whole["$defs"][kind]
        yield f"{'#' * level} {place}\n\n{_one_line(inner['description'])}\n"
        yield _table(inner, f"{place}.")
        yield from _sections(inner, whole, f"{place}.", 3)


def _places(node: _Schema, above: str) -> dict[str, str]:
    """Kind of every section right below one to its heading; of two alike the first counts."""
    marks = {"array": "[]", "object": "{}"}  # a section is each item, or each value
    found: dict[str, str] = {}
    for name, field in node["properties"].items():
        if kind := _kind(field):
            found.setdefault(kind, f"{above}{name}{marks.get(field.get('type', ''), '')}")
    return found


def _kind(field: _Schema) -> str:
    """Of the section that a field, its items or its values are; empty if none."""
    places = [field, field.get("items"), field.get("additionalProperties"), *field.get("anyOf", ())]
    refs = [place["$ref"] for place in places if isinstance(place, dict) and "$ref" in place]
    return str(refs[0]).rsplit("/", 1)[-1] if refs else ""


def _table(node: _Schema, above: str) -> str:
    places = _places(node, above)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in node["properties"].items():
        given = "required" if name in node.get("required", ()) else _default(field)
        meaning = _one_line(field.get("description", ""))
        if kind := _kind(field):
            meaning = f"{meaning} See [{places[kind]}](#{_anchor(places[kind])}).".strip()
        cells = [cell.replace("|", "\\|") for cell in (_type(field), given, meaning)]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _anchor(heading: str) -> str:
    """As the toc extension of Python-Markdown makes it."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "_-")


def _default(field: _Schema) -> str:
    value = field.get("default")
    if "$ref" in field:
        return ""
    if value in ({}, [], ""):
        return "empty"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return f"`{text.splitlines()[0]}`"


def _type(field: _Schema) -> str:
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "$ref" in field:
        return "section"
    if "enum" in field or "const" in field:
        *names, last = (f"`{value}`" for value in field.get("enum", [field.get("const")]))
        return f"{', '.join(names)} or {last}" if names else last
    return _plain_type(field)


def _plain_type(field: _Schema) -> str:
    kind: str = field["type"]
    if items := field.get("prefixItems"):
        return f"{len(items)} of: {_type(items[0])}"
    if kind == "array":
        return f"list of: {_type(field['items'])}"
    if kind == "object":
        values = field["additionalProperties"]
        return "mapping" if values is True else f"mapping to: {_type(values)}"
    if kind == "string":
        return "path" if field.get("format") == "path" else "text"
    words = {"integer": "whole number", "boolean": "true or false"}
    bounds = [f" {word} {_number(field[key])}" for key, word in BOUNDS.items() if key in field]
    return words.get(kind, kind) + "".join(bounds)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _presets() -> str:
    rows = []
    for name, make in PRESETS.items():
        stages = make(TrainConfig().steps)
        for stage, after in zip(stages, (*stages[1:], None), strict=True):
            usual = after.lr if after else stage.lr * FINAL_LR_RATIO
            end = stage.lr if stage.shape == "constant" else stage.lr_end or usual
            cells = (name, stage.name, stage.steps, f"{stage.lr:g}", f"{end:g}", stage.shape)
            more = (f"{stage.fraction:.0%}", stage.augment, stage.trains)
            rows.append("| " + " | ".join(map(str, (*cells, *more))) + " |")
    return "\n".join(rows) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())
