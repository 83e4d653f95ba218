"""A proposal as a YAML file with its reasons, and as lines for people."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.new.choices import Choice, Evidence, Open
from launch.new.proposedata import data_lines
from launch.new.proposetrain import model_lines, train_lines
from medpsp import __version__
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.errors import ConfigError
from medpsp.words import many

_WIDTH = 98
_REQUIRED = ("out", "data.archive", "data.classes")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What is proposed.

    Attributes:
        text: Of the file.
        said: Lines for people, of what was found and how many values were written.
        then: What to run next.
    """

    text: str
    said: tuple[str, ...]
    then: tuple[str, ...]


def propose(found: Evidence) -> Proposal:
    """Decide, and write it up."""
    lines = [
        Choice("out", f"runs/{found.places.file.stem}", "Everything of the run goes below it."),
        *data_lines(found),
        *model_lines(found),
        *train_lines(found),
    ]
    choices = [line for line in lines if isinstance(line, Choice)]
    opened = [line for line in lines if isinstance(line, Open)]
    usual = _defaults()
    written = [one for one in choices if _is_written(one, usual)]
    text = "".join(f"{line}\n" for line in _document(choices, opened, usual))
    said = [
        next(one.why for one in choices if one.key == "data.archive").removeprefix("As given. ")
    ]
    said += [one.why for one in choices if one.key == "data.label_format"]
    if found.pace:
        said += [f"train.steps {c.value}: {c.why}" for c in choices if c.key == "train.steps"]
    said += [f"OPEN: {one.text}" for one in opened]
    said.append(f"{found.places.file}  {many(len(written), 'value')}, each with its reason")
    return Proposal(text=text, said=tuple(said), then=_next(found))


def require_place(path: Path) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what it would say.

    Raises:
        ConfigError: It is a folder, or it cannot be made there.
    """
    if path.is_dir():
        raise ConfigError(f"--out {path}: a folder, expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror})") from None


def stays(path: Path, text: str) -> bool:
    """Whether a file is there that says the same, but for `train.steps`.

    Raises:
        ConfigError: One of other content is there.
    """
    if not path.exists():
        return False
    there = path.read_text(encoding="utf-8", errors="replace")
    if _but_steps(there) != _but_steps(text):
        raise ConfigError(
            f"--out {path}: exists and says something else; take another name, or delete it"
        )
    return True


def write_proposal(path: Path, text: str) -> None:
    """Write the file, once it has been loaded as any other; not one that `stays`.

    Raises:
        ConfigError: As `require_place` and `stays`.
    """
    require_place(path)
    if stays(path, text):
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        load_config(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _but_steps(text: str) -> str:
    """Without `train.steps` and its reason: a step never takes the same time twice."""
    return re.sub(
        r"(  # .*\n)*  (steps: |# steps \(default\): ).*\n(  # (?!\S+ \().*\n)*", "", text
    )


def _defaults() -> dict[str, Any]:
    return Config.model_validate({"data": {"archive": "", "classes": ["a", "b"]}}).model_dump(
        mode="json"
    )


def _is_written(choice: Choice, usual: dict[str, Any]) -> bool:
    node: Any = usual
    for part in choice.key.split("."):
        node = node[part]
    return choice.key in _REQUIRED or node != choice.value


def _document(
    choices: Sequence[Choice], opened: Sequence[Open], usual: dict[str, Any]
) -> Iterator[str]:
    """Lines of the file, in the order of the configuration."""
    yield from _comment(
        f"Proposed by `medpsp new` of medpsp {__version__} from headers, labels and this machine. "
        "Each value that is not the default has its reason above it; `medpsp config schema` "
        "explains all others.",
        "",
    )
    by_key = {one.key: one for one in choices}
    yield from _value(by_key["out"], "")
    for section in ("data", "model", "train"):
        keys = (f"{section}.{name}" for name in usual[section])
        some = [by_key[key] for key in keys if key in by_key]
        written = any(_is_written(one, usual) for one in some)
        yield f"{section}:" if written else f"# {section}: nothing but defaults"
        for note in (one for one in opened if one.section == section):
            yield from _comment(f"OPEN: {note.text}", "  ")
        for one in some:
            if _is_written(one, usual):
                yield from _value(one, "  ")
            else:
                yield from _comment(f"{one.key.rpartition('.')[2]} (default): {one.why}", "  ")


def _value(choice: Choice, indent: str) -> Iterator[str]:
    yield from _comment(choice.why, indent)
    name = choice.key.rpartition(".")[2]
    flow = yaml.safe_dump(
        [choice.value], default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    ).strip()[1:-1]
    if len(indent) + len(name) + len(flow) < _WIDTH:
        yield f"{indent}{name}: {flow}"
        return
    block = yaml.safe_dump({name: choice.value}, width=10**6, allow_unicode=True, sort_keys=False)
    yield from (f"{indent}{line}" for line in block.splitlines())


def _comment(text: str, indent: str) -> Iterator[str]:
    # U+0085 and U+2028 end a line for YAML, but not for textwrap: what is behind would be keys
    for line in textwrap.wrap(" ".join(text.split()), _WIDTH - len(indent), break_long_words=False):
        yield f"{indent}# {line}"


def _next(found: Evidence) -> tuple[str, str]:
    """Two commands."""
    places = found.places
    file = shlex.quote(str(places.file))
    if places.key and not places.key.exists():
        first = f"medpsp key new {shlex.quote(str(places.key))}"
    else:
        first = f"medpsp config show {file}"
    return first, f"medpsp {'run' if found.labels.kind else 'shards'} {file}"
