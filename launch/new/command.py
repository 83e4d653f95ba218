"""The command that proposes a configuration; heavy things are imported when it runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from medpsp.errors import ConfigError


def new(
    archive: Annotated[Path, typer.Argument(help="Folder of DICOM files.")],
    labels: Annotated[
        Path | None,
        typer.Option(help="Folder of masks: DICOM SEG, RTSTRUCT or NIfTI; none: in the archive."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("new.yaml"),
    key: Annotated[
        Path | None, typer.Option(help="Of `medpsp key new`; with it the split is made to fit.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="`data.index` of an earlier run, in place of a scan.")
    ] = None,
    most: Annotated[
        int, typer.Option(min=1, help="Files to look at; of more a sample is taken.")
    ] = 50_000,
) -> None:
    """Propose a configuration for an archive. With the reason for each value."""
    from launch.jobs import setup_logging
    from launch.new.choices import Places
    from launch.new.evidence import gather
    from launch.new.pace import pace_of
    from launch.new.proposal import propose, require_place, stays, write_proposal
    from launch.rundir import keep_private
    from medpsp.identity import KEY_VARIABLE

    setup_logging()
    keep_private(archive, labels)
    if out.resolve().is_relative_to(archive.resolve()):
        raise ConfigError(f"--out {out}: lies inside the archive; take a file outside it")
    if not out.is_file():  # one that is there may be read only: it stays as it is
        require_place(out)
    if key is None and not os.environ.get(KEY_VARIABLE):
        key = out.with_suffix(".key")
    places = Places(archive=archive, file=out, key=key, index=index)
    seen = gather(archive, labels, places, most)
    found = propose(seen)
    if stays(out, found.text):
        kept = f"{out}  was there and says the same: it stays as it is, its train.steps too"
        said = (*found.said[:-1], kept)
    else:
        if seen.labels.kind:  # there is something to train
            found = propose(replace(seen, pace=pace_of(found.text, seen.machine)))
        write_proposal(out, found.text)
        said = found.said
    typer.echo("\n".join((*said, *found.then)))
