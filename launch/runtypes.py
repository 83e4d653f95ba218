"""What the JSON files of a run hold, as pages take it: checked when it is read."""

from __future__ import annotations

from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from launch.chain import Told
from medpsp.deploy.dossier import Facts


class Estimate(TypedDict):
    """With its 95 % interval; None where there is none."""

    value: float | None
    low: float | None
    high: float | None


class ClassScores(TypedDict):
    """Of one class, see `launch.scores`."""

    dice: Estimate
    dice_pooled: Estimate
    dice_constant_mask: Estimate
    iou: Estimate
    hd95_mm: Estimate
    nsd: Estimate
    present: int
    missed: int
    invented: int
    absent: int


class Calibration(TypedDict):
    """Its error alone."""

    ece: Estimate


class Settings(TypedDict):
    """Those that a table names."""

    nsd_mm: float


class Evaluation(TypedDict):
    """Of ``evaluation.json``, what other pages than its own show."""

    split: str
    patients: int
    cases: int
    slices: int
    step: int
    weights: NotRequired[str]
    held_out: NotRequired[list[str]]
    classes: dict[str, ClassScores]
    calibration: Calibration
    settings: Settings


class Schedule(TypedDict):
    """Name and steps of every stage."""

    stages: list[tuple[str, int]]


class Reached(TypedDict):
    """Of the ``meta.json`` of a checkpoint; see `medpsp.train.checkpoint.TrainState`."""

    step: int
    best: float
    schedule: Schedule
    content: str


EVALUATION, DOSSIER = TypeAdapter(Evaluation), TypeAdapter(Facts)
REACHED, TOLD = TypeAdapter(Reached), TypeAdapter(Told)
