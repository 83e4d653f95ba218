"""Which slices a step trains on, and what of them becomes a channel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from medpsp.channels import channels_first, neighbours, stacked, window_channels
from medpsp.config import Config
from medpsp.deploy.graph import DeployGraph
from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.stream import Frame, Seen, count_values, segment
from medpsp.dicom.read import Pixels
from medpsp.errors import ShardError
from medpsp.types import Window, World
from shards.crops import check_classes, jittered, network_channels
from shards.dataset import Inputs, train_batches, whole_slices
from shards.index import SliceRow, read_index
from shards.reader import ShardReader
from shards.samples import Sample


@pytest.fixture
def rows(made: Config) -> tuple[SliceRow, ...]:
    return read_index(made.shards)


def changed(made: Config, model: dict[str, Any], **train: Any) -> Config:
    stages = [{"name": "a", "steps": 6, "lr": 1e-3, "augment": train.pop("level", "none")}]
    tree = made.model_dump()
    tree["model"].update(model)
    tree["train"].update({"stages": stages, "batch_size": 4, "size": [48, 48], **train})
    return Config.model_validate(tree)


def test_neighbours_at_holes_and_ends() -> None:
    """Slices at places 0, 1, 4, 5: the hole at 2 takes 1, that at 3 takes 4; ends repeat."""
    places = {0: 10, 1: 11, 4: 14, 5: 15}
    assert neighbours(places, 1, 1) == (10, 11, 11)
    assert neighbours(places, 1, 2) == (10, 10, 11, 11, 14)
    assert neighbours(places, 5, 1) == (14, 15, 15)
    assert neighbours(places, 4, 0) == (14,)


def test_channels_of_grey_and_colour() -> None:
    values = np.array([[0, 50, 100]], dtype=np.int16)
    windows = [Window(center=50, width=100), Window(center=75, width=50)]
    first, second = window_channels(values, windows, inverted=False)
    assert first.tolist() == [[0, 0.5, 1]]
    assert second.tolist() == [[0, 0, 1]]
    both = stacked([first, second])
    assert both.shape == (1, 3, 2)
    assert channels_first(both, 2)[1].tolist() == [[0, 0, 1]]
    assert stacked([first]) is first
    assert channels_first(first, 3).shape == (3, 1, 3)
    colour = np.zeros((2, 2, 3), np.float32)
    assert stacked([colour, colour]).shape == (2, 2, 6)


def test_context_and_windows_are_channels(made: Config, rows: tuple[SliceRow, ...]) -> None:
    """Two windows of three slices: the slice before, the slice, the slice behind."""
    windows = [{"center": 40, "width": 400}, {"center": 0, "width": 100}]
    config = changed(made, {"windows": windows, "context": 1})
    assert config.model.channels == 6
    reader = ShardReader(made.shards)
    of_series = sorted((r for r in rows if r.series == rows[0].series), key=lambda r: r.slice_index)
    inputs = Inputs(reader, config, rows)
    for place, row in enumerate(of_series):
        batch = inputs.batch([row])
        assert batch.image.shape == (1, 6, 48, 48)
        near = [of_series[min(max(place + d, 0), len(of_series) - 1)] for d in (-1, 0, 1)]
        for number, neighbour in enumerate(near):
            hu = reader.read(neighbour.bucket, neighbour.slot)[0].astype(np.float32)
            for w, (low, width) in enumerate(((-160, 400), (-50, 100))):
                expected = np.clip((hu - low) / width, 0, 1)
                np.testing.assert_allclose(
                    batch.image[0, 2 * number + w].numpy(), expected, atol=1e-6
                )
    trained = next(iter(train_batches(made.shards, rows, config, World(), (0, 0))))
    assert trained.image.shape == (4, 6, 48, 48)
    (whole, *_) = whole_slices(made.shards, rows, World(), config)
    assert whole.image.shape[1] == 6


def test_three_channels_and_context_repeat_grey(made: Config, rows: tuple[SliceRow, ...]) -> None:
    config = changed(made, {"in_channels": 3, "context": 1})
    image = Inputs(ShardReader(made.shards), config, rows).batch([rows[1]]).image[0]
    assert image.shape[0] == 9
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[3], image[5])
    assert not torch.equal(image[0], image[3])


def test_foreground_is_drawn_as_often_as_asked(made: Config, rows: tuple[SliceRow, ...]) -> None:
    rows = tuple(  # as if every slice but each fourth one were empty
        replace(row, histogram=(48 * 48, *[0] * (len(row.histogram) - 1))) if n % 4 else row
        for n, row in enumerate(rows)
    )
    full = {f"{r.file_id}/{r.frame}" for r in rows if any(r.histogram[1:-1])}
    config = changed(made, {}, foreground=0.75, steps=6)

    def drawn(workers: int, ranks: int) -> list[str]:
        wanted = config.model_copy(
            update={"train": config.train.model_copy(update={"loader_workers": workers})}
        )
        parts = [
            list(train_batches(made.shards, rows, wanted, World(rank=r, size=ranks), (0, 0)))
            for r in range(ranks)
        ]
        return [name for step in zip(*parts, strict=True) for b in step for name in b.samples]

    names = drawn(0, 1)
    assert len(names) == 24
    assert sum(name in full for name in names) >= 18
    assert drawn(1, 1) == drawn(0, 2) == names
    plain = changed(made, {}, foreground=0.0)
    batches = list(train_batches(made.shards, rows, plain, World(), (0, 0)))
    assert Counter(n for b in batches[:4] for n in b.samples).most_common(1)[0][1] == 1


def test_micro_batches_are_parts_of_the_same_batch(
    made: Config, rows: tuple[SliceRow, ...]
) -> None:
    """Of 4 samples in 2 micro-batches, rank 0 of 2 gets the first of each."""
    config = changed(made, {}, accumulate=2)
    whole = next(iter(train_batches(made.shards, rows, config, World(), (0, 0))))
    parts = [
        next(iter(train_batches(made.shards, rows, config, World(rank=r, size=2), (0, 0))))
        for r in range(2)
    ]
    assert [b.samples for b in whole.micro(2)] == [whole.samples[:2], whole.samples[2:]]
    assert parts[0].samples == (whole.samples[0], whole.samples[2])
    assert parts[1].samples == (whole.samples[1], whole.samples[3])
    assert torch.equal(parts[1].image, whole.image[[1, 3]])
    assert torch.equal(parts[1].keys, whole.keys[[1, 3]])


def test_jitter_moves_windows_within_its_share() -> None:
    window = Window(center=40, width=400)
    rng = np.random.default_rng(0)
    found = [jittered((window,), 0.1, rng)[0] for _ in range(200)]
    centres, widths = [w.center for w in found], [w.width for w in found]
    assert 0 <= min(centres) < 5
    assert 75 < max(centres) <= 80
    assert 360 <= min(widths) < 365
    assert 435 < max(widths) <= 440
    assert jittered((window,), 0.0, rng) == (window,)
    other = Window(center=0, width=100)
    one, two, again = jittered((window, other, window), 0.1, rng)
    assert one == again  # grey that is repeated to three channels stays grey
    assert one != window
    assert two != other


def test_a_label_that_is_no_class_is_named() -> None:
    sample = Sample("48x48_int16", (7,), (), inverted=False)
    label = np.array([[0, 1, 255]], np.uint8)
    check_classes(label, 2, sample.bucket, sample.slot)
    with pytest.raises(ShardError, match=r"48x48_int16 slot 7 has label 1, expected 0 to 0 or 255"):
        check_classes(label, 1, sample.bucket, sample.slot)


def test_the_device_gets_what_the_loader_would_have_made(
    made: Config, rows: tuple[SliceRow, ...]
) -> None:
    """`augment_on: device` draws the same; only where it is applied differs."""
    from medpsp.train.warptorch import apply_batch

    here = changed(made, {}, level="high", flips=True)
    there = changed(made, {}, level="high", flips=True, augment_on="device")
    pairs = zip(
        train_batches(made.shards, rows, here, World(), (0, 0)),
        train_batches(made.shards, rows, there, World(), (0, 0)),
        strict=True,
    )
    moved = 0
    for ours, theirs in pairs:
        assert len(theirs.draws) == 4
        image, label = apply_batch(theirs.image, theirs.label, theirs.draws)
        torch.testing.assert_close(image, ours.image, rtol=0, atol=1e-3)
        assert (label != ours.label).float().mean() < 1e-3
        moved += int((label != theirs.label).any())
    assert moved > 2


def test_a_device_sees_neighbours_as_training_does() -> None:
    """Through the window of the middle slice, also where each header has its own."""
    values = np.stack([np.full((2, 2), v, np.int16) for v in (10, 20, 30)])
    windows = tuple(Window(center=c, width=w) for c, w in ((10, 20), (20, 40), (30, 80)))

    class Reader:
        def read_into(self, bucket: str, slot: int, image: np.ndarray) -> None:  # type: ignore[type-arg]
            image[...] = values[slot]

    sample = Sample(bucket="", slots=(0, 1, 2), windows=windows[1:2], inverted=False)
    whole = (slice(None), slice(None))
    trained = network_channels(Reader(), sample, values[1].copy(), whole)  # type: ignore[arg-type]
    fed: list[tuple[np.ndarray, np.ndarray]] = []

    class Model:
        window, header_window, views, given = None, True, (), GraphInput(context=1)

        def masks(self, image: np.ndarray, window: np.ndarray) -> np.ndarray:
            fed.append((image, window))
            return np.zeros((3, 2, 2), np.uint8)

    frames = [Frame(n, n, Pixels(plane, None)) for n, plane in enumerate(values)]
    seen = Seen(modality="MR", headers=windows)
    list(segment(Model(), frames, seen, count_values(frames)))  # type: ignore[arg-type]
    ((image, window),) = fed
    graph = DeployGraph(torch.nn.Identity(), Model.given)
    shown = graph.unit(torch.from_numpy(image), torch.from_numpy(window))
    assert shown[1, :, 0, 0].tolist() == trained[0, 0].tolist()
    assert trained[0, 0].tolist() == pytest.approx([0.25, 0.5, 0.75])
