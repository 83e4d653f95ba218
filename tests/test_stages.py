"""The schedule at steps a person can work out."""

from __future__ import annotations

import itertools
import math

import pytest

from medpsp.config import StageConfig, TrainConfig
from medpsp.stages import in_stage, lr_at, stage_at, total_steps, trained_parts

STAGES = (
    StageConfig(name="warm", steps=10, lr=1e-3, fraction=0.2),
    StageConfig(name="broad", steps=20, lr=4e-4, fraction=0.6),
    StageConfig(name="full", steps=40, lr=1e-4),
)


def schedule(warmup: int) -> TrainConfig:
    return TrainConfig(stages=STAGES, warmup_steps=warmup)


def test_stage_at_bounds() -> None:
    assert total_steps(STAGES) == 70
    expected = {0: (0, 0), 9: (0, 9), 10: (1, 0), 29: (1, 19), 30: (2, 0), 69: (2, 39)}
    assert {step: stage_at(STAGES, step) for step in expected} == expected
    with pytest.raises(IndexError):
        stage_at(STAGES, 70)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-3),
        (5, 7e-4),  # half-way on the cosine from 1e-3 to 4e-4
        (10, 4e-4),
        (15, 3.5606601717798214e-4),  # a quarter: 1e-4 + 3e-4 * (1 + cos 45 deg) / 2
        (20, 2.5e-4),
        (30, 1e-4),
        (50, 5.25e-5),  # half-way from 1e-4 to 5 % of it
    ],
)
def test_rate_without_warm_up(step: int, rate: float) -> None:
    assert lr_at(schedule(0), step) == pytest.approx(rate, rel=1e-12)


def test_warm_up_rises_linearly_from_its_first_share() -> None:
    plain, warm = schedule(0), schedule(4)
    shares = [lr_at(warm, step) / lr_at(plain, step) for step in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_rate_never_jumps_or_rises() -> None:
    rates = [lr_at(schedule(0), step) for step in range(70)]
    falls = [a - b for a, b in itertools.pairwise(rates)]
    assert min(falls) >= 0
    steepest = (1e-3 - 4e-4) / 10 * math.pi / 2  # a cosine's slope in the middle of stage 1
    assert max(falls) <= steepest
    assert rates[9] - rates[10] == pytest.approx(1.468e-5, rel=1e-3)  # 3e-4 * (1 - cos 18 deg)
    assert rates[-1] == pytest.approx(5e-6, rel=0.05)


def test_trained_parts() -> None:
    parts = {
        trains: trained_parts(StageConfig(name="x", steps=1, lr=1, trains=trains))
        for trains in ("all", "backbone", "head")
    }
    assert parts == {"all": {"backbone", "head"}, "backbone": {"backbone"}, "head": {"head"}}


def test_stages_are_nested_and_the_last_takes_all() -> None:
    orders = [i / 100 for i in range(100)]  # keyed hashes lie in [0, 1)
    sets = [{o for o in orders if in_stage(o, f)} for f in (0.2, 0.6, 1.0)]
    assert [len(s) for s in sets] == [20, 60, 100]
    assert sets[0] < sets[1] < sets[2]
