"""A conversion of real data under SIGKILLs of its driver and of what works for it.

Until there were 50 kills, a conversion is killed and run again; when it has ended, the next begins
in a new folder. Every folder must hold, byte for byte, what an undisturbed run wrote, and no shard
that was committed may have been written again.

    MEDPSP_DATA=... python tests/bench/shards_kills.py [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medpsp.config import Config
from medpsp.identity import create_key
from tests.killing import Harm, contents, convert, state


def config_of(data: Path, out: Path, index: Path) -> Config:
    """Sarcoma CT with regions of RTSTRUCT: 424 slices of 8 patients."""
    archive = data / "seg3d/sts_dicom_rtstruct"
    tree = {
        "archive": archive,
        "labels": archive,
        "label_format": "rtstruct",
        "label_names": {"GTV_Mass*": "tumour"},
        "classes": ["background", "tumour"],
        "modalities": ["CT"],
        "split": {"val": 0.3, "test": 0.0},
        "key_file": out.parent / "key",
        "shard_slices": 8,
        "index": index,
        "max_reject_fraction": 1,
    }
    return Config.model_validate({"out": out, "data": tree})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    data = Path(os.environ["MEDPSP_DATA"])
    rng = random.Random(chosen.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        create_key(root / "key", "key of the bench 7")
        whole = config_of(data, root / "whole", root / "index-whole")
        convert(whole)
        expected = contents(whole.shards)
        shards = len(state(whole.shards, "commits/*.json"))
        print(f"undisturbed: {shards} shards, {time.monotonic() - began:.0f} s", flush=True)
        drivers = tasks = repeated = retried = left = rounds = same = 0
        while drivers + tasks < chosen.kills:
            rounds += 1
            config = config_of(data, root / f"out{rounds}", root / f"index{rounds}")
            harm = Harm(config, rng)
            while harm.drivers + harm.tasks + drivers + tasks < chosen.kills:
                if len(state(config.shards, "commits/*.json")) == shards:
                    break
                harm.run(rng.randint(1, 6))
            convert(config)
            harm.look()
            drivers, tasks = drivers + harm.drivers, tasks + harm.tasks
            repeated, left = repeated + harm.repeated, left + harm.left
            retried += harm.retried
            same += contents(config.shards) == expected
            print(
                f"round {rounds}: {drivers} drivers and {tasks} tasks killed; {repeated} whole "
                f"shards repeated, {retried} with lost slices tried again; {left} tasks left "
                f"over; {same} of {rounds} folders identical; {time.monotonic() - began:.0f} s",
                flush=True,
            )
    if repeated or left or same != rounds:
        sys.exit("FAILED")


if __name__ == "__main__":
    main()
