"""Scores of the held-out patients."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from typing import Any

import numpy as np

from launch.rundir import RunDir
from launch.trained import labelled_rows, load_trained, number, shown
from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.types import World

log = logging.getLogger("medpsp")


def evaluate_job(config: Config) -> dict[str, Any]:
    """Score the held-out patients in 3-D, beside the best mask that never looks at the image."""
    rows = labelled_rows(config)
    split = "test" if any(row.split == "test" for row in rows) else "val"
    held_out = [row for row in rows if row.split == split]
    if not held_out:
        raise ShardError(f"shards {config.shards}: no held-out patient; raise data.split.test")
    model, step = load_trained(config)
    import torch

    from medpsp.progress import Bar
    from medpsp.train.loop import predict_batch
    from medpsp.train.metrics import ConstantMask, confusion, dice_per_class
    from shards.dataset import stage_rows, whole_slices
    from shards.reader import ShardReader

    classes = len(config.data.classes)
    constant, reader = ConstantMask(classes), ShardReader(config.shards)
    for row in stage_rows(rows, 1.0):
        constant.add(reader.read(row.bucket, row.slot)[1])
    counts: dict[str, Any] = defaultdict(lambda: np.zeros((classes, classes), dtype=np.int64))
    blind = np.zeros((classes, 2, 2), dtype=np.int64)
    with Bar("evaluate", len(held_out), "slices") as bar:
        slices = whole_slices(config.shards, held_out, World(), config.model.in_channels)
        for batch in slices:
            predicted = predict_batch(model, batch, torch.device("cpu"))
            for patient, truth, mask in zip(
                batch.patients, batch.label.numpy(), predicted, strict=True
            ):
                counts[patient] += confusion(truth, mask, classes)
                for index in range(1, classes):
                    blind[index] += confusion(
                        np.where(truth == 255, 255, truth == index).astype(np.uint8),
                        constant.predict(index, truth.shape).astype(np.uint8),
                        2,
                    )
                bar.advance()
    pooled = dice_per_class(sum(counts.values()))
    per_patient = np.stack([dice_per_class(c) for c in counts.values()])
    names = config.data.classes
    result: dict[str, Any] = {
        "split": split,
        "patients": len(counts),
        "slices": len(held_out),
        "step": step,
        "dice": {names[k]: number(pooled[k]) for k in range(1, classes)},
        "dice_patient_mean": {names[k]: number(mean(per_patient[:, k])) for k in range(1, classes)},
        "dice_constant_mask": {
            names[k]: number(dice_per_class(blind[k])[1]) for k in range(1, classes)
        },
    }
    RunDir(config.out).evaluation.write_text(json.dumps(result, indent=1), encoding="utf-8")
    _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    log.info(
        "held-out Dice (%s, %d patients, %d slices):",
        *(result[key] for key in ("split", "patients", "slices")),
    )
    for name in result["dice"]:
        log.info(
            "  %-12s %s  (mean of patients %s, constant mask %s)",
            name,
            *(
                shown(result[key][name])
                for key in ("dice", "dice_patient_mean", "dice_constant_mask")
            ),
        )


def mean(values: Any) -> float:
    """Mean of what is not NaN."""
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else float("nan")
