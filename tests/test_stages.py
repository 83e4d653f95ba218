"""The schedule at steps a person can work out."""

from __future__ import annotations

import itertools
import math

import pytest

from medpsp.config import StageConfig, TrainConfig
from medpsp.stages import in_stage, in_steps, lr_at, stage_at, total_steps, trained_parts

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


@pytest.mark.parametrize(
    ("shape", "left"),  # of the way, at the start, a quarter and half of the stage
    [
        ("cosine", [1, 0.5 + math.sqrt(0.5) / 2, 0.5]),
        ("poly", [1, 0.75**0.9, 0.5**0.9]),
        ("constant", [1, 1, 1]),
    ],
)
def test_shapes_from_a_rate_to_the_one_asked_for(shape: str, left: list[float]) -> None:
    stage = StageConfig.model_validate(
        {"name": "x", "steps": 4, "lr": 1e-3, "lr_end": 2e-4, "shape": shape}
    )
    for stages in ((stage,), (stage, STAGES[0])):  # the last one, and one before another rate
        train = TrainConfig(stages=stages, warmup_steps=0)
        rates = [2e-4 + 8e-4 * share for share in left]
        assert [lr_at(train, step) for step in (0, 1, 2)] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize(
    ("begun", "steps"),
    [
        ([], [31, 47, 7, 1]),  # 2 * 250 / 16 = 31.25, 3 * 250 / 16 = 46.9; 0.06 is a step still
        ([("a", 99, 2), ("b", 98, 3)], [99, 98, 7, 1]),  # those of a smaller archive
        ([("a", 99, 4), ("x", 98, 3)], [31, 47, 7, 1]),  # of other epochs, of another stage
        ([("a", 99, 2), ("b", 98, 3), ("c", 97, None), ("d", 96, 0.001)], [99, 98, 7, 96]),
    ],
)
def test_steps_of_stages_in_epochs(
    begun: list[tuple[str, int, float | None]], steps: list[int]
) -> None:
    stages = (
        StageConfig(name="a", epochs=2, lr=1, fraction=0.25),
        StageConfig(name="b", epochs=3, lr=1, fraction=0.25),
        StageConfig(name="c", steps=7, lr=1),
        StageConfig(name="d", epochs=0.001, lr=1),
    )
    found = in_steps(
        TrainConfig(stages=stages, batch_size=16), lambda share: round(1000 * share), begun
    )
    assert [stage.steps for stage in found.stages] == steps
    assert [stage.epochs for stage in found.stages] == [2, 3, None, 0.001]


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
