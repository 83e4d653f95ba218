"""10,000 damaged files of all syntaxes, labels and containers through the real `Sandbox`.

Prints what became of them, and the worst cost of one. `tests/test_fuzz.py` is the short run.

    python tests/bench/fuzz.py [inputs] [seed]
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medpsp.dicom.codes import CODES
from tests.fuzzed import Tally, fuzz
from tests.mutate import sources

PROCESSES = 2


def part(number: int, inputs: int, seed: int) -> Tally:
    with tempfile.TemporaryDirectory() as folder:
        found = sources(Path(folder))
        return fuzz(found, range(number, inputs, PROCESSES), seed, Path(folder) / "fuzz")


def main(inputs: int = 10_000, seed: int = 1) -> None:
    began = time.perf_counter()
    whole = Tally()
    with ProcessPoolExecutor(PROCESSES) as pool:
        for tally in pool.map(part, range(PROCESSES), [inputs] * PROCESSES, [seed] * PROCESSES):
            whole.add(tally)
    for code, count in whole.outcomes.most_common():
        print(f"  {code:24} {count:6} {count / inputs:6.1%}")
    lost = inputs - sum(whole.outcomes.values())
    unknown = set(whole.outcomes) - {"read", *CODES}
    print(
        f"{whole.inputs} inputs, seed {seed}, {time.perf_counter() - began:.0f} s: "
        f"{len(whole.deaths)} deaths of the child, {len(whole.escapes)} escapes, {lost} lost, "
        f"{len(unknown)} unknown codes; worst {whole.seconds:.2f} s CPU ({whole.slowest}), "
        f"{whole.peak_mib:.0f} MiB ({whole.largest})"
    )
    print(*whole.escapes, *whole.deaths, sep="\n")
    if whole.escapes or lost or unknown or whole.seconds > 2 or whole.peak_mib > 1024:
        raise SystemExit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
