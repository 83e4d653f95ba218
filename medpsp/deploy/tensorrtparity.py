#!/usr/bin/env python3
"""Does TensorRT compute here what ONNX Runtime computed where the file was made?

Part of the folder that `medpsp tensorrt` writes, where it is called parity.py. It needs numpy, and
either tensorrt (8.5 or newer) with cuda-python, or onnxruntime built with TensorRT. It reads
parity.npz and ends with 1 where a difference is beyond its limit. Python 3.8 (JetPack 5) reads it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional  # noqa: UP035

import numpy as np

Arrays = Dict[str, Any]  # noqa: UP006
Runner = Callable[[Arrays], Arrays]
HERE = Path(__file__).resolve().parent
NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
"""By the name of a tensorrt.DataType; tensorrt.nptype of 8.5 fails with numpy 1.24."""


class Difference(NamedTuple):
    """Of one input.

    Attributes:
        shape: (N, H, W).
        largest: Greatest difference of two logits.
        sqnr_db: Power of the expected logits over that of the difference, in dB.
        changed: Share of the pixels whose class id is another.
    """

    shape: Any
    largest: float
    sqnr_db: float
    changed: float


def compare(expected: Arrays, found: Arrays) -> Difference:
    """Masks (N, H, W) and logits (N, K, H, W) of both; NaN and wrong shapes count as infinite."""
    shape = tuple(expected["mask"].shape)
    logits, mask = found["logits"], found["mask"]
    if logits.shape != expected["logits"].shape or mask.shape != expected["mask"].shape:
        return Difference(shape, float("inf"), float("-inf"), 1.0)
    wanted = expected["logits"].astype(np.float64)
    error = logits.astype(np.float64) - wanted
    if not np.isfinite(error).all():
        return Difference(shape, float("inf"), float("-inf"), 1.0)
    noise, signal = float(np.square(error).mean()), float(np.square(wanted).mean())
    sqnr = 10 * np.log10(max(signal, 1e-30) / noise) if noise else float("inf")
    changed = float((mask.astype(np.int64) != expected["mask"]).mean())
    return Difference(shape, float(np.abs(error).max()), float(sqnr), changed)


def cases(path: Path) -> List[Any]:  # noqa: UP006
    """Inputs and expected outputs of parity.npz, by name."""
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files}
    out = []
    for number in range(int(stored["cases"])):
        names = ("image", "window", "mask", "logits")
        case = {n: stored[f"{n}_{number}"] for n in names if f"{n}_{number}" in stored}
        inputs = {n: case[n] for n in ("image", "window") if n in case}
        out.append((inputs, {n: case[n] for n in ("mask", "logits")}))
    return out


def limits(path: Path) -> Arrays:
    """Least SQNR in dB and most changed pixels, as they were written."""
    with np.load(path) as file:
        return {name: float(file[name]) for name in ("least_sqnr_db", "most_changed")}


class Engine:
    """An engine of trtexec, by the API of TensorRT 8.5 and newer.

    Args:
        path: Of the engine.
    """

    def __init__(self, path: Path) -> None:
        trt: Any = import_module("tensorrt")
        try:
            self.cuda: Any = import_module("cuda.bindings.runtime")
        except ImportError:  # cuda-python before 12.6
            self.cuda = import_module("cuda.cudart")
        logger = trt.Logger(trt.Logger.WARNING)
        self.engine: Any = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise SystemExit(f"{path.name}: not of this TensorRT and GPU; run build.sh here")
        self.context: Any = self.engine.create_execution_context()
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]

    def __call__(self, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        for name, array in feeds.items():
            if not self.context.set_input_shape(name, array.shape):
                raise SystemExit(f"{name} {array.shape}: outside the shapes of the engine")
        host = {name: self._host(name, feeds.get(name)) for name in self.names}
        device = {name: self._call("cudaMalloc", array.nbytes) for name, array in host.items()}
        kinds = self.cuda.cudaMemcpyKind
        for name, array in host.items():
            self.context.set_tensor_address(name, int(device[name]))
            if name in feeds:
                where, kind = array.ctypes.data, kinds.cudaMemcpyHostToDevice
                self._call("cudaMemcpy", device[name], where, array.nbytes, kind)
        stream = self._call("cudaStreamCreate")
        if not self.context.execute_async_v3(int(stream)):
            raise SystemExit("the engine did not run; see the lines of TensorRT above")
        self._call("cudaStreamSynchronize", stream)
        outputs = {name: array for name, array in host.items() if name not in feeds}
        for name, array in outputs.items():
            where, kind = array.ctypes.data, kinds.cudaMemcpyDeviceToHost
            self._call("cudaMemcpy", where, device[name], array.nbytes, kind)
        for pointer in device.values():
            self._call("cudaFree", pointer)
        self._call("cudaStreamDestroy", stream)
        return outputs

    def _host(self, name: str, given: Any) -> Any:
        kind = NUMPY_TYPES[self.engine.get_tensor_dtype(name).name]
        if given is not None:
            return np.ascontiguousarray(given, kind)
        return np.empty(tuple(self.context.get_tensor_shape(name)), kind)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *result = getattr(self.cuda, name)(*arguments)
        if int(error):
            raise SystemExit(f"{name}: CUDA error {int(error)}; is a GPU free on this machine?")
        return result[0] if result else None


def onnx_runner(path: Path, provider: str) -> Runner:
    """Runs the ONNX file by ONNX Runtime: ``tensorrt`` with the options beside it, or ``cpu``."""
    import onnxruntime as ort

    providers: Any = ["CPUExecutionProvider"]
    if provider == "tensorrt":
        text = path.with_name("onnxruntime_tensorrt.json").read_text(encoding="utf-8")
        providers = [(name, options) for name, options in json.loads(text)["providers"]]
    session = ort.InferenceSession(str(path), providers=providers)
    first = providers[0][0] if provider == "tensorrt" else providers[0]
    if first not in session.get_providers():  # it would go on with a slower one
        raise SystemExit(f"this onnxruntime has no {first}; it has {session.get_providers()}")
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Arrays) -> Arrays:
        found = session.run(names, feeds)
        return {name: found[place] for place, name in enumerate(names)}

    return run


def main(arguments: Optional[List[str]] = None) -> int:  # noqa: UP006,UP045
    """0 where all differences are within their limits, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, default=HERE / "tensorrt.plan")
    parser.add_argument("--onnx", choices=("tensorrt", "cpu"), help="ONNX Runtime, no engine")
    parser.add_argument("--sqnr", type=float, help="least SQNR of the logits in dB")
    parser.add_argument("--changed", type=float, help="most pixels with another class, a share")
    args = parser.parse_args(arguments)
    written = limits(HERE / "parity.npz")
    least = written["least_sqnr_db"] if args.sqnr is None else args.sqnr
    most = written["most_changed"] if args.changed is None else args.changed
    run: Runner = (
        onnx_runner(HERE / "tensorrt.onnx", args.onnx) if args.onnx else Engine(args.engine)
    )
    failed = 0
    sys.stdout.write("N x H x W         SQNR dB   largest   changed\n")
    for inputs, expected in cases(HERE / "parity.npz"):
        row = compare(expected, run(inputs))
        good = row.sqnr_db >= least and row.changed <= most
        failed += not good
        size = " x ".join(map(str, row.shape))
        sys.stdout.write(
            f"{size:16} {row.sqnr_db:8.1f} {row.largest:9.2e} {100 * row.changed:8.3f} %"
            f"{'' if good else '  beyond the limit'}\n"
        )
    told = f"SQNR at least {least:g} dB, changed at most {100 * most:g} %"
    sys.stdout.write(f"{failed} beyond the limits: {told}\n")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
