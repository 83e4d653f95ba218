"""Shards against peers and floors, in one run: paired ratios of CPU time, medians, versions.

Peers live in .venv-bench (`make bench-shards` makes it). A row that misses its target says MISSED,
one whose peer is absent says why; the exit code is 0 all the same. Results: runs/bench/shards.json.

    python tests/bench/shards.py [SECTION ...] [--dir FOLDER] [--rounds 5] [--timed 128]
        [--slices 1200] [--compressed 300]

Sections: convert, headers, random, loader, ray, sizes; none means all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before this folder: its shards.py

from tests.bench import shards_convert, shards_read, shards_workers
from tests.bench.results import Missing, machine, versions
from tests.bench.shards_convert import Session
from tests.bench.shards_data import Data
from tests.bench.shards_rounds import Peer, report

SECTIONS = {
    "convert": shards_convert.convert,
    "headers": shards_read.headers,
    "random": shards_read.random_slices,
    "loader": shards_workers.loader,
    "ray": shards_workers.ray_workers,
    "sizes": shards_convert.sizes,
}
OURS = ("pydicom", "zarr", "numcodecs", "google-crc32c", "imagecodecs", "numpy", "torch", "ray")
PEERS = (
    *("pydicom", "zarr", "numcodecs", "monai", "SimpleITK", "dcm2niix", "mosaicml-streaming"),
    *("blosc2", "pyjpegls", "pylibjpeg-rle", "python-gdcm"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION")
    parser.add_argument("--dir", type=Path, help="keep data there, and use it again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timed", type=int, default=128, help="slices of a round, up to 200")
    parser.add_argument("--slices", type=int, default=1200)
    parser.add_argument("--compressed", type=int, default=300)
    chosen = parser.parse_args()
    with ExitStack() as stack:
        folder = chosen.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch = folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        session = Session(
            data=Data(folder.resolve(), chosen.slices, chosen.compressed),
            scratch=scratch.resolve(),
            peer=stack.enter_context(Peer()),
            rounds=chosen.rounds,
            timed=chosen.timed,
        )
        _versions(session.peer)
        for name in chosen.sections or SECTIONS:
            try:
                SECTIONS[name](session)
            except Missing as error:
                print(f"\n== {name}: {error}")


def _versions(peer: Peer) -> None:
    facts: dict[str, object] = {
        "machine": machine(),
        "ours": versions(*OURS),
    }
    try:
        found = peer.ask("versions", names=list(PEERS))["versions"]
        facts["peers"] = ", ".join(f"{name} {number}" for name, number in found.items())
    except Missing as error:
        facts["peers"] = str(error)
    report("versions", {}, [], facts)


if __name__ == "__main__":
    main()
