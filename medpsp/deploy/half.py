"""fp16 copies of an exported fp32 file."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from medpsp.deploy.export import write_model
from medpsp.deploy.quantize import weighted

SUMMING = (
    "GlobalAveragePool",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Pow",
    "ReduceMean",
    "ReduceSum",
)
"""These add up many values, or square them: above 65504 fp16 is infinite."""
WHOLE = ("Constant", "ConstantOfShape", "Range")
"""The type of their result is in an attribute, or in what they count."""
FIRST_ONLY = ("Resize",)
"""The scales stay fp32 by the standard."""


def half(source: Path, target: Path, metadata: dict[str, Any]) -> None:
    """Write the fp16 copy of an fp32 file; its inputs and outputs keep their types.

    fp32 stays what lies before the first weighted layer (windows: 2048 and 2049 HU are one in
    fp16) and after the last (upsampling, argmax), and what adds up many values: the
    products that pool the pyramid, means and normalisations.

    onnxruntime's own converter puts fp16 between any two layers that stay fp32, windows among them.

    Args:
        source: fp32 file of `export_onnx`.
        target: Where to write.
        metadata: As in `export_onnx`.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load(source), strict_mode=True)
    writer = _Writer(proto, fp32_nodes(proto))
    for node in proto.graph.node:
        writer.add(node)
    writer.finish()
    write_model(proto, target, metadata)


def fp32_nodes(proto: onnx.ModelProto) -> set[str]:
    """First outputs of all nodes that stay fp32.

    What is computed from a shape alone has no weighted layer before it.
    """
    constants = {t.name for t in proto.graph.initializer}
    after: set[str] = set()  # tensors that follow from a weighted layer
    for node in proto.graph.node:
        if weighted(node, constants) or after.intersection(node.input):
            after.update(() if node.op_type in ("Shape", "Size") else node.output)
    before: set[str] = set()  # tensors that a weighted layer follows from
    for node in reversed(proto.graph.node):
        if weighted(node, constants) or before.intersection(node.output):
            before.update(node.input)
    return {
        node.output[0]
        for node in proto.graph.node
        if not weighted(node, constants)
        and (
            node.op_type in ("MatMul", *SUMMING, *WHOLE)
            or not after.intersection(node.output)
            or not before.intersection(node.output)
        )
    }


class _Writer:
    """The nodes one after another, with casts where two types meet."""

    def __init__(self, proto: onnx.ModelProto, whole: Collection[str]) -> None:
        graph = proto.graph
        self.graph, self.whole = graph, whole
        self.weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        infos: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.output, *graph.value_info)
        self.types = {  # of float tensors: as they are at this point
            info.name: TensorProto.FLOAT
            for info in infos
            if info.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self.outputs = {output.name for output in graph.output}
        self.nodes: list[onnx.NodeProto] = []
        self.made: dict[str, onnx.TensorProto] = {}
        self.casts: set[str] = set()

    def add(self, node: onnx.NodeProto) -> None:
        """Copy one node, in fp16 unless it stays fp32."""
        node = _copied(node)
        to = TensorProto.FLOAT if node.output[0] in self.whole else TensorProto.FLOAT16
        count = 1 if node.op_type in FIRST_ONLY else len(node.input)
        for place in range(count):
            node.input[place] = self._as(node.input[place], to)
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT:
            node.attribute[0].i = to
        self.nodes.append(node)
        for place, name in enumerate(node.output):
            if self.types.get(name) is None or to == TensorProto.FLOAT:
                continue
            self.types[name] = to
            if name in self.outputs:
                node.output[place] = f"{name}_fp16"
                self.types[name] = TensorProto.FLOAT
                self.casts.add(node.output[place])
                self._cast(node.output[place], name, TensorProto.FLOAT)

    def _as(self, name: str, to: int) -> str:
        """Name of the same values in another type, if they are floats."""
        if name in self.weights:
            return name if to == TensorProto.FLOAT else self._half_weight(name)
        if self.types.get(name, to) == to:
            return name
        other = f"{name}_fp16" if to == TensorProto.FLOAT16 else f"{name}_fp32"
        if other not in self.casts:
            self._cast(name, other, to)
        return other

    def _half_weight(self, name: str) -> str:
        other = f"{name}_fp16"
        if other not in self.made:
            values = numpy_helper.to_array(self.weights[name]).astype(np.float16)
            self.made[other] = numpy_helper.from_array(values, other)
        return other

    def _cast(self, name: str, other: str, to: int) -> None:
        self.casts.add(other)
        self.nodes.append(helper.make_node("Cast", [name], [other], f"{other}_cast", to=to))

    def finish(self) -> None:
        """Put the new nodes and weights in place of the old."""
        graph = self.graph
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [t for t in (*graph.initializer, *self.made.values()) if t.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
