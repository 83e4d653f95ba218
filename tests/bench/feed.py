"""How many pairs of image and label the loader makes a second, augmentation included.

    python tests/bench/feed.py [--slices 120] [--steps 40]

A made-up CT archive of 512 x 512 becomes shards in a temporary folder; then whole slices are read,
checked, windowed and augmented, in batches of 8. Wall time, the loop does nothing else.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.phantom import CLASSES, Phantom, write_archive
from medpsp.config import Config
from medpsp.identity import create_key
from medpsp.types import World
from shards.build import build_shards
from shards.dataset import train_batches
from shards.index import read_index
from shards.loader import end_workers
from tests.bench.results import Row, report, versions

SIDE, BATCH, ROUNDS = 512, 8, 3
WANTED = 350.0


def config_of(root: Path, profile: str) -> Config:
    data = {
        "archive": root / "dicom",
        "labels": root / "masks",
        "classes": CLASSES,
        "key_file": root / "key",
        "split": {"val": 0.2, "test": 0.0},
        "max_reject_fraction": 1,
        "profile": profile,
    }
    return Config.model_validate({"out": root / profile, "data": data})


def pairs_per_second(config: Config, level: str, workers: int, steps: int) -> float:
    """Of the second to the last batch: workers start before the first."""
    stages = [{"name": "a", "steps": steps, "lr": 1e-3, "augment": level}]
    tree = config.model_dump()
    tree["train"].update(
        {"stages": stages, "batch_size": BATCH, "size": [SIDE, SIDE], "loader_workers": workers}
    )
    made = Config.model_validate(tree)
    batches = train_batches(config.shards, read_index(config.shards), made, World(), (0, 0))
    next(batches)
    began = time.perf_counter()
    count = sum(len(batch.label) for batch in batches)
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slices", type=int, default=120)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    logging.getLogger("medpsp").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        create_key(root / "key", "key of the bench 7")
        phantom = Phantom(shape=(args.slices // 6, SIDE, SIDE), spacing=(5.0, 0.7, 0.7))
        write_archive(root, 6, phantom)
        facts = {"versions": versions("torch", "numpy", "zarr")}
        facts["setting"] = f"{args.slices} slices of {SIDE} x {SIDE}, batches of {BATCH}, wall time"
        rows = []
        for profile in ("default", "fast"):
            config = config_of(root, profile)
            build_shards(config)
            for level in ("none", "low", "high"):
                found = {
                    n: max(pairs_per_second(config, level, n, args.steps) for _ in range(ROUNDS))
                    for n in (0, 1, 2)
                }
                end_workers()
                for workers, rate in found.items():
                    least = WANTED if (level, workers) == ("high", 2) else None
                    label = f"{profile}, augmentation {level}, {workers} workers"
                    rows.append(Row(label=label, value=rate, least=least, unit="pairs/s"))
        report("train", "pairs for training", rows, facts)


if __name__ == "__main__":
    main()
