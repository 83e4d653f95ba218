"""How far a score may be chance: bootstrap over patients, whose cases stay together.

Every score here is a ratio of two sums over patients, so a resample is a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = (2.5, 97.5)
"""Percentiles of the resamples that bound an interval of 95 %."""

LEAST_PATIENTS = 2
"""One patient has no spread: its interval would be of width 0."""


class Estimate(NamedTuple):
    """A score and its interval; NaN where there is none."""

    value: float
    low: float
    high: float


def draw_patients(patients: int, resamples: int, seed: int) -> Floats:
    """(R, P) how often each resample has each patient; rows add up to P."""
    rng = np.random.default_rng((seed, patients))
    shares = np.full(patients, 1 / max(1, patients))
    return rng.multinomial(patients, shares, size=resamples).astype(np.float64)


def sum_by_patient(values: Floats, patients: Sequence[str]) -> tuple[Floats, Floats]:
    """(P,) sums of the values of each patient, and (P,) how many there are; NaN counts as none.

    Args:
        values: (N,) of the cases.
        patients: (N,) whose they are; P different ones, in sorted order in the result.
    """
    _, place = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    known = np.isfinite(values)
    weights = np.where(known, values, 0.0), known
    top, count = (np.bincount(place, w).astype(np.float64) for w in weights)
    return top, count


def ratio(top: Floats, bottom: Floats, draws: Floats) -> Estimate:
    """Sum of ``top`` over sum of ``bottom``, with the percentile interval over the patients.

    Args:
        top: (P,).
        bottom: (P,), 0 for a patient who does not count.
        draws: (R, P) of `draw_patients`.
    """
    value = divided(np.atleast_1d(top.sum()), np.atleast_1d(bottom.sum()))[0]
    if np.count_nonzero(bottom) < LEAST_PATIENTS:
        return Estimate(float(value), np.nan, np.nan)
    return bounded(float(value), divided(draws @ top, draws @ bottom))


def bounded(value: float, resampled: Floats) -> Estimate:
    """A score with the interval of its (R,) resamples; resamples without a score are left out."""
    known = resampled[np.isfinite(resampled)]
    if not len(known):
        return Estimate(value, np.nan, np.nan)
    low, high = np.percentile(known, LEVEL)
    return Estimate(value, float(low), float(high))


def divided(top: Floats, bottom: Floats) -> Floats:
    """Elementwise; NaN where ``bottom`` is 0."""
    result = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=result, where=bottom > 0)
    return result
