"""What the ranks of tests/test_ranks.py do. Run as a program: folder, then names of scenarios."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medpsp.config import Config
from medpsp.train.loop import fit
from medpsp.train.ranks import barrier, process_group
from medpsp.types import World
from tests.squares import make_config, make_run, network

ROOT = Path(__file__).resolve().parents[1]
GROUP = {"norm": "group", "dropout": 0.2}
CURVE_STEPS, MOVE_AT, MOVE_STEPS = 50, 4, 8
LONG_STEPS = 24
ENGINES = ("ddp", "zero1", "zero2", "zero3")


def exact(precision: str) -> Config:
    """Three stages with frozen parts, augmentation, dropout, accumulation; GroupNorm."""
    stages = (
        {"name": "a", "steps": 3, "augment": "low"},
        {"name": "b", "steps": 2, "augment": "mid", "trains": "head"},
        {"name": "c", "steps": 3, "augment": "high"},
    )
    train = {"batch_size": 8, "accumulate": 2, "precision": precision, "ema": 0.5, "head_lr": 2.0}
    return make_config(*stages, model=GROUP, eval_every=4, **train)


def curve(engine: str, steps: int = CURVE_STEPS, **more: Any) -> Config:
    first = {"name": "a", "steps": steps // 2, "lr": 1e-3}
    second = {"name": "b", "steps": steps - steps // 2, "lr": 5e-4}
    return make_config(first, second, model=GROUP, engine=engine, save_every=MOVE_AT, **more)


def long(**more: Any) -> Config:
    """In float64; the first stage ends after the fourth step, the second after another 20."""
    stages = (
        {"name": "a", "steps": MOVE_AT, "augment": "high"},
        {"name": "b", "steps": LONG_STEPS - MOVE_AT, "augment": "high"},
    )
    return make_config(*stages, model=GROUP, batch_size=8, precision="fp64", **more)


def trained(config: Config, world: World, folder: Path) -> dict[str, Any]:
    """Scalars of every step, and the weights at the end."""
    run, seen = make_run(config, folder, world), {}

    class Recorder:
        def scalars(self, step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                seen.setdefault(name, {})[step] = value

        def overlays(self, *_: object) -> None:
            pass

        def tables(self, *_: object) -> None:
            pass

    model = network(config)
    state = fit(replace(run, board=Recorder()), model)  # type: ignore[arg-type]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    return {"seen": seen, "weights": weights, "score": state.score, "step": state.step}


def scenario(name: str, world: World, folder: Path) -> dict[str, Any]:
    kind, *rest = name.split(":")
    here = folder / name.replace(":", "-") / str(world.size)
    if kind == "exact":
        return trained(exact(rest[0]), world, here)
    if kind == "curve":
        return trained(curve(rest[0]), world, here)
    if kind == "start":
        return trained(curve(rest[0], MOVE_STEPS, channels_last=True), world, here)
    if kind == "long":
        return trained(long(), world, here)
    # move:ENGINE:SOURCE goes on from the checkpoint of another engine and number of ranks
    source = folder / "long/2/checkpoints/stage-0-a"
    if kind == "move":
        source = folder / f"start-{rest[1]}/2/checkpoints/step-{MOVE_AT:08d}"
    if world.rank == 0:
        shutil.copytree(source, here / "checkpoints" / source.name)
    barrier()
    if kind == "move":
        return trained(curve(rest[0], MOVE_STEPS, channels_last=True, resume="must"), world, here)
    return trained(long(resume="must"), world, here)


def main(folder: Path, scenarios: list[str]) -> None:
    size = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    world = World(rank=rank, size=size, local_rank=rank)
    # one group for all: DeepSpeed keeps the first that it sees
    with process_group(world, threads=1, alone=True):
        for name in scenarios:
            found = scenario(name, world, folder)
            torch.save(found, folder / f"{name.replace(':', '-')}-{size}-{rank}.pt")


def run_ranks(folder: Path, size: int, scenarios: list[str]) -> None:
    """Run scenarios in processes of their own; all must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *scenarios],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [child.communicate(timeout=600)[1] for child in children]
    finally:
        for child in children:
            child.kill()  # if one died, the other would wait for it
    assert [child.returncode for child in children] == [0] * size, "\n".join(said)


def result(folder: Path, name: str, size: int, rank: int = 0) -> dict[str, Any]:
    path = folder / f"{name.replace(':', '-')}-{size}-{rank}.pt"
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
