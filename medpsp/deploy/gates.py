"""What an exported file has to pass, and the measurements that say whether it does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.session import MASK, Feeds, class_masks, open_session, run_graph
from medpsp.tiles import Tiling
from medpsp.train.metrics import confusion, dice_per_class, mean_foreground
from medpsp.types import FloatArray

Variant = Literal["cpu", "trt", "half"]
LEAST_DICE: dict[str, dict[str, float]] = {
    "cpu": {
        "resnet18": 0.99,
        "convnext_tiny": 0.99,
        "efficientnet_b0": 0.97,
        "mobilenetv3_large_100": 0.95,
    },
    "trt": {
        "resnet18": 0.97,
        "convnext_tiny": 0.97,
        "efficientnet_b0": 0.95,
        "mobilenetv3_large_100": 0.93,
    },
    "half": {},
}
"""Mean foreground Dice of the masks against the fp32 masks."""
OTHERWISE = {"cpu": 0.95, "trt": 0.93, "half": 0.998}
"""For other backbones, and whatever the backbone."""
MOST_DROP = 0.005
"""Of the Dice of any class against the labels, from fp32 on."""
SATURATION_DB = 2.0
"""Real kernels and float emulation differed by up to 0.5 dB without saturation, and by 4 to 13 dB
with it (ResNet18, MobileNetV3 and EfficientNet-B0 on AVX2)."""
ROUNDS, WARM = 11, 2
WORST = 3
"""Slices of each file that are kept to be drawn, of as many cases."""


class Slice(Protocol):
    """See `launch.feeds.GraphSlice`."""

    @property
    def image(self) -> NDArray[Any]:
        """(1, P, H, W)."""

    @property
    def window(self) -> FloatArray | None:
        """(1, V, 3)."""

    @property
    def label(self) -> NDArray[np.uint8]:
        """(H, W)."""


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A slice of which two files make different masks, (H, W) each; ``number`` in the sequence."""

    number: int
    fp32: NDArray[np.uint8]
    other: NDArray[np.uint8]

    @property
    def pixels(self) -> int:
        """That differ."""
        return int((self.fp32 != self.other).sum())


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One file on validation slices; Dice (K,) is NaN where a class is in neither.

    Attributes:
        against_fp32: Dice of its masks against those of the fp32 file.
        against_labels: Dice of its masks against the labels.
        changed: Share of pixels with another class than fp32.
        worst: Slices that differ most, of each case at most one.
    """

    against_fp32: tuple[float, ...]
    against_labels: tuple[float, ...]
    changed: float
    worst: tuple[Differing, ...] = ()

    @property
    def agreement(self) -> float:
        """Mean foreground Dice against fp32; NaN without any foreground."""
        return mean_foreground(np.array(self.against_fp32))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition of a file: ``name`` may be allowed to fail, with a reason."""

    name: str
    variant: Variant
    passed: bool
    says: str


def scores(
    files: Mapping[str, ort.InferenceSession],
    slices: Iterable[Slice],
    given: GraphInput,
    classes: int,
    tiling: Tiling,
    cases: Sequence[str] = (),
) -> dict[str, Scores]:
    """Masks of all files on the same slices, cut into tiles as on the device.

    Args:
        files: The first one is the fp32 file.
        slices: Of validation patients.
        given: What the files take.
        classes: K.
        tiling: How much the network sees at once.
        cases: Of what case each slice is; without, each is one of its own.
    """
    to_fp32 = {name: np.zeros((classes, classes), np.int64) for name in files}
    to_label = {name: np.zeros((classes, classes), np.int64) for name in files}
    worst: dict[str, dict[str, Differing]] = {name: {} for name in files}
    for number, one in enumerate(slices):
        reference, case = None, cases[number] if cases else str(number)
        for name, session in files.items():
            (mask,) = class_masks(session, given, one.image, one.window, tiling)
            reference = mask if reference is None else reference
            to_fp32[name] += confusion(reference, mask, classes)
            to_label[name] += confusion(one.label, mask, classes)
            found = Differing(number=number, fp32=reference, other=mask)
            worst[name] = _with(worst[name], case, found)
    return {
        name: Scores(
            against_fp32=tuple(dice_per_class(to_fp32[name]).tolist()),
            against_labels=tuple(dice_per_class(to_label[name]).tolist()),
            changed=float(1 - np.diag(to_fp32[name]).sum() / max(1, to_fp32[name].sum())),
            worst=tuple(one for one in worst[name].values() if one.pixels),
        )
        for name in files
    }


def _with(worst: dict[str, Differing], case: str, found: Differing) -> dict[str, Differing]:
    """The `WORST` cases with the slice of each that differs most; the first of equal ones."""
    if case not in worst or found.pixels > worst[case].pixels:
        worst = {**worst, case: found}
    order = sorted(worst, key=lambda name: (-worst[name].pixels, worst[name].number))
    return {name: worst[name] for name in order[:WORST]}


def latency(
    paths: Mapping[str, Path], feeds: Feeds, threads: int, rounds: int = ROUNDS
) -> dict[str, NDArray[np.float64]]:
    """(rounds,) wall ms of each file on one input, the files in turn within each round."""
    sessions = {name: open_session(path, threads) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(WARM + rounds):
        for name, session in sessions.items():
            began = time.perf_counter()
            run_graph(session, feeds, MASK)
            if number >= WARM:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: np.array(found) for name, found in times.items()}


def least_dice(variant: Variant, backbone: str) -> float:
    """What the masks of a variant have to agree with those of fp32."""
    return LEAST_DICE[variant].get(backbone, OTHERWISE[variant])


def dice_gates(
    variant: Variant, least: float, found: Scores, fp32: Scores, classes: Sequence[str]
) -> list[Gate]:
    """Agreement with fp32, and the drop of each class, by its name, against the labels.

    Without any foreground in either mask there is no agreement to speak of: that does not pass.
    """
    says = f"masks agree with fp32 by Dice {found.agreement:.4f}, expected {least:g}"
    if np.isnan(found.agreement):
        says = f"no mask has any foreground, neither of fp32, expected Dice {least:g} between them"
    passed = bool(found.agreement >= least)
    gates = [Gate(name=f"{variant}_dice", variant=variant, passed=passed, says=says)]
    drops = np.array(fp32.against_labels) - np.array(found.against_labels)
    if np.isfinite(drops[1:]).any():
        worst = 1 + int(np.nanargmax(drops[1:]))
        side = "lower" if drops[worst] > 0 else "higher"
        gates.append(
            Gate(
                name=f"{variant}_drop",
                variant=variant,
                passed=bool(drops[worst] <= MOST_DROP),
                says=f"Dice of {classes[worst]} against the labels is {abs(drops[worst]):.4f} "
                f"{side} than that of fp32, at most {MOST_DROP:g} lower is expected",
            )
        )
    return gates


def latency_gate(times: Sequence[Mapping[str, NDArray[np.float64]]]) -> Gate:
    """The int8 file for CPUs is no slower than fp32; the median of paired rounds, best thread
    count."""
    ratios = [float(np.median(found["cpu"] / found["fp32"])) for found in times]
    return Gate(
        name="latency",
        variant="cpu",
        passed=min(ratios) <= 1,
        says=f"int8 takes {min(ratios):.2f} of the time of fp32 on this CPU, at most 1 is expected",
    )


def saturation_gate(real: float, emulated: float) -> Gate:
    """Do the int8 kernels of this CPU compute what the file says?

    Args:
        real: SQNR in dB of its logits against fp32, as it runs.
        emulated: The same without graph optimisation; see `restore.saturation`.
    """
    return Gate(
        name="saturation",
        variant="cpu",
        passed=real == emulated or abs(real - emulated) <= SATURATION_DB,  # both may be infinite
        says=f"int8 kernels of this CPU give {real:.1f} dB against fp32, the same file in float "
        f"{emulated:.1f} dB, within {SATURATION_DB:g} dB is expected",
    )


def refused_by(gates: Sequence[Gate], allow: Mapping[Any, str]) -> list[Gate]:
    """Gates that failed and may not; each refuses its own file and no other."""
    return [gate for gate in gates if not gate.passed and gate.name not in allow]
