"""Pyramid pooling: ours by matrix products against torch's adaptive pooling, in turn.

Floor: every input value is read once; at 4 bytes and about 10 GB/s of one core that is
0.4 ms a million values.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from medpsp.model.psp import PyramidPooling
from tests.bench.results import Row, paired, report, versions

BINS, ROUNDS = (1, 3, 5, 7), 30
SHAPES = ((4, 512, 16, 16), (1, 512, 64, 64), (1, 960, 32, 32))


def timed(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    began = time.process_time()
    function(x)
    return (time.process_time() - began) * 1e3


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    ours = PyramidPooling(BINS)

    def native(x: torch.Tensor) -> object:
        return [F.adaptive_avg_pool2d(x, b) for b in BINS]

    rows = []
    for shape in SHAPES:
        x = torch.randn(shape)
        timed(ours, x), timed(native, x)
        pairs = [(timed(ours, x), timed(native, x)) for _ in range(ROUNDS)]
        mine, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
        size = " x ".join(map(str, shape))
        rows.append(paired(f"torch / ours, {size}", mine, theirs, least=1))
        floor = x.numel() / 1e6 * 0.4
        rows.append(Row(label=f"floor, {size}", value=floor, unit="ms"))
    facts = {"versions": versions("torch")}
    facts["setting"] = f"1 thread, no gradient, bins {BINS}, {ROUNDS} pairs; CPU time"
    facts["floor"] = "every value is read once: 4 bytes at about 10 GB/s of one core; calculated"
    report("train", "pooling", rows, facts)


if __name__ == "__main__":
    main()
