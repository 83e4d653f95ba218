"""The folder that a Jetson needs, from one exported file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from medpsp.errors import ConfigError


def tensorrt(
    model: Annotated[Path, typer.Argument(help="fp32, fp16 or trt file of `medpsp export`.")],
    out: Annotated[Path, typer.Argument(help="Folder for what goes to the device.")],
    least: Annotated[
        str, typer.Option(help="Fewest rows and columns, as 128x128; none: half a tile.")
    ] = "",
    most: Annotated[str, typer.Option(help="Most rows and columns; none: twice a tile.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Most images at once.")] = 4,
    dla: Annotated[
        int, typer.Option(min=-1, help="Core of the DLA: one tile at once; -1 for the GPU.")
    ] = -1,
) -> None:
    """Write what builds and checks a TensorRT engine on a Jetson."""
    from launch.jobs import setup_logging
    from medpsp.deploy.modelfile import ModelFile
    from medpsp.deploy.tensorrt import profile_of, write_kit

    setup_logging()
    smallest, largest = size("--least", least), size("--most", most)
    file = ModelFile(model, threads=1)
    core = None if dla < 0 else dla
    profile = profile_of(file.tiling.size, smallest, largest, batch, core)
    found = write_kit(file, out, profile)
    typer.echo(
        f"{out}: {sum(found.counts.values())} nodes of {len(found.counts)} operators, all listed "
        "for TensorRT 10.15; not run on TensorRT, see README.txt there"
    )
    if found.too_new:
        typer.echo(f"not for TensorRT 8.5 (JetPack 5): {', '.join(found.too_new)}")


def size(option: str, text: str) -> tuple[int, int] | None:
    """Rows and columns of ``128x128``; None of an empty text.

    Raises:
        ConfigError: Neither.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if text and not found:
        raise ConfigError(f"{option} {text}: expected rows x columns, for example 128x128")
    return (int(found[1]), int(found[2])) if found else None
