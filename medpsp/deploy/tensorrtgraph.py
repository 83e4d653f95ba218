"""What TensorRT takes of an exported graph, and a copy of the graph that it can read.

Nothing here was run on TensorRT. Sources: docs/operators.md of onnx-tensorrt, editions TensorRT
10.15 (opsets 9 to 24) and 8.5 (up to opset 17, the TensorRT of JetPack 5); tensorrt.DataType in
NVIDIA's API reference: inputs and outputs are float, half, int8, int32, int64 (from 10), bool, and
uint8 next to a Cast; int16 is not among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from medpsp.deploy.session import IMAGE, MASK
from medpsp.errors import ExportError

SUPPORTED = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
    BatchNormalization BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape
    Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum
    Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If
    ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
    ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TensorScatter ThresholdedRelu Tile
    TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()
)
"""Operators marked Y in the edition of TensorRT 10.15."""

LATER = frozenset(
    """
    Attention BlackmanWindow CastLike DeformConv Gelu GroupNormalization HammingWindow HannWindow
    Hardmax IsInf LayerNormalization Mish RMSNormalization RotaryEmbedding STFT TensorScatter
    """.split()
)
"""Those of `SUPPORTED` that the edition of TensorRT 8.5 marks N or does not name."""

OPSETS, OLD_OPSET = range(9, 25), 17
"""Opsets that TensorRT 10.15 reads, and the last one that 8.5 does."""


@dataclass(frozen=True, kw_only=True)
class OpCheck:
    """A graph against the lists.

    Attributes:
        opset: Of the file.
        counts: Nodes by operator; ``domain::name`` outside the standard domain.
    """

    opset: int
    counts: dict[str, int]

    @property
    def unlisted(self) -> list[str]:
        """Operators that TensorRT 10.15 does not list."""
        return sorted(set(self.counts) - SUPPORTED)

    @property
    def too_new(self) -> list[str]:
        """What keeps TensorRT 8.5 from reading it; empty where nothing does."""
        newer = [f"opset {self.opset}"] if self.opset > OLD_OPSET else []
        return newer + sorted(set(self.counts) - (SUPPORTED - LATER))


def check_ops(proto: Any, name: str) -> OpCheck:
    """Hold each operator of a graph, and of the graphs inside its nodes, against the lists.

    Args:
        proto: An `onnx.ModelProto`.
        name: Of the file, for the message.

    Raises:
        ExportError: An operator or the opset is on no list.
    """
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    counts = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        for node in _nodes(proto.graph)
    )
    found = OpCheck(opset=opset, counts=dict(sorted(counts.items())))
    if found.unlisted or opset not in OPSETS:
        what = ", ".join(found.unlisted) or f"opset {opset}"
        raise ExportError(
            f"{name}: TensorRT 10.15 does not list {what}; give an fp32, fp16 or trt file as "
            "`medpsp export` writes it"
        )
    return found


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
            for inner in attribute.graphs:
                yield from _nodes(inner)


def is_quantized(proto: Any) -> bool:
    """Whether it holds Q/DQ nodes."""
    return bool(_paired(proto))


def asymmetric(proto: Any) -> list[str]:
    """Names of the Q/DQ nodes that TensorRT does not take: other than int8 with zero point 0."""
    values = _constants(proto.graph)
    return [n.name for n in _paired(proto) if not _symmetric(n, values)]


def _paired(proto: Any) -> list[Any]:
    return [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]


def refuse_asymmetric(proto: Any, name: str) -> None:
    """TensorRT takes int8 with a zero point of 0 and nothing else.

    Raises:
        ExportError: A Q/DQ node has another one: a U8S8 file for CPUs.
    """
    if wrong := len(asymmetric(proto)):
        raise ExportError(
            f"{name}: {wrong} of {len(_paired(proto))} Q/DQ nodes are not int8 with zero point 0 "
            "(U8S8, for CPUs), which TensorRT does not take; give the trt file (S8S8) of the same "
            "export"
        )


def _symmetric(node: Any, values: dict[str, Any]) -> bool:
    if len(node.input) < 3 or not node.input[2]:
        return str(node.op_type) == "DequantizeLinear"  # QuantizeLinear without one makes uint8
    zero = values.get(node.input[2])
    if zero is None or zero.data_type not in (TensorProto.INT8, TensorProto.INT32):
        return False
    return not bool(np.any(numpy_helper.to_array(zero)))


def _constants(graph: Any) -> dict[str, Any]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found


def make_readable(proto: Any, name: str) -> list[str]:
    """Change a graph in place until its inputs, outputs and Q/DQ nodes are what TensorRT takes.

    ``image`` becomes float32, which holds every int16 and uint8 exactly; ``mask`` becomes int32
    (NVIDIA converts to uint8 from floats only); int32 biases become float32 (their DequantizeLinear
    is refused: onnxruntime#14229, onnx-tensorrt#850), the same numbers that it would have made.

    Returns:
        What was done, a sentence each.

    Raises:
        ExportError: ``mask`` is not made by a Cast, or the changed graph does not check.
    """
    graph = proto.graph
    done = [text for step in (_float_image, _int_mask, _float_biases) if (text := step(graph))]
    del graph.value_info[:]  # holds types of before
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{name}: the copy for TensorRT is not valid ONNX ({str(error).splitlines()[0]}); "
            "export the model again with this version of medpsp"
        ) from None
    return done


def _float_image(graph: Any) -> str:
    tensor = next(i for i in graph.input if i.name == IMAGE).type.tensor_type
    before = TensorProto.DataType.Name(tensor.elem_type).lower()
    if tensor.elem_type == TensorProto.FLOAT:
        return ""
    tensor.elem_type = TensorProto.FLOAT
    casts = [
        node
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] == IMAGE and _target(node) == TensorProto.FLOAT
    ]
    for cast in casts:
        _reroute(graph, cast.output[0], IMAGE)
        graph.node.remove(cast)
    return f"`{IMAGE}` takes float32 instead of {before}; give it the same modality values."


def _int_mask(graph: Any) -> str:
    tensor = next(o for o in graph.output if o.name == MASK).type.tensor_type
    if tensor.elem_type == TensorProto.INT32:
        return ""
    maker = next(node for node in graph.node if MASK in node.output)
    if maker.op_type != "Cast":
        raise ExportError(f"output {MASK}: made by {maker.op_type}, expected Cast; export it again")
    for attribute in maker.attribute:
        if attribute.name == "to":
            attribute.i = TensorProto.INT32
    tensor.elem_type = TensorProto.INT32
    return f"`{MASK}` gives int32 instead of uint8 class ids."


def _float_biases(graph: Any) -> str:
    values, users = _constants(graph), Counter(i for node in graph.node for i in node.input)
    folded = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in values
        and values[node.input[0]].data_type == TensorProto.INT32
    ]
    for node in folded:
        bias, scale = (numpy_helper.to_array(values[name]) for name in node.input[:2])
        if scale.size > 1:  # per channel; a bias has one axis
            scale = scale.reshape(bias.shape)
        made = bias.astype(np.float32) * scale.astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(made, node.output[0]))
        graph.node.remove(node)
        users.subtract(node.input)
    kept = [t for t in graph.initializer if users.get(t.name, 1) > 0]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return f"{len(folded)} int32 biases became float32." if folded else ""


def _target(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "to"), 0)


def _reroute(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def save(proto: Any, path: Path) -> None:
    """The same graph gives the same bytes."""
    path.write_bytes(proto.SerializeToString(deterministic=True))
