"""A trained network to ONNX with exact dynamic batch, height and width."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from medpsp.deploy.graph import DeployGraph
from medpsp.deploy.rewrites import turn_gelu
from medpsp.deploy.session import CONFIDENCE, IMAGE, LOGITS, MASK, OUTPUTS, WINDOW
from medpsp.errors import ExportError

IR_VERSION = 8
"""Readable by runtimes from ONNX Runtime 1.10 on; the exporter alone would write 10."""
LEGACY = range(11, 16)
"""Opsets that only the older exporter writes; the dynamo one gives 18 for them without a word."""


def export_onnx(graph: DeployGraph, path: Path, opset: int, metadata: dict[str, Any]) -> None:
    """Write an fp32 ONNX file with dynamic N, H and W.

    Args:
        graph: With the trained network; set to eval mode here.
        path: Where to write.
        opset: 18 to 20, or 11 to 15 for old runtimes; checked in the file afterwards.
        metadata: Written as one JSON value under the key ``medpsp``.

    Raises:
        ExportError: The exporter gave another opset.
    """
    graph, given = graph.eval(), graph.given
    image = torch.zeros(2, given.planes, 64, 96, dtype=getattr(torch, given.dtype))
    feeds = [image] if given.windows else [image, torch.ones(2, given.views, 3)]
    with warnings.catch_warnings(), quiet("torch.onnx", logging.ERROR):
        warnings.simplefilter("ignore")
        make = _legacy if opset in LEGACY else _dynamo
        proto = make(graph, tuple(feeds), opset)
    found = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if found != opset:
        raise ExportError(f"asked for opset {opset}, the exporter wrote {found}")
    write_model(proto, path, metadata)


def _dynamo(graph: DeployGraph, feeds: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    inputs, outputs = _names(graph)
    batch, height, width = (torch.export.Dim(letter) for letter in "NHW")
    dynamic = ({0: batch, 2: height, 3: width}, {0: batch})
    program = torch.onnx.export(
        graph,
        feeds,
        input_names=inputs,
        output_names=outputs,
        opset_version=opset,
        dynamo=True,
        dynamic_shapes=dynamic[: len(feeds)],
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned nothing; use the versions of constraints.txt")
    proto: onnx.ModelProto = program.model_proto  # made anew each time that it is asked for
    turn_gelu(proto)
    return proto


def _legacy(graph: DeployGraph, feeds: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    inputs, outputs = _names(graph)
    plane, map_ = {0: "N", 2: "H", 3: "W"}, {0: "N", 1: "H", 2: "W"}
    dynamic = {IMAGE: plane, WINDOW: {0: "N"}, MASK: map_, LOGITS: plane, CONFIDENCE: map_}
    written = io.BytesIO()
    torch.onnx.export(
        graph,
        feeds,
        written,  # type: ignore[arg-type] # its stub knows no files, its documentation does
        input_names=inputs,
        output_names=outputs,
        opset_version=opset,
        dynamo=False,
        dynamic_axes={name: dynamic[name] for name in (*inputs, *outputs)},
    )
    return onnx.load_from_string(written.getvalue())


def _names(graph: DeployGraph) -> tuple[list[str], list[str]]:
    """Of inputs and outputs."""
    inputs = [IMAGE] if graph.given.windows else [IMAGE, WINDOW]
    return inputs, [*OUTPUTS, CONFIDENCE] if graph.confidence else OUTPUTS


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
