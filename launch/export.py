"""The best network of a run to checked ONNX files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.rundir import RunDir
from launch.trained import labelled_rows, load_trained, number, shown
from medpsp import __version__
from medpsp.config import Config
from medpsp.errors import ExportError
from medpsp.tiles import Tiling, framed, tile_places
from medpsp.types import ReadPolicy

if TYPE_CHECKING:
    from shards.index import SliceRow

log = logging.getLogger("medpsp")


def _device_policy(policy: ReadPolicy) -> dict[str, str]:
    """How `predict` reads: as the shards did, but a device may show the names in its images.

    Only blanking is kept, since it decides what the network sees.
    """
    tree = asdict(replace(policy, burned_in="blank" if policy.burned_in == "blank" else "keep"))
    del tree["modalities"]
    return tree


def _metadata(config: Config, rows: tuple[SliceRow, ...], step: int) -> dict[str, Any]:
    """What the file says of itself, and what `predict` needs to read as training did."""
    from shards.index import read_manifest

    window = config.data.fixed_window
    return {
        "tool": f"medpsp {__version__}",
        "classes": list(config.data.classes),
        "modalities": sorted({row.modality for row in rows}),
        "window": asdict(window) if window else None,
        "header_window": config.data.header_window,
        "tile": asdict(config.tiling),
        "backbone": config.model.backbone,
        "head": config.model.head,
        "bins": list(config.model.bins),
        "step": step,
        "in_channels": config.model.in_channels,
        "windows": [window.model_dump() for window in config.model.windows],
        "context": config.model.context,
        "policy": _device_policy(config.data.policy),
        "key_fingerprint": read_manifest(config.shards).key_fingerprint,
    }


def export_job(config: Config) -> None:
    """Best checkpoint to fp32 and int8 ONNX, both checked.

    Raises:
        ParityError: fp32 differs from the network.
        ExportError: int8 masks agree too little with the fp32 masks.
    """
    target, rows = RunDir(config.out), labelled_rows(config)
    run = RunDir(config.out, export_name=".export.partial")  # nothing has its name before the gates
    shutil.rmtree(run.export, ignore_errors=True)
    model, step = load_trained(config)
    from medpsp.deploy.export import export_onnx
    from medpsp.deploy.quantize import quantize_int8
    from medpsp.deploy.verify import check_parity, mask_agreement
    from shards.dataset import stage_rows

    metadata = _metadata(config, rows, step)
    channels, limit = config.model.channels, config.export.calibration_slices
    log.info("export: fp32, opset %d", config.export.opset)
    export_onnx(model, run.fp32, channels, config.export.opset, metadata)
    parity = check_parity(model, run.fp32, channels, config.export.parity_tolerance)
    worst = max(row.max_abs_diff for row in parity)
    log.info("export: largest logit difference %.1e over %d shapes", worst, len(parity))
    train = spread(stage_rows(rows, 1.0), limit)
    calibration = one_tile_each(unit_images(config, rows, train), config.tiling)
    quantize_int8(run.fp32, run.int8, calibration, {**metadata, "int8": "QDQ U8S8"})
    val = spread([row for row in rows if row.split == "val"], limit)
    agreement = mask_agreement(
        run.fp32,
        run.int8,
        unit_images(config, rows, val),
        len(config.data.classes),
        config.tiling,
    )
    log.info("export: int8 masks against fp32 masks, Dice %s", shown(number(agreement)))
    report = {
        "parity": [
            {"shape": r.shape, "max_abs_diff": r.max_abs_diff, "changed": r.changed} for r in parity
        ],
        "int8_dice_against_fp32": number(agreement),
        "int8_slices": len(val),
        "bytes": {"fp32": run.fp32.stat().st_size, "int8": run.int8.stat().st_size},
    }
    run.export_report.write_text(json.dumps(report, indent=1), encoding="utf-8")
    least = config.export.int8_min_dice
    if least and not agreement >= least:  # NaN: no foreground in either
        raise ExportError(
            f"{run.int8.name}: masks agree with fp32 by Dice {shown(number(agreement))}, expected "
            f"at least {least} (export.int8_min_dice); train longer"
        )
    shutil.rmtree(target.export, ignore_errors=True)
    run.export.rename(target.export)


def spread(rows: list[SliceRow], count: int) -> list[SliceRow]:
    """At most ``count`` rows, evenly spaced over the list."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def one_tile_each(images: Iterable[Any], tiling: Tiling) -> Iterator[Any]:
    """Of each image one tile, of each the next."""
    for place, image in enumerate(images):
        whole, _ = framed(image, tiling.size)
        tiles = tile_places(whole.shape, tiling)
        yield np.ascontiguousarray(whole[tiles[place % len(tiles)]])


def unit_images(config: Config, rows: tuple[SliceRow, ...], chosen: list[SliceRow]) -> Any:
    """(1, C, H, W) inputs of the network, one after another; neighbours are among ``rows``."""
    from shards.dataset import Inputs
    from shards.reader import ShardReader

    inputs = Inputs(ShardReader(config.shards), config, rows)
    return (inputs.batch([row]).image.numpy() for row in chosen)
