"""Which sample comes when, for any number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import batch_positions, epoch_permutation, sample_order


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
