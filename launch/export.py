"""The best network of a run to checked ONNX files, and the dossier that proves it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.feeds import GraphSlice, graph_input, graph_slices, one_tile_each
from launch.rundir import SAID, VARIANTS, RunDir
from launch.trained import labelled_rows, load_trained, weights_digest
from medpsp import __version__
from medpsp.config import Config
from medpsp.deploy.folders import nothing_left
from medpsp.deploy.inputs import GraphInput
from medpsp.errors import ExportError
from medpsp.types import ReadPolicy
from medpsp.words import many

if TYPE_CHECKING:
    from launch.exportfacts import Found
    from medpsp.deploy.gates import Variant
    from medpsp.deploy.session import Feeds
    from shards.index import SliceRow

log = logging.getLogger("medpsp")
EXAMPLES, PROBES = 8, 16
"""Slices that parity is tried on; tiles on which int8 layers are restored, saturation seen."""


def export_job(config: Config) -> None:
    """Best checkpoint to ONNX files, each checked, with their dossier.

    Raises:
        ParityError: fp32 differs from the network.
        ExportError: A gate did not pass, and is not among ``export.allow``.
    """
    target, rows = RunDir(config.out), labelled_rows(config)
    if not validation(rows):
        raise ExportError(
            "export: no labelled slice of a validation patient to compare files on; raise "
            "data.split.val"
        )
    run = RunDir(config.out, export_name=".export.partial")  # nothing has its name before the gates
    with nothing_left(run.export):
        _export(config, run, rows)
        _take_the_place(run, target)


def _export(config: Config, run: RunDir, rows: tuple[SliceRow, ...]) -> None:
    model, step = load_trained(config)
    from launch.dossier import write_dossier
    from launch.exportfacts import Found, dossier_facts
    from medpsp.deploy.export import export_onnx
    from medpsp.deploy.gates import judge
    from medpsp.deploy.graph import DeployGraph
    from medpsp.deploy.verify import Example, check_parity
    from shards.dataset import stage_rows

    given, train = graph_input(config, rows), stage_rows(rows, 1.0)
    metadata, found = model_metadata(config, rows, step, given), Found()
    metadata["weights"] = weights_digest(model)
    log.info("export: fp32, opset %d, image %s", config.export.opset, given.dtype)
    graph = DeployGraph(model, given, config.export.confidence)
    export_onnx(graph, run.fp32, config.export.opset, {**metadata, "variant": "fp32"})
    shown = graph_slices(config, rows, spread(train, EXAMPLES), given)
    examples = [Example(one.image, one.window) for one in shown]
    found.parity = check_parity(graph, run.fp32, given, examples, config.export.parity_tolerance)
    worst = max(row.max_abs_diff for row in found.parity)
    log.info("export: largest logit difference %.1e over %d shapes", worst, len(found.parity))
    _write_variants(config, run, rows, (given, metadata, found))
    _compare(config, run, rows, given, found)
    write_dossier(run.export, dossier_facts(config, run, metadata, rows, found))
    judge(found.gates, config.export.allow)


def _take_the_place(run: RunDir, target: RunDir) -> None:
    """Of an earlier export, whose dossier goes first and comes last; what else is there stays."""
    target.export.mkdir(exist_ok=True)
    made = {path.name for path in run.export.iterdir()}
    models = {target.fp32.name, *(target.variant(name).name for name in VARIANTS)}
    papers = sorted(made - models)
    for name in (*papers, *sorted(models - made)):
        (target.export / name).unlink(missing_ok=True)
    for name in (*sorted(made & models), *papers):
        (run.export / name).replace(target.export / name)
    run.export.rmdir()


def model_metadata(
    config: Config, rows: Sequence[SliceRow], step: int, given: GraphInput
) -> dict[str, Any]:
    """What the file says of itself, and what `predict` needs to read as training did."""
    from shards.index import read_manifest

    window, manifest = config.data.fixed_window, read_manifest(config.shards)
    known = [row.spacing for row in rows if np.isfinite(row.spacing).all()]
    model, wanted = config.model, config.export
    return {
        "tool": f"medpsp {__version__}",
        "classes": list(config.data.classes),
        "codes": {name: terms.model_dump() for name, terms in wanted.codes.items()},
        "input": given.to_json(),
        "modalities": sorted({row.modality for row in rows}),
        "window": asdict(window) if window else None,
        "header_window": config.data.header_window,
        "windows": [view.model_dump() for view in model.windows],
        "tile": asdict(config.tiling),
        "axes": usual_axes(rows),
        "spacing_mm": [round(float(v), 4) for v in np.median(known, axis=0)] if known else None,
        "backbone": model.backbone,
        "head": model.head,
        "stride": model.output_stride,
        "bins": list(model.bins),
        "step": step,
        "policy": _device_policy(config.data.policy),
        "manifest": manifest.data_id,
        "key_fingerprint": manifest.key_fingerprint,
        "licence": wanted.licence,
        "intended_use": wanted.intended_use,
    }


def usual_axes(rows: Sequence[SliceRow]) -> list[list[int]] | None:
    """Which way most series lie; None where none has patient geometry."""
    from medpsp.dicom.nifti import axes_of

    affines = {row.series: np.reshape(row.affine, (4, 4)) for row in rows if row.affine}
    found = Counter(axes_of(a) for a in affines.values() if np.isfinite(a).all())
    return [list(pair) for pair in found.most_common(1)[0][0]] if found else None


def _device_policy(policy: ReadPolicy) -> dict[str, str]:
    """How `predict` reads: as the shards did, but a device may show the names in its images.

    Only blanking is kept, since it decides what the network sees.
    """
    tree = asdict(replace(policy, burned_in="blank" if policy.burned_in == "blank" else "keep"))
    del tree["modalities"]
    return tree


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
    return all(gate.passed for gate in dice_gates(name, least, scores[name], scores["fp32"]))


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
    slices = graph_slices(config, rows, chosen, given)
    found.scores |= scores(sessions, slices, given, len(config.data.classes), config.tiling)
    found.slices = len(chosen)


def feeds(one: GraphSlice) -> Feeds:
    """Of one slice."""
    from medpsp.deploy.session import feeds_of

    return feeds_of(one.image, one.window)


def _compare(
    config: Config, run: RunDir, rows: tuple[SliceRow, ...], given: GraphInput, found: Found
) -> None:
    """All files on validation slices, and their latency on one tile."""
    from medpsp.deploy.gates import dice_gates, latency, latency_gate, least_dice

    wanted = config.export
    files = {"fp32": run.fp32}
    files |= {name: run.variant(name) for name in wanted.variants}
    if left := [name for name in wanted.variants if name not in found.scores]:
        _score(config, run, rows, (given, found), *left)
    fp32 = found.scores["fp32"]
    for name in wanted.variants:
        least = least_dice(name, config.model.backbone)
        found.gates += dice_gates(name, least, found.scores[name], fp32)
        log.info(
            "export: %s masks against fp32 masks, Dice %.4f", name, found.scores[name].agreement
        )
    first = validation(rows)[:1]
    one = next(one_tile_each(graph_slices(config, rows, first, given), given, config))
    found.feeds = feeds(one)
    for threads in (1, 2):
        quick = {name: path for name, path in files.items() if name != "trt"}
        found.times[threads] = latency(quick, found.feeds, threads)
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
