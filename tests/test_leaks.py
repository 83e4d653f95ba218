"""The same patient, slice or scan in two splits is found, and different ones are left in peace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from launch.phantom import Phantom, draw, write_series
from medpsp.config import Config
from medpsp.identity import split_of
from shards import leaks
from shards.check import check_shards
from shards.dhash import BANDS, bands, difference_hash, tells
from shards.index import read_index
from shards.leaks import likeness
from tests.damage import rewrite_index

Values = NDArray[Any]
CT, SMALL = Phantom(shape=(8, 128, 128)), Phantom(shape=(8, 64, 64))
MR = Phantom(shape=(8, 128, 128), modality="MR")


def named(key: bytes, split: str, count: int) -> list[str]:
    """PatientIDs of a split."""
    names = (f"P{number}" for number in range(1000))
    return [name for name in names if split_of(key, name, 0.25, 0.25) == split][:count]


def halved(values: Values) -> Values:
    return values.reshape(len(values), 64, 2, 64, 2).mean((2, 4)).round().astype(np.int16)


def windowed(values: Values, centre: float, width: float) -> Values:
    return (((values - centre) / width + 0.5).clip(0, 1) * 255).round().astype(np.int16)


def noisy(values: Values) -> Values:
    noise = np.random.default_rng(1).normal(0, 14, values.shape)  # 1 % of the range
    return (values + noise).round().astype(np.int16)


COPIES: dict[str, tuple[Callable[[Values], Values], Phantom]] = {
    "exact": (lambda values: values, CT),
    "8 bits": (lambda values: windowed(values, 150, 2400), MR),
    "window": (lambda values: windowed(values, 40, 400), MR),
    "noise": (noisy, CT),
    "half the size": (halved, SMALL),
}


@pytest.fixture(scope="module")
def leaky(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., Config],
    key: bytes,
    ray_once: None,
) -> tuple[Config, list[str]]:
    """Five phantoms in train with a copy each in val, and three others in val and in test."""
    from shards.build import build_shards

    root = tmp_path_factory.mktemp("leaky")
    copies = named(key, "val", 8)
    for number, patient in enumerate(named(key, "train", 5)):
        values, _ = draw(CT, number)
        write_series(root / "dicom" / patient, patient, values, CT)
        change, phantom = list(COPIES.values())[number]
        write_series(root / "dicom" / copies[number], copies[number], change(values), phantom)
    for number, patient in enumerate([*copies[5:], *named(key, "test", 3)]):
        write_series(root / "dicom" / patient, patient, draw(CT, 50 + number)[0], CT)
    config = make_config(root, root / "out", labels=None, unlabelled="keep", shard_slices=32)
    build_shards(config)
    return config, copies


def test_planted_copies_are_found_and_nothing_else(leaky: tuple[Config, list[str]]):
    problems = list(check_shards(leaky[0].shards))
    assert sorted(problem.kind for problem in problems) == ["copy"] * 4 + ["leak"]
    rows = {(row.patient, row.split) for row in read_index(leaky[0].shards)}
    found = [
        {f"{p} ({s})" for p, s in rows if f"{p} ({s})" in problem.text} for problem in problems
    ]
    assert all(len(pair) == 2 for pair in found)  # one of train, one of val
    assert len(set.union(*found)) == 10  # five different pairs
    (exact,) = (problem for problem in problems if problem.kind == "leak")
    assert exact.text.startswith("8 equal slices in series ")
    assert "show the same pictures, for example 128x128_int16 slot " in problems[1].text


def test_copies_within_a_split_are_no_leak(leaky: tuple[Config, list[str]], tmp_path: Path):
    import shutil

    root = tmp_path / "shards"
    shutil.copytree(leaky[0].shards, root)
    rewrite_index(root, lambda rows: [replace(row, split="train") for row in rows])
    assert list(leaks.find_leaks(root)) == []


def test_a_patient_in_two_splits(copied: Config):
    rows = read_index(copied.shards)
    patient, split = rows[0].patient, rows[0].split
    other = "val" if split != "val" else "test"
    rewrite_index(copied.shards, lambda rows: [replace(rows[0], split=other), *rows[1:]])
    texts = [problem.text for problem in check_shards(copied.shards) if problem.kind == "leak"]
    assert texts == [f"patient {patient} is in {' and '.join(sorted([split, other]))}"]


def test_equal_slices_of_one_value_say_nothing(copied: Config):
    def blank(rows: list[Any]) -> list[Any]:
        return [replace(row, crc32c=5, dhash="0" * 64) for row in rows]

    rewrite_index(copied.shards, blank)
    assert list(leaks.find_leaks(copied.shards)) == []


def test_bands_are_blocks_of_four_rows_and_eight_columns():
    bits = np.zeros((16, 16), np.uint8)
    bits[4:8, 8:] = 1  # second group of rows, right half
    (found,) = bands([np.packbits(bits).tobytes().hex()])
    assert found.tolist() == [0, 0, 0, 2**32 - 1, 0, 0, 0, 0]
    assert len(found) == BANDS


def test_bands_of_few_or_nearly_all_bits_tell_nothing():
    counts = [0, 6, 7, 16, 25, 26, 32]
    found = np.array([2**count - 1 for count in counts], np.uint32)
    assert tells(found).tolist() == [False, False, True, True, True, False, False]


def test_a_window_spoils_only_the_bands_that_it_clips():
    rng = np.random.default_rng(3)
    values = np.kron(rng.integers(-15, 15, (16, 17)) * 10, np.ones((8, 8)))
    values[64:] += 3000  # all above the window
    one, other = (bands([difference_hash(v)])[0] for v in (values, windowed(values, 0, 400)))
    assert (one == other).tolist() == [True] * 4 + [False] * 4


def test_detail_goes_with_a_copy_and_with_nothing_else():
    one, other = (draw(CT, seed)[0][4].astype(np.float32) for seed in (1, 2))
    assert likeness(one, one) == pytest.approx(1)
    assert likeness(one, 7 - 2 * one) == pytest.approx(-1)
    assert likeness(one, windowed(one, 40, 400).astype(np.float32)) > 0.9
    assert abs(likeness(one, other)) < 0.12
    assert likeness(one[:15], one[:15]) == 0  # too small
    assert likeness(one, np.zeros_like(one)) == 0


def test_two_series_of_one_patient_or_split_are_no_pair():
    heads = [
        leaks.Head("a", "1", "train"),
        leaks.Head("a", "2", "val"),
        leaks.Head("b", "3", "val"),
        leaks.Head("c", "4", "val"),
    ]
    pairs = leaks._Pairs(heads)
    keys, series = np.array([9, 9, 9, 9, 9, 8], np.uint32), np.array([3, 1, 2, 0, 0, 0], np.uint32)
    assert leaks._counted(pairs.of(keys, series)) == {(0, 2): 1, (0, 3): 1}
    assert leaks._counted(pairs.of(keys[:0], series[:0])) == {}
