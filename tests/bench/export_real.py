"""Real scans: what each file costs in Dice, and parity at all shapes, as the dossiers have it.

MEDPSP_DATA is the folder of real scans. Crops, split and shards are those of `accuracy`; networks
are trained for a short while, by the normal jobs. Masks are compared on validation patients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from medpsp.config import BACKBONES
from medpsp.deploy.gates import MOST_DROP, Variant, least_dice
from medpsp.deploy.verify import SHAPES
from tests.bench.export_nets import Net, exported
from tests.bench.results import Missing, Row, report

SETS = ("sunnybrook", "sarcoma")
VARIANTS: dict[str, Variant] = {"int8 QDQ U8S8": "cpu", "int8 QDQ S8S8": "trt", "fp16": "half"}
SEED = 1


def real(args: Any) -> None:
    """A table for each set and network.

    Raises:
        Missing: No real scans.
    """
    if "MEDPSP_DATA" not in os.environ:
        raise Missing("MEDPSP_DATA is not set: the folder of real scans")
    from tests.bench.accuracy import prepared

    for name in args.sets or SETS:
        base = prepared(name, args.folder / "real", SEED)
        for backbone in args.backbones or BACKBONES:
            for stride in args.strides:
                model = {"backbone": backbone, "output_stride": stride}
                folder = f"{backbone}-OS{stride}-{args.real_steps}"
                began = time.monotonic()
                try:
                    net = exported(base, folder, model, args.real_steps, list(VARIANTS.values()))
                except Missing as error:
                    section = f"real {name}, {backbone} OS{stride}"
                    report("export", section, [], {"not measured": str(error)})
                    continue
                _table(name, net, time.monotonic() - began)


def _table(name: str, net: Net, seconds: float) -> None:
    found = net.dossier
    facts = {
        "training": f"{net.config.train.steps} steps, crops of {net.config.train.size}",
        "validation": f"{found['agreement'][0]['slices']} slices",
    }
    rows = [*_rows(net, found), Row(label="training and export", value=seconds, unit="s")]
    report("export", f"real {name}, {net.name}", rows, facts, list(_lines(found)))


def _rows(net: Net, found: dict[str, Any]) -> Iterator[Row]:
    parity = found["parity"]
    worst = max(row["relative"] for row in parity)
    label = f"fp32 against torch, {len(parity)} shapes: largest difference, relative"
    yield Row(label=label, value=worst, most=net.config.export.parity_tolerance)
    label = f"fp32 against torch, {len(SHAPES)} shapes: changed pixels, beyond ties"
    yield Row(label=label, value=sum(r["changed"] - r["near_ties"] for r in parity), most=0)
    yield Row(label="near ties among changed pixels", value=sum(r["near_ties"] for r in parity))
    for label, before in found["agreement"][0]["labels_fp32"].items():
        yield Row(label=f"fp32: Dice of {label}", value=before)
    for fact in found["agreement"]:
        variant = VARIANTS[fact["variant"]]
        least = least_dice(variant, net.config.model.backbone)
        yield Row(label=f"{variant}: Dice against fp32 masks", value=fact["mean"], least=least)
        for label, before in fact["labels_fp32"].items():
            after = fact["labels"][label]
            drop = None if before is None or after is None else before - after
            yield Row(label=f"{variant}: Dice drop of {label}", value=drop, most=MOST_DROP)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for fact in found["agreement"]:
        labels = ", ".join(
            f"{name} {_said(before)} to {_said(fact['labels'][name])}"
            for name, before in fact["labels_fp32"].items()
        )
        real_db, emulated = fact["sqnr_real_db"], fact["sqnr_emulated_db"]
        kernels = f"; SQNR {real_db:.1f} dB, emulated {emulated:.1f}" if real_db else ""
        layers = ", ".join(fact["restored"]) or "none"
        yield f"{fact['variant']}: Dice {labels}; restored: {layers}{kernels}"
    for fact in found["allowances"]:
        yield f"not met: {fact['gate']}, {fact['reason'].split('(', 1)[-1].rstrip(')')}"


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
