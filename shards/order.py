"""Which sample comes when: a pure function of seed and position, for any number of ranks.

Positions count samples since the start of a stage. Position p belongs to epoch p // n and takes
the (p mod n)-th entry of that epoch's permutation, so the state of the stream is one integer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Permutation = Callable[[int], NDArray[np.integer]]
"""Epoch to the order of its samples."""

_EPOCHS_KEPT = 2
"""Between two batches of one epoch, shards of the next are looked up; 10^7 samples take 40 MB."""


def epoch_permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of ``range(count)`` keyed on (seed, epoch); Philox, equal on every platform."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return rng.permutation(count)


def shard_permutation(
    shards: NDArray[np.integer], seed: int, epoch: int, together: int
) -> NDArray[np.int64]:
    """Permutation keyed on (seed, epoch) that touches few shards at a time.

    The shards are put into random order and taken ``together`` at a time; samples of these come
    in random order before the first one of the next.

    Args:
        shards: (N) number of the shard that each sample lies in.
        seed: Of the run.
        epoch: Decides order and company of the shards anew.
        together: Shards that are shuffled together, at least 1.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    names, which = np.unique(shards, return_inverse=True)
    group = rng.permutation(len(names)) // together
    order = rng.permutation(len(shards))
    behind: NDArray[np.int64] = order[np.argsort(group[which][order], kind="stable")]
    return behind


def remembered(permutation: Permutation) -> Permutation:
    """The same, with the last epochs kept: a step then costs no more than its batch."""

    @lru_cache(maxsize=_EPOCHS_KEPT)
    def kept(epoch: int) -> NDArray[np.integer]:
        return permutation(epoch).astype(np.int32)  # each sample is a row in memory: far below 2^31

    return kept


def batch_positions(step: int, batch_size: int, rank: int, size: int) -> range:
    """Stream positions of one rank in one step: its contiguous share of the global batch.

    Args:
        step: 0-based step within the stage.
        batch_size: Samples of the global batch; ``size`` divides it.
        rank: 0 .. size - 1.
        size: Number of ranks.

    Raises:
        ValueError: ``size`` does not divide ``batch_size``.
    """
    if batch_size % size:
        raise ValueError(f"batch of {batch_size} cannot be shared by {size} ranks")
    share = batch_size // size
    first = step * batch_size + rank * share
    return range(first, first + share)


def ordered(count: int, positions: range, permutation: Permutation) -> list[tuple[int, int]]:
    """(epoch, sample number) for each stream position.

    Args:
        count: Samples in the stage, at least 1.
        positions: Contiguous, as `batch_positions` gives them.
        permutation: Of ``range(count)`` for each epoch; see `remembered`.
    """
    out: list[tuple[int, int]] = []
    at = positions.start
    while at < positions.stop:
        epoch, within = divmod(at, count)
        end = min(count, within + positions.stop - at)
        out += [(epoch, sample) for sample in permutation(epoch)[within:end].tolist()]
        at += end - within
    return out


def shares(positions: range, share: float) -> tuple[range, range, list[bool]]:
    """Stream positions divided between two streams, evenly and without a draw.

    Of the first p positions, floor(p * share) are of the first stream.

    Args:
        positions: Contiguous.
        share: Of the first stream, in [0, 1).

    Returns:
        Positions within the first stream, within the second one, and for each position whether
        it is of the first.
    """
    before = [math.floor(p * share) for p in range(positions.start, positions.stop + 1)]
    first = range(before[0], before[-1])
    second = range(positions.start - before[0], positions.stop - before[-1])
    return first, second, [b > a for a, b in itertools.pairwise(before)]
