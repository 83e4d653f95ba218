"""A short piece of training that is timed: what a step, the data and an all-reduce take."""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import detect_world, threads_each
from launch.meeting import write_json
from launch.ranks import end_with_parent, start_ranks
from launch.rundir import RunDir
from launch.trained import labelled_rows
from medpsp.config import Config
from medpsp.words import many

if TYPE_CHECKING:
    import torch

    from medpsp.model.psp import PSPNet
    from medpsp.train.batch import Batch
    from medpsp.train.loop import Progress, Run
    from medpsp.types import World

log = logging.getLogger("medpsp")
WARM_UP, REDUCED = 3, 10
"""Steps that do not count, and all-reduces that are timed."""


def measure_job(config: Config) -> None:
    """Train for the steps of the first stage and write ``scale.json``; nothing else is kept.

    Medians over the steps of rank 0; the all-reduce is one of as many bytes as the gradients have,
    with nothing else at work, so it is what a step would wait for if nothing overlapped.
    """
    if config.train.ranks > 1 and "WORLD_SIZE" not in os.environ:
        start_ranks(config, "measure")
        return
    from medpsp.train.ranks import process_group

    world, train = detect_world(), config.train
    end_with_parent()
    threads = train.threads or threads_each(world.size)
    with process_group(world, threads, alone=train.engine != "ddp") as device:
        found = _measured(config, world, device)
    if world.rank == 0:
        write_json(config.out / "scale.json", found)
        rate = found["batch"] / found["step_s"]
        ranks = many(world.size, "rank")
        log.info("measure: %s, %s: %.1f images/s", found["backbone"], ranks, rate)


def _measured(config: Config, world: World, device: torch.device) -> dict[str, Any]:
    import torch

    from medpsp.model.psp import build_model
    from shards.dataset import train_batches

    torch.manual_seed(config.seed)
    model = build_model(config.model, len(config.data.classes)).to(device)
    batches = train_batches(config.shards, labelled_rows(config), config, world, (0, 0))
    waits = list[float]()
    some = _waited(batches, config.train.stages[0].steps or 20, waits)
    steps = list(step_times(model, config, world, device, some))
    gradient = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {
        "backbone": config.model.backbone,
        "engine": config.train.engine,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        "batch": config.train.batch_size,
        "size": list(config.train.size),
        "step_s": statistics.median(steps[WARM_UP:]),
        "data_s": statistics.median(waits[WARM_UP:]),
        "reduce_s": _reduce_seconds(gradient, device) if world.size > 1 else 0.0,
        "gradient_bytes": gradient,
    }


def parts_of_fit(
    model: PSPNet, config: Config, world: World, device: torch.device
) -> tuple[Run, Progress]:
    """What `train_step` needs to be timed; nothing is read, written or shown."""
    import torch

    from medpsp.train.checkpoint import TrainState
    from medpsp.train.ema import Average
    from medpsp.train.guard import Guard
    from medpsp.train.loop import Progress, Run
    from medpsp.train.optimizer import no_moments
    from medpsp.train.timing import Clock

    empty: Any = None
    run = Run(
        config=config,
        world=world,
        device=device,
        checkpoints=Path(),
        board=empty,
        batches=empty,
        val_batches=empty,
        examples=None,
        weights=torch.ones(len(config.data.classes), device=device),
    )
    progress = Progress(
        model=model,
        average=Average(model, config.train),
        state=TrainState(step=0, stage="", best=-1, score=0, model={}),
        moments=no_moments(),
        guard=Guard(device, config.train.most_bad_steps),
        clock=Clock(config, model, device, world),
    )
    return run, progress


def step_times(
    model: PSPNet, config: Config, world: World, device: torch.device, batches: Iterable[Batch]
) -> Iterator[float]:
    """Seconds of each step of the first stage."""
    from medpsp.train.loop import enter_stage, train_step
    from medpsp.train.optimizer import no_moments

    run, progress = parts_of_fit(model, config, world, device)
    engine = enter_stage(model, config.train.stages[0], run, no_moments())
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        train_step(run, engine, progress, batch, number)
        _settle(device)
        yield time.perf_counter() - began


def made_batch(config: Config, count: int) -> Batch:
    """Noise in the place of slices, for `step_times`: nothing is read for it."""
    import torch

    from medpsp.train.batch import Batch

    size, classes = config.train.size, len(config.data.classes)
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, classes, (count, *size), generator=generator)
    return Batch(
        image=torch.rand(count, config.model.channels, *size, generator=generator),
        label=label.to(torch.uint8),
        patients=("",) * count,
        keys=torch.arange(count),
        samples=("",) * count,
    )


def _waited(batches: Iterator[Batch], count: int, waits: list[float]) -> Iterator[Batch]:
    """Batches; how long each was waited for is added to ``waits``."""
    for _ in range(count + WARM_UP):
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waits.append(time.perf_counter() - began)
        yield batch


def _settle(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reduce_seconds(size: int, device: torch.device) -> float:
    import torch
    import torch.distributed as dist

    values, times = torch.zeros(size // 4, device=device), []
    for _ in itertools.repeat(None, REDUCED):
        _settle(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _settle(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def forget(run: RunDir) -> None:
    """Take away what an earlier `measure_job` wrote."""
    (run.root / "scale.json").unlink(missing_ok=True)


def measured(run: RunDir) -> dict[str, Any] | None:
    """What `measure_job` wrote; None where it did not end."""
    try:
        found: dict[str, Any] = json.loads((run.root / "scale.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None
