"""How far int8 is from fp32, whether kernels saturate, which layers to give back to fp32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.deploy.quantize import Quantizer, Source, fresh
from medpsp.deploy.session import LOGITS, open_session, run_graph
from medpsp.progress import Bar
from medpsp.train.metrics import confusion, dice_per_class, mean_foreground
from medpsp.words import many

log = logging.getLogger("medpsp")
Logits = NDArray[np.float32]
PROBES = 3
"""Feeds that layers are ranked by."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the outputs of one file are like those of another.

    Attributes:
        sqnr_db: Signal to noise of the logits, over all values; infinite where they are equal.
        dice: Of the masks, for each class; NaN where a class is in neither.
        mean: Of the foreground classes; NaN without any foreground.
        changed: Share of pixels with another class.
    """

    sqnr_db: float
    dice: tuple[float, ...]
    mean: float
    changed: float


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `restore` did.

    Attributes:
        nodes: Names of those that it gave back to fp32, in that order.
        before: Agreement with every node in int8.
        after: Agreement of the file as it was written.
    """

    nodes: tuple[str, ...]
    before: Agreement
    after: Agreement


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What ends `restore`.

    Attributes:
        least: Mean foreground Dice of the masks against the fp32 masks that is enough; a mean of
            NaN (no foreground) is, too.
        most: Layers to give back at most.
        confirm: Whether the file as it is now passes on more than the feeds; asked where they are
            content and have foreground.
    """

    least: float
    most: int
    confirm: Callable[[], bool] = lambda: True


def logits_of(path: Path, source: Source, optimise: bool = True) -> Iterator[Logits]:
    """(N, K, H, W) for each of the feeds; ``optimise`` as in `open_session`."""
    session = open_session(path, optimise=optimise)
    for feeds in fresh(source):
        yield run_graph(session, feeds, LOGITS)[0]


def agreement(reference: Iterable[Logits], other: Iterable[Logits]) -> Agreement:
    """Compare logits (N, K, H, W) of the same feeds, one after another.

    Raises:
        ValueError: No logits, or not as many.
    """
    signal = noise = 0.0
    counts: NDArray[np.int64] | None = None
    for first, second in zip(reference, other, strict=True):
        wide = first.astype(np.float64)
        signal += float((wide**2).sum())
        noise += float(((wide - second) ** 2).sum())
        classes = first.shape[1]
        masks = [logits.argmax(1).astype(np.uint8) for logits in (first, second)]
        found = confusion(masks[0], masks[1], classes)
        counts = found if counts is None else counts + found
    if counts is None:
        raise ValueError("no logits to compare")
    dice = dice_per_class(counts)
    return Agreement(
        sqnr_db=decibel(signal, noise),
        dice=tuple(float(d) for d in dice),
        mean=mean_foreground(dice),
        changed=float(1 - np.diag(counts).sum() / counts.sum()),
    )


def decibel(signal: float, noise: float) -> float:
    """10 log10 of the ratio of two powers; infinite without noise, minus that without signal."""
    with np.errstate(divide="ignore"):
        return float(10 * (np.log10(signal) - np.log10(noise))) if noise else float("inf")


def saturation(reference: Path, path: Path, source: Source) -> tuple[float, float]:
    """SQNR in dB of an int8 file against its fp32 file, as it runs and in float emulation.

    CPUs without VNNI add two products of 8 bits in 16 bits and clip. With ``reduce_range`` they
    cannot: 2 * 255 * 64 < 2^15. The same file without graph optimisation runs in float, as exact as
    kernels that do not saturate. Of ``cpu`` files: the S8S8 of ``trt`` is not made for the kernels
    of a CPU.
    """
    real, emulated = (
        agreement(logits_of(reference, source), logits_of(path, source, optimise)).sqnr_db
        for optimise in (True, False)
    )
    return real, emulated


def restore(
    quantizer: Quantizer,
    target: Path,
    metadata: dict[str, Any],
    source: Source,
    bound: Bound,
) -> Restored:
    """Write an int8 file, with as few layers in fp32 as it takes to agree with the fp32 file.

    Layers are given back from the noisiest on, see `by_noise`. The fp32 logits of all feeds are in
    memory.

    Args:
        quantizer: Of the fp32 file.
        target: Where to write.
        metadata: As in `export_onnx`.
        source: Feeds, at best of validation patients.
        bound: When to stop. The file is written even if that is not enough.
    """
    optimise = quantizer.kind == "cpu"  # trt: no kernels of this CPU, see `saturation`
    expected = list(logits_of(quantizer.source, source))
    done: list[str] = []
    order: list[str] = []
    least, most = bound.least, min(bound.most, len(quantizer.nodes))
    found: list[Agreement] = []
    while True:
        quantizer.write(target, metadata, done)
        found.append(agreement(expected, logits_of(target, source, optimise)))
        if not np.isnan(found[-1].mean):
            log.info(
                "export: with %s in fp32 masks agree by %.4f on %s, %.2f is asked for",
                *(many(len(done), "layer"), found[-1].mean, many(len(expected), "tile"), least),
            )
        content = found[-1].mean >= least and bound.confirm()
        if content or np.isnan(found[-1].mean):
            break
        if len(done) == most:
            log.info("export: as many as may be are in fp32; the gates decide")
            break
        order = order or by_noise(quantizer, source)
        done.append(order[len(done)])
    return Restored(nodes=tuple(done), before=found[0], after=found[-1])


def by_noise(quantizer: Quantizer, source: Source) -> list[str]:
    """Names of the nodes that can be quantized, from the one that spoils the logits most on.

    Each is quantized alone, so that the noise at the logits is its own. Noise adds up, so one
    ranking serves all steps: restoring 8 layers of MobileNetV3 brings 14 dB, against 10 where the
    rest is int8 as well (8 times as long) and none by the activations that differ most
    (`onnxruntime.quantization.qdq_loss_debug`: they lie behind the layers at fault). In float
    emulation, since rounding is what is ranked, not kernels.
    """

    def few() -> Iterator[Any]:
        return islice(fresh(source), PROBES)

    expected, noise = list(logits_of(quantizer.source, few)), {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "alone.onnx"
        with Bar("rank by noise", len(quantizer.nodes), "layers") as bar:
            for name in quantizer.nodes:
                path.write_bytes(quantizer.graph([name]).SerializeToString())
                noise[name] = agreement(expected, logits_of(path, few, False)).sqnr_db
                bar.advance()
    return sorted(quantizer.nodes, key=noise.__getitem__)
