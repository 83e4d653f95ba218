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
from zipfile import BadZipFile
from zlib import error as DeflateError

try:
    import numpy as np
except ImportError:
    raise SystemExit("numpy cannot be imported; pip install numpy") from None

Arrays = Dict[str, Any]  # noqa: UP006
Runner = Callable[[Arrays], Arrays]
HERE = Path(__file__).resolve().parent
AGAIN = "copy the whole folder of `medpsp tensorrt` once more"
NAMES = ("image", "mask", "logits")
"""What a case has, and what an engine takes and gives; some take a window."""
PACKED = (BadZipFile, DeflateError)
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


def stored(path: Path) -> Arrays:
    """Arrays of parity.npz."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        wanted = [f"{name}_{n}" for n in range(int(arrays["cases"])) for name in NAMES]
        if missing := {"least_sqnr_db", "most_changed", *wanted} - set(arrays):
            raise KeyError(min(missing))
    except (AttributeError, KeyError, OSError, ValueError, EOFError, *PACKED) as error:
        why = getattr(error, "strerror", None) or "damaged, or not of this folder"
        raise SystemExit(f"{path.name}: {why}; {AGAIN}") from None
    return arrays


def cases(arrays: Arrays) -> List[Any]:  # noqa: UP006
    """Inputs and expected outputs, by name."""
    out = []
    for number in range(int(arrays["cases"])):
        names = ("image", "window", "mask", "logits")
        case = {n: arrays[f"{n}_{number}"] for n in names if f"{n}_{number}" in arrays}
        inputs = {n: case[n] for n in ("image", "window") if n in case}
        out.append((inputs, {n: case[n] for n in ("mask", "logits")}))
    return out


def limits(arrays: Arrays) -> Arrays:
    """Least SQNR in dB and most changed pixels, as they were written."""
    return {name: float(arrays[name]) for name in ("least_sqnr_db", "most_changed")}


def _module(name: str, lacking: str, before: str = "") -> Any:
    """A module, or the one of older versions."""
    try:
        return import_module(name)
    except ImportError as error:
        if before:
            return _module(before, lacking)
        raise SystemExit(f"{name} cannot be imported ({error}); {lacking}") from None


def _bytes_of(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"{path.name}: {error.strerror}; {advice}") from None


class Engine:
    """An engine of trtexec, by the API of TensorRT 8.5 and newer.

    Args:
        path: Of the engine.
    """

    def __init__(self, path: Path) -> None:
        data = _bytes_of(path, "run build.sh, which makes tensorrt.plan, or name it with --engine")
        trt: Any = _module("tensorrt", "it comes with JetPack; or give --onnx tensorrt")
        self.cuda: Any = _module("cuda.bindings.runtime", "pip install cuda-python", "cuda.cudart")
        logger = trt.Logger(trt.Logger.WARNING)
        try:
            runtime: Any = trt.Runtime(logger)
        except (TypeError, RuntimeError):  # what pybind11 makes of a null pointer
            raise SystemExit("TensorRT does not start; is a GPU free on this machine?") from None
        self.engine: Any = runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise SystemExit(f"{path.name}: not of this TensorRT and GPU; run build.sh here")
        self.context: Any = self.engine.create_execution_context()
        if self.context is None:
            raise SystemExit(f"{path.name}: no context, see the lines above; is GPU memory free?")
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        if not set(NAMES) <= set(self.names):
            raise SystemExit(
                f"{path.name}: takes and gives {', '.join(self.names)}, expected "
                f"{', '.join(NAMES)}: an engine of another file; run build.sh here"
            )

    def __call__(self, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        for name, array in feeds.items():
            if name not in self.names:
                raise SystemExit(f"the engine takes no {name}: it is of another file; run build.sh")
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
        called = self.engine.get_tensor_dtype(name).name
        shape = tuple(self.context.get_tensor_shape(name)) if given is None else given.shape
        if called not in NUMPY_TYPES or min(shape, default=0) < 0:
            raise SystemExit(
                f"{name}: {called} {shape} in the engine: it is of another file; run build.sh here"
            )
        kind = NUMPY_TYPES[called]
        return np.empty(shape, kind) if given is None else np.ascontiguousarray(given, kind)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *result = getattr(self.cuda, name)(*arguments)
        if int(error):
            raise SystemExit(f"{name}: CUDA error {int(error)}; is a GPU free on this machine?")
        return result[0] if result else None


def onnx_runner(path: Path, provider: str) -> Runner:
    """Runs the ONNX file by ONNX Runtime: ``tensorrt`` with the options beside it, or ``cpu``."""
    ort: Any = _module("onnxruntime", "pip install onnxruntime; with TensorRT: onnxruntime-gpu")
    providers: Any = ["CPUExecutionProvider"]
    if provider == "tensorrt":
        text = _bytes_of(path.with_name("onnxruntime_tensorrt.json"), AGAIN)
        providers = [(name, options) for name, options in json.loads(text)["providers"]]
    _bytes_of(path, AGAIN)  # a missing file in our words
    try:
        session = ort.InferenceSession(str(path), providers=providers)
    except Exception as error:  # noqa: BLE001 - its errors share no base
        told = str(error).partition("\n")[0].replace(str(path), path.name)
        raise SystemExit(f"{path.name}: {told}; {AGAIN}") from None
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
    arrays = stored(HERE / "parity.npz")
    written = limits(arrays)
    least = written["least_sqnr_db"] if args.sqnr is None else args.sqnr
    most = written["most_changed"] if args.changed is None else args.changed
    run: Runner = (
        onnx_runner(HERE / "tensorrt.onnx", args.onnx) if args.onnx else Engine(args.engine)
    )
    failed = 0
    sys.stdout.write("N x H x W         SQNR dB   largest   changed\n")
    for inputs, expected in cases(arrays):
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
