"""Shards against peers and floors, in one run: paired ratios of CPU time, medians, versions.

Peers live in .venv-bench/shards (`make bench-shards` makes it). A row that misses its target says
MISSED, one whose peer is absent says why; the exit code is 0 all the same, and 1 where a section
failed. Results: runs/bench/shards.json.

    python tests/bench/shards.py [SECTION ...] [--dir FOLDER] [--rounds 5] [--timed 128]
        [--slices 1200] [--compressed 300]

Sections: convert, headers, random, loader, ray, sizes; none means all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before this folder: its shards.py

from tests.bench import shards_convert, shards_read, shards_workers
from tests.bench.results import Missing, run_sections, versions
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
        chosen.sections = chosen.sections or list(SECTIONS)
        run_sections("shards", {n: partial(SECTIONS[n], session) for n in chosen.sections})


def _versions(peer: Peer) -> None:
    facts: dict[str, object] = {
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
