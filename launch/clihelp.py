"""How the command line speaks: the order of the help, and settings that are given as options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from medpsp import __version__
from medpsp.errors import ConfigError

ORDER = (
    *("doctor", "key", "new", "config", "shards", "report", "check", "train", "evaluate", "export"),
    *("run", "page", "demo", "predict", "watch", "receive", "tensorrt", "status", "logs"),
    *("cancel", "resume", "sweep", "compare", "scale", "backbones", "voc", "sbom", "measure"),
)
"""Commands as they are used, one after another."""


def begin(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """What `medpsp` does without a command: show the help, or its version."""
    if version:
        typer.echo(f"medpsp {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


class InOrder(TyperGroup):
    """Lists its commands in the order of their use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names; a command that `ORDER` lacks is an error."""
        return sorted(self.commands, key=ORDER.index)


class Settable(TyperCommand):
    """A command that takes settings: says how they are written to who writes them as options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left.

        Raises:
            ConfigError: An option that there is none of.
        """
        options = {o for p in self.params for o in (*p.opts, *p.secondary_opts)}
        options.update(ctx.help_option_names)
        words = args[: args.index("--")] if "--" in args else args
        for place, word in enumerate(words):
            if word.startswith("--") and word.partition("=")[0] not in options:
                raise ConfigError(_as_setting(word, words[place + 1 :], sorted(options)))
        return super().parse_args(ctx, args)


def _as_setting(word: str, rest: Sequence[str], options: Sequence[str]) -> str:
    """What to write in place of an option that is none."""
    import difflib

    from medpsp.configio import keys_like, keys_named

    name, equals, value = word.partition("=")
    if not equals:
        value = next((text for text in rest[:1] if not text.startswith("-")), "VALUE")
    plain = name.lstrip("-").replace("-", "_")
    keys = keys_like(plain)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    if near and not keys_named(plain):
        return f"{name}: no such option; did you mean '{near[0]}'?"
    example = f"{keys[0]}={value}" if keys else "train.batch_size=8"
    return f"{name}: no such option; settings are written as {example}"
