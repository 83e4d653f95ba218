"""Several workers: batches for training, and shard tasks of Ray."""

from __future__ import annotations

import logging
import os
import shutil
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from medpsp.config import Config
from medpsp.dataconfig import DataConfig
from tests.bench.results import Missing
from tests.bench.shards_convert import Session
from tests.bench.shards_read import BUCKET, Store, linked_all, slices
from tests.bench.shards_rounds import Cell, Target, Work, entry, measure, report

BATCH, WORKERS = 16, 2


class ZarrPairs:
    """What a torch DataLoader needs: image and label by ``z[i]``; opened in the worker."""

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count, self._arrays = root, count, list[Any]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        if not self._arrays:
            folder = self.root / BUCKET
            self._arrays = [zarr.open_array(folder / n, mode="r") for n in ("image", "label")]
        image, label = (array[number] for array in self._arrays)
        return image, label


def loader(session: Session) -> None:
    """Section: batches of 16 pairs in random order, 2 workers."""
    values = slices(session)
    order = np.random.default_rng(1).permutation(len(values)).tolist()
    works: dict[str, Work] = {}
    for name, profile in (("zstd", "default"), ("lz4", "fast")):
        store = Store(session.scratch / f"store-{profile}", profile, values)
        works[f"zarr pairs, DataLoader, {name}"] = _dataloader(store.root, order)
        works[f"ours {name}"] = _ours(store.root, order)
    cells = measure(works, len(order), session.rounds)
    targets = [
        _target(name, wall, least if wall else 1)
        for name, least in (("zstd", 2.6), ("lz4", 4.0))
        for wall in (True, False)
    ]
    facts = {"pairs a round": len(order), "batch": BATCH, "workers": WORKERS}
    report("loader", cells, targets, facts)


def _target(name: str, wall: bool, least: float) -> Target:
    theirs = "zarr pairs, DataLoader, zstd"
    return Target(ours=f"ours {name}", theirs=theirs, least=least, wall=wall)


def _dataloader(root: Path, order: list[int]) -> Work:
    from torch.utils.data import DataLoader

    data: Any = DataLoader(
        ZarrPairs(root, len(order)),  # type: ignore[arg-type]
        batch_size=BATCH,
        sampler=order,
        num_workers=WORKERS,
        persistent_workers=True,  # their start is not the point
        multiprocessing_context="spawn",  # zarr's threads survive no fork
    )

    def run() -> None:
        for image, label in data:
            if image.shape[0] != label.shape[0]:
                raise Missing("the DataLoader gave half a batch")

    return run


def _ours(root: Path, order: list[int]) -> Work:
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def run() -> None:
        for _ in entry("shards.loader", "raw_batches")(root, BUCKET, batches, WORKERS):
            pass

    return run


def ray_workers(session: Session) -> None:
    """Section: wall clock of shard tasks with 1 and 2 workers; Ray runs and is warm."""
    entry("shards.build", "convert_part")
    files = list(chain.from_iterable(session.data.files("native", session.peer)))
    archive = linked_all(files, session.scratch / "archive")
    os.environ.setdefault("MEDPSP_KEY", "a key for the bench alone")
    cells = {name: Cell() for name in ("1 worker", "2 workers")}
    loads = []
    for _ in range(min(3, session.rounds)):
        for number, name in enumerate(cells, 1):
            loads.append(round(os.getloadavg()[0], 1))
            seconds = _convert(session.scratch / "ray", archive, number)
            cells[name].wall.append(seconds / len(files) * 1e3)
    target = Target(
        ours="2 workers",
        theirs="1 worker",
        least=1.8,
        wall=True,
    )
    facts = {"slices": len(files), "load at the start of each run": loads}
    report("ray", cells, [target], facts)


def _convert(scratch: Path, archive: Path, workers: int) -> float:
    """Seconds of the second of two conversions; the first one starts the workers."""
    import ray

    shutil.rmtree(scratch, ignore_errors=True)
    data = DataConfig(
        archive=archive,
        classes=("background", "a"),
        unlabelled="keep",
        workers=workers,
        index=scratch / "index",
    )
    config = Config(out=scratch / "out", data=data)
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _memory=8 * 2**30,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        entry("shards.build", "plan_shards")(config)
        seconds = 0.0
        for _ in range(2):
            shutil.rmtree(config.shards / "commits", ignore_errors=True)
            began = time.perf_counter()
            entry("shards.build", "convert_part")(config, 1, 1)
            seconds = time.perf_counter() - began
        return seconds
    finally:
        ray.shutdown()
