"""The best network of a run to checked ONNX files, and the dossier that proves it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.exportmeta import doubts, model_metadata, scores_in
from launch.exportplace import beside, take_the_place
from launch.feeds import GraphSlice, graph_input, graph_slices, one_tile_each
from launch.rundir import SAID, RunDir
from launch.trained import labelled_rows, load_trained, weights_digest
from medpsp.config import Config
from medpsp.deploy.folders import nothing_left
from medpsp.deploy.inputs import GraphInput
from medpsp.errors import ExportError
from medpsp.exportconfig import REASON
from medpsp.progress import Bar
from medpsp.words import many

if TYPE_CHECKING:
    from launch.exportfacts import Found
    from medpsp.deploy.gates import Gate, Variant
    from medpsp.deploy.session import Feeds
    from shards.index import SliceRow

log = logging.getLogger("medpsp")
EXAMPLES, PROBES = 8, 16
"""Slices that parity is tried on; tiles on which int8 layers are restored, saturation seen."""


def export_job(config: Config) -> None:
    """Best checkpoint to ONNX files, each checked, with their dossier.

    A file that does not pass its gates is not given out; those that do are, with fp32.

    Raises:
        ParityError: fp32 differs from the network: nothing is given out, what was there stays.
        ExportError: A file was refused, at the end: a gate of it did not pass and is not among
            ``export.allow``. Or, before anything: nothing to compare files on, or no place for
            them.
    """
    target, rows = RunDir(config.out), labelled_rows(config)
    if not validation(rows):
        raise ExportError(
            "export: no labelled slice of a validation patient to compare files on; raise "
            "data.split.val"
        )
    run = beside(target)  # nothing has its name before the gates
    with nothing_left(run.export):
        refused = _export(config, run, rows)
        gone = take_the_place(run, target)
    if refused:
        raise ExportError(refusal(config, refused, gone))
    log.info("dossier: %s", target.export_report.with_suffix(".html"))


def _export(config: Config, run: RunDir, rows: tuple[SliceRow, ...]) -> list[Gate]:
    """All files that pass and the dossier of all, into a folder of their own; what was refused."""
    model, step = load_trained(config)
    from launch.dossier import write_dossier
    from launch.exportfacts import Found, dossier_facts
    from medpsp.deploy.export import export_onnx
    from medpsp.deploy.gates import refused_by
    from medpsp.deploy.graph import DeployGraph
    from medpsp.deploy.verify import SHAPES, Example, check_parity, parity_says
    from shards.dataset import stage_rows

    given, train = graph_input(config, rows), stage_rows(rows, 1.0)
    metadata, found = model_metadata(config, rows, step, given), Found()
    metadata["weights"] = weights_digest(model)
    metadata["doubts"] = doubts(config, scores_in(run), metadata["weights"])
    log.info("export: fp32, opset %d, image %s", config.export.opset, given.dtype)
    graph = DeployGraph(model, given, config.export.confidence)
    export_onnx(graph, run.fp32, config.export.opset, {**metadata, "variant": "fp32"})
    shown = graph_slices(config, rows, spread(train, EXAMPLES), given)
    examples = [Example(one.image, one.window) for one in shown]
    limit = config.export.parity_tolerance
    with Bar("parity", len(SHAPES), "shapes") as bar:
        found.parity = check_parity(graph, run.fp32, given, examples, limit, bar.advance)
    log.info("export: %s", parity_says(found.parity, limit))
    _write_variants(config, run, rows, (given, metadata, found))
    _compare(config, run, rows, given, found)
    write_dossier(run.export, dossier_facts(config, run, metadata, rows, found))
    for gate in found.gates:
        if not gate.passed and (reason := config.export.allow.get(gate.name)):  # type: ignore[call-overload]
            log.warning("export: %s: %s; allowed: %s", gate.name, gate.says, reason)
    refused = refused_by(found.gates, config.export.allow)
    if found.gates and all(gate.passed for gate in found.gates):
        log.info("export: every gate was met, %d and parity", len(found.gates))
    for name in {gate.variant for gate in refused}:
        run.variant(name).unlink()
    return refused


def refusal(config: Config, refused: Sequence[Gate], gone: Sequence[str] = ()) -> str:
    """One line: what was written, what was refused and why, and the command that allows it.

    Args:
        config: Of the run.
        refused: Gates, at least one.
        gone: Files of an earlier export that are no longer there.
    """
    run, names = RunDir(config.out), {gate.variant for gate in refused}
    given = [run.fp32, *(run.variant(n) for n in config.export.variants if n not in names)]
    said = "; ".join(
        f"{run.variant(name).name} ("
        + "; ".join(f"{gate.name}: {gate.says}" for gate in refused if gate.variant == name)
        + ")"
        for name in config.export.variants
        if name in names
    )
    more = (
        f" (of the earlier export {', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone)"
        if gone
        else ""
    )
    weak = any(gate.name.endswith(("_dice", "_drop")) for gate in refused)
    options = (f"export.allow.{gate.name}='{REASON}'" for gate in refused)
    command = f"medpsp export {shlex.quote(str(run.config))} {' '.join(options)}"
    return (
        f"export: refused {said}; written to {run.export}: "
        f"{', '.join(path.name for path in given)} and their dossier{more}; "
        f"{'train longer, or ' if weak else ''}let it pass with a reason, which the dossier "
        f"shows: {command}"
    )


def _write_variants(
    config: Config,
    run: RunDir,
    rows: tuple[SliceRow, ...],
    made: tuple[GraphInput, dict[str, Any], Found],
) -> None:
    from medpsp.deploy.gates import least_dice, saturation_gate
    from medpsp.deploy.half import half
    from medpsp.deploy.quantize import Quantizer
    from medpsp.deploy.restore import Bound, restore, saturation
    from shards.dataset import stage_rows

    given, metadata, found = made
    wanted = config.export
    train = spread(stage_rows(rows, 1.0), wanted.calibration_slices)
    probes = spread(validation(rows), PROBES)

    def tiles(chosen: list[SliceRow]) -> Iterator[Feeds]:
        slices = graph_slices(config, rows, chosen, given)
        return (feeds(one) for one in one_tile_each(slices, given, config))

    for name in wanted.variants:
        said, path = {**metadata, "variant": SAID[name]}, run.variant(name)
        log.info("export: %s", SAID[name])
        if name == "half":
            half(run.fp32, path, said)
            continue
        least = least_dice(name, config.model.backbone)
        quantizer = Quantizer(run.fp32, lambda: tiles(train), name, wanted.percentile)
        found.restored[name] = restore(
            quantizer,
            path,
            said,
            lambda: tiles(probes),
            Bound(
                least=least,
                most=wanted.restore_layers,
                confirm=partial(_agrees, config, run, rows, (given, found), name),
            ),
        )
        if not found.restored[name].after.mean >= least:
            found.scores.pop(name, None)  # of an earlier file: this one was not asked about
        if layers := found.restored[name].nodes:
            log.info("export: %s back to fp32: %s", many(len(layers), "layer"), ", ".join(layers))
    if "cpu" in wanted.variants:
        found.saturation = saturation(run.fp32, run.int8, lambda: tiles(probes))
        found.gates.append(saturation_gate(*found.saturation))


def _agrees(
    config: Config,
    run: RunDir,
    rows: tuple[SliceRow, ...],
    known: tuple[GraphInput, Found],
    name: Variant,
) -> bool:
    """Score a file on validation slices, and judge it as it is judged in the end."""
    from medpsp.deploy.gates import dice_gates, least_dice

    _score(config, run, rows, known, name)
    scores, least = known[1].scores, least_dice(name, config.model.backbone)
    gates = dice_gates(name, least, scores[name], scores["fp32"], config.data.classes)
    return all(gate.passed for gate in gates)


def _score(
    config: Config,
    run: RunDir,
    rows: tuple[SliceRow, ...],
    known: tuple[GraphInput, Found],
    *names: Variant,
) -> None:
    """Score files, and that of fp32, on validation slices."""
    from medpsp.deploy.gates import scores
    from medpsp.deploy.session import open_session

    given, found = known
    chosen = spread(validation(rows), config.export.validation_slices)
    files = {"fp32": run.fp32}
    files |= {name: run.variant(name) for name in names}
    # trt: what TensorRT computes is nearer to float emulation than to the kernels of this CPU
    sessions = {n: open_session(p, 0, optimise=n != "trt") for n, p in files.items()}
    slices, cases = graph_slices(config, rows, chosen, given), [row.series for row in chosen]
    classes = len(config.data.classes)
    with Bar("compare", len(chosen), "slices") as bar:
        counted = _counted(slices, bar)
        found.scores |= scores(sessions, counted, given, classes, config.tiling, cases)
    found.chosen = chosen


def _counted(slices: Iterable[GraphSlice], bar: Bar) -> Iterator[GraphSlice]:
    for one in slices:
        yield one
        bar.advance()


def feeds(one: GraphSlice) -> Feeds:
    """Of one slice."""
    from medpsp.deploy.session import feeds_of

    return feeds_of(one.image, one.window)


def _compare(
    config: Config, run: RunDir, rows: tuple[SliceRow, ...], given: GraphInput, found: Found
) -> None:
    """All files on validation slices, and their latency on one tile."""
    from medpsp.deploy.gates import dice_gates, latency, latency_gate, least_dice
    from medpsp.deploy.others import Others

    wanted = config.export
    files = {"fp32": run.fp32}
    files |= {name: run.variant(name) for name in wanted.variants}
    if left := [name for name in wanted.variants if name not in found.scores]:
        _score(config, run, rows, (given, found), *left)
    for name in wanted.variants:
        least, fp32 = least_dice(name, config.model.backbone), found.scores["fp32"]
        found.gates += dice_gates(name, least, found.scores[name], fp32, config.data.classes)
        log.info(
            "export: %s masks against fp32 masks, Dice %.4f", name, found.scores[name].agreement
        )
    first = validation(rows)[:1]
    one = next(one_tile_each(graph_slices(config, rows, first, given), given, config))
    found.feeds = feeds(one)
    quick, others = {name: path for name, path in files.items() if name != "trt"}, Others()
    for threads in (1, 2):
        found.times[threads] = latency(quick, found.feeds, threads)
    found.others = others.cores()
    if "cpu" in wanted.variants:
        found.gates.append(latency_gate(list(found.times.values())))


def validation(rows: Sequence[SliceRow]) -> list[SliceRow]:
    """Rows that files are compared on: of validation patients, with foreground if any has."""
    val = [row for row in rows if row.split == "val"]
    return [row for row in val if sum(row.histogram[1:-1])] or val


def spread(rows: Sequence[SliceRow], count: int) -> list[SliceRow]:
    """At most ``count`` rows, evenly spaced over the list."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]
