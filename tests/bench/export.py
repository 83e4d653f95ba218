"""Exported files and `medpsp predict` against torch, OpenVINO and MONAI, in one run.

    python tests/bench/export.py [SECTION ...] [--dir FOLDER] [--rounds 15] [--steps 200]

Sections, none means all, `real` only with MEDPSP_DATA:
    latency   torch eager, ONNX fp32, int8 and fp16, OpenVINO int8 by NNCF: CPU time and wall of a
              512 x 512 image, paired rounds; memory of a process with one file; Dice of the masks
    series    a DICOM series to a DICOM SEG, against MONAI and highdicom
    flat      memory of `medpsp predict` over the number of frames
    cold      the base install: its size, and its first mask
    real      Dice of all files on real scans (MEDPSP_DATA), and parity

Peers live in .venv-bench/export (`make bench-export` makes it). A row that misses what is wanted
says MISSED, one whose peer is absent says why; the exit code is 0 all the same, and 1 where a
section failed. Networks are trained on a phantom; --dir keeps them.
Results: runs/bench/export.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before this folder: its shards.py

from medpsp.config import BACKBONES
from medpsp.deploy.dossier import cpu_facts, environment_facts
from tests.bench import export_device, export_latency, export_real, export_series
from tests.bench.export_nets import HEADS
from tests.bench.results import ROOT, report, run_sections

SECTIONS = {
    "latency": export_latency.latency,
    "series": export_series.series,
    "flat": export_device.flat,
    "cold": export_device.cold,
    "real": export_real.real,
}
PEERS = ("openvino", "nncf", "monai")
VNNI = "VNNI is among them; the wanted ratios of int8 are from a CPU with AVX2 and without VNNI"
NO_VNNI = "no VNNI; neither had the CPU that the wanted ratios of int8 are from (AVX2)"


def main() -> None:
    chosen = _arguments()
    with ExitStack() as stack:
        folder = chosen.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        chosen.folder = folder.resolve()
        _versions()
        usual = [name for name in SECTIONS if name != "real" or "MEDPSP_DATA" in os.environ]
        names = chosen.sections or usual
        run_sections("export", {name: partial(SECTIONS[name], chosen) for name in names})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION")
    parser.add_argument("--dir", type=Path, help="keep networks and data there, use them again")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES)
    parser.add_argument("--heads", nargs="+", choices=HEADS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="of latency")
    parser.add_argument("--commands", type=int, default=5, help="rounds of series and cold")
    parser.add_argument("--steps", type=int, default=200, help="of training on the phantom")
    parser.add_argument("--slices", type=int, default=60, help="of the series")
    parser.add_argument("--frames", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--sets", nargs="+", choices=export_real.SETS)
    parser.add_argument("--strides", nargs="+", type=int, default=[16])
    parser.add_argument("--real-steps", type=int, default=300)
    return parser.parse_args()


def _versions() -> None:
    cpu = cpu_facts()
    vnni = any("vnni" in flag or flag == "amx_int8" for flag in cpu["flags"])
    facts = {
        "flags": f"{' '.join(cpu['flags'])} ({VNNI if vnni else NO_VNNI})",
        "ours": ", ".join(f"{name} {number}" for name, number in environment_facts().items()),
        "peers": ", ".join(map(_peer, PEERS)),
    }
    report("export", "versions", [], facts)


def _peer(name: str) -> str:
    found = sorted((ROOT / ".venv-bench" / "export").glob(f"{name}-*.dist-info"))
    number = found[0].name.removeprefix(f"{name}-").removesuffix(".dist-info") if found else ""
    return f"{name} {number or 'absent: make bench-export'}"


if __name__ == "__main__":
    main()
