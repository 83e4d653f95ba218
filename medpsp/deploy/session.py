"""An exported file as onnxruntime runs it. No torch is imported here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from medpsp.deploy.inputs import GraphInput
from medpsp.machine import affinity, whole_cores
from medpsp.tiles import Tiling, tile_places, tiled
from medpsp.types import FloatArray

IMAGE, WINDOW = "image", "window"
MASK, LOGITS = OUTPUTS = ["mask", "logits"]
CONFIDENCE = "confidence"
"""An output where `export.confidence` is set."""
Feeds = dict[str, NDArray[Any]]
"""By the name of the input."""
MARGIN = 2e-4
"""Two logits nearer than this may change places where sums are taken in another order."""


def open_session(path: Path, threads: int = 1, optimise: bool = True) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        path: Of the ONNX file.
        threads: 0 for all cores that are ours.
        optimise: False runs each node as it stands, QDQ in float: what a CPU with VNNI computes.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = count = thread_count(threads)
    if cores := own_cores(count):
        options.add_session_config_entry("session.intra_op_thread_affinities", cores)
    options.log_severity_level = 3
    # threads that wait for the next run would take the cores of the decoders for 30 ms each time
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def thread_count(threads: int) -> int:
    """What ONNX Runtime is told: its own 0 is all cores of the machine, and binds threads to
    cores that affinity or a quota may keep from us."""
    some = whole_cores()
    return threads or (some if some < (os.cpu_count() or 1) else 0)


def own_cores(threads: int) -> str:
    """Where there is a core for each of some threads: those of the threads beside the caller, as
    onnxruntime writes them (from 1, by semicolons); else empty, and the kernel places them.

    It may put two that wait for each other on one core for a tick of 4 ms: MobileNetV3 with 2
    threads on 2 cores took 16.8 to 22.8 ms from process to process, and 15.6 bound.
    """
    cores = affinity() or []
    return ";".join(str(core + 1) for core in cores[1:]) if threads == len(cores) else ""


def run_graph(session: ort.InferenceSession, feeds: Feeds, *names: str) -> list[NDArray[Any]]:
    """These outputs."""
    found: list[NDArray[Any]] = session.run(names, feeds)
    return found


def clear_pixels(logits: NDArray[Any]) -> NDArray[np.bool_]:
    """(N, H, W): the two largest of (N, K, H, W) are more than `MARGIN` apart."""
    top = np.sort(logits, axis=1)
    with np.errstate(invalid="ignore"):  # infinite ones
        clear: NDArray[np.bool_] = top[:, -1] - top[:, -2] > MARGIN
    return clear


def feeds_of(image: NDArray[Any], window: FloatArray | None) -> Feeds:
    """Both inputs, or the one where windows are constants."""
    image = np.ascontiguousarray(image)
    return {IMAGE: image} if window is None else {IMAGE: image, WINDOW: window}


def class_masks(
    session: ort.InferenceSession,
    given: GraphInput,
    image: NDArray[Any],
    window: FloatArray | None,
    tiling: Tiling,
) -> NDArray[np.uint8]:
    """(N, H, W) class ids, cut into tiles as in evaluation.

    Args:
        session: Of an exported file.
        given: What it takes.
        image: (N, P, H, W) modality values.
        window: (N, V, 3); None where windows are constants of the graph.
        tiling: How much the network sees at once.
    """
    outside = given.outside(window is not None and bool(window[0, 0, 1] < 0))
    rows, columns = (max(pair) for pair in zip(image.shape[-2:], tiling.size, strict=True))
    alone = len(tile_places((rows, columns), tiling)) == 1

    def predict(part: NDArray[Any]) -> Any:
        if alone:
            return run_graph(session, feeds_of(part, window), MASK)[0]
        (logits,) = run_graph(session, feeds_of(part, window), LOGITS)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    found = tiled(predict, image, tiling, outside=outside)
    mask: NDArray[np.uint8] = found if alone else found.argmax(1).astype(np.uint8)
    return mask
