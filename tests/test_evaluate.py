"""Calibration, intervals, sliding windows, cleaning, and the evaluation of a whole run."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from launch import evaluate
from launch.evalpage import ranked
from launch.evalpictures import Pictures
from launch.evaluate import evaluate_job, score_stack
from launch.exportmeta import doubts, of_these_files
from launch.rundir import RunDir
from launch.scores import Case, doubt_of, summarise
from launch.stacks import grid_of, stacks_of
from launch.trained import BY_CASE, POOLED, labelled_rows, load_trained, weights_digest
from medpsp.config import Config, EvaluateConfig
from medpsp.tiles import Tiling, tile_starts
from medpsp.train.calibration import BINS, calibration_bins, calibration_error
from medpsp.train.cases import Scores
from medpsp.train.intervals import divided, draw_patients, ratio, sum_by_patient
from medpsp.train.postprocess import (
    apply_steps,
    choose_step,
    cleaned,
    filled,
    largest_component,
)
from medpsp.train.sliding import probabilities
from shards.figures import Columns
from shards.index import SliceRow, read_index
from shards.reader import ShardReader

torch.set_num_threads(1)
Labels = NDArray[np.uint8]


# calibration ------------------------------------------------------------------------------------


def toy(confidence: float, right: int, of: int = 100) -> NDArray[np.float64]:
    share = np.full(of, confidence, dtype=np.float32)
    return calibration_bins(share, np.arange(of) < right)


def test_calibration_by_hand() -> None:
    assert calibration_error(toy(0.75, 75)) == pytest.approx(0, abs=1e-6)  # perfect
    assert calibration_error(toy(0.99, 60)) == pytest.approx(0.39, abs=1e-6)  # too sure
    # bins do not cancel: 100 voxels 0.39 too sure, 300 voxels 0.1 too modest
    both = toy(0.99, 60) + toy(0.5, 180, 300)
    assert calibration_error(both) == pytest.approx((100 * 0.39 + 300 * 0.1) / 400, abs=1e-6)
    assert np.isnan(calibration_error(np.zeros((3, BINS))))


def test_a_bin_has_its_upper_edge() -> None:
    edges = np.array([0, 1 / 15, 1 / 15 + 1e-4, 0.5, 1], dtype=np.float32)
    places = [int(calibration_bins(e, np.ones(1, bool))[0].argmax()) for e in np.split(edges, 5)]
    assert places == [0, 0, 1, 7, 14]


# intervals --------------------------------------------------------------------------------------


def test_equal_patients_have_no_spread() -> None:
    draws = draw_patients(7, 500, 0)
    assert draws.shape == (500, 7)
    assert (draws.sum(1) == 7).all()
    seen = ratio(np.full(7, 0.8), np.ones(7), draws)
    assert seen == pytest.approx((0.8, 0.8, 0.8))


def test_an_interval_by_hand() -> None:
    """Two patients of 0 and 1: a resample is 0, 1/2 or 1, each end with a chance of 1/4."""
    seen = ratio(np.array([0.0, 1.0]), np.ones(2), draw_patients(2, 2000, 0))
    assert seen == (0.5, 0.0, 1.0)
    assert np.isnan(ratio(np.ones(1), np.ones(1), draw_patients(1, 100, 0))[1:]).all()


def test_an_interval_of_many_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    seen = ratio(values, np.ones(400), draw_patients(400, 4000, 1))
    half = 1.96 * values.std() / 20
    assert (seen.value - seen.low, seen.high - seen.value) == pytest.approx((half, half), rel=0.06)
    again = ratio(values, np.ones(400), draw_patients(400, 4000, 1))
    assert seen == again


def test_the_cases_of_a_patient_stay_together() -> None:
    """Ten cases of one patient are no ten patients: means are of cases, draws of patients."""
    values = np.array([0.0] * 10 + [1.0])
    top, bottom = sum_by_patient(values, ["a"] * 10 + ["b"])
    assert (top.tolist(), bottom.tolist()) == ([0, 1], [10, 1])
    seen = ratio(top, bottom, draw_patients(2, 2000, 0))
    assert seen == pytest.approx((1 / 11, 0, 1))
    top, bottom = sum_by_patient(np.array([0.5, np.nan, np.nan]), ["a", "a", "b"])
    assert divided(top, bottom).tolist()[0] == 0.5
    assert np.isnan(divided(top, bottom)[1])  # nothing is known of it: it counts in no mean


# tiles ------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """Sees one pixel at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


class Ramp(nn.Module):
    """Thinks that class 1 is at the right."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        right = torch.linspace(-1, 1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])
        return torch.cat([-right, right], 1), None


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (70, 32), (200, 200)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_tiles_change_nothing_for_a_network_that_sees_one_pixel(
    size: tuple[int, int], overlap: float
) -> None:
    image = torch.rand(1, 2, 70, 90, generator=torch.Generator().manual_seed(1))
    whole = probabilities(Pointwise(), image, Tiling((70, 90)))
    assert whole.shape == (1, 4, 70, 90)
    assert whole.sum(1).sub(1).abs().max() < 1e-6
    for flips in (False, True):
        seen = probabilities(Pointwise(), image, Tiling(size, overlap), flips)
        torch.testing.assert_close(seen, whole, rtol=0, atol=1e-6)
        assert torch.equal(seen.argmax(1), whole.argmax(1))


def test_tiles_cover_an_axis() -> None:
    assert tile_starts(100, 40, 0.5) == [0, 20, 40, 60]
    assert tile_starts(100, 40, 0.0) == [0, 30, 60]  # evenly spread, none beyond the end
    assert tile_starts(40, 40, 0.5) == [0]
    assert tile_starts(41, 40, 0.9) == [0, 1]


def test_the_middle_of_a_tile_weighs_more_than_its_edge() -> None:
    image = torch.zeros(1, 1, 32, 48)
    seen = probabilities(Ramp(), image, Tiling((32, 32)))[0, 1, 16]
    left, right = (torch.sigmoid(2 * torch.linspace(-1, 1, 32)) for _ in range(2))
    assert seen[:16].tolist() == pytest.approx(left[:16].tolist())  # one tile alone
    assert seen[32:].tolist() == pytest.approx(right[16:].tolist())
    # pixel 24 is 8.5 and 7.5 pixels from the middles, of a sigma of 4
    first, second = math.exp(-(8.5**2) / 32), math.exp(-(7.5**2) / 32)
    mixed = (first * left[24] + second * right[8]) / (first + second)
    assert float(seen[24]) == pytest.approx(float(mixed))
    assert abs(float(seen[17] - left[17])) < 0.01  # the middle of the first, edge of the second


def test_flips_cancel_what_is_not_symmetric() -> None:
    image = torch.zeros(1, 1, 8, 10)
    tiling = Tiling((8, 10))
    assert probabilities(Ramp(), image, tiling)[0, 1, 0, 9] > 0.8
    seen = probabilities(Ramp(), image, tiling, flips=True)
    assert (seen - 0.5).abs().max() < 1e-6


# cleaning ---------------------------------------------------------------------------------------


def ball_with_a_hole() -> Labels:
    """A box of class 1 with a hole in which there is class 2, and a speck of class 1."""
    labels = np.zeros((7, 9, 9), dtype=np.uint8)
    labels[1:6, 1:6, 1:6] = 1
    labels[3, 2:5, 2:5] = 0
    labels[3, 3, 3] = 2
    labels[5, 8, 8] = 1
    return labels


def test_components_and_holes_by_hand() -> None:
    labels = ball_with_a_hole()
    assert int((labels == 1).sum()) == 125 - 9 + 1
    sizes = {
        step: int(cleaned(labels, 1, step, True).sum())
        for step in ("none", "largest", "fill", "both")
    }
    # the hole of 9 holds a voxel of class 2, which stays
    assert sizes == {"none": 117, "largest": 116, "fill": 125, "both": 124}
    after = apply_steps(labels, {1: "both"}, True)
    assert (after[3, 3, 3], after[5, 8, 8], after[3, 2, 2]) == (2, 0, 1)
    assert labels[5, 8, 8] == 1  # a copy
    assert apply_steps(np.zeros_like(labels), {1: "both"}, True).sum() == 0


def test_corners_connect_a_mask_and_close_no_hole() -> None:
    corner = np.zeros((4, 4, 4), dtype=bool)
    corner[0, 0, 0] = corner[1, 1, 1] = corner[3, 3, 3] = True
    assert largest_component(corner).sum() == 2
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    assert filled(ring).all()
    ring[0, 0] = False  # the hole meets the outside at a corner: still a hole, by 4 neighbours
    assert filled(ring).sum() == 8
    ring[0, 1] = False
    assert filled(ring).sum() == 6


def test_slices_that_are_no_volume_are_cleaned_alone() -> None:
    labels = ball_with_a_hole()
    labels[:, 2, 2] = 0  # a channel of the volume: no hole in 3-D, a hole in each slice
    assert cleaned(labels, 1, "fill", True)[2, 2, 2] == 0
    assert cleaned(labels, 1, "fill", False)[2, 2, 2] == 1
    assert cleaned(labels, 1, "largest", False)[5, 8, 8] == 0


def test_a_step_is_chosen_only_where_it_is_better() -> None:
    nan = float("nan")
    assert choose_step({"none": 0.8, "largest": 0.8, "fill": 0.8, "both": 0.8}) == "none"
    assert choose_step({"none": 0.8, "largest": 0.7, "fill": 0.9, "both": 0.9}) == "fill"
    assert choose_step({"none": nan, "largest": nan, "fill": nan, "both": nan}) == "none"


# a summary --------------------------------------------------------------------------------------


def case(patient: str, overlap: int, hd95: float, row: SliceRow, **changes: object) -> Case:
    """One of 10 voxels of truth and 10 of prediction, of which ``overlap`` agree."""
    counts = np.array([[100, 10 - overlap], [10 - overlap, overlap]])
    base = Case(
        patient=patient,
        series=f"{patient}-1",
        modality="CT",
        scanner="",
        z_step=5.0,
        slices=3,
        scores=Scores(
            counts=counts, hd95=np.array([np.nan, hd95]), nsd=np.array([np.nan, overlap / 10])
        ),
        blind=np.array([[0, 0], [6, 20]]),
        bins=toy(0.9, 90),
        drawn=row,
        mask=b"",
    )
    return replace(base, **changes)


@pytest.fixture
def row(made: Config) -> SliceRow:
    return read_index(made.shards)[0]


def test_a_summary_by_hand(row: SliceRow) -> None:
    absent = Scores(
        counts=np.array([[50, 0], [0, 0]]), hd95=np.full(2, np.nan), nsd=np.full(2, np.nan)
    )
    cases = [
        case("a", 10, 0.0, row, scanner="SIEMENS", z_step=1.0),
        case("a", 6, 4.0, row, scanner="SIEMENS", z_step=1.5),
        case("b", 2, np.nan, row, z_step=5.0),
        case("c", 0, 1.0, row, scores=absent, z_step=float("nan"), modality="MR"),
    ]
    seen = summarise(cases, ("background", "organ"), EvaluateConfig(bootstrap=100), 0)
    organ = seen["classes"]["organ"]
    assert organ["dice"]["value"] == pytest.approx((1 + 0.6 + 0.2) / 3)
    assert seen["dice"]["organ"] == organ["dice_pooled"]["value"] == pytest.approx(36 / 60)
    assert seen["dice_patient_mean"]["organ"] == pytest.approx((0.8 + 0.2) / 2)
    assert seen["dice_constant_mask"]["organ"] == pytest.approx(0.3)
    assert organ["iou"]["value"] == pytest.approx((1 + 6 / 14 + 2 / 18) / 3, abs=1e-4)
    assert organ["hd95_mm"] == {"value": 2.0, "low": None, "high": None}  # of one patient
    assert organ["dice"]["low"] < organ["dice"]["value"] < organ["dice"]["high"]
    assert [organ[k] for k in ("present", "missed", "invented", "absent")] == [3, 0, 0, 1]
    assert seen["confusion"] == [[350, 12], [12, 18]]
    strata = seen["strata"]
    assert list(strata["scanner"]) == ["SIEMENS", "unknown"]
    assert list(strata["slice thickness"]) == ["up to 1.5 mm", "3 to 5 mm", "unknown"]
    assert (strata["scanner"]["SIEMENS"]["patients"], strata["scanner"]["SIEMENS"]["cases"]) == (
        1,
        2,
    )
    assert strata["modality"]["MR"]["classes"]["organ"]["dice"]["value"] is None
    assert seen["calibration"]["ece"]["value"] == pytest.approx(0, abs=1e-4)
    assert [c.state(1) for c in cases] == ["present", "present", "present", "absent"]
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen


def told(value: float | None, low: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": None}


@pytest.mark.parametrize(
    ("dice", "blind", "doubt"),
    [
        (told(0.382, 0.30), 0.371, "perhaps no better"),
        (told(0.382, 0.38), 0.371, ""),
        (told(0.382), 0.371, ""),  # one patient: no interval
        (told(0.371, 0.30), 0.371, "no better"),
        (told(0.2), 0.371, "no better"),
        (told(None), 0.371, ""),
        (told(0.2, 0.1), None, ""),
    ],
)
def test_a_network_is_held_against_the_constant_mask(
    dice: dict[str, float | None], blind: float | None, doubt: str
) -> None:
    assert doubt_of({"dice_pooled": dice, "dice_constant_mask": told(blind)}) == doubt


def test_worst_median_and_best(row: SliceRow) -> None:
    cases = [case(f"p{n}", n, 1.0, row) for n in (3, 9, 1, 5, 7)]
    assert [(rank, c.patient) for rank, c in ranked(cases)] == [
        ("worst", "p1"), ("median", "p5"), ("best", "p9"),
    ]  # fmt: skip
    assert [rank for rank, _ in ranked(cases[:1])] == ["the only one"]
    assert [rank for rank, _ in ranked(cases[:2])] == ["worst", "best"]
    many = [case(f"p{n}", n, 1.0, row) for n in range(9)]
    assert [c.patient for _, c in ranked(many)] == ["p0", "p1", "p2", "p4", "p8"]


# the whole --------------------------------------------------------------------------------------


def test_cases_are_in_order_and_know_where_they_lie(made: Config) -> None:
    rows = labelled_rows(made)
    stacks = stacks_of(rows[::-1])
    assert [len(stack) for stack in stacks] == [4] * 8
    for stack in stacks:
        assert len({r.series for r in stack}) == 1
        assert [r.slice_index for r in stack] == [0, 1, 2, 3]
        grid = grid_of(stack)
        assert grid is not None
        lengths = np.linalg.norm(grid.steps, axis=1)
        assert lengths.tolist() == pytest.approx([5.0, 2.6, 2.6], abs=1e-6)  # of the phantom
    assert grid_of((replace(rows[0], spacing=(1.0, 1.0, float("nan"))),)) is None
    assert grid_of((replace(rows[0], affine=()),)) is None


@pytest.mark.usefixtures("own_handlers")
def test_evaluation_of_a_run(trained: Config, caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate_job(trained)
    doubts = {name: doubt_of(of) for name, of in result["classes"].items()}
    assert doubts["lesion"]  # 20 steps are too few for it
    for name, doubt in doubts.items():
        said = f"{name} is {doubt} than a mask that ignores the image: pooled Dice "
        assert (said in caplog.text) == bool(doubt)
    place = RunDir(trained.out).evaluation
    assert json.loads(place.read_text()) == result
    assert (result["split"], result["patients"], result["cases"], result["slices"]) == (
        *("test", 2, 2, 8),
    )
    names = trained.data.classes[1:]
    for key in ("dice", "dice_patient_mean", "dice_constant_mask"):
        assert list(result[key]) == list(names)
    voxels = sum(b["voxels"] for b in result["calibration"]["bins"])
    assert voxels == np.sum(result["confusion"]) == 8 * 48 * 48
    assert set(result["postprocess"]["chosen"]) == set(names)
    with place.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == [*names, *names]
    assert sum(int(line["truth_voxels"]) for line in lines) == np.sum(result["confusion"][1:])
    assert result["held_out"] == sorted({line["patient"] for line in lines})
    page = place.with_suffix(".html").read_text()
    assert {by: len(of) for by, of in result["strata"].items()} == dict.fromkeys(
        ("scanner", "modality", "slice thickness"), 1
    )
    assert "<h2>By " not in page  # it would be the first table again
    assert "No table by scanner (" in page
    assert "modality (CT)" in page
    for name, doubt in doubts.items():
        said = f"<strong>{name}</strong> is {doubt} than a mask that ignores the image."
        assert (said in page) == bool(doubt)
    assert page.count("data:image/png") == 8  # two cases of two pictures and what lies over them
    assert not re.search(r"(src|href)=\"(?!data:image/png|#)", page)
    assert {line["patient"] for line in lines} <= set(re.findall(r"<code>([0-9a-f]+)</code>", page))


@pytest.mark.usefixtures("own_handlers")
def test_what_was_scored_is_not_scored_again_unless_something_changed(
    trained: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = evaluate_job(trained)
    scored: list[str] = []

    def spy(*arguments: object) -> Case:
        scored.append("case")
        return score_stack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "score_stack", spy)
    with caplog.at_level(logging.INFO, "medpsp"):
        assert evaluate_job(trained) == first
    assert "nothing changed since" in caplog.text
    for text in (
        f"held-out {BY_CASE} (test, 2 patients, 8 slices)",
        f"{POOLED}: ",
        *first["held_out"],
    ):
        assert text in caplog.text
    assert scored == []
    place = RunDir(trained.out).evaluation
    place.with_suffix(".csv").write_text("other")
    assert evaluate_job(trained) == first
    place.unlink()
    assert evaluate_job(trained) == first
    assert evaluate_job(trained.model_copy(update={"seed": 99}))["made_of"] != first["made_of"]
    assert len(scored) == 6


@pytest.mark.usefixtures("own_handlers")
def test_the_network_sees_as_much_as_in_training_unless_told(trained: Config) -> None:
    def scores(**changes: object) -> tuple[object, object]:
        settings = trained.evaluate.model_copy(update={"postprocess": "none", **changes})
        found = evaluate_job(trained.model_copy(update={"evaluate": settings}))
        return found["classes"], found["calibration"]["bins"]

    usual = scores()
    assert scores(size=trained.train.size) == usual
    assert scores(size=(64, 64)) != usual
    assert scores(flips=True) != usual


@pytest.mark.usefixtures("own_handlers")
def test_scores_belong_to_files_of_the_same_weights_and_settings(trained: Config) -> None:
    settings = trained.evaluate.model_copy(update={"postprocess": "none"})
    config = trained.model_copy(update={"evaluate": settings})
    model, _ = load_trained(config)
    digest, scores = weights_digest(model), evaluate_job(config)
    assert of_these_files(scores, config, digest)
    for damaged in ({}, [], {**scores, "settings": None}):
        assert not of_these_files(damaged, config, digest)
    assert not of_these_files({**scores, "postprocess": {"chosen": {}}}, config, digest)
    for change in ({"flips": True}, {"overlap": 0.1}, {"size": [9, 9]}):
        other = {**scores, "settings": {**scores["settings"], **change}}
        assert not of_these_files(other, config, digest)
    first, of = next(iter(scores["classes"].items()))
    of["dice_pooled"] |= {"value": 0.25, "low": 0.1}
    of["dice_constant_mask"] |= {"value": 0.5}
    said = "no better than a mask that ignores the image: pooled Dice of 2 held-out patients 0.250"
    assert doubts(config, scores, digest)[first] == f"{said}, that mask 0.500"
    assert doubts(config, scores, "others") == doubts(config, None, digest) == {}
    of["dice_pooled"] |= {"value": 0.9, "low": 0.8}
    assert first not in doubts(config, scores, digest)
    model.state_dict()["classify.bias"][0] += 1e-3  # the same memory
    assert not of_these_files(scores, config, weights_digest(model))


@pytest.mark.usefixtures("own_handlers")
def test_what_may_show_a_name_is_scored_and_never_drawn(
    trained: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import evalpage

    drawn: list[str] = []
    draw, find = evalpage.draw_case, evalpage.withheld
    first = stacks_of([r for r in read_index(trained.shards) if r.split == "test"])[0][0].series

    def spy(reader: ShardReader, case: Case) -> Pictures:
        drawn.append(case.series)
        return draw(reader, case)

    def withheld(columns: Columns, burned_in: str) -> dict[int, str]:
        row = columns.series.tolist().index(first)
        return {**find(columns, burned_in), row: "may show a name"}

    monkeypatch.setattr(evalpage, "draw_case", spy)
    monkeypatch.setattr(evalpage, "withheld", withheld)
    RunDir(trained.out).evaluation.unlink(missing_ok=True)
    result = evaluate_job(trained)
    assert result["cases"] == 2
    page = RunDir(trained.out).evaluation.with_suffix(".html").read_text()
    assert "not shown: may show a name" in page
    assert page.count("data:image/png") == 4
    assert first not in drawn
    assert len(drawn) == 1
    RunDir(trained.out).evaluation.unlink()  # what is held back here is not held back elsewhere
