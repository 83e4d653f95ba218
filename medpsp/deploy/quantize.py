"""Static int8 (QDQ) copies of an exported fp32 file.

Taken are Conv, MatMul and Gemm with constant weights, per channel. Depthwise convolutions are left
out, which wins 1 to 11 dB on the four backbones. Files for CPUs take those that read and give int8
in any case: there only the weights are rounded.
`torch.quantization.quantize_dynamic` would leave every Conv2d in fp32 without a word.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.shape_inference import quant_pre_process

from medpsp.deploy.export import quiet, write_model
from medpsp.deploy.rewrites import fuse_silu, keep_float, quantize_sums
from medpsp.deploy.session import Feeds
from medpsp.deploy.tensorrtgraph import asymmetric
from medpsp.errors import ExportError

Kind = Literal["cpu", "trt"]
"""cpu: U8S8 for x86 and ARM. trt: S8S8 with zero points of 0, the only int8 that TensorRT reads."""
Source = Iterable[Feeds] | Callable[[], Iterable[Feeds]]
"""A list of feeds, or what gives them anew at each call: they are gone through several times."""
Range = tuple[float, float]

WEIGHTED = ("Conv", "MatMul", "Gemm")
BINS = 2048
"""Of the histogram of a tensor between its extremes; a percentile is right to one of them."""


def fresh(source: Source) -> Iterator[Feeds]:
    """The feeds from the first one on."""
    return iter(source() if callable(source) else source)


class Quantizer:
    """One fp32 file with its calibrated ranges, from which int8 graphs are made at little cost.

    Args:
        source: fp32 file of `export_onnx`.
        feeds: Calibration inputs of training patients, at best one tile each: all activations of
            one feed are in memory at once, never those of two.
        kind: For which runtime.
        percentile: Share of the values of a tensor, in percent, that its range holds; the rest is
            clipped, half at each end. 100 is MinMax; 99.99 won nothing on the four backbones.

    Attributes:
        source: As given.
        nodes: Names of all that can be quantized, in the order of the graph.

    Raises:
        ExportError: No feeds, or activations that are not finite.
    """

    def __init__(self, source: Path, feeds: Source, kind: Kind, percentile: float = 100.0) -> None:
        self.source, self.kind = source, kind
        with tempfile.TemporaryDirectory() as folder, quiet("", logging.WARNING):
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(source, ready, skip_symbolic_shape=True)
            self._proto = load_model_with_shape_infer(ready)
        if kind == "cpu":
            fuse_silu(self._proto)
        self.nodes = quantizable(self._proto, kind)
        self._around = between(self._proto)
        self._ranges = _ranges(self._proto, self._taken(self.nodes), feeds, percentile)

    def graph(self, nodes: Collection[str]) -> onnx.ModelProto:
        """A new graph in which these of the `nodes` are int8, depthwise ones if those around are.

        Raises:
            ExportError: ``trt``, and a zero point is not 0.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(self._proto)
        given = set(nodes)
        nodes = {name for name in given if self._around.get(name, frozenset()) <= given}
        if not nodes:  # an empty list would mean every node to onnxruntime
            return copy
        taken = self._taken(nodes)
        used = {name for node in taken for name in (*node.input, *node.output)}
        ranges = {
            name: (np.array(low, np.float32), np.array(high, np.float32))
            for name, (low, high) in self._ranges.items()
            if name in used
        }
        cpu = self.kind == "cpu"
        with quiet("", logging.WARNING):
            quantizer = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=cpu,  # always: the exporting machine is not the device
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8 if cpu else QuantType.QInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
                nodes_to_quantize=[node.name for node in taken],
                nodes_to_exclude=[],
                op_types_to_quantize=[*WEIGHTED, "Relu"],
                extra_options=CPU if cpu else TRT,
            )
            made: onnx.ModelProto = quantizer.quantize_model()
            quantizer.model.topological_sort()
        if cpu:
            quantize_sums(made)
            keep_float(made)
        elif wrong := asymmetric(made):
            raise ExportError(f"{wrong[0]}: no int8 with zero point 0; TensorRT takes no other")
        return made

    def write(self, target: Path, metadata: dict[str, Any], restored: Collection[str] = ()) -> None:
        """Write the int8 file; a ``trt`` one is as large as fp32: TensorRT makes the int8 itself.

        Args:
            target: Where to.
            metadata: As in `export_onnx`.
            restored: Those of the `nodes` that stay fp32.
        """
        _write(self.graph([n for n in self.nodes if n not in restored]), target, metadata)

    def _taken(self, nodes: Collection[str]) -> list[onnx.NodeProto]:
        """The nodes, and every ReLU that is all that reads one of them.

        In U8S8 such a ReLU is no more than the lower end of the range of the convolution, which
        then has all 256 steps for what is left.
        """
        chosen = [node for node in self._proto.graph.node if node.name in set(nodes)]
        if self.kind == "trt":  # fuses them itself, and has no step between
            return chosen
        made = {node.output[0] for node in chosen}
        readers = [name for node in self._proto.graph.node for name in node.input if name in made]
        alone = {name for name in made if readers.count(name) == 1}
        relus = (node for node in self._proto.graph.node if node.op_type == "Relu")
        return chosen + [node for node in relus if node.input[0] in alone]


CPU = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
"""ONNX Runtime has products of int8 that give floats; what follows one is in float. In
ConvNeXt-Tiny that is 8 % of the time, and the masks agree as before."""
TRT = {
    "ActivationSymmetric": True,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
    "QuantizeBias": False,
}
"""TensorRT reads no int8 constant and no int32 bias through DequantizeLinear ("only activation
types allowed as input to this layer": onnxruntime issue 14229, onnx-tensorrt issue 850), so the
weights stay float with a pair of their own. It fuses what follows a convolution before the next
pair; one more pair between would only cost accuracy."""


def quantizable(proto: onnx.ModelProto, kind: Kind) -> tuple[str, ...]:
    """Names of Conv, MatMul and Gemm nodes with constant weights.

    Of convolutions in groups only those that `between` names, and for ``cpu``. The pooling matrices
    of the pyramid are computed at run time, so their products stay fp32.
    """
    taken = between(proto) if kind == "cpu" else {}
    return tuple(n.name for n in _layers(proto) if _dense(n) or n.name in taken)


def between(proto: onnx.ModelProto) -> dict[str, frozenset[str]]:
    """Depthwise convolutions that read and give int8 in any case, and the layers that see to that.

    They read the ReLU of a dense layer, and all that reads them is a ReLU that dense layers read.
    """
    dense = [node for node in _layers(proto) if _dense(node)]
    gives = {node.output[0]: node.name for node in dense}
    relus = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Relu"}
    readers: dict[str, list[str]] = defaultdict(list)
    for node in proto.graph.node:
        for name in node.input:
            readers[name].append(node.output[0])
    for output in proto.graph.output:
        readers[output.name].append("")
    channels = {t.name: t.dims[1] for t in proto.graph.initializer if len(t.dims) > 2}
    found = {}
    for node in _layers(proto):
        before, after = relus.get(node.input[0], ""), readers[node.output[0]]
        if _dense(node) or channels.get(node.input[1]) != 1 or before not in gives:
            continue
        if len(after) == 1 and after[0] in relus and all(n in gives for n in readers[after[0]]):
            around = [before, *readers[after[0]]]
            found[node.name] = frozenset(gives[name] for name in around)
    return found


def _layers(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    constants = {t.name for t in proto.graph.initializer}
    return [node for node in proto.graph.node if weighted(node, constants)]


def _dense(node: onnx.NodeProto) -> bool:
    return next((a.i for a in node.attribute if a.name == "group"), 1) == 1


def weighted(node: onnx.NodeProto, constants: Collection[str]) -> bool:
    """Whether a layer whose weights are in the file."""
    return node.op_type in WEIGHTED and node.input[1] in constants


def _write(proto: onnx.ModelProto, target: Path, metadata: dict[str, Any]) -> None:
    used = {node.domain for node in proto.graph.node}
    kept = [opset for opset in proto.opset_import if not opset.domain or opset.domain in used]
    del proto.opset_import[:]  # onnxruntime names all of its own
    proto.opset_import.extend(kept)
    write_model(proto, target, metadata)


def _ranges(
    proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], source: Source, percentile: float
) -> dict[str, Range]:
    """Lowest and highest value of what the nodes read and give, over all feeds.

    onnxruntime's own calibraters hold all outputs of all feeds, or, told to hold fewer, forget them
    (1.32: `MinMaxCalibrater.collect_data` with ``max_intermediate_outputs``); the bins of its
    histograms grow without bound after a first slice that is empty.
    """
    names = list(dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0])))
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    given = {output.name for output in proto.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in given)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: dict[str, Range] = {}
    for feeds in fresh(source):
        for name, values in zip(names, session.run(names, feeds), strict=True):
            low, high = float(values.min()), float(values.max())
            if not np.isfinite([low, high]).all():
                raise ExportError(
                    f"calibration: {name} is not finite; look at the weights of the checkpoint"
                )
            before = found.get(name, (low, high))
            found[name] = min(low, before[0]), max(high, before[1])
    if not found:
        raise ExportError("calibration: no slice was given; the train split must have one")
    if percentile >= 100:
        return found
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for feeds in fresh(source):
        for name, values in zip(names, session.run(names, feeds), strict=True):
            counts[name] += np.histogram(values, BINS, found[name])[0]
    return {name: percentile_range(counts[name], *found[name], percentile) for name in names}


def percentile_range(
    counts: NDArray[np.int64], low: float, high: float, percentile: float
) -> Range:
    """Edges of the bins between which this share of the values lies, in percent.

    Args:
        counts: (B,) values in each of B equal bins from ``low`` to ``high``.
        low: Lowest value.
        high: Highest value.
        percentile: In (0, 100]; half of the rest is cut off at each end.
    """
    edges = np.linspace(low, high, len(counts) + 1)
    cut = (100 - percentile) / 200 * counts.sum()
    first = int(np.searchsorted(np.cumsum(counts), cut, side="right"))
    last = int(np.searchsorted(np.cumsum(counts[::-1]), cut, side="right"))
    return float(edges[min(first, len(counts) - 1)]), float(edges[max(len(counts) - last, 1)])
