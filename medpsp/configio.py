"""YAML and dotted overrides to a `Config`, and back.

YAML files give values, overrides (``train.batch_size=16``) change them, `load_config` returns a
frozen tree or raises `ConfigError` with the key, the value found and what is legal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medpsp.config import Config, TrainConfig
from medpsp.dataconfig import Node
from medpsp.errors import ConfigError
from medpsp.modelconfig import usual_of_head

_DECIDE = ("train.preset=", "train.steps=", "model.head=")
"""Overrides that come first: what follows from them is made anew, and others may change it then."""


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file and apply overrides of the form ``a.b=c``.

    Raises:
        ConfigError: File missing or not YAML, unknown key, value out of range.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path}: cannot be read ({type(error).__name__}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 looks like a date
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        place = f" (line {line})" if line else ""
        raise ConfigError(f"config {path}: not YAML{place}; mend the file") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: expected a mapping at the top, got {_kind(tree)}")
    for text in sorted(overrides, key=lambda text: not text.startswith(_DECIDE)):
        _override(tree, text)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"config {path}: {_explain(error)}") from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{text}': expected key=value, for example train.batch_size=8")
    _forget_what_follows(tree, key, value)
    node: Any = tree
    default: Any = _defaults(Config)  # so that a list left to its default has items
    default["train"]["stages"] = _stages(tree)
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        where = ".".join(parts[: depth + 1])
        default = default.get(part) if isinstance(default, dict) else None
        if isinstance(node, list):
            node = node[_list_index(node, part, where)]
        else:
            if node.get(part) is None:  # absent, or an empty section
                node[part] = default if isinstance(default, list) else {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override '{text}': '{where}' holds a value, not a section")
    parsed = _value(text, value)
    last = parts[-1]
    node[_list_index(node, last, key) if isinstance(node, list) else last] = parsed


def _forget_what_follows(tree: dict[str, Any], key: str, value: str) -> None:
    """Take out of a resolved file what an override decides anew, but nothing written by hand.

    Raises:
        ConfigError: Stages of one's own, which a preset or its steps would put aside.
    """
    section = tree.get(key.partition(".")[0])
    if not isinstance(section, dict):
        return
    if key in ("train.preset", "train.steps") and section.get("stages"):
        if _as_stages(section["stages"]) != _stages(tree):
            raise ConfigError(
                f"override '{key}={value}': the file has train.stages of its own; change those, or "
                "take them out of the file"
            )
        del section["stages"]
    if key == "model.head":
        usual = usual_of_head(section)
        if usual != usual_of_head({"head": value.strip()}):
            for name in [name for name in usual if section.get(name) == usual[name]]:
                del section[name]


def _as_stages(found: object) -> object:
    """Stages of a file with all their keys; as they are where they are not legal."""
    try:
        return [s.model_dump() for s in TrainConfig.model_validate({"stages": found}).stages]
    except ValidationError:
        return found


def _value(text: str, value: str) -> Any:
    """The YAML value of an override; a pattern such as ``{PatientID}.nii`` stays as it is."""
    try:
        parsed = yaml.safe_load(value)
        if isinstance(parsed, dict) and parsed and not any(v is not None for v in parsed.values()):
            return value
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45
        if value.startswith("{") and "}" in value[1:-1] and isinstance(error, yaml.YAMLError):
            return value
        raise ConfigError(f"override '{text}': '{value}' is not a YAML value") from None
    return parsed


def _defaults(node: type[Node]) -> dict[str, Any]:
    """Default values below a section as plain lists and mappings, required sections included."""
    tree: dict[str, Any] = {}
    for name, field in node.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Node):
            tree[name] = _defaults(kind)
        elif isinstance(field.default, tuple):
            tree[name] = [v.model_dump() if isinstance(v, Node) else v for v in field.default]
    return tree


def _stages(tree: dict[str, Any]) -> list[Any]:
    """Those of the preset that the tree names; of the default one where it names none there is."""
    train = tree.get("train")
    named = train if isinstance(train, dict) else {}
    chosen = {k: named[k] for k in ("preset", "steps") if k in named}
    try:
        stages = TrainConfig.model_validate(chosen).stages
    except ValidationError:
        stages = TrainConfig().stages
    return [stage.model_dump() for stage in stages]


def _list_index(node: list[Any], part: str, where: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"override '{where}': expected an index below {len(node)}, got '{part}'")


def _explain(error: ValidationError) -> str:
    """One line for the first fault, with the near miss of an unknown key."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    count = len(faults)
    where = ".".join(str(part) for part in fault["loc"]) or "config"
    if fault["type"] == "extra_forbidden":
        legal = _keys_at(fault["loc"][:-1])
        last = str(fault["loc"][-1])
        near = difflib.get_close_matches(last, legal, n=1)
        there = [".".join(str(part) for part in (*fault["loc"][:-1], *near))] if near else []
        meant = there or keys_named(last)[:1]
        hint = f"did you mean '{meant[0]}'?" if meant else f"legal: {', '.join(legal)}"
        text = f"{where}: unknown key; {hint}"
    elif fault["type"] == "missing":
        text = f"{where}: required, but not given"
    else:
        got = fault["input"]
        shown = repr(got) if isinstance(got, str | int | float | bool | None) else _kind(got)
        text = f"{where}: {fault['msg'].removeprefix('Value error, ')}"
        text += "" if fault["type"] == "value_error" else f", got {shown}"
        text += "; a list is written in brackets" if fault["type"] == "tuple_type" else ""
    return text + (f" (and {count - 1} more)" if count > 1 else "")


def keys_named(name: str) -> list[str]:
    """Whole keys that are a name or end in it."""
    return [key for key in _keys_below(Config) if f".{key}".endswith(f".{name}")]


def keys_like(name: str) -> list[str]:
    """Whole keys that are a name or end in it, else in what is nearest to it."""
    if same := keys_named(name):
        return same
    keys = list(_keys_below(Config))
    ends = [key.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(name, [*keys, *ends], n=1)
    return keys_named(near[0]) if near else []


def _keys_below(node: type[Node]) -> Iterator[str]:
    for name, field in node.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Node):
            yield from (f"{name}.{key}" for key in _keys_below(kind))
        else:
            yield name


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names legal at a place of the tree, read off the JSON Schema."""
    schema = Config.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc:
        node = node.get("items", {}) if isinstance(part, int) else node["properties"][part]
        options = [node, *node.get("anyOf", [])]
        ref = next((o["$ref"] for o in options if "$ref" in o), None)
        if ref:
            node = schema["$defs"][ref.rsplit("/", 1)[-1]]
    return sorted(node.get("properties", {}))


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def without_paths(config: Config) -> str:
    """As `dump_yaml`, without places of the data: for what travels further than a run folder."""
    return yaml.safe_dump(tree_without_paths(config), sort_keys=False)


def tree_without_paths(config: Config) -> dict[str, Any]:
    """The same as mappings, lists and values."""
    tree = config.model_dump(mode="json", exclude={"data": {"ray_address"}})
    return _no_paths(config, tree)


def _no_paths(node: Node, tree: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in tree.items():
        found = getattr(node, name)
        if not isinstance(found, Path):
            kept[name] = _no_paths(found, value) if isinstance(found, Node) else value
    return kept


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML; `load_config` reads it back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
