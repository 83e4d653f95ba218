"""What is known of an exported model, as plain JSON values, for its certification file.

A fact that is not there was not measured. Nothing here names a patient, a host or a path.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # the one that pydantic can check on Python 3.11

CPUINFO = Path("/proc/cpuinfo")
ISA = (
    "avx2 avx_vnni avx_vnni_int8 avx512f avx512bw avx512vl avx512_vnni amx_int8 fma f16c "
    "neon asimd asimdhp asimddp i8mm sve sve2"
).split()
"""Flags that decide which kernels of ONNX Runtime run; x86 first, then ARM."""

VERSIONS = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch", "torchvision", "timm")


class FileFact(TypedDict):
    """A model file; ``variant`` as in its metadata, ``bytes`` its size, ``sha256`` in hex."""

    name: str
    variant: str
    bytes: int
    sha256: str
    opset: int
    ir: int


class ParityFact(TypedDict):
    """A file against the trained network at one shape.

    ``shape`` is (N, H, W); ``max_abs_diff`` of logits; ``relative`` to the largest logit;
    ``changed`` pixels with another class id, of which ``near_ties`` had a margin of the two
    largest logits of at most 2e-4.
    """

    variant: str
    shape: tuple[int, int, int]
    max_abs_diff: float
    relative: float
    changed: int
    near_ties: int


class AgreementFact(TypedDict):
    """A variant against fp32 and both against the labels, on ``slices`` validation slices.

    Dice by class name, without the background, None where a class occurs in neither; ``mean`` of
    those against fp32. SQNR of the logits against fp32 in dB, by the kernels of this CPU (``real``)
    and by float emulation of the same graph; None where not measured. ``restored``: names of nodes
    that went back to fp32.
    """

    variant: str
    slices: int
    against_fp32: dict[str, float | None]
    mean: float | None
    labels_fp32: dict[str, float | None]
    labels: dict[str, float | None]
    sqnr_real_db: float | None
    sqnr_emulated_db: float | None
    restored: list[str]


class OverlayFact(TypedDict):
    """A picture of a large disagreement: the slice, and cut out of it the mask of fp32, that of
    the variant and what differs. Empty where it may not be shown."""

    title: str
    png: bytes


class LatencyFact(TypedDict):
    """One image of ``size`` (H, W); milliseconds; peak resident memory of the process in MiB."""

    variant: str
    threads: int
    size: tuple[int, int]
    median_ms: float
    p95_ms: float
    peak_rss_mib: float | None


class CpuFact(TypedDict):
    """Of `cpu_facts`."""

    model: str
    flags: list[str]


class LoadFact(TypedDict):
    """Cores of the machine, and how many of them other processes took while latency was measured;
    None where the kernel does not say."""

    cores: int
    others: float | None


class SplitFact(TypedDict):
    """Of one split."""

    patients: int
    slices: int


class TrainingFact(TypedDict):
    """``manifest``: its digest; ``splits`` by name; ``classes``: labels, the background first.

    ``changed``: They are of shards that have changed since the network was trained.
    """

    changed: NotRequired[bool]
    manifest: str
    splits: dict[str, SplitFact]
    classes: list[str]


class GateFact(TypedDict):
    """A gate, the variant whose file it guards, and what was found and expected, in words."""

    gate: str
    variant: str
    passed: bool
    says: str


class AllowanceFact(TypedDict):
    """A gate that was not met and passed all the same, and the reason that was given."""

    gate: str
    reason: str


class RefusalFact(TypedDict):
    """A gate that was not met, so that ``file``, of ``variant``, was not given out."""

    gate: str
    variant: str
    file: str
    says: str


class Facts(TypedDict, total=False):
    """All of a dossier; what is left out was not measured.

    Attributes:
        model: Metadata of the files, as it stands in them.
        files: That were given out, in the order to show.
        parity: Rows of all variants.
        agreement: A row a variant.
        overlays: Largest disagreements first.
        latency: Rows.
        cpu: That latency and real kernels were measured on.
        load: Of the machine meanwhile.
        training: Of the data.
        evaluation: ``evaluation.json`` of `medpsp evaluate`.
        gates: All that were applied.
        allowances: Empty where every gate was met, or its file refused.
        refusals: Of files that were not given out; empty where all were.
        steps: What was optimised, a sentence each.
        environment: Versions by name.
    """

    model: dict[str, Any]
    files: list[FileFact]
    parity: list[ParityFact]
    agreement: list[AgreementFact]
    overlays: list[OverlayFact]
    latency: list[LatencyFact]
    cpu: CpuFact
    load: LoadFact
    training: TrainingFact
    evaluation: dict[str, Any]
    gates: list[GateFact]
    allowances: list[AllowanceFact]
    refusals: list[RefusalFact]
    steps: list[str]
    environment: dict[str, str]


def plain(value: Any) -> Any:
    """Values that JSON has: NaN and infinities become None, bytes their SHA-256."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cpu_facts(source: Path = CPUINFO) -> CpuFact:
    """Name and those flags of the CPU that are in `ISA`; "unknown" where the kernel says none.

    Args:
        source: What /proc/cpuinfo holds; ARM kernels name a part number instead of a model.
    """
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    pairs = [(k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in lines)]
    first = dict(reversed(pairs))
    given = set((first.get("flags") or first.get("Features") or "").split())
    arm = " ".join(f"{k} {first[k]}" for k in ("CPU implementer", "CPU part") if k in first)
    name = first.get("model name") or arm or platform.machine() or "unknown"
    return {"model": name, "flags": [flag for flag in ISA if flag in given]}


def environment_facts() -> dict[str, str]:
    """Versions of Python and of what makes and runs the files, where installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
