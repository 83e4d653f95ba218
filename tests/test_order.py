"""Which sample comes when, for any number of ranks."""

from __future__ import annotations

from functools import partial
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import (
    batch_positions,
    epoch_permutation,
    ordered,
    remembered,
    shard_permutation,
    shares,
)


def sample_order(count: int, seed: int, positions: range) -> list[tuple[int, int]]:
    return ordered(count, positions, partial(epoch_permutation, count, seed))


def test_positions_of_a_step_are_shared_in_contiguous_parts():
    assert list(batch_positions(step=2, batch_size=6, rank=0, size=1)) == [12, 13, 14, 15, 16, 17]
    assert [list(batch_positions(2, 6, rank, 3)) for rank in range(3)] == [
        [12, 13],
        [14, 15],
        [16, 17],
    ]


@pytest.mark.parametrize(("batch", "size"), [(6, 4), (1, 2), (7, 3)])
def test_a_batch_that_the_ranks_cannot_share_is_refused(batch: int, size: int):
    with pytest.raises(ValueError, match=f"batch of {batch} cannot be shared by {size} ranks"):
        batch_positions(0, batch, 0, size)


@pytest.mark.parametrize("batch", [12, 24])
@pytest.mark.parametrize("step", [0, 1, 7, 1000])
def test_the_global_batch_is_the_same_list_for_any_number_of_ranks(batch: int, step: int):
    def union(size: int) -> list[tuple[int, int]]:
        return [
            item
            for rank in range(size)
            for item in sample_order(31, 5, batch_positions(step, batch, rank, size))
        ]

    alone = union(1)
    assert len(alone) == batch
    for size in (2, 3, 4, 6, 12):
        assert union(size) == alone


@given(count=st.integers(1, 40), seed=st.integers(0, 2**63), epochs=st.integers(1, 4))
def test_every_sample_comes_once_an_epoch(count: int, seed: int, epochs: int):
    stream = sample_order(count, seed, range(count * epochs))
    for epoch in range(epochs):
        part = stream[epoch * count : (epoch + 1) * count]
        assert {e for e, _ in part} == {epoch}
        assert sorted(sample for _, sample in part) == list(range(count))


@given(count=st.integers(1, 20), batch=st.integers(1, 9), cut=st.integers(0, 12))
def test_going_on_from_a_step_gives_the_tail_of_the_straight_run(count: int, batch: int, cut: int):
    def run(first: int) -> list[tuple[int, int]]:
        return [
            item
            for step in range(first, 12)
            for item in sample_order(count, 3, batch_positions(step, batch, 0, 1))
        ]

    assert run(cut) == run(0)[cut * batch :]
    # the stream has no seams at epochs: it equals one draw over all positions
    assert run(0) == sample_order(count, 3, range(12 * batch))


def test_epochs_and_seeds_differ_and_repeat():
    first = epoch_permutation(50, 1, 0).tolist()
    assert epoch_permutation(50, 1, 0).tolist() == first
    assert epoch_permutation(50, 1, 1).tolist() != first
    assert epoch_permutation(50, 2, 0).tolist() != first


def test_the_permutation_is_pinned():
    """Philox is the same on every platform; a change here makes every resumed run jump."""
    assert epoch_permutation(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert sample_order(3, 7, range(2, 7)) == [(0, 0), (1, 0), (1, 2), (1, 1), (2, 2)]


# shuffled shard by shard

SHARDS = [7, 7, 7, 2, 2, 2, 5, 5, 9]  # of nine samples


def test_with_one_shard_at_a_time_each_comes_whole():
    order = shard_permutation(np.array(SHARDS), 3, 0, 1).tolist()
    assert sorted(order) == list(range(9))
    runs = [(shard, len(list(run))) for shard, run in groupby(SHARDS[n] for n in order)]
    assert sorted(runs) == [(2, 3), (5, 2), (7, 3), (9, 1)]


def test_with_all_shards_together_every_order_can_come():
    """Of three samples in three shards, each of the six orders."""
    found = {tuple(shard_permutation(np.arange(3), 0, e, 3).tolist()) for e in range(60)}
    assert len(found) == 6


def test_shards_that_are_together_are_mixed():
    """Of two shards of ten samples, all of one before all of the other is one chance in 92,378."""
    order = shard_permutation(np.repeat([4, 8], 10), 3, 0, 2).tolist()
    assert {n // 10 for n in order[:10]} == {n // 10 for n in order[10:]} == {0, 1}


def test_what_is_together_keeps_the_order_that_was_drawn():
    """Sorting by group is stable: else the order would be that of the machine's sort."""
    rng = np.random.Generator(np.random.Philox(key=[3, 0]))
    first, second = rng.permutation(2).argsort()  # of the two shards, odd samples and even ones
    drawn = rng.permutation(5000)
    expected = [*drawn[drawn % 2 == first], *drawn[drawn % 2 == second]]
    assert shard_permutation(np.arange(5000) % 2, 3, 0, 1).tolist() == expected


@given(
    shards=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    together=st.integers(1, 14),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**63),
)
def test_few_shards_are_touched_at_a_time(shards: list[int], together: int, epoch: int, seed: int):
    order = shard_permutation(np.array(shards), seed, epoch, together).tolist()
    assert sorted(order) == list(range(len(shards)))
    seen = [shards[n] for n in order]
    # each group of shards, in the order of their first sample, is used up before the next begins
    first_seen = list(dict.fromkeys(seen))
    for at in range(0, len(first_seen), together):
        group = set(first_seen[at : at + together])
        members = [n for n, shard in enumerate(seen) if shard in group]
        assert members == list(range(members[0], members[-1] + 1))


def test_shard_order_repeats_and_differs_by_epoch_and_seed():
    shards = np.repeat(np.arange(10), 5)
    first = shard_permutation(shards, 1, 0, 2).tolist()
    assert shard_permutation(shards, 1, 0, 2).tolist() == first
    assert shard_permutation(shards, 1, 1, 2).tolist() != first
    assert shard_permutation(shards, 2, 0, 2).tolist() != first
    assert shard_permutation(np.array([4, 4, 8, 8]), 0, 0, 1).tolist() == [1, 0, 3, 2]


def test_a_stream_of_any_permutation_has_every_sample_once_an_epoch():
    calls = []

    def backwards(epoch: int) -> np.ndarray:
        calls.append(epoch)
        return np.arange(3)[::-1] if epoch % 2 else np.arange(3)

    kept = remembered(backwards)
    stream = [item for at in range(0, 12, 2) for item in ordered(3, range(at, at + 2), kept)]
    assert [sample for _, sample in stream] == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]
    assert [epoch for epoch, _ in stream] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert calls == [0, 1, 2, 3]  # once an epoch, not once a step


def test_a_step_draws_no_permutation_anew():
    drawn = []

    @remembered
    def permutation(epoch: int) -> np.ndarray:
        drawn.append(epoch)
        return epoch_permutation(12, 987, epoch)

    for step in range(30):  # 12 samples: 5 steps are two epochs
        ordered(12, batch_positions(step, 5, 0, 1), permutation)
    assert drawn == list(range(13))


def test_two_epochs_are_kept_in_four_bytes_a_sample():
    """The look ahead comes between two batches: two epochs in turn, each drawn once."""
    drawn = []

    @remembered
    def permutation(epoch: int) -> np.ndarray:
        drawn.append(epoch)
        return epoch_permutation(3, 0, epoch)

    assert [permutation(epoch).dtype for epoch in (0, 1, 0, 1, 2)] == [np.int32] * 5
    assert drawn == [0, 1, 2]
    permutation(0)  # was let go
    assert drawn == [0, 1, 2, 0]


# divided between two streams


def test_every_other_position_is_of_the_first_stream():
    """Positions 3 .. 7 of half and half: 1 of the first stream lies before them, 2 of the other."""
    turns = [True, False, True, False, True]
    assert shares(range(3, 8), 0.5) == (range(1, 4), range(2, 4), turns)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_shares_count_up_without_gaps(share: float):
    """Blocks of any size walk both streams from their start, none twice, none left out."""
    first, second, start = [], [], 0
    for size in (1, 4, 7, 4, 100):
        a, b, turns = shares(range(start, start + size), share)
        assert (len(a), len(b), len(turns)) == (sum(turns), size - sum(turns), size)
        first += a
        second += b
        start += size
    assert first == list(range(len(first)))
    assert second == list(range(len(second)))
    assert len(first) == int(start * share)
