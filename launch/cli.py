"""The command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import enum
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch import chaincli, ondevice, sweepcli
from launch.chaincli import ConfigArg, Overrides
from launch.clihelp import InOrder, Settable, begin
from launch.cluster import sleep_at_barriers
from launch.configcli import config_app, key_app
from launch.doctor.command import doctor
from launch.guards import refuse_beside_jobs, refuse_by_hand
from launch.new.command import new
from launch.tensorrt import tensorrt
from medpsp.errors import EXIT_AGAIN, ConfigError, MedpspError
from medpsp.words import many

app = typer.Typer(
    cls=InOrder,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a DICOM archive to an ONNX file that segments DICOM.",
)
app.callback()(begin)


class Step(enum.StrEnum):
    """Of `medpsp shards`."""

    plan = enum.auto()
    convert = enum.auto()
    publish = enum.auto()


@app.command(cls=Settable)
def shards(
    config: ConfigArg,
    overrides: Overrides = None,
    step: Annotated[
        Step | None, typer.Option(help="Only this one, for a job array; needs data.index.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="With --step convert: which of how many parts, for example 3/16.")
    ] = "1/1",
) -> None:
    """Turn the archive into Zarr shards."""
    from launch.byhand import run_by_hand
    from launch.jobs import convert_job, plan_job, publish_job, setup_logging
    from launch.ranks import log_job
    from launch.rundir import open_run

    setup_logging()
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    which, parts = map(int, numbers.groups()) if numbers else (1, 0)
    if which > parts or (part != "1/1" and step is not Step.convert):
        raise ConfigError(
            f"--part {part}: expected K/N with 1 <= K <= N, and only with --step convert"
        )

    refuse = partial(refuse_by_hand, "shards")
    converts = step is Step.convert
    resolved, run = open_run(
        config, tuple(overrides or ()), shared=converts, refuse=refuse, trains=False
    )
    log_job(run, f"shards.{which}of{parts}" if converts else "shards")
    if converts:
        convert_job(resolved, which, parts)
    elif step:  # for an array of one's own
        {Step.plan: plan_job, Step.publish: publish_job}[step](resolved)
    else:
        run_by_hand("shards", resolved)


@app.command(cls=Settable)
def check(
    config: ConfigArg,
    overrides: Overrides = None,
    repair: Annotated[bool, typer.Option("--repair", help="Convert damaged shards anew.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave the slices unread.")] = False,
) -> None:
    """Verify every byte of the shards."""
    from launch.byhand import run_by_hand
    from launch.jobs import check_job, setup_logging
    from launch.ranks import log_job
    from launch.rundir import open_run

    setup_logging()
    refuse = partial(refuse_by_hand, "check")
    resolved, run = open_run(config, tuple(overrides or ()), refuse=refuse, trains=False)
    log_job(run, "check")
    work = partial(check_job, resolved, repair=repair, quick=quick)
    if quick:  # less than the job of the chain
        work()
    else:
        run_by_hand("check", resolved, work)


def _job(name: str) -> Callable[[str, list[str] | None], None]:
    def command(config: ConfigArg, overrides: Overrides = None) -> None:
        from launch.byhand import run_by_hand
        from launch.home import trains
        from launch.jobs import setup_logging
        from launch.ranks import log_job
        from launch.rundir import open_run

        setup_logging()
        changes, refuse = tuple(overrides or ()), partial(refuse_by_hand, name)
        resolved, run = open_run(config, changes, refuse=refuse, trains=trains(name))
        log_job(run, name)
        run_by_hand(name, resolved)

    return command


for _name, _help in (
    ("train", "Train, or go on from the newest checkpoint."),
    ("evaluate", "Score the held-out patients."),
    ("export", "Write checked fp32 and int8 ONNX files."),
):
    app.command(_name, help=_help, cls=Settable)(_job(_name))
app.command("measure", hidden=True, cls=Settable)(_job("measure"))  # for the ranks of `scale`


@app.command(cls=Settable)
def report(config: ConfigArg, overrides: Overrides = None) -> None:
    """Write the report page of shards that exist anew."""
    from launch.jobs import setup_logging
    from launch.rundir import open_run
    from shards.report import write_report

    setup_logging()
    refuse = partial(refuse_by_hand, "report")
    resolved, _ = open_run(config, tuple(overrides or ()), refuse=refuse, trains=False)
    typer.echo(str(write_report(resolved.shards)))


@app.command()
def page(run: chaincli.RunArg) -> None:
    """Write all of a run on one page. What it saw, learnt, scored, cost, how to repeat it."""
    from launch.jobs import setup_logging
    from launch.runfacts import require_begun
    from launch.runpage import write_run_page

    setup_logging()
    require_begun(run)
    typer.echo(str(write_run_page(run)))


@app.command(cls=Settable)
def voc(
    config: ConfigArg,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    overrides: Overrides = None,
    bits: Annotated[int, typer.Option(help="8: windowed; 16: modality values.")] = 8,
) -> None:
    """Write the shards as a PASCAL VOC folder. PNG images and masks, split lists, a table."""
    from launch.jobs import setup_logging
    from launch.rundir import open_run

    setup_logging()
    resolved, folder = open_run(
        config, tuple(overrides or ()), refuse=refuse_beside_jobs, trains=False
    )
    from shards.voc import export_voc

    folder.log_to("voc")
    images, masks = export_voc(resolved, out, bits)
    typer.echo(f"{out}  {many(images, 'image')}, {many(masks, 'mask')}")


@app.command(cls=Settable)
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Make a phantom archive and take it the whole way."""
    from launch.demo import run_demo
    from launch.jobs import setup_logging

    setup_logging()
    typer.echo("\n".join(run_demo(out, tuple(overrides or ()))))


@app.command()
def predict(
    model: ondevice.ModelArg,
    source: Annotated[
        Path, typer.Argument(help="DICOM: a folder, a file, a zip. Or a NIfTI, or plain images.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the answers; empty or new.")],
    threads: ondevice.Threads = 0,
    formats: ondevice.Formats = "seg,nifti,png",
) -> None:
    """Segment DICOM with onnxruntime alone."""
    from launch.jobs import setup_logging
    from launch.ondevice import predict_source
    from launch.rundir import keep_private

    setup_logging()
    keep_private(source)
    predict_source(model, source, out, threads, formats)


@app.command(cls=Settable)
def backbones(
    config: Annotated[str, typer.Argument(help="As for `train`; none: the defaults.")] = "",
    overrides: Overrides = None,
    height: Annotated[int, typer.Option(min=0, max=4096, help="Rows; 0: train.size.")] = 0,
    width: Annotated[int, typer.Option(min=0, max=4096, help="Columns; 0: train.size.")] = 0,
    classes: Annotated[int, typer.Option(min=0, help="0: as many as data.classes.")] = 0,
) -> None:
    """Show what each backbone costs. With the head of a configuration, and what it is for."""
    from launch.backbones import setting, show_backbones

    rows, columns, count, model = setting(config, tuple(overrides or ()))
    show_backbones(height or rows, width or columns, classes or count, model)


_first = (new, doctor)
_chain = (chaincli.run, chaincli.status, chaincli.logs, chaincli.cancel, chaincli.resume)
_several = (sweepcli.sweep, sweepcli.compare, sweepcli.scale)
_device = (ondevice.watch, ondevice.receive, tensorrt, ondevice.sbom)
for _command in (*_first, *_chain, *_several, *_device):
    takes_settings = "overrides" in _command.__annotations__
    app.command(cls=Settable if takes_settings else None)(_command)


app.add_typer(key_app, name="key")
app.add_typer(config_app, name="config")


def main() -> None:
    """Entry point: one clear line and a code for every error a user can cause."""
    sleep_at_barriers()
    if sys.stderr is None:  # started with it closed
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")
    try:
        app()
        return
    except (MedpspError, OSError, ImportError, MemoryError, RuntimeError) as error:
        _fail(error)
        raise
    except SystemExit as end:
        code = end.code
        if code not in (129, 130, 143):  # SIGHUP, Ctrl-C, as typer leaves, and SIGTERM
            raise
    from launch.terminal import leave, show

    show("medpsp: interrupted; run the same command again to go on\n")
    leave(int(code))


def _fail(error: Exception) -> None:
    """End with the line of an error, where it has one."""
    from launch.diagnose import lost_peer
    from launch.jobs import end_of
    from launch.ranks import say_last

    if not (end := end_of(error)):
        return
    code, line = end
    say_last(line, echo=lost_peer(error), code=code)
    if code != EXIT_AGAIN:
        with suppress(OSError):  # where no file can be opened, none of ours is imported either
            from launch.traces import remove_traces

            remove_traces(line)
    sys.exit(code)


if __name__ == "__main__":
    main()
