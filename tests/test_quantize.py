"""int8 and fp16 copies: what they touch, how far they are off, what is given back."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from medpsp.deploy.gates import saturation_gate
from medpsp.deploy.half import fp32_nodes, half
from medpsp.deploy.quantize import (
    Quantizer,
    percentile_range,
    quantizable,
)
from medpsp.deploy.restore import (
    Agreement,
    Bound,
    agreement,
    by_noise,
    decibel,
    logits_of,
    restore,
    saturation,
)
from medpsp.deploy.rewrites import fuse_silu, keep_float
from medpsp.deploy.session import Feeds, open_session
from medpsp.deploy.tensorrtgraph import asymmetric
from medpsp.errors import ExportError

METADATA = {"classes": ["background", "liver", "lésion"], "variant": "some"}
NET = """
<ir_version: 8, opset_import: ["": 18]>
net (int16[N,1,H,W] image, float[N,1,3] window)
    => (uint8[N,H,W] mask, float[N,H,W] confidence, float[N,3,H,W] logits)
<float[1] low = {-100}, float[1] width = {400}, float zero = {0}, float one = {1},
 int64[1] first = {1}, int64[1] across = {3}, int64 begin = {0}, int64 step = {1}>
{
    values = Cast <to = 1> (image)
    shifted = Sub (values, low)
    ratio = Div (shifted, width)
    unit = Clip (ratio, zero, one)
    [stem] stem_out = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (unit, stem_w, stem_b)
    stem_on = Relu (stem_out)
    [depth] depth_out = Conv <kernel_shape = [3,3], pads = [1,1,1,1], group = 8>
        (stem_on, depth_w, depth_b)
    depth_on = Relu (depth_out)
    [point] point_out = Conv <kernel_shape = [1,1]> (depth_on, point_w, point_b)
    point_on = Relu (point_out)
    size = Shape <start = 3> (point_on)
    count = Squeeze (size)
    places = Range (begin, count, step)
    floats = Cast <to = 1> (places)
    ones = Equal (floats, floats)
    weights = Cast <to = 1> (ones)
    column = Unsqueeze (weights, first)
    [pool] rows = MatMul (point_on, column)
    total = ReduceMean <keepdims = 1> (rows, across)
    shared = Mul (total, small)
    both = Add (point_on, shared)
    [fuse] fuse_out = Conv <kernel_shape = [1,1]> (both, fuse_w, fuse_b)
    sum = Add (fuse_out, stem_on)
    [classify] logits = Conv <kernel_shape = [1,1]> (sum, classify_w, classify_b)
    shares = Softmax <axis = 1> (logits)
    confidence = ReduceMax <keepdims = 0> (shares, first)
    index = ArgMax <axis = 1, keepdims = 0> (logits)
    mask = Cast <to = 2> (index)
}
"""


def make_net(path: Path, **weights: NDArray[np.float32]) -> Path:
    """A prelude, a depthwise layer, a pool over rows, a skip, three outputs."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (8, 1, 3, 3), "depth": (8, 1, 3, 3), "point": (8, 8, 1, 1)}
    shapes |= {"fuse": (8, 8, 1, 1), "classify": (3, 8, 1, 1)}
    values = {"small": np.full(1, 0.01, np.float32)}
    for name, shape in shapes.items():
        values[f"{name}_w"] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        values[f"{name}_b"] = rng.normal(0, 0.1, shape[0])
    proto = onnx.parser.parse_model(NET)
    for name, value in {**values, **weights}.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return path


def slices(count: int, seed: int = 0) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    window = np.float32([[[0, 400, 0]]])
    return [
        {"image": rng.integers(-200, 500, (1, 1, 20, 24)).astype(np.int16), "window": window}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_net(tmp_path_factory.mktemp("net") / "net.onnx")


def constants(proto: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in proto.graph.node for name in node.output}


def interface(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    both = (*proto.graph.input, *proto.graph.output)
    return [(value.name, value.type.tensor_type.elem_type) for value in both]


def test_the_pool_is_left_out_and_depthwise_layers_but_between_relus(
    net: Path,
) -> None:
    dense = ("stem", "point", "fuse", "classify")
    proto = onnx.load(net)
    assert quantizable(proto, "trt") == dense
    assert quantizable(proto, "cpu") == ("stem", "depth", *dense[1:])
    for change in ("stem_on", "depth_on", "another reader"):
        other = onnx.load(net)
        nodes = {node.output[0]: node for node in other.graph.node}
        if change == "another reader":
            nodes["sum"].input[1] = "depth_on"
        else:
            nodes[change].op_type = "HardSwish"
        assert quantizable(other, "cpu") == dense


FORK = """
<ir_version: 8, opset_import: ["": 18]>
net (float[N,1,H,W] image) => (float[N,8,H,W] logits)
{
    [stem] a = Conv <kernel_shape = [1,1]> (image, stem_w)
    b = Relu (a)
    [left] c = Conv <kernel_shape = [1,1]> (b, left_w)
    [right] d = Conv <kernel_shape = [1,1]> (b, right_w)
    e = Relu (d)
    [last] f = Conv <kernel_shape = [1,1]> (e, last_w)
    logits = Add (c, f)
}
"""


def test_layers_that_stay_in_fp32_keep_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime rounds those of a Conv that reads int8 itself, with a scale for all channels."""
    proto, rng = onnx.parser.parse_model(FORK), np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.3, (8, 8)) for name in ("left", "right", "last")}
    weights["stem"] = rng.normal(0, 1, (8, 1))
    weights["stem"][0], weights["right"][0, 0] = 1e-4, 50  # a large weight, of next to nothing
    for name, value in weights.items():
        weight = value[..., None, None].astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weight, f"{name}_w"))
    source, target = tmp_path / "net.onnx", tmp_path / "int8.onnx"
    onnx.save(proto, source)
    feeds = [{"image": rng.normal(0, 2, (1, 1, 9, 7)).astype(np.float32)} for _ in range(3)]
    quantizer = Quantizer(source, feeds, "cpu")
    quantizer.write(target, METADATA, ["right"])
    nodes = {node.name: node for node in onnx.load(target).graph.node}
    assert [name for name, n in nodes.items() if n.op_type == "FusedConv"] == ["right"]
    assert nodes["right"].input[1] == "right_w"
    real, emulated = saturation(source, target, feeds)
    assert abs(real - emulated) < 0.5
    monkeypatch.setattr("medpsp.deploy.quantize.keep_float", lambda proto: None)
    quantizer.write(target, METADATA, ["right"])
    assert saturation(source, target, feeds)[0] < emulated - 6


def test_a_depthwise_layer_is_int8_with_those_around_it_alone(net: Path) -> None:
    quantizer = Quantizer(net, slices(4), "cpu")
    for taken in (["depth"], ["stem", "depth"], ["depth", "point"], ["stem", "depth", "point"]):
        nodes = {node.name: node for node in quantizer.graph(taken).graph.node}
        assert (nodes["depth"].input[1] == "depth_w") == (len(taken) < 3)


def test_int8_is_seen_through_what_only_moves_it() -> None:
    """ONNX Runtime moves DequantizeLinear behind MaxPool, and then rounds what reads that."""
    for passed, kind in (("MaxPool <kernel_shape = [1,1]>", "FusedConv"), ("Sigmoid", "Conv")):
        proto = onnx.parser.parse_model(
            f"""
            <ir_version: 8, opset_import: ["": 18]>
            net (uint8[1,2,4,4] x) => (float[1,2,4,4] y)
            <float scale = {{0.1}}, float[2,2,1,1] w = {{1, 2, 3, 4}}>
            {{
                a = DequantizeLinear (x, scale)
                b = {passed} (a)
                c = Conv (b, w)
                y = Relu (c)
            }}
            """
        )
        keep_float(proto)
        nodes = proto.graph.node
        assert [n.op_type for n in nodes][2:] == ([kind] if kind == "FusedConv" else [kind, "Relu"])
        assert nodes[-1].output[0] == "y"


def test_cpu_takes_convolutions_in_seven_bits(net: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "int8.onnx"
    Quantizer(net, slices(4), "cpu").write(target, METADATA)
    proto = onnx.load(target)
    made, values = producers(proto), constants(proto)
    nodes = {node.name: node for node in proto.graph.node}
    for name in ("stem", "depth", "point", "fuse", "classify"):
        read, weight, bias = (made[given] for given in nodes[name].input)
        assert {n.op_type for n in (read, weight, bias)} == {"DequantizeLinear"}
        assert values[read.input[2]].dtype == np.uint8
        stored = values[weight.input[0]]
        assert stored.dtype == np.int8
        assert np.abs(stored.astype(int)).max() == 64  # 2 * 255 * 64 < 2 ** 15: none saturates
        assert values[weight.input[1]].shape == (len(stored),)  # a scale for each channel
        assert values[bias.input[0]].dtype == np.int32
    assert made[nodes["pool"].input[1]].op_type == "Unsqueeze"
    assert made[nodes["stem"].input[0]].op_type == "DequantizeLinear"
    assert {made[name].op_type for name in ("ratio", "shifted", "unit")} == {"Div", "Sub", "Clip"}
    # what only reads one of them is the lower end of its range
    assert Counter(n.op_type for n in proto.graph.node)["Relu"] == 0
    assert interface(proto) == interface(onnx.load(net))
    assert [(m.key, json.loads(m.value)) for m in proto.metadata_props] == [("medpsp", METADATA)]
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    assert proto.ir_version == 8
    assert [path.name for path in target.parent.iterdir()] == ["int8.onnx"]
    found = agreement(logits_of(net, slices(4, 1)), logits_of(target, slices(4, 1)))
    assert found.sqnr_db > 30
    assert found.mean > 0.95


def test_products_of_matrices_give_floats_on_cpus(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["": 18]>
        net (float[N,6] image) => (float[N,3] logits)
        { [first] a = MatMul (image, u)  c = Tanh (a)  [last] logits = Gemm (c, v, b) }
        """
    )
    rng = np.random.default_rng(0)
    for name, shape in (("u", (6, 8)), ("v", (8, 3)), ("b", (3,))):
        value = rng.normal(0, 1, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.save(proto, tmp_path / "net.onnx")
    feeds = [{"image": rng.normal(0, 2, (9, 6)).astype(np.float32)} for _ in range(3)]
    Quantizer(tmp_path / "net.onnx", feeds, "cpu").write(tmp_path / "cpu.onnx", METADATA)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    ort.InferenceSession(tmp_path / "cpu.onnx", options)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert kinds == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 1, "Tanh": 1, "QGemm": 1}
    (exact,), (found,) = (
        [open_session(tmp_path / name).run(None, feeds[0])[0]] for name in ("net.onnx", "cpu.onnx")
    )
    assert 10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()) > 30


SILU = """
<ir_version: 8, opset_import: ["": 18]>
net (float[N,1,H,W] image) => (float[N,2,H,W] logits)
{
    [first] a = Conv <kernel_shape = [1,1]> (image, first_w)
    [gate] s = Sigmoid (a)
    [silu] b = Mul (s, a)
    [other] t = Sigmoid (b)
    [squeeze] c = Mul (t, a)
    [twice] u = Sigmoid (c)
    [half] d = Mul (u, c)
    e = Add (d, u)
    [last] logits = Conv <kernel_shape = [1,1]> (e, last_w)
}
"""


def test_an_output_of_the_graph_is_not_fused_away(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(SILU.replace("logits)", "logits, float[N,4,H,W] s)", 1))
    fuse_silu(proto)
    assert Counter(node.op_type for node in proto.graph.node)["QuickGelu"] == 0


def test_silu_is_one_node_in_the_file_for_cpus(tmp_path: Path) -> None:
    """Not where the gate is of another tensor, or is read twice; TensorRT knows no such node."""
    proto = onnx.parser.parse_model(SILU)
    rng = np.random.default_rng(0)
    for name, shape in (("first_w", (4, 1, 1, 1)), ("last_w", (2, 4, 1, 1))):
        value = rng.normal(0, 1, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.save(proto, tmp_path / "net.onnx")
    feeds = [{"image": rng.normal(0, 2, (1, 1, 9, 7)).astype(np.float32)} for _ in range(3)]
    for kind, fused in (("cpu", ["silu"]), ("trt", [])):
        target = tmp_path / f"{kind}.onnx"
        Quantizer(tmp_path / "net.onnx", feeds, kind).write(target, METADATA)
        made = onnx.load(target)
        assert [n.name for n in made.graph.node if n.op_type == "QuickGelu"] == fused
        assert {n.domain for n in made.graph.node} == {"", *["com.microsoft"] * len(fused)}
        assert len(made.opset_import) == 1 + len(fused)
        assert Counter(n.op_type for n in made.graph.node)["Sigmoid"] == 3 - len(fused)
        found = agreement(logits_of(tmp_path / "net.onnx", feeds), logits_of(target, feeds))
        assert found.sqnr_db > 30
    onnx.checker.check_model(onnx.load(tmp_path / "cpu.onnx"))


DECODER = """
<ir_version: 8, opset_import: ["": 18]>
net (float[N,1,H,W] image) => (float[N,2,H2,W2] logits)
<float[4] twice = {1, 1, 2, 2}>
{
    fine = Resize <mode = "linear"> (image, , twice)
    [deep] a = Conv <kernel_shape = [1,1]> (image, deep_w)
    [skip] b = Conv <kernel_shape = [1,1]> (fine, skip_w)
    [up] c = Resize <mode = "linear"> (a, , twice)
    [sum] d = Add (c, b)
    [smooth] e = Conv <kernel_shape = [1,1]> (d, smooth_w)
    f = Relu (e)
    [last] logits = Conv <kernel_shape = [1,1]> (f, last_w)
}
"""


@pytest.mark.parametrize("kept", ["", "deep", "skip", "smooth"])
def test_a_sum_is_int8_where_all_that_it_reads_and_gives_is(tmp_path: Path, kept: str) -> None:
    """Not beside a layer that was given back to fp32; TensorRT fuses sums itself."""
    proto = onnx.parser.parse_model(DECODER)
    rng = np.random.default_rng(0)
    shapes = {"deep": (4, 1), "skip": (4, 1), "smooth": (4, 4), "last": (2, 4)}
    for name, shape in shapes.items():
        value = rng.normal(0, 1, (*shape, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, f"{name}_w"))
    source = tmp_path / "net.onnx"
    onnx.save(proto, source)
    feeds = [{"image": rng.normal(0, 2, (1, 1, 9, 7)).astype(np.float32)} for _ in range(3)]
    for kind in ("cpu", "trt"):
        target, ran = tmp_path / f"{kind}.onnx", tmp_path / "ran.onnx"
        Quantizer(source, feeds, kind).write(target, METADATA, [kept])
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(ran)
        ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(ran).graph.node
        adds = Counter(n.op_type for n in nodes if "Add" in n.op_type)
        assert adds == ({"QLinearAdd": 1} if kind == "cpu" and not kept else {"Add": 1})
        if "QLinearAdd" in adds:
            (up,) = (n for n in nodes if n.name == "up")
            (reader,) = (n for n in nodes if up.output[0] in n.input)
            assert reader.op_type == "QuantizeLinear"  # it is made in fp32
        for optimise in (True, False):
            found = agreement(logits_of(source, feeds), logits_of(target, feeds, optimise))
            assert found.sqnr_db > 30


def test_trt_has_zero_points_of_zero_and_pairs_on_what_is_read_alone(
    net: Path, tmp_path: Path
) -> None:
    target = tmp_path / "trt.onnx"
    Quantizer(net, slices(4), "trt").write(target, METADATA)
    proto = onnx.load(target)
    made, values = producers(proto), constants(proto)
    assert asymmetric(proto) == []
    nodes = {node.name: node for node in proto.graph.node}
    for name in ("stem", "point", "fuse", "classify"):
        read, weight = (made[given] for given in nodes[name].input[:2])
        assert made[read.input[0]].op_type == made[weight.input[0]].op_type == "QuantizeLinear"
        stored = values[made[weight.input[0]].input[0]]  # float: TensorRT reads no int8 constant
        scale = values[weight.input[1]]
        assert stored.dtype == np.float32
        np.testing.assert_allclose(np.abs(stored).max((1, 2, 3)) / scale, 127, rtol=0.01)
        assert nodes[name].input[2] == f"{name}_b"  # nor int32
    counts = Counter(node.op_type for node in proto.graph.node)
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 8
    assert counts["Relu"] == 3
    found = agreement(logits_of(net, slices(4, 1)), logits_of(target, slices(4, 1), False))
    assert found.sqnr_db > 30
    zero = next(t for t in proto.graph.initializer if t.name == read.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.int8(3), zero.name))
    assert asymmetric(proto) == [n.name for n in proto.graph.node if zero.name in n.input] != []


def scale_of(path: Path, name: str) -> tuple[float, int]:
    """Of what a layer reads."""
    proto = onnx.load(path)
    node = next(node for node in proto.graph.node if node.name == name)
    pair = producers(proto)[node.input[0]]
    return float(constants(proto)[pair.input[1]]), int(constants(proto)[pair.input[2]])


def constant(value: int) -> Feeds:
    image = np.full((1, 1, 20, 20), value, np.int16)
    return {"image": image, "window": np.float32([[[0, 400, 0]]])}


def test_ranges_are_those_of_all_feeds(net: Path, tmp_path: Path) -> None:
    """0 HU is 0.25 of the window from -100 to 300, and 100 HU is 0.5."""
    calls = []

    def feeds() -> Iterator[Feeds]:
        calls.append(1)
        yield from (constant(0), constant(100), constant(-100))

    target = tmp_path / "int8.onnx"
    Quantizer(net, feeds, "cpu").write(target, {})
    assert calls == [1]
    assert scale_of(target, "stem") == (pytest.approx(0.5 / 255), 0)
    Quantizer(net, feeds, "trt").write(target, {})
    assert scale_of(target, "stem") == (pytest.approx(0.5 / 127, rel=0.01), 0)


def test_a_percentile_leaves_out_outliers(net: Path, tmp_path: Path) -> None:
    feeds = [constant(0) for _ in range(10)]
    feeds[3]["image"][0, 0, 0, :4] = 300  # 4 of 4000 values are 1, the others 0.25
    scales = []
    for percentile in (100, 99.95, 99.5):
        Quantizer(net, feeds, "cpu", percentile).write(tmp_path / "int8.onnx", {})
        scales.append(scale_of(tmp_path / "int8.onnx", "stem")[0] * 255)
    assert scales[:2] == pytest.approx([1, 1])  # 0.025 % at each end is one value
    assert 0.25 <= scales[2] < 0.2505  # 0.25 % is ten; right to a bin


def test_percentile_range_by_hand() -> None:
    counts = np.array([1, 0, 8, 90, 1])
    assert percentile_range(counts, 0, 5, 100) == (0, 5)
    assert percentile_range(counts, 0, 5, 98) == (2, 4)  # one value at each end
    assert percentile_range(counts, 0, 5, 80) == (3, 4)
    assert percentile_range(counts, 2, 2, 98) == (2, 2)


def test_one_feed_at_a_time_is_held(net: Path) -> None:
    alive = 0

    class Counted(dict[str, NDArray[np.int16]]):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def feeds() -> Iterator[Feeds]:
        nonlocal alive
        for feed in slices(6):
            alive += 1
            yield Counted(feed)
            assert alive <= 1

    Quantizer(net, feeds, "cpu", 99.9)
    assert alive <= 1


def test_calibration_without_slices_or_with_nan_is_refused(net: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="calibration: no slice was given"):
        Quantizer(net, [], "cpu")
    broken = make_net(tmp_path / "nan.onnx", point_b=np.full(8, np.nan, np.float32))
    with pytest.raises(ExportError, match=r"calibration: .* is not finite"):
        Quantizer(broken, slices(1), "cpu")


def test_restored_layers_are_as_they_were(net: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(net, slices(2), "cpu")
    quantizer.write(tmp_path / "some.onnx", METADATA, ["stem", "fuse"])
    proto = onnx.load(tmp_path / "some.onnx")
    nodes = {node.name: node for node in proto.graph.node}
    assert nodes["stem"].input[1] == "stem_w"
    assert nodes["fuse"].input[1] == "fuse_w"
    assert nodes["point"].input[1] != "point_w"
    quantizer.write(tmp_path / "all.onnx", METADATA, quantizer.nodes)
    assert not [n for n in onnx.load(tmp_path / "all.onnx").graph.node if "Linear" in n.op_type]
    same = agreement(logits_of(net, slices(2)), logits_of(tmp_path / "all.onnx", slices(2)))
    assert same.sqnr_db > 120
    assert same.changed == 0


def outlier(path: Path) -> Path:
    """One of the channels that `fuse` reads is 1000 times the others, and counts for nothing."""
    point = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
    point[7] = 1000
    fuse = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
    fuse[7] = fuse[:, 7] = 0
    return make_net(path, point_w=point, fuse_w=fuse)


def test_the_layer_that_spoils_most_is_restored_first(tmp_path: Path) -> None:
    net = outlier(tmp_path / "outlier.onnx")
    quantizer = Quantizer(net, slices(4), "cpu")
    order = by_noise(quantizer, slices(2, 5))
    assert sorted(order) == sorted(quantizer.nodes)
    assert set(order[:2]) == {"point", "fuse"}  # both round what one of them gives the other
    target, fresh = tmp_path / "int8.onnx", slices(4, 5)
    found = restore(quantizer, target, METADATA, fresh, Bound(least=0.8, most=3))
    assert found.before.mean < 0.5
    assert found.after.mean >= 0.8
    assert found.nodes == tuple(order[:2])
    again = agreement(logits_of(net, fresh), logits_of(target, fresh))
    assert again == found.after
    others = iter([False, True])  # of all slices: one layer more
    beyond = restore(
        quantizer, target, METADATA, fresh, Bound(least=0.8, most=4, confirm=lambda: next(others))
    )
    assert beyond.nodes == tuple(order[:3])
    capped = restore(quantizer, target, METADATA, fresh, Bound(least=1.0, most=1))
    assert capped.nodes == tuple(order[:1])
    assert capped.after.mean < 1
    assert restore(quantizer, target, METADATA, fresh, Bound(least=0.1, most=3)).nodes == ()


def test_nothing_is_restored_without_foreground(tmp_path: Path) -> None:
    bias = np.float32([99, 0, 0])
    net = make_net(tmp_path / "empty.onnx", classify_b=bias)
    found = restore(
        Quantizer(net, slices(1), "trt"),
        tmp_path / "8.onnx",
        {},
        slices(2),
        Bound(least=0.99, most=3),
    )
    assert found.nodes == ()
    assert np.isnan(found.after.mean)
    assert found.after.dice[0] == 1


def test_agreement_by_hand() -> None:
    """Four pixels, of which two and one are class 1; then a slice that is the same."""
    first = np.float32([[[[0, 0, 4, 4]], [[4, 4, 0, 0]]]])
    second = np.float32([[[[0, 4, 4, 4]], [[4, 0, 0, 0]]]])
    found = agreement([first, first], [second, first])
    assert found == Agreement(
        sqnr_db=pytest.approx(10 * np.log10(8 * 16 / 32)),
        dice=(2 * 4 / 9, 2 * 3 / 7),
        mean=2 * 3 / 7,
        changed=0.125,
    )
    assert agreement([first], [first]).sqnr_db == np.inf
    with pytest.raises(ValueError, match="no logits"):
        agreement([], [])
    with pytest.raises(ValueError, match="shorter"):
        agreement([first, first], [first])
    assert decibel(100, 1) == 20
    assert decibel(0, 1) == -np.inf


WIDE = """
<ir_version: 8, opset_import: ["": 18]>
wide (float[N,64,H,W] image) => (float[N,2,H,W] logits)
<float step = {0.0039215686}, uint8 none = {0}, float out = {0.25}, uint8 middle = {128},
 int8[2] zeros = {0, 0}>
{
    q = QuantizeLinear (image, step, none)
    x = DequantizeLinear (q, step, none)
    w = DequantizeLinear <axis = 0> (weight, scale, zeros)
    y = Conv <kernel_shape = [1,1]> (x, w)
    r = QuantizeLinear (y, out, middle)
    logits = DequantizeLinear (r, out, middle)
}
"""


def wide(folder: Path, largest: int) -> tuple[Path, Path, NDArray[np.int8]]:
    """A layer of 64 channels with weights up to ``largest`` steps, fp32 and int8."""
    weight = np.random.default_rng(0).integers(largest // 2, largest + 1, (2, 64, 1, 1))
    weight[1] *= -1
    scale = np.full(2, 0.4 / largest, np.float32)
    proto = onnx.parser.parse_model(WIDE)
    proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.int8), "weight"))
    proto.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    int8, fp32 = folder / "int8.onnx", folder / "fp32.onnx"
    onnx.save(proto, int8)
    conv = next(node for node in proto.graph.node if node.op_type == "Conv")
    conv.input[0], conv.input[1], conv.output[0] = "image", "float", "logits"
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.append(conv)
    value = (weight * scale[:, None, None, None]).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(value, "float"))
    onnx.save(proto, fp32)
    return fp32, int8, weight.astype(np.int8)


CPUINFO = Path("/proc/cpuinfo")


def saturates(cpuinfo: str) -> bool:
    """By what Linux says of the CPU: x86, whose lines of flags name no VNNI. ARM has none."""
    flags = [line.split(":")[1].split() for line in cpuinfo.splitlines() if line[:5] == "flags"]
    return bool(flags) and not any("vnni" in flag for flag in flags[0])


def test_who_saturates() -> None:
    assert saturates("model name\t: vnni\nflags\t\t: fpu avx2 avx512f\n")
    assert not saturates("flags\t\t: fpu avx2 avx_vnni\n")
    assert not saturates("flags\t\t: fpu avx512_vnni avx2\n")
    assert not saturates("Features\t: fp asimd asimddp i8mm\n")  # aarch64
    assert not saturates("")


def bright() -> list[Feeds]:
    rng = np.random.default_rng(1)
    return [{"image": rng.uniform(0.7, 1, (1, 64, 8, 8)).astype(np.float32)}]


@pytest.mark.parametrize("largest", [127, 64])
def test_saturation_of_the_real_kernels_is_found(tmp_path: Path, largest: int) -> None:
    """With VNNI, and on ARM, it cannot occur: then both agree."""
    cpuinfo = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    fp32, int8, _ = wide(tmp_path, largest)
    real, emulated = saturation(fp32, int8, bright())
    gate = saturation_gate(real, emulated)
    assert gate.passed == (largest == 64 or not saturates(cpuinfo)), gate.says
    if gate.passed:
        assert real > 30
        assert abs(real - emulated) < 0.5


@pytest.mark.parametrize("largest", [127, 64])
def test_saturation_as_it_is_without_vnni(tmp_path: Path, largest: int) -> None:
    """What vpmaddubsw does, in numpy: the sum of two products is clipped to 16 bits."""
    fp32, int8, weight = wide(tmp_path, largest)
    image = np.round(bright()[0]["image"] * 255).astype(np.int64)
    products = image[:, None] * weight.astype(np.int64).reshape(1, 2, 64, 1, 1)
    pairs = products.reshape(1, 2, 32, 2, 8, 8).sum(3)
    sums = np.clip(pairs, -(2**15), 2**15 - 1).sum(2)
    logits = (sums * (0.4 / largest / 255)).astype(np.float32)
    expected = list(logits_of(fp32, bright()))
    real = agreement(expected, [logits]).sqnr_db
    emulated = agreement(expected, logits_of(int8, bright(), False)).sqnr_db
    if largest == 127:
        assert (np.abs(pairs) >= 2**15).any()
        assert emulated - real > 20
        assert not saturation_gate(real, emulated).passed
    else:
        assert real > emulated > 30  # no rounding of the logits


def test_a_difference_of_two_decibel_is_allowed() -> None:
    for real, emulated in ((30, 32), (32, 30), (np.inf, np.inf)):
        assert saturation_gate(real, emulated).passed
    for real, emulated in ((30, 32.1), (32.1, 30), (30, np.inf), (np.nan, 30)):
        assert not saturation_gate(real, emulated).passed


def test_fp16_keeps_windows_sums_and_outputs_in_fp32(net: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.onnx"
    half(net, target, METADATA)
    proto = onnx.shape_inference.infer_shapes(onnx.load(target), strict_mode=True)
    types = {i.name: i.type.tensor_type.elem_type for i in proto.graph.value_info}
    types |= {t.name: t.data_type for t in proto.graph.initializer} | dict(interface(proto))
    full, halved = TensorProto.FLOAT, TensorProto.FLOAT16
    nodes = {node.output[0]: node for node in proto.graph.node}
    for name in ("values", "ratio", "unit", "weights", "rows", "total", "shares", "confidence"):
        inputs = {types[given] for given in nodes[name].input[:2]}
        assert types[name] == full
        assert halved not in inputs, name
    for name in ("stem_out", "depth_on", "point_out", "both", "fuse_out", "sum"):
        assert {types[given] for given in (*nodes[name].input, name)} == {halved}, name
    assert [types[name] for name in ("logits", "mask")] == [full, TensorProto.UINT8]
    assert {types[n.name] for n in proto.graph.initializer if n.name.endswith("_w_fp16")} == {
        halved
    }
    assert interface(proto) == interface(onnx.load(net))
    assert [(m.key, json.loads(m.value)) for m in proto.metadata_props] == [("medpsp", METADATA)]
    assert agreement(logits_of(net, slices(4)), logits_of(target, slices(4))).sqnr_db > 50
    assert fp32_nodes(onnx.load(net)) >= {"values", "unit", "rows", "total", "shares", "mask"}


def test_fp16_holds_what_fp16_does_not(tmp_path: Path) -> None:
    """Sums above 65504, and neighbours above 2048 HU in a window of 4."""
    narrow = make_net(tmp_path / "net.onnx", small=np.full(1, 1e-3, np.float32))
    proto = onnx.load(narrow)
    for tensor in proto.graph.initializer:
        if tensor.name in ("low", "width"):
            value = np.float32([2047 if tensor.name == "low" else 4])
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        if tensor.name == "point_b":
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, 9000, np.float32), tensor.name))
        if tensor.name == "fuse_b":
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, -9000, np.float32), tensor.name))
    onnx.save(proto, narrow)
    half(narrow, tmp_path / "half.onnx", {})
    session = open_session(tmp_path / "half.onnx")
    image = np.full((1, 1, 20, 24), 2048, np.int16)
    image[..., 12:] = 2049
    logits = session.run(["logits"], {"image": image, "window": np.float32([[[0, 1, 0]]])})[0]
    assert np.isfinite(logits).all()  # 24 * 9000 in a row
    shown = onnx.load(tmp_path / "half.onnx")
    shown.graph.output.append(onnx.ValueInfoProto(name="unit"))
    onnx.save(shown, tmp_path / "shown.onnx")
    feeds = {"image": image, "window": np.float32([[[0, 1, 0]]])}
    unit = open_session(tmp_path / "shown.onnx").run(["unit"], feeds)[0]
    assert set(np.unique(unit)) == {0.25, 0.5}


def test_another_process_writes_the_same_bytes(net: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.test_quantize import write_all\n"
        "write_all(Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    there = tmp_path / "there"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, root, str(net), str(there)]
    process = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    write_all(net, tmp_path / "here")
    names = sorted(path.name for path in there.iterdir())
    assert names == ["cpu.onnx", "half.onnx", "trt.onnx"]
    for name in names:
        assert (there / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def write_all(net: Path, folder: Path) -> None:
    Quantizer(net, slices(3), "cpu", 99.9).write(folder / "cpu.onnx", METADATA)
    Quantizer(net, slices(3), "trt").write(folder / "trt.onnx", METADATA)
    half(net, folder / "half.onnx", METADATA)
    for one, other in itertools.pairwise(sorted(folder.iterdir())):
        assert one.read_bytes() != other.read_bytes()
