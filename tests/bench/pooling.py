"""Pyramid pooling: ours by matrix products against torch's adaptive pooling, in turn.

Floor: every input value is read once; at 4 bytes and about 10 GB/s of one core that is
0.4 ms a million values. Prints the medians and the median of the paired ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medpsp.model.psp import PyramidPooling

BINS, ROUNDS = (1, 3, 5, 7), 30
SHAPES = ((4, 512, 16, 16), (1, 512, 64, 64), (1, 960, 32, 32))


def timed(function: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    began = time.perf_counter()
    function(x)
    return (time.perf_counter() - began) * 1e3


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    ours = PyramidPooling(BINS)

    def native(x: torch.Tensor) -> object:
        return [F.adaptive_avg_pool2d(x, b) for b in BINS]

    print(f"torch {torch.__version__}, 1 thread, bins {BINS}, {ROUNDS} pairs")
    for shape in SHAPES:
        x = torch.randn(shape)
        timed(ours, x), timed(native, x)
        pairs = [(timed(ours, x), timed(native, x)) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        ratio = statistics.median(b / a for a, b in pairs)
        floor = x.numel() / 1e6 * 0.4
        print(
            f"  {shape!s:20} ours {mine:.2f} ms, torch {theirs:.2f} ms, "
            f"torch / ours {ratio:.2f}, floor {floor:.2f} ms"
        )


if __name__ == "__main__":
    main()
