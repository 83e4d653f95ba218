"""Which sample comes when: a pure function of seed and position, for any number of ranks.

Positions count samples since the start of a stage. Position p belongs to epoch p // n and takes
the (p mod n)-th entry of that epoch's permutation, so the state of the stream is one integer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of ``range(count)`` keyed on (seed, epoch); Philox, equal on every platform."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return rng.permutation(count)


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


def sample_order(count: int, seed: int, positions: range) -> list[tuple[int, int]]:
    """(epoch, sample number) for each stream position.

    Args:
        count: Samples in the stage, at least 1.
        seed: Of the run, changed per stage by the caller.
        positions: As `batch_positions` gives them.
    """
    cache: dict[int, NDArray[np.int64]] = {}
    out: list[tuple[int, int]] = []
    for position in positions:
        epoch, within = divmod(position, count)
        if epoch not in cache:
            cache[epoch] = epoch_permutation(count, seed, epoch)
        out.append((epoch, int(cache[epoch][within])))
    return out
