"""A DICOM series to a DICOM SEG, whole commands: `medpsp predict` and MONAI's way, same network.

MONAI's way: LoadImage, windowing, SliceInferer (its sliding window over slices) and a SEG by
highdicom; `export_monai` holds it. Both see 512 x 512 at once, 4 slices in a batch, on all cores.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.phantom import Phantom, draw, write_series
from medpsp.deploy.inputs import window_rows
from medpsp.types import Window
from tests.bench.export_nets import SLICE, Net, eager_file, meta_of, phantom_net, with_tiles
from tests.bench.export_rounds import Ran, ran
from tests.bench.results import ROOT, Missing, Row, paired, report

SHARE_OF_MONAI, SAME_MASKS = 0.5, 0.99
MONAI = ROOT / "tests" / "bench" / "export_monai.py"


def series(args: Any) -> None:
    """Both files of one ResNet18, and MONAI, in turn."""
    net = phantom_net(args.folder, "resnet18", "refine", args.steps)
    folder = dicom_series(args.folder / f"series-{args.slices}", args.slices, SLICE)
    works = _works(net, folder, args.folder)
    found: dict[str, list[Ran]] = {name: [] for name in works}
    why: dict[str, str] = {}
    for number in range(args.commands):
        for name in list(works)[:: -1 if number % 2 else 1]:
            try:
                found[name].append(works[name]())
            except Missing as error:
                why[name] = str(error)
    lines = [_line(name, found[name], why.get(name, "")) for name in works]
    facts = {"series": f"{args.slices} files of 512 x 512", "commands of each": args.commands}
    facts["memory"] = "sum over processes of the most that each had resident"
    report("export", "series", _rows(found, why, args.folder), facts, lines)


def dicom_series(folder: Path, slices: int, size: tuple[int, int]) -> Path:
    """Phantom CT, one file a slice; made once."""
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        phantom = Phantom(shape=(slices, *size), spacing=(3.0, 330 / size[0], 330 / size[1]))
        write_series(partial, "BENCH", drawn(phantom), phantom)
        partial.rename(folder)
    return folder


def drawn(phantom: Phantom, most: int = 100) -> Any:
    """HU of one patient, repeated from ``most`` slices on: drawing takes 100 bytes a voxel."""
    count = phantom.shape[0]
    few = Phantom(shape=(min(count, most), *phantom.shape[1:]), spacing=phantom.spacing)
    values, _ = draw(few, 3)
    return np.resize(values, phantom.shape)


def predict(model: Path, source: Path, out: Path, formats: str) -> Ran:
    """`medpsp predict` into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    command = [Path(sys.executable).with_name("medpsp"), "predict", model, source, out]
    return ran([*command, "--format", formats], out.with_suffix(".log"))


def _works(net: Net, folder: Path, scratch: Path) -> dict[str, Callable[[], Ran]]:
    files = {"int8": net.run.int8, "fp32": net.run.fp32}
    whole = {n: with_tiles(p, SLICE, scratch / f"whole.{n}.onnx") for n, p in files.items()}
    low, width, _ = window_rows([Window(**w) for w in meta_of(net.run.fp32)["input"]["windows"]])[0]
    numbers = [str(float(value)) for value in (low, low + width)]
    eager = eager_file(net)

    def ours(name: str) -> Callable[[], Ran]:
        return lambda: predict(whole[name], folder, scratch / f"series.{name}", "seg")

    def monai() -> Ran:
        command = [sys.executable, MONAI, eager, folder, scratch / "series.monai.dcm", *numbers]
        return ran(command, scratch / "series.monai.log")

    return {"medpsp int8": ours("int8"), "medpsp fp32": ours("fp32"), "MONAI + highdicom": monai}


def _line(name: str, found: list[Ran], why: str) -> str:
    if not found:
        return f"{name:20} -- {why}"
    wall, cpu = (statistics.median(getattr(r, key) for r in found) for key in ("wall", "cpu"))
    largest = max(found, key=lambda r: r.peak)
    children = ", ".join(f"{size:.0f}" for size in largest.children)
    return (
        f"{name:20} wall {wall:6.2f} s, CPU {cpu:6.2f} s, peak {largest.peak:5.0f} MiB "
        f"(main {largest.main:.0f}" + (f"; children {children})" if children else ")")
    )


def _rows(found: dict[str, list[Ran]], why: dict[str, str], scratch: Path) -> list[Row]:
    theirs, rows = found["MONAI + highdicom"], []
    for name in ("medpsp int8", "medpsp fp32"):
        ours = found[name]
        said = why.get(name) or why.get("MONAI + highdicom", "")
        pairs = list(zip(ours, theirs, strict=False))
        walls = [a.wall for a, _ in pairs], [b.wall for _, b in pairs]
        rows.append(replace(paired(f"{name} / MONAI, wall", *walls, "s", most=1.0), why=said))
        peaks = [[max(one.peak for one in side)] if side else [] for side in (ours, theirs)]
        row = paired(f"{name} / MONAI, memory", *peaks, "MiB", most=SHARE_OF_MONAI)
        rows.append(replace(row, why=said, spread=""))
    both = scratch / "series.fp32" / "series-000.dcm", scratch / "series.monai.dcm"
    dice = same_masks(*both) if all(path.exists() for path in both) else None
    rows.append(Row(label="Dice of both fp32 SEGs", value=dice, least=SAME_MASKS))
    return rows


def same_masks(ours: Path, theirs: Path) -> float:
    """Pooled Dice over segments and referenced images of two binary SEGs."""
    first, second = _frames(ours), _frames(theirs)
    empty = np.zeros(SLICE, bool)
    both = sizes = 0
    for key in first.keys() | second.keys():
        a, b = first.get(key, empty), second.get(key, empty)
        both, sizes = both + int((a & b).sum()), sizes + int(a.sum()) + int(b.sum())
    return 2 * both / sizes if sizes else float("nan")


def _frames(path: Path) -> dict[tuple[int, str], Any]:
    """(H, W) by segment number and referenced image."""
    from pydicom import dcmread
    from pydicom.pixels import pixel_array

    ds = dcmread(path)
    pixels = pixel_array(ds).reshape(-1, ds.Rows, ds.Columns)
    found = {}
    for item, frame in zip(ds.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        number = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        source = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        found[int(number), str(source)] = frame > 0
    return found
