"""Ranks and engines against one process: wall time of a step, on one machine.

    python tests/bench/ranks.py [--steps 12] [--rounds 3] [--head refine]

ResNet18, 128 x 128, global batch 8. One process has two threads, each of two ranks one. Rounds in
turn, medians; only the ranks of a row run at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.results import Row, paired, report, versions

ROWS = {
    "1 process x 2 threads": (1, "ddp"),
    "2 ranks, DDP": (2, "ddp"),
    "2 ranks, ZeRO-1": (2, "zero1"),
    "2 ranks, ZeRO-2": (2, "zero2"),
    "2 ranks, ZeRO-3": (2, "zero3"),
}
PAIRS = (
    ("2 ranks, DDP", "1 process x 2 threads", 1.15),
    *((f"2 ranks, ZeRO-{number}", "2 ranks, DDP", None) for number in (1, 2, 3)),
)
SIDE, BATCH = 128, 8


def rank(engine: str, steps: int, head: str) -> None:
    """One rank: seconds of each step, peak memory, and where the time went, as JSON."""
    import resource

    import torch

    from launch.measure import parts_of_fit
    from medpsp.model.psp import build_model
    from medpsp.train.loop import enter_stage, train_step
    from medpsp.train.optimizer import no_moments
    from medpsp.train.ranks import process_group
    from medpsp.types import World
    from tests.bench.train import batch_of, config_of

    size = int(os.environ["WORLD_SIZE"])
    world = World(rank=int(os.environ["RANK"]), size=size)
    config = config_of(SIDE, BATCH, 0.0)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"engine": engine}),
            "model": config.model.model_copy(update={"head": head}),
        }
    )
    with process_group(world, 2 // size, alone=True) as device:
        torch.manual_seed(0)
        model = build_model(config.model, 2)
        run, progress = parts_of_fit(model, config, world, device)
        engine_of = enter_stage(model, config.train.stages[0], run, no_moments())
        batch = batch_of(SIDE, BATCH // size)
        times = []
        for step in range(steps + 3):
            began = time.perf_counter()
            train_step(run, engine_of, progress, batch, step)
            times.append(time.perf_counter() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cpu = time.process_time()
        print(json.dumps({"step": statistics.median(times[3:]), "gib": peak, "cpu": cpu}))


def measure(size: int, engine: str, args: argparse.Namespace) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": str(2 // size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", engine, str(args.steps), args.head],
            env={**common, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(size)
    ]
    said = [json.loads(child.communicate()[0].strip().splitlines()[-1]) for child in ranks]
    return max(said, key=lambda found: found["step"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--head", default="refine")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for _ in range(args.rounds):
        for name, (size, engine) in ROWS.items():
            found[name].append(measure(size, engine, args))
    steps = {name: [r["step"] * 1e3 for r in rounds] for name, rounds in found.items()}
    rows = []
    for name, other, most in PAIRS:
        row = paired(f"{name} / {other}, wall of a step", steps[name], steps[other], most=1)
        rows.append(replace(row, most=most))
    facts = {"versions": versions("torch", "deepspeed")}
    facts["setting"] = (
        f"ResNet18, {args.head}, {SIDE} x {SIDE}, global batch {BATCH}, {args.rounds} rounds"
    )
    for name, rounds in found.items():
        gib = max(r["gib"] for r in rounds)
        rows.append(Row(label=f"{name}: memory of a rank", value=gib, unit="GiB"))
    report("train", "ranks", rows, facts)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
