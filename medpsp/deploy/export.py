"""A trained network to ONNX with exact dynamic batch, height and width."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from medpsp.deploy.session import INPUT, OUTPUT
from medpsp.errors import ExportError

IR_VERSION = 8
"""Readable by runtimes from ONNX Runtime 1.10 on; the exporter alone would write 10."""


class LogitsOnly(nn.Module):
    """The network without its auxiliary output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K, H, W)."""
        logits, _ = self.model(image)
        return logits  # type: ignore[no-any-return]


def export_onnx(
    model: nn.Module, path: Path, channels: int, opset: int, metadata: dict[str, Any]
) -> None:
    """Write an fp32 ONNX file.

    Args:
        model: Trained network; set to eval mode here.
        path: Where to write.
        channels: Image channels C.
        opset: Asked for, and checked in the file afterwards: the exporter may substitute.
        metadata: Written as one JSON value under the key ``medpsp``.

    Raises:
        ExportError: The exporter gave another opset.
    """
    model.eval()
    sample = torch.zeros(2, channels, 64, 96)
    dynamic = {0: torch.export.Dim("N"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    with warnings.catch_warnings(), quiet("torch.onnx", logging.ERROR):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            LogitsOnly(model),
            (sample,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=(dynamic,),
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned nothing; use the versions of constraints.txt")
    proto = program.model_proto
    found = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if found != opset:
        raise ExportError(f"asked for opset {opset}, the exporter wrote {found}")
    write_model(proto, path, metadata)


@contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """A logger without what lies below ``level``, for as long as this lasts."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)


def write_model(proto: onnx.ModelProto, path: Path, metadata: dict[str, Any]) -> None:
    """Strip source paths, set IR version and metadata, write deterministically."""
    proto.ir_version = IR_VERSION
    _strip(proto)
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = "medpsp", json.dumps(metadata, sort_keys=True)
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(proto.SerializeToString(deterministic=True))
    partial.replace(path)


def _strip(proto: onnx.ModelProto) -> None:
    """The exporter writes stack traces, with paths of this machine, into every node."""
    proto.doc_string = proto.graph.doc_string = ""
    proto.producer_name = "medpsp"
    del proto.graph.metadata_props[:]
    for item in (
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
    ):
        item.doc_string = ""
        del item.metadata_props[:]
