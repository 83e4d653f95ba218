"""Shares of the patients for validation and test that leave each side somebody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from medpsp.dataconfig import SplitConfig

FEW = 15
"""Patients below which the usual shares leave validation empty with one key in 28 or more."""
_FEW_SHARE = 0.25


class Shares(NamedTuple):
    """For `data.split`, and how many patients each side gets; empty where there is no key yet."""

    val: float
    test: float
    counts: tuple[int, ...] = ()


def shares_of(places: Sequence[float | None]) -> Shares:
    """Shares for patients.

    Args:
        places: Where a patient's keyed hash lies (0 to 1); None where there is no key.
    """
    usual = SplitConfig()
    known = sorted(place for place in places if place is not None)
    if len(known) < len(places) or not known:
        few = 1 < len(places) < FEW
        return Shares(_FEW_SHARE, _FEW_SHARE) if few else Shares(usual.val, usual.test)
    count = len(known)
    in_val = max(1, round(usual.val * count))
    in_test = max(1, round(usual.test * count)) if count > 2 else 0
    wanted = count - in_val - in_test, in_val, in_test
    now = _counts(known, usual.val, usual.test)
    least = 1.0 if count < FEW else 0.5
    enough = all(have and have >= least * want for have, want in zip(now, wanted, strict=True))
    if count == 1 or enough:
        return Shares(usual.val, usual.test, now)
    test = _between(known, in_test, 0.0)
    val = _between(known, in_val + in_test, test)
    return Shares(val, test, _counts(known, val, test))


def to_train(places: Sequence[float | None]) -> int:
    """How many patients there will be to train on, or about so many where there is no key."""
    shares = shares_of(places)
    return (
        shares.counts[0] if shares.counts else round(len(places) * (1 - shares.val - shares.test))
    )


def chance_of_none(share: float, patients: int) -> float:
    """How likely it is that a share of so many patients, drawn at random, is empty."""
    return (1 - share) ** patients


def _counts(places: Sequence[float], val: float, test: float) -> tuple[int, int, int]:
    """Training, validation and test, as `identity.split_of` has it."""
    in_test = sum(place < test for place in places)
    in_val = sum(test <= place < test + val for place in places)
    return len(places) - in_test - in_val, in_val, in_test


def _between(places: Sequence[float], count: int, base: float) -> float:
    """The shortest decimal that, added to ``base``, is above just so many of the sorted places."""
    if count == 0:
        return 0.0
    low = places[count - 1]
    for digits in range(1, 16):
        share = math.floor((low - base) * 10**digits + 1) / 10**digits
        if sum(place < base + share for place in places) == count:
            return float(share)
    return low - base
