"""An exported file as onnxruntime runs it. No torch is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from medpsp.tiles import Tiling, tiled

INPUT, OUTPUT = "image", "logits"


def open_session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        path: Of the ONNX file.
        threads: Of it; 0 for all cores.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def class_masks(
    session: ort.InferenceSession, image: NDArray[np.float32], tiling: Tiling
) -> NDArray[np.uint8]:
    """(N, H, W) class indices of (N, C, H, W) images, cut into tiles as in evaluation."""

    def predict(part: NDArray[np.float32]) -> Any:
        logits = session.run(None, {INPUT: np.ascontiguousarray(part)})[0]
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    mask: NDArray[np.uint8] = tiled(predict, image, tiling).argmax(1).astype(np.uint8)
    return mask
