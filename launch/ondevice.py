"""Commands of the device, and what they print. Nothing heavy is imported until one runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from medpsp.errors import ConfigError
from medpsp.words import many

if TYPE_CHECKING:
    from medpsp.deploy.answers import Format, Prediction
    from medpsp.deploy.predict import Predictor
    from medpsp.types import ScanRow

ModelArg = Annotated[Path, typer.Argument(help="ONNX file of `medpsp export`.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads, one a core at most; 0 for all.")]
Formats = Annotated[
    str, typer.Option("--format", help="Some of seg, nifti, png, gif, mesh; with commas.")
]


def parse_formats(text: str) -> tuple[Format, ...]:
    """Names with commas between them.

    Raises:
        ConfigError: One is unknown, or there is none.
    """
    from medpsp.deploy.answers import FORMATS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or set(names) - set(FORMATS):
        raise ConfigError(f"--format {text}: expected some of {', '.join(FORMATS)}")
    return cast("tuple[Format, ...]", names)


def predict_source(model: Path, source: Path, out: Path, threads: int, formats: str) -> None:
    """Segment, and print what was written."""
    from medpsp.deploy.predict import Predictor
    from medpsp.progress import Bar

    predictor = Predictor(model, threads, parse_formats(formats))
    with Bar("predict", 0, "series") as bar:
        found, rows = predictor.source(source, out, lambda name: bar.advance(note=name))
    show(predictor, found, rows)


def show(predictor: Predictor, found: Sequence[Prediction], rows: Sequence[ScanRow]) -> None:
    """A line a series and the files of each, the time a slice, and what was not segmented."""
    import numpy as np

    from medpsp.dicom.codes import told_rows, told_series

    for item in found:
        parts = []
        for number, name in enumerate(predictor.model.classes[1:], 1):
            amount = many(item.pixels[number], "pixel")
            if item.volumes:
                amount = f"{item.volumes[number]:.1f} ml"
            parts.append(f"{name} {amount}")
        files = _told_files(item)
        where = files[0] if files else f"{item.name}: no surface to write"
        kind = f"{item.modality}, " if item.modality else ""
        typer.echo(f"{where}  {kind}{many(item.slices, 'slice')}, {', '.join(parts)}")
        for line in files[1:]:
            typer.echo(f"  {line}")
    if times := predictor.model.times:
        ms = np.percentile(np.array(times) * 1e3, [50, 95])
        typer.echo(f"network: {ms[0]:.0f} ms a slice (p50), {ms[1]:.0f} ms (p95)")
    for line in told_series(rows):  # asked for, and missing beside what is there
        typer.echo(line)
    if rows:
        typer.echo(told_rows(rows))


def _told_files(item: Prediction) -> list[str]:
    """Files of a series; of single slices the folder, and how many they are."""
    whole = [str(path) for path in item.files if path.name.startswith(item.name)]
    slices = [path.parent for path in item.files if not path.name.startswith(item.name)]
    return [*whole, *(f"{folder}  {many(item.slices, 'slice')}" for folder in slices[:1])]


def watch(
    model: ModelArg,
    inbox: Annotated[
        Path,
        typer.Argument(help="Folder whose entries are segmented: folders, files, zip, NIfTI."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for job-... folders and .failed files.")],
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds without a change until an entry is whole.")
    ] = 5.0,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Do what is there, then end; 1 if one failed.")
    ] = False,
    threads: Threads = 0,
    formats: Formats = "seg,nifti,png",
) -> None:
    """Segment whatever comes into a folder. Each entry once; it stays as it is."""
    from launch.jobs import setup_logging
    from launch.rundir import keep_private
    from medpsp.deploy.jobs import owned
    from medpsp.deploy.predict import Predictor
    from medpsp.deploy.watch import Watch
    from medpsp.train.stop import StopRequest

    setup_logging()
    keep_private(inbox)
    with StopRequest().listening() as asked:
        watched = Watch(Predictor(model, threads, parse_formats(formats)), inbox, out, settle)
        with owned(out):
            failed = watched.run(lambda: asked.code != 0, every, once)
    if once and failed:
        raise typer.Exit(1)


def receive(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Folder for assoc-... folders.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 11112,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    aet: Annotated[str, typer.Option(help="Our application entity title.")] = "MEDPSP",
    answer: Annotated[
        str, typer.Option(help="Where SEG files are sent: AET@host:port; none: nowhere.")
    ] = "",
    threads: Threads = 0,
    formats: Formats = "seg",
) -> None:
    """Segment what is sent by C-STORE. Each association for itself; SEG may be sent back."""
    from launch.jobs import setup_logging
    from medpsp.deploy.dicomnet import Peer
    from medpsp.deploy.predict import Predictor
    from medpsp.deploy.receive import Listen, Receiver
    from medpsp.train.stop import StopRequest

    setup_logging()
    wanted, peer = parse_formats(formats), Peer.parse(answer) if answer else None
    if peer and "seg" not in wanted:
        raise ConfigError(f"--answer needs seg among --format, not {formats}")
    listen = Listen(aet=aet, host=host, port=port, answer=peer)
    with StopRequest().listening() as asked:
        with Receiver(Predictor(model, threads, wanted), out, listen) as receiver:
            typer.echo("listening on {}:{}".format(*receiver.address))
            receiver.serve(lambda: asked.code != 0)


def sbom(
    out: Annotated[
        Path | None, typer.Option(help="File to write; none: it is printed.", show_default=False)
    ] = None,
) -> None:
    """Write what is installed as a bill of materials (CycloneDX 1.6)."""
    import json

    from medpsp.deploy.sbom import bill_of_install

    text = json.dumps(bill_of_install(), indent=1, ensure_ascii=False)
    if out is None:
        typer.echo(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    typer.echo(f"{out}  {many(len(json.loads(text)['components']), 'component')}")
