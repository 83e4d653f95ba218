"""Changes of a graph after which ONNX Runtime takes fewer or faster kernels for it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper

ORT_DOMAIN = "com.microsoft"
PASSED = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
"""ONNX Runtime moves a DequantizeLinear from before these to behind them (`QDQPropagation`)."""


def turn_gelu(proto: onnx.ModelProto) -> None:
    """Make (x * (1 + erf(x / s))) * 0.5 of x * (0.5 * (1 + erf(x / s))), which has the same bits.

    Not where the product overflows, from half of the largest float on.

    ONNX Runtime 1.32 computes the first as one node, the second as six: 12 % of ConvNeXt-Tiny's
    time in fp32, 17 % in int8. The older exporter writes the first.
    """
    nodes = proto.graph.node
    scalars = (t for t in proto.graph.initializer if not t.dims)
    halves = {t.name for t in scalars if numpy_helper.to_array(t) == 0.5}
    made = {name: node for node in nodes for name in node.output}
    readers = _readers(proto)

    def kind(name: str) -> str:
        return made[name].op_type if name in made else ""

    for last in nodes:
        pair = list(last.input) if last.op_type == "Mul" else []
        for x, inner in zip(pair, pair[::-1], strict=True):
            first = made.get(inner)
            if kind(inner) != "Mul" or readers[inner] > 1 or not first:
                continue
            sums = [name for name in first.input if kind(name) == "Add"]
            half = [name for name in first.input if name in halves]
            erfs = [name for name in (made[sums[0]].input if sums else ()) if kind(name) == "Erf"]
            scaled = made.get(made[erfs[0]].input[0]) if erfs else None
            if half and scaled is not None and x in scaled.input:
                first.input[:], last.input[:] = [x, sums[0]], [inner, half[0]]
                break


def fuse_silu(proto: onnx.ModelProto) -> None:
    """Write x * sigmoid(x) as one node, `QuickGelu` of ONNX Runtime.

    It makes the same of an fp32 file, but not of int8: where x comes from DequantizeLinear each of
    its two readers gets a copy, and the pattern is gone. In EfficientNet-B0 that is 10 of 58 ms and
    a quarter of the memory, and the values are the same.
    """
    nodes = proto.graph.node
    readers = _readers(proto)
    gates = {n.output[0]: n for n in nodes if n.op_type == "Sigmoid" and readers[n.output[0]] == 1}
    for node in list(nodes):
        gate = next((gates[name] for name in node.input if name in gates), None)
        if node.op_type == "Mul" and gate and gate.input[0] in node.input:
            node.CopyFrom(
                helper.make_node(
                    "QuickGelu", gate.input, node.output, node.name, domain=ORT_DOMAIN, alpha=1.0
                )
            )
            nodes.remove(gate)
    _import_ort(proto)


def keep_float(proto: onnx.ModelProto) -> None:
    """Write convolutions of int8 maps by fp32 weights as `FusedConv`, with the ReLU after them.

    ONNX Runtime (`WeightBiasQuantization`) rounds the weights of a Conv between DequantizeLinear
    and QuantizeLinear to 8 bits, with one scale for all channels, though the file has them in fp32:
    layers that were given back for their accuracy lost it again, and more (4 dB of 41 on CT). It
    looks at no FusedConv.
    """
    nodes = proto.graph.node
    made = {name: node for node in nodes for name in node.output}
    readers = _readers(proto)
    relus = {node.input[0]: node for node in nodes if node.op_type == "Relu"}
    weights = {tensor.name for tensor in proto.graph.initializer}

    def of_int8(name: str) -> bool:
        while name in made and made[name].op_type in PASSED:
            name = made[name].input[0]
        return name in made and made[name].op_type == "DequantizeLinear"

    for node in [n for n in nodes if n.op_type == "Conv" and n.input[1] in weights]:
        if not of_int8(node.input[0]):
            continue
        node.op_type, node.domain = "FusedConv", ORT_DOMAIN
        relu = relus.get(node.output[0])
        if relu and readers[node.output[0]] == 1:
            node.attribute.append(helper.make_attribute("activation", "Relu"))
            node.output[0] = relu.output[0]
            nodes.remove(relu)
    _import_ort(proto)


def quantize_sums(proto: onnx.ModelProto) -> None:
    """Round an int8 map that was scaled up and is added to another once more, at its own scale.

    One that is larger by the last bit, in fact: of a Resize between equal scales earlier versions
    make one of uint8.

    All that the sum reads and gives is int8 then, and ONNX Runtime adds in int8; in the decoders of
    MobileNetV3 the sums in fp32 took a tenth of the time. It costs 0.3 dB. Resize itself stays in
    fp32: with uint8 ONNX Runtime takes four times as long for it.
    """
    nodes, none = list(proto.graph.node), onnx.NodeProto()
    made = {name: node for node in nodes for name in node.output}
    readers = _readers(proto)
    reader = {name: node for node in nodes for name in node.input if readers[name] == 1}
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if not t.dims}
    for place, node in reversed(list(enumerate(nodes))):
        if node.op_type != "Resize":
            continue
        name, source = node.output[0], made.get(node.input[0], none)
        total = reader.get(name, none)
        ends = [reader.get(total.output[0], none).op_type] if total.op_type == "Add" else []
        ends += [made.get(other, none).op_type for other in total.input if other != name]
        if [source.op_type, *ends] != ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear"]:
            continue
        if source.input[1] not in values:  # a scale for each channel
            continue
        scaled, rounded, scale = f"{name}_scaled", f"{name}_rounded", f"{name}_scale"
        node.output[0] = scaled
        wider = np.nextafter(values[source.input[1]], np.float32(np.inf))
        proto.graph.initializer.append(numpy_helper.from_array(wider, scale))
        pair = ("QuantizeLinear", scaled, rounded), ("DequantizeLinear", rounded, name)
        for back, (kind, given, gives) in enumerate(pair, start=1):
            new = helper.make_node(
                kind, [given, scale, *source.input[2:]], [gives], f"{name}_{kind}"
            )
            proto.graph.node.insert(place + back, new)


def _readers(proto: onnx.ModelProto) -> Counter[str]:
    """How many nodes read each tensor; who runs the graph reads its outputs."""
    counts = Counter(name for node in proto.graph.node for name in node.input)
    counts.update(output.name for output in proto.graph.output)
    return counts


def _import_ort(proto: onnx.ModelProto) -> None:
    if ORT_DOMAIN not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(ORT_DOMAIN, 1))
