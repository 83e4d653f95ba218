"""Shards to batches: the same for any number of loader workers and ranks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import groupby

import numpy as np
import pytest
import torch

from launch.phantom import draw
from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.identity import pseudonym
from medpsp.train.augment import AugmentOptions, augment
from medpsp.train.batch import Batch, crop_or_pad
from medpsp.types import World
from shards.dataset import Stream, example_batch, read_unit, stage_rows, train_batches, whole_slices
from shards.index import SliceRow, class_pixels, read_index
from shards.loader import end_workers
from shards.order import epoch_permutation, ordered
from shards.reader import ShardReader


@pytest.fixture
def rows(made: Config) -> tuple[SliceRow, ...]:
    return read_index(made.shards)


def trained_on(made: Config, **train: object) -> Config:
    """Three stages of 5 steps of 4 crops of 32 x 32, with and without augmentation."""
    stages = [
        {"name": "a", "steps": 5, "lr": 1e-3, "fraction": 0.2, "augment": "high"},
        {"name": "b", "steps": 5, "lr": 1e-3, "fraction": 0.6, "augment": "none"},
        {"name": "c", "steps": 5, "lr": 1e-3, "fraction": 1.0, "augment": "low"},
    ]
    tree = made.model_dump()
    tree["train"].update({"stages": stages, **train})
    return Config.model_validate(tree)


def assert_same(ours: Iterable[Batch], theirs: Iterable[Batch]) -> None:
    pairs = list(zip(ours, theirs, strict=True))
    assert pairs
    for one, other in pairs:
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.label, other.label)
        assert one.patients == other.patients
        assert torch.equal(one.keys, other.keys)
        assert one.samples == other.samples


@pytest.mark.parametrize("shuffle", ["full", "shard"])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_loader_workers(
    made: Config, rows: tuple[SliceRow, ...], workers: int, shuffle: str
):
    train = {"shuffle": shuffle, "shuffle_shards": 2}
    alone, several = (trained_on(made, loader_workers=n, **train) for n in (0, workers))
    ours = list(train_batches(made.shards, rows, alone, World(), (0, 0)))
    assert_same(ours, train_batches(made.shards, rows, several, World(), (0, 0)))
    end_workers()
    assert len(ours) == 5
    assert ours[0].image.shape == (4, 1, 32, 32)
    assert ours[0].image.dtype == torch.float32
    assert ours[0].label.shape == (4, 32, 32)
    assert ours[0].label.dtype == torch.uint8
    assert -0.1 <= float(ours[0].image.min()) < float(ours[0].image.max()) <= 1.2  # brightened
    assert len({int(key) for batch in ours for key in batch.keys}) == 20


@pytest.mark.parametrize("size", [[32, 32], [64, 40]])
def test_batches_are_what_the_slow_way_makes(
    made: Config, rows: tuple[SliceRow, ...], size: list[int]
):
    """Whole slice, window, crop, augmentation; one slice at a time."""
    config, reader = trained_on(made, size=size), ShardReader(made.shards)
    chosen = stage_rows(rows, 0.2)
    batches = train_batches(made.shards, rows, config, World(), (0, 0))
    for step, batch in enumerate(batches):
        draw = partial(epoch_permutation, len(chosen), config.seed * 1009)
        keys = ordered(len(chosen), range(step * 4, step * 4 + 4), draw)
        for at, (epoch, number) in enumerate(keys):
            row = chosen[number]
            rng = np.random.default_rng([config.seed, 0, epoch, int(row.file_id, 16) + row.frame])
            cut = crop_or_pad(*read_unit(reader, row), config.train.size, rng)
            options = AugmentOptions(spacing=row.spacing[:2])
            image, label = augment(*cut, "high", rng, options=options)
            np.testing.assert_array_equal(batch.image[at, 0].numpy(), image)
            np.testing.assert_array_equal(batch.label[at].numpy(), label)
            assert batch.patients[at] == row.patient


def test_shuffled_by_shard_few_shards_are_touched_at_a_time(
    made: Config, rows: tuple[SliceRow, ...]
):
    """16 training slices in shards of 6 slots; what comes next was named before it comes."""
    config = trained_on(made, shuffle="shard", shuffle_shards=1)
    chosen = stage_rows(rows, 1.0)
    stream = Stream(ShardReader(made.shards), chosen, config, 2)
    items = [stream.at(range(at, at + 1))[0] for at in range(32)]
    samples = [item.samples[0] for item in items]
    for epoch in (samples[:16], samples[16:]):
        slots = [sample.slot for sample in epoch]
        assert sorted(slots) == sorted(row.slot for row in chosen)
        runs = [shard for shard, _ in groupby(slot // 6 for slot in slots)]
        assert len(runs) == len(set(runs)) > 2
    named = [shard for item in items for shard in item.soon]
    assert set(named) == {(sample.bucket, sample.slot // 6) for sample in samples}
    full = trained_on(made)
    assert Stream(ShardReader(made.shards), chosen, full, 2).at(range(4))[0].soon == ()


def test_a_loader_worker_imports_no_torch():
    """Neither with its task nor with the augmentation, which has a part for torch."""
    code = (
        "import sys, numpy as np, shards.dataset\n"
        "from medpsp.train.augment import AugmentOptions, augment\n"
        "image, label = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.uint8)\n"
        "augment(image, label, 'high', np.random.default_rng(0))\n"
        "print([m for m in ('torch', 'zarr', 'ray', 'pyarrow') if m in sys.modules])\n"
        "import torch; torch.zeros(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shuffle", ["full", "shard"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_shares_of_the_ranks_make_the_batch_of_one(
    made: Config, rows: tuple[SliceRow, ...], size: int, shuffle: str
):
    config = trained_on(made, shuffle=shuffle, shuffle_shards=2)

    def batches(world: World) -> list[Batch]:
        return list(train_batches(made.shards, rows, config, world, (2, 0)))

    whole = batches(World())
    shares = [batches(World(rank=r, size=size)) for r in range(size)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [len(p.label) for p in parts] == [4 // size] * size
        assert torch.equal(torch.cat([p.image for p in parts]), batch.image)
        assert torch.equal(torch.cat([p.label for p in parts]), batch.label)
        assert tuple(name for p in parts for name in p.patients) == batch.patients


def test_going_on_within_a_stage_gives_the_tail(made: Config, rows: tuple[SliceRow, ...]):
    config = trained_on(made)
    straight = list(train_batches(made.shards, rows, config, World(), (0, 0)))
    assert_same(straight[3:], train_batches(made.shards, rows, config, World(), (0, 3)))


def test_an_epoch_holds_every_slice_once_and_only_of_its_stage(
    made: Config, rows: tuple[SliceRow, ...], key: bytes
):
    """At 20 % only patient 3 trains: its 4 slices fill each batch of 4."""
    batches = list(train_batches(made.shards, rows, trained_on(made), World(), (0, 0)))
    third = pseudonym(key, "patient", "PHANTOM003")
    assert [b.patients for b in batches] == [(third,) * 4] * 5
    # at 100 %, 16 slices: four steps make an epoch
    batches = list(train_batches(made.shards, rows, trained_on(made), World(), (2, 0)))
    seen = Counter(name for b in batches[:4] for name in b.patients)
    assert seen == {pseudonym(key, "patient", f"PHANTOM00{n}"): 4 for n in (2, 3, 6, 7)}


def test_epochs_stages_and_seeds_crop_and_augment_anew(made: Config, rows: tuple[SliceRow, ...]):
    config = trained_on(made)

    def pixels(config: Config, stage: int) -> list[bytes]:
        batches = train_batches(made.shards, rows, config, World(), (stage, 0))
        return [image.numpy().tobytes() for b in batches for image in b.image]

    first = pixels(config, 0)
    assert len(set(first)) == 20  # 4 slices, five epochs: no two alike
    assert pixels(config, 0) == first
    assert set(pixels(config.model_copy(update={"seed": 1}), 0)).isdisjoint(first)


def test_without_augmentation_a_crop_is_a_piece_of_the_slice(
    made: Config, rows: tuple[SliceRow, ...], key: bytes
):
    config = trained_on(made, size=[48, 48])
    (batch, *_) = train_batches(made.shards, rows, config, World(), (1, 0))
    for image, label, name in zip(batch.image, batch.label, batch.patients, strict=True):
        number = next(n for n in (3, 6) if name == pseudonym(key, "patient", f"PHANTOM00{n}"))
        hu, truth = draw_small(number)
        unit = ((hu + 160) / 400).clip(0, 1)  # window 40/400: -160 HU is black, 240 HU white
        match = [i for i in range(4) if np.array_equal(truth[i], label.numpy())]
        assert match
        assert any(np.allclose(unit[i], image[0].numpy(), atol=1e-6) for i in match)


def draw_small(number: int) -> tuple[np.ndarray, np.ndarray]:
    from launch.phantom import Phantom

    hu, label = draw(Phantom(shape=(4, 48, 48)), number)
    return hu.astype(np.float32), label


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_whole_slices_cover_each_row_once_over_the_ranks(
    made: Config, rows: tuple[SliceRow, ...], size: int
):
    reader = ShardReader(made.shards)
    expected = Counter(read_unit(reader, row)[0].tobytes() for row in rows)
    found: Counter[bytes] = Counter()
    for rank in range(size):
        batches = list(whole_slices(made.shards, rows, World(rank=rank, size=size), made))
        assert all(len(b.label) <= 8 and b.image.shape[2:] == (48, 48) for b in batches)
        found += Counter(image.numpy().tobytes() for b in batches for image in b.image)
    assert sum(found.values()) == 32
    assert found == expected


def test_stages_are_nested_by_the_hash_of_the_patient(rows: tuple[SliceRow, ...], key: bytes):
    def patients(fraction: float) -> set[str]:
        return {row.patient for row in stage_rows(rows, fraction)}

    def named(*numbers: int) -> set[str]:
        return {pseudonym(key, "patient", f"PHANTOM00{n}") for n in numbers}

    assert patients(0.2) == named(3)
    assert patients(0.6) == named(3, 6)
    assert patients(1.0) == named(2, 3, 6, 7)
    assert patients(0.01) == named(3)  # nobody is below: the lowest one stands in
    sizes = [len(stage_rows(rows, f / 20)) for f in range(1, 21)]
    assert sizes == sorted(sizes)


def test_without_a_labelled_training_slice_there_is_no_stage(rows: tuple[SliceRow, ...]):
    with pytest.raises(ShardError, match="no labelled training slice"):
        stage_rows([row for row in rows if row.split != "train"], 1.0)


def test_examples_are_the_slices_with_most_foreground_one_a_patient(
    made: Config, rows: tuple[SliceRow, ...], key: bytes
):
    val = [row for row in rows if row.split == "val"]
    batch = example_batch(made.shards, val, trained_on(made, size=[48, 48]))
    best = {}
    for number in (1, 4):
        truth = draw_small(number)[1]
        best[pseudonym(key, "patient", f"PHANTOM00{number}")] = max(
            truth, key=lambda mask: int((mask > 0).sum())
        )
    order = sorted(best, key=lambda name: int((best[name] > 0).sum()), reverse=True)
    assert batch.patients == tuple(order)
    for label, name in zip(batch.label.numpy(), order, strict=True):
        np.testing.assert_array_equal(label, best[name])


def test_class_pixels_add_up(rows: tuple[SliceRow, ...]):
    truth = sum(np.bincount(draw_small(n)[1].ravel(), minlength=4) for n in range(8))
    assert class_pixels(rows, 4).tolist() == np.asarray(truth).tolist()
