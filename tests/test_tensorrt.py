"""The folder for a Jetson: what it refuses, what it changes, and that its script compares."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from launch.tensorrt import tensorrt
from medpsp.deploy import tensorrtparity
from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.modelfile import ModelFile
from medpsp.deploy.tensorrt import Profile, parity_arrays, profile_of, write_kit
from medpsp.deploy.tensorrtgraph import LATER, SUPPORTED, check_ops, make_readable
from medpsp.errors import ConfigError, ExportError
from medpsp.types import Window

TYPES = {"int16": TensorProto.INT16, "uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
SMALL = Profile(least=(8, 8), best=(16, 24), most=(32, 32), batch=2)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def build(
    path: Path, given: GraphInput, quantized: str = "", opset: int = 13, more: str = ""
) -> ModelFile:
    """Window, a 3 x 3 convolution of three classes, argmax: the contract with little in it."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (3, given.planes, 3, 3)).astype(np.float32)
    values: dict[str, Any] = {
        "w": weight,
        "b": np.float32([0.1, -0.2, 0.3]),
        "low": np.float32(-100),
        "width": np.float32(400),
        "zero": np.float32(0),
        "one": np.float32(1),
        "at_low": np.int64([0]),
        "at_width": np.int64([1]),
        "shape": np.int64([-1, given.planes, 1, 1]),
    }
    nodes = [node("Cast", "image", "float", to=TensorProto.FLOAT)]
    inputs = [
        helper.make_tensor_value_info("image", TYPES[given.dtype], ["N", given.planes, *"HW"])
    ]
    low, width = "low", "width"
    if not given.windows:
        inputs.append(helper.make_tensor_value_info("window", TensorProto.FLOAT, ["N", 1, 3]))
        for name in ("low", "width"):
            nodes.append(node("Gather", f"window at_{name}", f"{name}_", axis=2))
            nodes.append(node("Reshape", f"{name}_ shape", f"{name}__"))
        low, width = "low__", "width__"
    nodes += [
        node("Sub", f"float {low}", "above"),
        node("Div", f"above {width}", "share"),
        node("Clip", "share zero one", "unit"),
    ]
    if quantized:
        kind, zero = (np.int8, 0) if quantized == "S8S8" else (np.uint8, 64)
        scale = np.abs(weight).max((1, 2, 3)) / 127
        values |= {
            "xs": np.float32(1 / 127),
            "xz": kind(zero),
            "ws": scale.astype(np.float32),
            "wz": np.zeros(3, np.int8),
            "bs": (scale / 127).astype(np.float32),
            "bz": np.zeros(3, np.int32),
        }
        values["wq"] = np.round(weight / scale[:, None, None, None]).astype(np.int8)
        values["bq"] = np.round(values["b"] / values["bs"]).astype(np.int32)
        del values["w"], values["b"]
        nodes += [
            node("QuantizeLinear", "unit xs xz", "xq"),
            node("DequantizeLinear", "xq xs xz", "x"),
            node("DequantizeLinear", "wq ws wz", "w", axis=0),
            node("DequantizeLinear", "bq bs bz", "b", axis=0),
        ]
    nodes += [
        node("Conv", f"{'x' if quantized else 'unit'} w b", "raw", pads=[1] * 4),
        node(more or "Identity", "raw", "logits"),
        node("Softmax", "logits", "shares", axis=1),
        node("ReduceMax", "shares", "confidence", axes=[1], keepdims=0),
        node("ArgMax", "logits", "ids", axis=1, keepdims=0),
        node("Cast", "ids", "mask", to=TensorProto.UINT8),
    ]
    outputs = [
        helper.make_tensor_value_info("mask", TensorProto.UINT8, [*"NHW"]),
        helper.make_tensor_value_info("confidence", TensorProto.FLOAT, [*"NHW"]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, *"HW"]),
    ]
    used = {name for n in nodes for name in n.input}
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items() if k in used]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    meta = {
        "classes": ["background", "liver", "lesion"],
        "modalities": ["CT"],
        "window": None,
        "tile": {"size": [16, 24], "overlap": 0.5},
        "input": given.to_json(),
        "variant": f"int8 QDQ {quantized}" if quantized else "fp32",
    }
    helper.set_model_props(proto, {"medpsp": json.dumps(meta, sort_keys=True)})
    onnx.save(proto, path)
    return ModelFile(path, threads=1)


FIXED = GraphInput(windows=(Window(center=100, width=400, function="LINEAR_EXACT"),))


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    write_kit(build(tmp_path / "m.onnx", FIXED), tmp_path / "kit", SMALL)
    return tmp_path / "kit"


def test_copy_takes_what_tensorrt_takes_and_computes_the_same(tmp_path: Path) -> None:
    model = build(tmp_path / "m.onnx", GraphInput())
    found = write_kit(model, tmp_path / "kit", SMALL)
    copy = onnx.load(tmp_path / "kit" / "tensorrt.onnx")
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*copy.graph.input, *copy.graph.output)}
    assert kinds["image"] == kinds["window"] == kinds["logits"] == TensorProto.FLOAT
    assert kinds["mask"] == TensorProto.INT32
    assert found.counts["Cast"] == 1  # that of the image is gone
    assert not found.unlisted
    assert not found.too_new
    shapes = {"1 x 16 x 24", "1 x 8 x 8", "2 x 13 x 17"}
    cases = tensorrtparity.cases(tensorrtparity.stored(tmp_path / "kit" / "parity.npz"))
    assert {" x ".join(map(str, of["mask"].shape)) for _, of in cases} == shapes
    session = ort.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    for inputs, expected in cases:  # the file as exported gives what was stored
        feeds = {**inputs, "image": inputs["image"].astype(np.int16)}
        mask, logits = session.run(["mask", "logits"], feeds)
        assert (mask == expected["mask"]).all()
        assert np.allclose(logits, expected["logits"], atol=1e-6)
    assert len(np.unique(cases[0][1]["mask"])) > 1  # not an empty comparison


def test_rgb_with_constant_windows_has_one_input(tmp_path: Path) -> None:
    given = GraphInput(dtype="uint8", colours=3, windows=FIXED.windows)
    write_kit(build(tmp_path / "m.onnx", given), tmp_path / "kit", SMALL)
    text = (tmp_path / "kit" / "build.sh").read_text()
    assert "--minShapes=image:1x3x8x8 " in text
    assert "window" not in text


def test_biases_of_int8_become_float_and_nothing_changes(tmp_path: Path) -> None:
    model = build(tmp_path / "m.onnx", FIXED, "S8S8")
    found = write_kit(model, tmp_path / "kit", SMALL)
    assert found.counts["DequantizeLinear"] == 2  # image and weights
    copy = onnx.load(tmp_path / "kit" / "tensorrt.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    assert np.allclose(tensors["b"], [0.1, -0.2, 0.3], atol=1e-3)
    assert not {"bq", "bs", "bz"} & set(tensors)
    readme = (tmp_path / "kit" / "README.txt").read_text()
    assert "1 int32 biases became float32" in readme
    assert "NOT RUN" in readme
    arrays = tensorrtparity.stored(tmp_path / "kit" / "parity.npz")
    assert tensorrtparity.limits(arrays)["least_sqnr_db"] == 20


def test_refuses_what_tensorrt_cannot_read(tmp_path: Path) -> None:
    asymmetric = build(tmp_path / "m.int8.onnx", FIXED, "U8S8")
    with pytest.raises(ExportError, match=r"2 of 4 Q/DQ nodes .* give the trt file"):
        write_kit(asymmetric, tmp_path / "kit", SMALL)
    symmetric = build(tmp_path / "m.trt.onnx", FIXED, "S8S8")
    with pytest.raises(ConfigError, match="DLA takes no Q/DQ"):
        write_kit(symmetric, tmp_path / "kit", profile_of((16, 24), dla=0))
    assert not (tmp_path / "kit").exists()
    unlisted = build(tmp_path / "m.onnx", FIXED, more="Shrink", opset=13)
    proto = onnx.load(unlisted.path)
    proto.graph.node[-5].op_type = "BitShift"
    with pytest.raises(ExportError, match=r"does not list BitShift"):
        check_ops(proto, "m.onnx")


def test_newer_operators_and_opsets_are_named(tmp_path: Path) -> None:
    found = check_ops(onnx.load(build(tmp_path / "m.onnx", FIXED, opset=17).path), "m.onnx")
    assert (found.opset, found.too_new) == (17, [])
    later = onnx.load(build(tmp_path / "m.onnx", FIXED, more="Identity").path)
    later.opset_import[0].version = 18
    later.graph.node[-5].op_type = "IsInf"
    assert check_ops(later, "m.onnx").too_new == ["opset 18", "IsInf"]
    assert LATER < SUPPORTED
    assert not {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv"} & SUPPORTED


def test_a_mask_without_cast_is_refused(tmp_path: Path) -> None:
    proto = onnx.load(build(tmp_path / "m.onnx", FIXED).path)
    proto.graph.node[-1].op_type = "Identity"
    with pytest.raises(ExportError, match="mask: made by Identity"):
        make_readable(proto, "m.onnx")


def test_a_copy_that_computes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tmp_path / "m.onnx", FIXED)
    proto = onnx.load(model.path)
    make_readable(proto, "m.onnx")
    bias = next(t for t in proto.graph.initializer if t.name == "b")
    bias.CopyFrom(numpy_helper.from_array(np.float32([0.1, -0.2, 0.31]), "b"))
    onnx.save(proto, tmp_path / "copy.onnx")
    with pytest.raises(ExportError, match=r"\(1, 16, 24\): its copy .* differs by"):
        parity_arrays(model, tmp_path / "copy.onnx", SMALL, optimise=True)
    monkeypatch.setattr("medpsp.deploy.tensorrt.SAME", -1.0)
    with pytest.raises(ExportError, match="differs by"):
        write_kit(model, tmp_path / "kit", SMALL)
    assert not (tmp_path / "kit").exists()


def test_a_copy_may_settle_a_tie_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes 0 and 2 are the same but for 1e-6, which are added to the other one in the copy."""
    proto = onnx.load(build(tmp_path / "m.onnx", FIXED).path)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    weight = numpy_helper.to_array(tensors["w"])[[0, 1, 0]]
    tensors["w"].CopyFrom(numpy_helper.from_array(weight, "w"))

    def saved(name: str, *bias: float) -> Path:
        tensors["b"].CopyFrom(numpy_helper.from_array(np.float32(bias), "b"))
        onnx.save(proto, tmp_path / name)
        return tmp_path / name

    model = ModelFile(saved("tied.onnx", 0.1, -9, 0.1 + 1e-6), threads=1)
    make_readable(proto, "m.onnx")
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    copy = saved("copy.onnx", 0.1 + 1e-6, -9, 0.1)
    _, far = parity_arrays(model, copy, SMALL, optimise=True)
    assert 0 < far < 1e-5
    monkeypatch.setattr("medpsp.deploy.session.MARGIN", 1e-7)
    with pytest.raises(ExportError, match=r"and in \d+ class ids that are no ties"):
        parity_arrays(model, copy, SMALL, optimise=True)


def test_profiles(tmp_path: Path) -> None:
    made = profile_of((256, 320))
    assert (made.least, made.best, made.most, made.batch) == ((128, 160), (256, 320), (512, 640), 4)
    assert made.shapes(3, 2) == {
        "min": "image:1x3x128x160,window:1x2x3",
        "opt": "image:1x3x256x320,window:1x2x3",
        "max": "image:4x3x512x640,window:4x2x3",
    }
    assert made.tried() == [(1, 256, 320), (1, 128, 160), (2, 193, 241)]
    fixed = profile_of((256, 320), dla=1)
    assert fixed.tried() == [(1, 256, 320)]
    assert fixed.least == fixed.most == (256, 320)
    for wrong, told in (
        ({"least": (300, 300)}, "--least 300x300: expected at most the tile of the model, 256x320"),
        ({"least": (300, 300)}, "the nearest is --least 256x300 "),
        ({"least": (0, 8)}, "the nearest is --least 1x8 "),
        ({"most": (8, 400)}, "--most 8x400: expected at least the tile of the model, 256x320"),
        ({"most": (8, 400)}, "the nearest is --most 256x400 "),
        ({"dla": 0, "most": (512, 512)}, "--most 512x512, 1 images: a DLA takes one image of one"),
        ({"batch": 0}, "--batch 0: expected 1 or more"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            profile_of((256, 320), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="4 images: a DLA takes"):
        Profile(least=(8, 8), best=(8, 8), most=(8, 8), batch=4, dla=0)


@pytest.mark.parametrize(
    ("quantized", "dla", "options", "expected"),
    [
        ("", None, "--fp16 --stronglyTyped", "--fp16"),
        ("", None, "--stronglyTyped", "--stronglyTyped"),
        ("S8S8", None, "--fp16 --stronglyTyped", "--stronglyTyped"),
        ("S8S8", None, "--fp16 --int8", "--int8 --fp16"),
        ("S8S8", None, "", ""),
        ("", 1, "--fp16 --stronglyTyped", "--fp16 --useDLACore=1 --allowGPUFallback"),
    ],
)
def test_build_script_asks_trtexec_what_it_knows(
    tmp_path: Path, quantized: str, dla: int | None, options: str, expected: str
) -> None:
    profile = SMALL if dla is None else profile_of((16, 24), dla=dla)
    write_kit(build(tmp_path / "m.onnx", FIXED, quantized), tmp_path / "kit", profile)
    fake = tmp_path / "trtexec"
    fake.write_text(f"#!/bin/sh\n[ $1 = --help ] && echo '{options}' || echo \"$@\"\n")
    fake.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "kit" / "build.sh"],
        env={**os.environ, "TRTEXEC": str(fake)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, last = (8, 8, 32, 32), (16, 24, 16, 24)
    low, wide, high, broad = first if dla is None else last
    most = 2 if dla is None else 1
    middle = f"{expected} " if expected else ""
    assert done.stdout.strip() == (
        f"--onnx=tensorrt.onnx --saveEngine=tensorrt.plan {middle}"
        f"--minShapes=image:1x1x{low}x{wide} --optShapes=image:1x1x16x24 "
        f"--maxShapes=image:{most}x1x{high}x{broad} --timingCacheFile=timing.cache"
    )


def test_options_of_onnx_runtime(kit: Path) -> None:
    (name, options), *others = json.loads((kit / "onnxruntime_tensorrt.json").read_text())[
        "providers"
    ]
    assert name == "TensorrtExecutionProvider"
    assert [other for other, _ in others] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert options["trt_profile_max_shapes"] == "image:2x1x32x32"
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == (True, False)


def run_script(
    kit: Path, *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, kit / "parity.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=env)


def test_script_ends_with_0_here_and_with_1_on_another_network(kit: Path) -> None:
    good = run_script(kit, "--onnx", "cpu")
    assert (good.returncode, good.stdout.count("0.000 %")) == (0, 3), good.stderr
    assert good.stdout.splitlines()[-1].startswith("0 beyond the limits: SQNR at least 40 dB")
    proto = onnx.load(kit / "tensorrt.onnx")
    bias = next(t for t in proto.graph.initializer if t.name == "b")
    bias.CopyFrom(numpy_helper.from_array(np.float32([1.1, -0.2, 0.3]), "b"))
    onnx.save(proto, kit / "tensorrt.onnx")
    bad = run_script(kit, "--onnx", "cpu")
    assert bad.returncode == 1
    assert bad.stdout.count("beyond the limit\n") == 3
    assert run_script(kit, "--onnx", "cpu", "--sqnr", "-20", "--changed", "1").returncode == 0


def test_script_takes_no_slower_provider_for_tensorrt(kit: Path) -> None:
    if "TensorrtExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has it")
    done = run_script(kit, "--onnx", "tensorrt")
    assert done.returncode == 1
    assert "this onnxruntime has no TensorrtExecutionProvider" in done.stderr


STUB = """
class Engine:
    num_io_tensors, names = {number}, {names}
    get_tensor_name = lambda self, place: self.names[place]
    create_execution_context = lambda self: {context}
class Runtime:
    def __init__(self, logger): {start}
    deserialize_cuda_engine = lambda self, data: None if data == b"wrong" else Engine()
class Logger:
    WARNING = 1
    def __init__(self, level): pass
"""


@pytest.mark.parametrize(
    ("lacking", "given", "told"),
    [
        ("parity.npz", (), "parity.npz: No such file or directory; copy the whole folder of"),
        ("tensorrt.plan", (), "tensorrt.plan: No such file or directory; run build.sh, which"),
        ("tensorrt", (), "tensorrt cannot be imported (No module named 'tensorrt'); it comes with"),
        ("cuda", ("",), "cuda.cudart cannot be imported (none here); pip install cuda-python"),
        ("engine", ("",), "tensorrt.plan: not of this TensorRT and GPU; run build.sh here"),
        ("start", ("",), "TensorRT does not start; is a GPU free on this machine?"),
        ("context", ("",), "tensorrt.plan: no context, see the lines above"),
        ("names", ("",), "tensorrt.plan: takes and gives input, output, expected image, mask, log"),
        ("damage", (), "parity.npz: damaged, or not of this folder; copy the whole"),
        ("other", (), "parity.npz: damaged, or not of this folder; copy the whole"),
        ("onnx", ("--onnx", "cpu"), "tensorrt.onnx: No such file or directory; copy the whole"),
        ("broken", ("--onnx", "cpu"), "tensorrt.onnx: [ONNXRuntimeError]"),
    ],
)
def test_script_says_in_a_line_what_it_lacks(
    kit: Path, tmp_path: Path, lacking: str, given: tuple[str, ...], told: str
) -> None:
    """Of TensorRT there is a stand-in, whose answers are those that its documentation names."""
    (kit / "tensorrt.plan").write_bytes(b"wrong" if lacking == "engine" else b"engine")
    for name, path in (("parity.npz",) * 2, ("tensorrt.plan",) * 2, ("onnx", "tensorrt.onnx")):
        if lacking == name:
            (kit / path).unlink()
    if lacking == "damage":
        data = (kit / "parity.npz").read_bytes()
        (kit / "parity.npz").write_bytes(data[: len(data) // 2])
    if lacking == "other":
        np.savez(kit / "parity.npz", cases=1, least_sqnr_db=1, most_changed=1)
    if lacking == "broken":
        (kit / "tensorrt.onnx").write_bytes(b"no")
    stand = tmp_path / "stand"
    stand.mkdir()
    if given == ("",):
        (stand / "tensorrt.py").write_text(
            STUB.format(
                number=2,
                names=["input", "output"],
                context="None" if lacking == "context" else "self",
                start="raise TypeError" if lacking == "start" else "pass",
            )
        )
        if lacking == "cuda":
            (stand / "cuda.py").write_text("raise ImportError('none here')")
        else:
            (stand / "cuda" / "bindings").mkdir(parents=True)
            (stand / "cuda" / "bindings" / "runtime.py").touch()
    done = run_script(kit, *filter(None, given), path=stand)
    assert done.returncode == 1
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) not in done.stderr


def test_differences_in_numbers() -> None:
    logits = np.zeros((1, 2, 1, 4), np.float32)
    logits[:, 0] = 10
    expected = {"mask": np.zeros((1, 1, 4), np.uint8), "logits": logits}
    found = {"mask": np.int32([[[0, 0, 0, 1]]]), "logits": logits + np.float32(0.1)}
    row = tensorrtparity.compare(expected, found)
    assert row.changed == 0.25
    assert row.largest == pytest.approx(0.1, rel=1e-5)
    assert row.sqnr_db == pytest.approx(10 * np.log10(50 / 0.01), abs=1e-3)  # mean square 50
    assert tensorrtparity.compare(expected, expected).sqnr_db == np.inf
    broken = {**found, "logits": np.full_like(logits, np.nan)}
    assert tensorrtparity.compare(expected, broken).changed == 1
    assert tensorrtparity.compare(expected, {**found, "mask": found["mask"][0]}).changed == 1


class Memory:
    """The calls of cuda-python that the script makes, on memory of this process."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return {
            "cudaMalloc": self._take,
            "cudaFree": lambda pointer: (0, self.blocks.pop(pointer) and None),
            "cudaMemcpy": lambda to, at, size, kind: (ctypes.memmove(to, at, size) and 0,),
            "cudaStreamCreate": lambda: (0, 7),
        }.get(name, lambda stream: (0,))

    def _take(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)


class Context:
    """An engine and its context, which ONNX Runtime computes for."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.values)
        self.places: dict[str, int] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}

    def create_execution_context(self) -> Context:
        return self

    def get_tensor_name(self, place: int) -> str:
        return str(self.values[place].name)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="INT32" if name == "mask" else "FLOAT")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.sizes[name] = shape
        return max(shape) <= 32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        n, _, h, w = self.sizes["image"]
        return (n, 3, h, w) if name == "logits" else (n, h, w)

    def set_tensor_address(self, name: str, place: int) -> None:
        self.places[name] = place

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        feeds = {name: np.empty(shape, np.float32) for name, shape in self.sizes.items()}
        for name, array in feeds.items():
            ctypes.memmove(array.ctypes.data, self.places[name], array.nbytes)
        names = [output.name for output in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            ctypes.memmove(self.places[name], array.ctypes.data, array.nbytes)
        return True


def test_engine_code_moves_the_right_bytes(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: it shows that the code runs, not that TensorRT has this interface."""
    memory, trt = Memory(), ModuleType("tensorrt")
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: Context(kit / "tensorrt.onnx"))
    trt.Runtime = lambda logger: runtime  # type: ignore[attr-defined]
    trt.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", memory)  # type: ignore[arg-type]
    (kit / "tensorrt.plan").write_bytes(b"engine")
    spec = importlib.util.spec_from_file_location("kit_parity", kit / "parity.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([]) == 0
    assert not memory.blocks  # all freed
    with pytest.raises(SystemExit, match="outside the shapes"):
        script.Engine(kit / "tensorrt.plan")({"image": np.zeros((1, 1, 40, 8), np.float32)})


def test_same_model_same_bytes(kit: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in kit.iterdir()}
    shutil.rmtree(kit)
    write_kit(ModelFile(tmp_path / "m.onnx", threads=1), kit, SMALL)
    assert {path.name: path.read_bytes() for path in kit.iterdir()} == before
    assert set(before) == {
        "tensorrt.onnx", "build.sh", "parity.py", "parity.npz", "onnxruntime_tensorrt.json",
        "README.txt",
    }  # fmt: skip
    assert not any(str(tmp_path).encode() in data for data in before.values())


def test_a_kit_is_replaced_as_a_whole_or_not_at_all(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = tmp_path / "whole", build(tmp_path / "other.onnx", GraphInput())
    shutil.copytree(kit, whole)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: not a folder; take another one for the kit"):
        write_kit(model, tmp_path / "file", SMALL)

    def full(*given: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medpsp.deploy.tensorrt.readme", full)
    for folder in (whole, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            write_kit(model, folder, SMALL)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_command(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(tensorrt)
    build(tmp_path / "m.onnx", FIXED)
    arguments = [str(tmp_path / "m.onnx"), str(tmp_path / "kit"), "--most", "40x48", "--batch", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    assert "not run on TensorRT" in done.output
    assert "--maxShapes=image:1x1x40x48 " in (tmp_path / "kit" / "build.sh").read_text()
    wrong = CliRunner().invoke(app, [*arguments[:2], "--least", "40"])
    assert isinstance(wrong.exception, ConfigError)
