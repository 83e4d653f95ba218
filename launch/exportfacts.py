"""What an export found, as the dossier takes it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from launch.exportmeta import of_these_files, scores_in
from launch.exportpictures import draw_largest
from launch.rundir import SAID, RunDir
from medpsp.config import Config
from medpsp.deploy.dossier import (
    AgreementFact,
    Facts,
    FileFact,
    GateFact,
    LatencyFact,
    ParityFact,
    TrainingFact,
    cpu_facts,
    environment_facts,
)
from medpsp.deploy.gates import Gate, refused_by
from medpsp.types import SPLITS
from shards.index import file_sha256

if TYPE_CHECKING:
    from medpsp.deploy.gates import Gate, Scores
    from medpsp.deploy.restore import Restored
    from medpsp.deploy.session import Feeds
    from medpsp.deploy.verify import Parity
    from shards.index import SliceRow

PEAK = """
import sys
import numpy as np
from pathlib import Path
from medpsp.deploy.session import MASK, open_session, run_graph
session = open_session(Path(sys.argv[1]), int(sys.argv[2]))
feeds = dict(np.load(sys.argv[3]))
for _ in range(2):
    run_graph(session, feeds, MASK)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@dataclass
class Found:
    """What an export measured, for the gates and the dossier.

    Attributes:
        parity: Of each file that has to equal the network.
        restored: Of each int8 file.
        saturation: Real and emulated SQNR of the ``cpu`` file, dB.
        scores: Of fp32 and each variant, on validation slices.
        chosen: Rows of those slices.
        times: (rounds,) ms of fp32 and each file for CPUs, by threads.
        others: Cores that other processes took meanwhile.
        feeds: The tile that they were measured on.
        gates: All that were tried.
    """

    parity: list[Parity] = field(default_factory=list)
    restored: dict[str, Restored] = field(default_factory=dict)
    saturation: tuple[float, float] | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    chosen: Sequence[SliceRow] = ()
    times: dict[int, dict[str, Any]] = field(default_factory=dict)
    others: float | None = None
    feeds: Feeds = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the tile."""
        height, width = self.feeds["image"].shape[2:]
        return height, width


def dossier_facts(
    config: Config, run: RunDir, metadata: dict[str, Any], rows: Sequence[SliceRow], found: Found
) -> Facts:
    """All of an export.

    Args:
        config: Of the run.
        run: With the folder of the files.
        metadata: Of the fp32 file.
        rows: Labelled ones.
        found: What was measured.
    """
    files = {"fp32": run.fp32}
    files |= {name: run.variant(name) for name in config.export.variants}
    refused = refused_by(found.gates, config.export.allow)
    names = {gate.variant for gate in refused}
    facts = Facts(
        model=metadata,
        files=[_file(path, said_of(name)) for name, path in files.items() if name not in names],
        parity=_parity(found),
        agreement=[_agreement(config, found, name) for name in config.export.variants],
        overlays=draw_largest(
            config,
            found.chosen,
            {said_of(n): found.scores[n].worst for n in config.export.variants},
        ),
        latency=list(_latency(files, found)),
        cpu=cpu_facts(),
        load={"cores": os.cpu_count() or 1, "others": found.others},
        training=_training(config, run, rows, metadata["manifest"]),
        gates=[_parity_gate(config, found), *map(_gate, found.gates)],
        allowances=[
            {"gate": gate.name, "reason": f"{config.export.allow[gate.name]} ({gate.says})"}
            for gate in found.gates
            if not gate.passed and gate.name in config.export.allow
        ],
        refusals=[
            {
                "gate": gate.name,
                "variant": said_of(gate.variant),
                "file": run.variant(gate.variant).name,
                "says": gate.says,
            }
            for gate in refused
        ],
        steps=_steps(config, found),
        environment=environment_facts(),
    )
    scores = scores_in(run)
    if of_these_files(scores, config, metadata["weights"]):
        facts["evaluation"] = scores
    elif scores is not None:
        facts["steps"].append(
            "The scores that lie in the run are not known to be of these weights, or are of tiles, "
            "mirrored images or cleaned masks that the files do not have: they are left out. "
            "Evaluate again."
        )
    return facts


def said_of(name: str) -> str:
    """Variant as the metadata of the file has it."""
    return SAID.get(name, name)


def _parity_gate(config: Config, found: Found) -> GateFact:
    """Nothing is written where it is not met."""
    from medpsp.deploy.verify import parity_says

    says = parity_says(found.parity, config.export.parity_tolerance)
    return {"gate": "parity", "variant": "fp32", "passed": True, "says": says}


def _gate(gate: Gate) -> GateFact:
    variant = said_of(gate.variant)
    return {"gate": gate.name, "variant": variant, "passed": gate.passed, "says": gate.says}


def _file(path: Path, variant: str) -> FileFact:
    proto = onnx.load(path)
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return {
        "name": path.name,
        "variant": variant,
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "opset": int(opset),
        "ir": int(proto.ir_version),
    }


def _parity(found: Found) -> list[ParityFact]:
    return [
        {
            "variant": "fp32",
            "shape": row.shape,
            "max_abs_diff": row.max_abs_diff,
            "relative": row.relative,
            "changed": row.changed + row.ties,
            "near_ties": row.ties,
        }
        for row in found.parity
    ]


def _agreement(config: Config, found: Found, name: str) -> AgreementFact:
    scores, fp32 = found.scores[name], found.scores["fp32"]
    restored = found.restored.get(name)
    real, emulated = found.saturation if name == "cpu" and found.saturation else (None, None)

    def named(values: Sequence[float]) -> dict[str, float | None]:
        pairs = zip(config.data.classes[1:], values[1:], strict=True)
        return {label: None if math.isnan(value) else value for label, value in pairs}

    return {
        "variant": said_of(name),
        "slices": len(found.chosen),
        "against_fp32": named(scores.against_fp32),
        "mean": None if math.isnan(scores.agreement) else scores.agreement,
        "labels_fp32": named(fp32.against_labels),
        "labels": named(scores.against_labels),
        "sqnr_real_db": real,
        "sqnr_emulated_db": emulated,
        "restored": list(restored.nodes) if restored else [],
    }


def _latency(files: Mapping[str, Path], found: Found) -> Iterator[LatencyFact]:
    for threads, times in found.times.items():
        for name, ms in times.items():
            yield {
                "variant": said_of(name),
                "threads": threads,
                "size": found.size,
                "median_ms": float(np.median(ms)),
                "p95_ms": float(np.percentile(ms, 95)),
                "peak_rss_mib": _peak(files[name], threads, found),
            }


def _peak(path: Path, threads: int, found: Found) -> float | None:
    """MiB of a process that does nothing else; None where the kernel does not say."""
    feeds = path.parent / "feeds.npz"
    np.savez(feeds, **found.feeds)  # type: ignore[arg-type] # its stub takes no names
    command = [sys.executable, "-c", PEAK, str(path), str(threads), str(feeds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024
    except (subprocess.CalledProcessError, ValueError):
        return None
    finally:
        feeds.unlink(missing_ok=True)


def _training(config: Config, run: RunDir, rows: Sequence[SliceRow], manifest: str) -> TrainingFact:
    from medpsp.train.checkpoint import read_state
    from shards.index import SHARDS, read_manifest

    trained_on = read_state(run.checkpoints / "best").content
    now = read_manifest(config.shards).tables[SHARDS]
    patients: dict[str, set[str]] = defaultdict(set)
    slices: dict[str, int] = defaultdict(int)
    for row in rows:
        patients[row.split].add(row.patient)
        slices[row.split] += 1
    splits = [name for name in SPLITS if name in slices]
    return {
        "changed": bool(trained_on) and trained_on != now,
        "manifest": manifest,
        "splits": {n: {"patients": len(patients[n]), "slices": slices[n]} for n in splits},
        "classes": list(config.data.classes),
    }


def _steps(config: Config, found: Found) -> list[str]:
    steps = [
        "Windows, padding to the stride, network and argmax are one graph.",
        "BatchNorm is folded into the convolutions where onnxruntime prepares int8; the auxiliary "
        "head is left out.",
    ]
    for name in config.export.variants:
        if name == "half":
            steps.append(
                "fp16: weights and activations of the network; windows, pooling sums and what "
                "follows the network stay fp32."
            )
            continue
        kept = found.restored[name].nodes
        more = f" Back to fp32 for accuracy: {', '.join(kept)}." if kept else ""
        ranges = (
            "all values" if config.export.percentile == 100 else f"{config.export.percentile} %"
        )
        but = ", but between ReLUs of others" if name == "cpu" else ""
        steps.append(
            f"{said_of(name)}: static, per channel, convolutions and matrix products with constant "
            f"weights; depthwise ones stay fp32{but}. Ranges hold {ranges} of "
            f"{config.export.calibration_slices} tiles of training patients at most.{more}"
        )
    return steps
