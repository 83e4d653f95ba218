"""The texts of the TensorRT folder: the build script, the options of ONNX Runtime, the README."""

from __future__ import annotations

import textwrap
from typing import Any

from medpsp.deploy.tensorrtgraph import OpCheck


def build_script(kind: str, shapes: dict[str, str], dla: int | None) -> str:
    """A shell script that makes tensorrt.plan with the trtexec of the device."""
    old = {"fp32": "--fp16", "fp16": "--fp16", "int8": "--int8 --fp16"}[kind]
    strong = '  *--stronglyTyped*) types="--stronglyTyped" ;; # the types of the file: 9.1 or newer'
    flags = f'  *--fp16*) types="{old}" ;; # JetPack 5, and TensorRT up to 10'
    # DLA up to 10 knows the flags alone; fp32 must be told to become fp16
    order = [flags, strong] if dla is not None or kind == "fp32" else [strong, flags]
    core = "" if dla is None else f" --useDLACore={dla} --allowGPUFallback"
    cases = "\n".join([*order, '  *) types="" ;;'])
    return f"""#!/bin/sh
# Makes tensorrt.plan on the device that will run it: an engine fits one GPU and one TensorRT.
set -eu
cd "$(dirname "$0")"
trtexec=${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}
help=$("$trtexec" --help 2>&1 || true)
case "$help" in
{cases}
esac
set -x
"$trtexec" --onnx=tensorrt.onnx --saveEngine=tensorrt.plan $types{core} \\
  --minShapes={shapes["min"]} \\
  --optShapes={shapes["opt"]} \\
  --maxShapes={shapes["max"]} \\
  --timingCacheFile=timing.cache
"""


def ort_providers(kind: str, shapes: dict[str, str], dla: int | None) -> dict[str, Any]:
    """Providers for `onnxruntime.InferenceSession`, the first choice first."""
    options: dict[str, Any] = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": "engines",
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": "engines",
        "trt_fp16_enable": True,
        "trt_int8_enable": kind == "int8",
        **{f"trt_profile_{name}_shapes": text for name, text in shapes.items()},
    }
    if dla is not None:
        options |= {"trt_dla_enable": True, "trt_dla_core": dla}
    names = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return {"providers": [["TensorrtExecutionProvider", options], *([name, {}] for name in names)]}


def readme(
    about: dict[str, Any], changes: list[str], found: OpCheck, shapes: dict[str, str]
) -> str:
    """README.txt.

    Args:
        about: ``file``, ``variant``, ``kind``, ``far`` (see `parity_arrays`) and ``cases``.
        changes: See `make_readable`.
        found: Of the copy.
        shapes: Of the engine.
    """
    counted = ", ".join(f"{name} {count}" for name, count in found.counts.items())
    listed = textwrap.fill(counted, 96, initial_indent="  ", subsequent_indent="  ")
    old = ", ".join(found.too_new)
    before = (
        f"TensorRT 8.5 (JetPack 5) does not list: {old}. For it, export with opset 13."
        if old
        else "TensorRT 8.5 (JetPack 5) lists them as well."
    )
    edits = "\n".join(f"- {text}" for text in changes) or "- nothing"
    return f"""{about["file"]} ({about["variant"]}) for TensorRT
=================================================

On the device, in this folder:
  sh build.sh             makes tensorrt.plan; TRTEXEC names another trtexec
  python3 parity.py       compares it with what was computed where this folder was made
  python3 parity.py --onnx tensorrt   the same by ONNX Runtime's TensorRT provider

NOT RUN: there was no TensorRT where this folder was written. The engine, its speed and the limits
of parity.py are not measured. Trust tensorrt.plan once parity.py has ended with 0 on the device.

What was checked
- Each operator is in docs/operators.md of onnx-tensorrt for TensorRT 10.15 (opsets 9 to 24);
  this file has opset {found.opset}:
{listed}
- The remarks of that page on attributes and types were not checked, but for zero points of Q/DQ
  nodes.
- {before}
- tensorrt.onnx gives the class ids of {about["file"]} at {about["cases"]} sizes, on the CPU by
  ONNX Runtime; logits differ by {about["far"]:.1e} of the largest.{_kernels(about["kind"])}

How tensorrt.onnx differs from {about["file"]}
{edits}
  TensorRT reads no int16; uint8 only next to a Cast from or to floats.

Precision
{_precision(about["kind"])}

Sizes of the engine: {shapes["min"]} to {shapes["max"]}, tuned for {shapes["opt"]}.
tensorrt.plan fits the GPU and the TensorRT version that made it and no other.
A DLA takes one size, and no Q/DQ nodes; see `medpsp tensorrt --help`.
"""


def _kernels(kind: str) -> str:
    if kind != "int8":
        return ""
    return (
        "\n  Q/DQ nodes were computed in float (graph optimisation off): int8 kernels of a CPU "
        "without\n  VNNI saturate, those of a GPU do not."
    )


def _precision(kind: str) -> str:
    if kind == "fp32":
        return (
            "- TensorRT up to 10: --fp16, layers may run in half precision, the windows too.\n"
            "- TensorRT 11 has no such flag and runs fp32: give the fp16 file for half precision."
        )
    what = "int8 between Q/DQ nodes, the rest in fp32" if kind == "int8" else "half and fp32"
    rest = " and half precision elsewhere" if kind == "int8" else ""
    flags = "--int8 --fp16" if kind == "int8" else "--fp16"
    return (
        f"- TensorRT 10 and newer: --stronglyTyped, the types of the file ({what}).\n"
        f"- Older ones: {flags}{rest}; the windows may run in half precision too."
    )
