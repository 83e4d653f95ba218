"""Flipped bits, one at a time, anywhere below a folder of shards: how many does `check` name?

    python tests/bench/shards_flips.py SHARDS [COUNT] [SEED]

It writes into SHARDS and puts every bit back.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.damage import random_flips


def main(root: Path, count: int = 200, seed: int = 1) -> int:
    named, began = 0, time.perf_counter()
    for path, bit, found in random_flips(root, count, seed):
        named += path in found
        if path not in found:
            print(f"MISSED bit {bit} of {path}: said {found}")
    print(f"{named} of {count} flipped bits found, {time.perf_counter() - began:.0f} s")
    return named != count


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:4])))
