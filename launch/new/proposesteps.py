"""How many steps to train: passes over the slices, and the time that they take here."""

from __future__ import annotations

import math
from typing import NamedTuple

from launch.new.choices import Choice, Evidence
from launch.new.shares import to_train
from medpsp.config import TrainConfig
from medpsp.progress import duration

BUDGET_S = 900.0
"""For a first model on a CPU, which shows what is wrong with the data: that is waited for."""
FEWEST = 300
"""With less a network has hardly begun."""
_PASSES, _MOST_STEPS = 20, 60_000
_MOST_PASSES, _LEAST_STEPS = 300, 1500


class Wanted(NamedTuple):
    """Steps that the slices ask for, and why so many."""

    steps: int
    why: str


def steps_of(found: Evidence, batch: int) -> Choice:
    """`train.steps`, with hours where a step has been timed.

    Args:
        found: All that is known.
        batch: Slices of a step.
    """
    wanted, pace = _wanted(found, batch), found.pace
    if pace is None:
        return Choice("train.steps", wanted.steps, wanted.why)
    each = f"{duration(pace.seconds)} a step, {pace.how}; reading and scoring come on top"
    fit = int(BUDGET_S / pace.seconds)
    if found.machine.gpus or wanted.steps <= fit:
        time = about(wanted.steps * pace.seconds)
        return Choice("train.steps", wanted.steps, f"{wanted.why} About {time} here ({each}).")
    steps = min(wanted.steps, max(FEWEST, fit // 50 * 50))
    passes = steps * batch / slices_to_train(found)
    least = f", but not with fewer than {FEWEST} steps" if fit < FEWEST else ""
    why = (
        f"About {about(steps * pace.seconds)} here ({each}), {passes:.0f} passes over the training "
        f"slices. {wanted.steps} would take {about(wanted.steps * pace.seconds)} without a GPU; on "
        f"a CPU a first model shall be there within {duration(BUDGET_S)}{least}. A GPU or more "
        f"steps will give a better one: train.steps={wanted.steps}, or any number; the stages keep "
        "their shares."
    )
    return Choice("train.steps", steps, why)


def about(seconds: float) -> str:
    """A duration that is not known to the second."""
    return duration(60 * round(seconds / 60) if seconds >= 600 else seconds)


def _wanted(found: Evidence, batch: int) -> Wanted:
    usual, kept = TrainConfig().steps, slices_to_train(found)
    passes = usual * batch / kept
    if found.machine.gpus and passes < _PASSES:
        return Wanted(
            min(_MOST_STEPS, math.ceil(_PASSES * kept / batch / 1000) * 1000),
            f"About {kept:.0f} slices to train on: {usual} steps would be {passes:.1f} passes.",
        )
    if passes > _MOST_PASSES:
        return Wanted(
            max(_LEAST_STEPS, math.ceil(_MOST_PASSES * kept / batch / 500) * 500),
            f"{kept:.0f} slices to train on: at most about {_MOST_PASSES} passes over them, a rule "
            "of thumb.",
        )
    return Wanted(usual, f"About {passes:.0f} passes over some {kept:.0f} training slices.")


def slices_to_train(found: Evidence) -> float:
    """About so many, of the whole archive."""
    share = to_train(found.patients) / len(found.patients)
    return max(1.0, found.used.slices * share * found.met / found.read)
