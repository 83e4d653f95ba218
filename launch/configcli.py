"""Commands of keys and of configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.chaincli import ConfigArg, Overrides
from launch.clihelp import Settable

key_app = typer.Typer(no_args_is_help=True, help="The key of the pseudonyms.")


@key_app.command("new")
def key_new(path: Annotated[Path, typer.Argument(help="File to write, mode 0600.")]) -> None:
    """Make a project key; whoever has it can find a patient's pseudonym, so keep it safe."""
    from medpsp.identity import create_key

    create_key(path)
    typer.echo(f"{path}  (set data.key_file to it; a lost key means new pseudonyms and splits)")


config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from medpsp.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("list")
def config_list() -> None:
    """Names of the shipped configurations."""
    from launch.rundir import shipped_configs

    typer.echo("\n".join(shipped_configs()))


@config_app.command("show", cls=Settable)
def config_show(config: ConfigArg, overrides: Overrides = None) -> None:
    """Print the resolved configuration."""
    from launch.rundir import find_config
    from medpsp.configio import dump_yaml, load_config

    typer.echo(dump_yaml(load_config(find_config(config), tuple(overrides or ()))))
