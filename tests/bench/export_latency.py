"""One image of 512 x 512: torch eager, our files and OpenVINO's int8; and whose masks agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.exportfacts import SAID
from medpsp.config import BACKBONES
from medpsp.deploy.gates import least_dice
from medpsp.train.metrics import confusion, dice_per_class, mean_foreground
from tests.bench.export_nets import HEADS, Net, eager_file, large_slice, phantom_net, tiles
from tests.bench.export_rounds import Engine, engine_task, in_turn, ratio
from tests.bench.results import Missing, Row, report

OVER_EAGER = {
    "resnet18": 2.3,
    "mobilenetv3_large_100": 1.9,
    "efficientnet_b0": 1.65,
    "convnext_tiny": 1.8,
}
"""int8 over torch eager, CPU time at OS16; from a CPU with AVX2, without VNNI."""
BEHIND_OPENVINO, SHARE_OF_FP32 = 1.05, 0.9
PRESETS = ("performance", "mixed")
"""Symmetric activations, and asymmetric ones where they are signed."""
EAGER, PASSIVE = "torch eager fp32", "torch eager fp32, passive"
CALIBRATION, VALIDATION = 64, 128
"""Slices; the defaults of `export`."""


def latency(args: Any) -> None:
    """All networks that were asked for."""
    for backbone in args.backbones or BACKBONES:
        for head in args.heads or HEADS:
            try:
                _of_net(phantom_net(args.folder, backbone, head, args.steps), args)
            except Missing as error:
                report("export", f"latency {backbone} {head}", [], {"not measured": str(error)})


@dataclass(frozen=True)
class Peer:
    """OpenVINO's int8 of one preset; ``agrees``: masks against its fp32, mean foreground Dice."""

    file: Path
    agrees: float | None
    why: str = ""


def _of_net(net: Net, args: Any) -> None:
    peers = {preset: _openvino(net, preset) for preset in PRESETS}
    image = large_slice(args.folder / "slice.npz")
    files = _files(net, peers)
    for threads in args.threads:
        engines = _measured(files, image, threads, args.rounds)
        # threads that sleep while they wait hand the core over, and count as preempted
        disturbed = any(e.disturbed for e in engines.values() if not e.passive)
        rows = [
            replace(row, disturbed=disturbed and "CPU time" in row.label)
            for row in _rows(net, peers, engines)
        ]
        facts = {"threads": threads, "one image": "512 x 512, int16 in, class ids out"}
        lines = [engine.text for engine in engines.values()]
        report(
            "export",
            f"latency {net.name}, {threads} thread{'s' * (threads > 1)}",
            rows,
            facts,
            lines,
        )


def _files(net: Net, peers: dict[str, Peer]) -> dict[str, tuple[str, Path]]:
    run = net.run
    files = {
        EAGER: ("torch_eager", eager_file(net)),
        "ONNX fp32": ("onnxruntime", run.fp32),
        "ONNX int8 (cpu)": ("onnxruntime", run.int8),
        "ONNX fp16": ("onnxruntime", run.variant("half")),
    }
    for preset, peer in peers.items():
        if peer.agrees is not None:
            files[f"openvino int8 {preset}"] = ("openvino", peer.file)
            files[f"openvino int8 {preset}, f32"] = ("openvino_f32", peer.file)
    return files


def _measured(
    files: dict[str, tuple[str, Path]], image: Path, threads: int, rounds: int
) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    try:
        for name, (kind, path) in files.items():
            given = (kind, str(path), str(image))
            engines[name] = Engine(name, given, threads)
            if kind == "torch_eager" and threads > 1:
                engines[PASSIVE] = Engine(PASSIVE, given, threads, passive=True)
        in_turn(list(engines.values()), rounds)
    finally:
        for engine in engines.values():
            engine.close()
    return engines


def _rows(net: Net, peers: dict[str, Peer], engines: dict[str, Engine]) -> Iterator[Row]:
    backbone = net.config.model.backbone
    eager, fp32 = _faster(engines), engines["ONNX fp32"]
    int8, fp16 = engines["ONNX int8 (cpu)"], engines["ONNX fp16"]
    for engine in engines.values():
        yield Row(
            label=f"{engine.name}: CPU time of an image",
            value=statistics.median(engine.cpu) if engine.cpu else None,
            unit="ms",
            why="" if engine.cpu else engine.about,
        )
    yield Row(label="eager / ONNX fp32, CPU time", value=ratio(eager, fp32))
    wanted = OVER_EAGER[backbone]
    yield Row(label="eager / int8, CPU time", value=ratio(eager, int8), least=wanted)
    yield Row(label="ONNX fp32 / int8, CPU time", value=ratio(fp32, int8), least=1.0)
    yield Row(label="eager / int8, wall", value=_wall(eager, int8))
    yield Row(label="ONNX fp32 / int8, wall", value=_wall(fp32, int8))
    yield Row(label="ONNX fp32 / fp16, CPU time", value=ratio(fp32, fp16))
    share = int8.peak / fp32.peak if int8.peak and fp32.peak else None
    yield Row(label="peak memory, int8 / ONNX fp32", value=share, most=SHARE_OF_FP32)
    least = least_dice("cpu", backbone)
    for fact in net.dossier["agreement"]:
        bound = least_dice("half", backbone) if fact["variant"] == SAID["half"] else least
        yield Row(label=f"Dice of {fact['variant']} masks, fp32's", value=fact["mean"], least=bound)
    for preset, peer in peers.items():
        label = f"Dice of openvino int8 {preset} masks, its fp32's"
        yield Row(label=label, value=peer.agrees, why=peer.why)
        for name in (f"openvino int8 {preset}", f"openvino int8 {preset}, f32"):
            label = f"int8 / {name}, CPU time"
            if name not in engines:
                yield Row(label=label, value=None, why=peer.why)
                continue
            passes = peer.agrees is not None and peer.agrees >= least
            bound, why = (BEHIND_OPENVINO, "") if passes else (None, f"its Dice is < {least:g}")
            yield Row(label=label, value=ratio(int8, engines[name]), most=bound, why=why)


def _faster(engines: dict[str, Engine]) -> Engine:
    """Eager with the less CPU time: whether its threads spin or sleep must not be our gain."""
    found = [engines[name] for name in (EAGER, PASSIVE) if name in engines and engines[name].cpu]
    return min(found, key=lambda e: statistics.median(e.cpu)) if found else engines[EAGER]


def _wall(above: Engine, below: Engine) -> float | None:
    pairs = list(zip(above.wall, below.wall, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _openvino(net: Net, preset: str) -> Peer:
    """Made and compared once for a network; with the tiles that our own int8 was made with."""
    run = net.run
    file = run.root / f"openvino.{preset}.xml"
    try:
        if not file.exists():
            given = tiles(net, "train", CALIBRATION, run.root / "calibration.npz")
            engine_task("quantize", preset, str(run.fp32), str(given), str(file))
        given = tiles(net, "val", VALIDATION, run.root / "validation.npz")
        found = [
            _masks(engine, path, given)
            for engine, path in (("openvino_f32", run.fp32), ("openvino", file))
        ]
    except Missing as error:
        return Peer(file, None, str(error))
    return Peer(file, _agreement(found, len(net.config.data.classes)))


def _masks(engine: str, path: Path, given: Path) -> Any:
    out = path.with_suffix(".masks.npy")
    engine_task("masks", engine, str(path), str(given), str(out))
    return np.load(out)


def _agreement(found: Sequence[Any], classes: int) -> float:
    counts = confusion(found[0], found[1], classes)
    return float(mean_foreground(dice_per_class(counts)))
