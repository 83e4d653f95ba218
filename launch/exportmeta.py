"""What the metadata of an exported file says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medpsp import __version__
from medpsp.config import Config
from medpsp.deploy.inputs import GraphInput
from medpsp.types import ReadPolicy
from medpsp.words import many

if TYPE_CHECKING:
    from launch.rundir import RunDir
    from shards.index import SliceRow


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


def scores_in(run: RunDir) -> Any:
    """What its ``evaluation.json`` says; None where there is none."""
    return json.loads(run.evaluation.read_text("utf-8")) if run.evaluation.is_file() else None


def of_these_files(scores: Any, config: Config, weights: str) -> bool:
    """Whether an ``evaluation.json`` says what the files do on a device."""
    if not isinstance(scores, dict):
        return False
    settings = scores.get("settings") or {}
    size = settings.get("size") or list(config.train.size)
    tiling = config.tiling
    return (
        scores.get("weights") == weights
        and (list(size), settings.get("overlap")) == (list(tiling.size), tiling.overlap)
        and not settings.get("flips")
        and scores.get("postprocess") is None
    )


def doubts(config: Config, scores: Any, weights: str) -> dict[str, str]:
    """Classes that held-out patients show to be no better found than by a mask without a look.

    Args:
        config: Of the run.
        scores: Of `scores_in`; none are doubted by those of other files.
        weights: Digest of those that are exported.
    """
    if not of_these_files(scores, config, weights):
        return {}
    from launch.scores import doubt_of  # scipy comes with it

    return {
        name: f"{doubt} than a mask that ignores the image: pooled Dice of "
        f"{many(scores['patients'], 'held-out patient')} {of['dice_pooled']['value']:.3f}, that "
        f"mask {of['dice_constant_mask']['value']:.3f}"
        for name, of in scores["classes"].items()
        if "dice_constant_mask" in of and (doubt := doubt_of(of))
    }
