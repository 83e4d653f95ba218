"""From the scores of the cases to those of the held-out patients: means, intervals, tables."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.trained import number
from medpsp.config import EvaluateConfig
from medpsp.train.calibration import BINS, Bins, calibration_error
from medpsp.train.cases import Scores
from medpsp.train.intervals import (
    LEAST_PATIENTS,
    Estimate,
    Floats,
    bounded,
    divided,
    draw_patients,
    ratio,
    sum_by_patient,
)
from medpsp.train.metrics import dice_per_class, iou_per_class, mean_foreground

if TYPE_CHECKING:
    from shards.index import SliceRow

THICKNESS = ((1.5, "up to 1.5 mm"), (3.0, "1.5 to 3 mm"), (5.0, "3 to 5 mm"))
"""Upper edges of the groups of the distance between slices, which belong to the lower group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One series of a patient and its scores.

    Attributes:
        blind: (K, 2) of the constant mask: twice its true voxels, voxels of truth and mask.
        bins: Of the network as it is, before any cleaning; see `calibration_bins`.
        drawn: The slice with the most disagreement.
        mask: Its predicted classes, compressed by zlib.
    """

    patient: str
    series: str
    modality: str
    scanner: str
    z_step: float
    slices: int
    scores: Scores
    blind: Floats
    bins: Bins
    drawn: SliceRow
    mask: bytes

    @property
    def dice(self) -> Floats:
        """(K,) NaN where absent."""
        return dice_per_class(self.scores.counts)

    @property
    def mean_dice(self) -> float:
        """Mean over the classes but the background; NaN where all are absent."""
        return mean_foreground(self.dice)

    @property
    def thickness(self) -> str:
        """Its group of `THICKNESS`."""
        if not np.isfinite(self.z_step):
            return "unknown"
        for edge, name in THICKNESS:
            if self.z_step <= edge * 1.001:  # decimal strings carry noise
                return name
        return "above 5 mm"

    def state(self, index: int) -> str:
        """present, or absent, missed, invented; see `medpsp.train.cases`."""
        wanted, found = self._voxels(index)
        names = {(True, True): "present", (True, False): "missed", (False, True): "invented"}
        return names.get((wanted > 0, found > 0), "absent")

    def _voxels(self, index: int) -> tuple[int, int]:
        counts = self.scores.counts
        return int(counts[index].sum()), int(counts[:, index].sum())

    def line(self, index: int) -> dict[str, Any]:
        """Its row of the table of cases."""
        wanted, found = self._voxels(index)
        return {
            "patient": self.patient,
            "series": self.series,
            "modality": self.modality,
            "scanner": self.scanner,
            "z_step_mm": number(self.z_step),
            "slices": self.slices,
            "state": self.state(index),
            "dice": number(self.dice[index]),
            "iou": number(iou_per_class(self.scores.counts)[index]),
            "hd95_mm": number(self.scores.hd95[index]),
            "nsd": number(self.scores.nsd[index]),
            "truth_voxels": wanted,
            "predicted_voxels": found,
            "ece": number(float(calibration_error(self.bins))),
        }


STRATA: dict[str, Callable[[Case], str]] = {
    "scanner": lambda case: case.scanner or "unknown",
    "modality": lambda case: case.modality or "unknown",
    "slice thickness": lambda case: case.thickness,
}
_ORDER = [*(name for _, name in THICKNESS), "above 5 mm"]


def summarise(
    cases: Sequence[Case], names: Sequence[str], settings: EvaluateConfig, seed: int
) -> dict[str, Any]:
    """All that `evaluation.json` says of the scores; values with their 95 % intervals.

    Args:
        cases: At least one.
        names: Of the classes, the background first.
        settings: Of the evaluation.
        seed: Of the resamples.
    """
    draws = draw_patients(len({case.patient for case in cases}), settings.bootstrap, seed)
    classes = {name: _class_scores(cases, k, draws) for k, name in _foreground(names)}
    alone = {  # values without their intervals, metric by metric
        key: {name: scores[source]["value"] for name, scores in classes.items()}
        for key, source in (
            ("dice", "dice_pooled"),
            ("dice_patient_mean", "dice_patient_mean"),
            ("dice_constant_mask", "dice_constant_mask"),
        )
    }
    return {
        **alone,
        "cases": len(cases),
        "classes": classes,
        "calibration": _calibration(cases, draws),
        "strata": {
            by: _stratum(cases, names, key, (settings.bootstrap, seed))
            for by, key in STRATA.items()
        },
        "confusion": np.sum([case.scores.counts for case in cases], axis=0).tolist(),
    }


def doubt_of(scores: Mapping[str, Any]) -> str:
    """Whether a class is better than the constant mask: "no better", "perhaps no better", or "".

    Perhaps: its interval reaches down to that mask.

    Args:
        scores: Of one class, as `summarise` gives them.
    """
    dice, blind = scores["dice_pooled"], scores["dice_constant_mask"]["value"]
    if blind is None or dice["value"] is None:
        return ""
    if dice["value"] <= blind:
        return "no better"
    return "perhaps no better" if dice["low"] is not None and dice["low"] <= blind else ""


def _foreground(names: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(names))[1:]


def _class_scores(cases: Sequence[Case], index: int, draws: Floats) -> dict[str, Any]:
    patients = [case.patient for case in cases]
    counts = np.stack([case.scores.counts for case in cases])
    both = counts[:, index, index].astype(np.float64)
    size = (counts[:, index].sum(1) + counts[:, :, index].sum(1)).astype(np.float64)
    blind = np.stack([case.blind[index] for case in cases])

    def mean(values: Floats) -> dict[str, float | None]:
        return _told(ratio(*sum_by_patient(values, patients), draws))

    def pooled(top: Floats, bottom: Floats) -> dict[str, float | None]:
        above, below = (sum_by_patient(values, patients)[0] for values in (top, bottom))
        return _told(ratio(above, below, draws))

    of_patients = divided(*(sum_by_patient(v, patients)[0] for v in (2 * both, size)))
    states = [case.state(index) for case in cases]
    return {
        "dice": mean(divided(2 * both, size)),
        "dice_pooled": pooled(2 * both, size),
        "dice_patient_mean": _told(
            ratio(np.nan_to_num(of_patients), np.isfinite(of_patients).astype(np.float64), draws)
        ),
        "dice_constant_mask": pooled(blind[:, 0], blind[:, 1]),
        "iou": mean(divided(both, size - both)),
        "iou_pooled": pooled(both, size - both),
        "hd95_mm": mean(np.array([case.scores.hd95[index] for case in cases])),
        "nsd": mean(np.array([case.scores.nsd[index] for case in cases])),
        **{name: states.count(name) for name in ("present", "missed", "invented", "absent")},
    }


def _told(estimate: Estimate) -> dict[str, float | None]:
    return {key: number(value) for key, value in estimate._asdict().items()}


def _stratum(
    cases: Sequence[Case],
    names: Sequence[str],
    key: Callable[[Case], str],
    bootstrap: tuple[int, int],
) -> dict[str, Any]:
    """Groups by name, thicknesses from thin to thick, what is unknown last."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[key(case)].append(case)
    shown = {}
    for name in sorted(groups, key=lambda g: (g == "unknown", g in _ORDER and _ORDER.index(g), g)):
        members = groups[name]
        patients = len({case.patient for case in members})
        draws = draw_patients(patients, *bootstrap)
        scores = {label: _class_scores(members, k, draws) for k, label in _foreground(names)}
        kept = ("dice", "iou", "hd95_mm", "nsd", "missed", "invented")
        shown[name] = {
            "patients": patients,
            "cases": len(members),
            "classes": {label: {k: of[k] for k in kept} for label, of in scores.items()},
        }
    return shown


def _calibration(cases: Sequence[Case], draws: Floats) -> dict[str, Any]:
    _, place = np.unique([case.patient for case in cases], return_inverse=True)
    patients = np.zeros((draws.shape[1], 3, BINS))
    np.add.at(patients, place, np.stack([case.bins for case in cases]))
    total = patients.sum(0)
    value = float(calibration_error(total))
    resampled = np.full(1, np.nan)
    if len(patients) >= LEAST_PATIENTS:
        flat = draws @ patients.reshape(len(patients), -1)
        resampled = calibration_error(flat.reshape(-1, 3, BINS))
    count, confidence, right = total
    means = [divided(values, count) for values in (confidence, right)]
    return {
        "ece": _told(bounded(value, resampled)),
        "bins": [
            {"confidence": number(c), "accuracy": number(a), "voxels": int(n)}
            for c, a, n in zip(*means, count, strict=True)
        ],
    }


def cases_csv(cases: Sequence[Case], names: Sequence[str]) -> str:
    """One line a case and class; empty where there is no number."""
    text = io.StringIO()
    lines = ({**case.line(k), "class": name} for case in cases for k, name in _foreground(names))
    columns = list(cases[0].line(0))
    columns.insert(columns.index("state"), "class")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
