"""A device: memory over the length of a series, cold start, and what the small install holds."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.export_nets import SLICE, phantom_net, with_tiles
from tests.bench.export_rounds import POLL_S, Ran, environment, ran
from tests.bench.export_series import dicom_series, predict
from tests.bench.results import ROOT, Missing, Row, report

SMALL = (128, 128)
FLAT, BYTES_A_VOXEL, COLD_S = 0.05, 1.5, 2.0
ROUNDS = 3
"""Of each command: processes that decode vary by 1 MiB from one to the next."""
SIZES = """
import json, pathlib, sys
from importlib.metadata import distributions
found = {}
for one in distributions():
    paths = [pathlib.Path(one.locate_file(f)) for f in one.files or ()]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    found[f"{one.metadata['Name']} {one.version}"] = size
print(json.dumps(found))
"""


def flat(args: Any) -> None:
    """`medpsp predict` of series of 128 x 128: what streams stays flat, what needs the whole mask
    grows by that."""
    model = phantom_net(args.folder, "resnet18", "refine", args.steps).run.int8
    lengths = sorted(args.frames)
    peaks: dict[str, dict[int, Ran]] = {}
    for formats in ("png,nifti", "seg", "mesh"):
        peaks[formats] = {}
        for count in lengths:
            source = dicom_series(args.folder / f"small-{count}", count, SMALL)
            out = args.folder / "flat"
            runs = []
            for _ in range(ROUNDS):
                runs.append(predict(model, source, out, formats))
                shutil.rmtree(out)
            peaks[formats][count] = sorted(runs, key=lambda run: run.peak)[ROUNDS // 2]
    lines = [
        f"{formats:10} {count:5d} frames  {one.peak:6.1f} MiB (main {one.main:.1f}; children "
        f"{', '.join(f'{size:.0f}' for size in one.children)}), {one.wall:.1f} s"
        for formats, found in peaks.items()
        for count, one in found.items()
    ]
    report(
        "export",
        "flat",
        _flat_rows(peaks, lengths),
        {"frames": f"files of 128 x 128, median of {ROUNDS} commands"},
        lines,
    )


def _flat_rows(peaks: dict[str, dict[int, Ran]], lengths: list[int]) -> list[Row]:
    few, many = lengths[0], lengths[-1]
    rows = []
    streamed = peaks["png,nifti"]
    for what, sizes in (
        ("main process", {n: one.main for n, one in streamed.items()}),
        ("all processes", {n: one.peak for n, one in streamed.items()}),
    ):
        change = max(abs(size / sizes[few] - 1) for size in sizes.values())
        label = f"png,nifti, {few} to {many} frames, {what}: largest change"
        rows.append(Row(label=label, value=100 * change, most=100 * FLAT, unit="%"))
    start = lengths[-2] if len(lengths) > 2 else few
    voxels = (many - start) * SMALL[0] * SMALL[1]
    for formats in ("seg", "mesh"):
        found = peaks[formats]
        grown = (found[many].peak - found[start].peak) * 2**20 / voxels
        label = f"{formats}, {start} to {many} frames: growth"
        rows.append(Row(label=label, value=grown, most=BYTES_A_VOXEL, unit="B/voxel"))
    return rows


def cold(args: Any) -> None:
    """Of an environment that holds the base install alone: its size, and its first mask."""
    place = args.folder / "device"
    _install(place)
    sizes = _sizes(place)
    whole = _size(place)
    facts = {
        "environment": f"{whole / 2**20:.0f} MiB, {len(sizes)} packages; with byte code, "
        "which the list of packages leaves out",
        "file cache": "warm: the kernel's is not dropped between the rounds",
    }
    lines = [
        f"{name:40} {size / 2**20:8.1f} MiB" for name, size in sorted(sizes.items(), key=_by_size)
    ]
    net = phantom_net(args.folder, "resnet18", "refine", args.steps)
    model = with_tiles(net.run.int8, SLICE, args.folder / "whole.int8.onnx")
    source = dicom_series(args.folder / "single", 1, SLICE)
    rows = []
    for formats in ("nifti", "seg", "seg,nifti,png"):
        times = [_first_mask(place, model, source, formats) for _ in range(args.commands + 1)]
        first, *rest = times
        label = f"first mask on disk, --format {formats}"
        found = statistics.median(mask for mask, _ in rest)
        rows.append(Row(label=label, value=found, most=COLD_S, unit="s"))
        lines.append(
            f"--format {formats}: the first time {first[0]:.2f} s; process ends after "
            f"{statistics.median(end for _, end in rest):.2f} s"
        )
    absent = _absent(place)
    rows.append(Row(label="torch, ray, zarr and onnx in it", value=absent, most=0, unit="packages"))
    report("export", "cold", rows, facts, lines)


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def _install(place: Path) -> None:
    """As `uv pip install medpsp` of this tree, with the versions of constraints.txt."""
    uv = Path(sys.executable).with_name("uv")
    shutil.rmtree(place, ignore_errors=True)
    ran([uv, "venv", "--quiet", "--python", sys.executable, place], place.with_suffix(".venv.log"))
    command = [uv, "pip", "install", "--python", place / "bin" / "python", "--compile-bytecode"]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    ran([*command, *constraints, ROOT], place.with_suffix(".install.log"))


def _sizes(place: Path) -> dict[str, int]:
    done = subprocess.run(
        [place / "bin" / "python", "-c", SIZES], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _absent(place: Path) -> float:
    names = [name.split()[0].lower() for name in _sizes(place)]
    return float(sum(name in names for name in ("torch", "ray", "zarr", "onnx")))


def _size(place: Path) -> int:
    return sum(p.stat().st_size for p in place.rglob("*") if p.is_file() and not p.is_symlink())


def _first_mask(place: Path, model: Path, source: Path, formats: str) -> tuple[float, float]:
    """Seconds from the start of the process to the first mask under its name, and to its end.

    Raises:
        Missing: It failed.
    """
    out = place.with_name("cold")
    shutil.rmtree(out, ignore_errors=True)
    command = [place / "bin" / "medpsp", "predict", model, source, out, "--format", formats]
    first = 0.0
    with out.with_suffix(".log").open("wb") as log:
        began = time.perf_counter()
        child = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment(), cwd=place
        )
        while child.poll() is None:
            if not first and any((*out.glob("*.nii.gz"), *out.glob("*.dcm"))):
                first = time.perf_counter() - began
            time.sleep(POLL_S / 5)
        end = time.perf_counter() - began
    if child.returncode:
        raise Missing(f"medpsp predict of the base install: exit {child.returncode}")
    return first or end, end
