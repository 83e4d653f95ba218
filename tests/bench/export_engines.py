"""One network in a process of its own: torch, ONNX Runtime or OpenVINO; and OpenVINO's int8.

    export_engines.py serve ENGINE FILE FEEDS THREADS      a round for each line of stdin
    export_engines.py masks ENGINE FILE FEEDS OUT          masks (M, H, W) of all feeds, as .npy
    export_engines.py quantize PRESET FILE FEEDS OUT       NNCF's int8 of an ONNX file, as .xml

FEEDS is an .npz of the inputs of the graph, M images each. All take modality values and give class
ids, in a batch of one: the same work. Heavy imports are those of the engine alone, so that its
memory is its own. OpenVINO is looked for in .venv-bench/export (see the Makefile).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

PEERS = Path(__file__).resolve().parents[2] / ".venv-bench" / "export"
WARM = 3
Run = Callable[[dict[str, Any]], Any]
"""Feeds of one image to its mask (1, H, W)."""


def torch_eager(path: Path, threads: int) -> tuple[Run, str]:
    """The trained network as Python runs it; `export_nets` writes its file."""
    import torch

    from medpsp.config import ModelConfig
    from medpsp.deploy.graph import DeployGraph
    from medpsp.deploy.inputs import GraphInput
    from medpsp.model.psp import build_model

    torch.set_num_threads(threads)
    saved = torch.load(path, weights_only=True)
    model = build_model(ModelConfig.model_validate_json(saved["config"]), saved["classes"])
    model.load_state_dict(saved["weights"])
    graph = DeployGraph(model.eval(), GraphInput.from_json(json.loads(saved["given"]))).eval()

    def run(feeds: dict[str, Any]) -> Any:
        with torch.inference_mode():
            unit = graph.unit(*(torch.from_numpy(feeds[name]) for name in feeds))
            return graph.model(unit)[0].argmax(1).to(torch.uint8).numpy()

    return run, f"torch {torch.__version__}"


def onnxruntime(path: Path, threads: int) -> tuple[Run, str]:
    """As `medpsp predict` runs a file."""
    from onnxruntime import __version__

    from medpsp.deploy.session import MASK, open_session, run_graph

    session = open_session(path, threads)
    return lambda feeds: run_graph(session, feeds, MASK)[0], f"onnxruntime {__version__}"


def openvino(path: Path, threads: int, precision: str = "") -> tuple[Run, str]:
    """As it comes, tuned for latency: bf16 for what is not int8 where the CPU has that."""
    ov = _peer("openvino")
    core = ov.Core()
    model = _opened(core, path)
    alone = ov.Model([model.output("mask").get_node()], model.get_parameters(), "mask")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = core.compile_model(alone, "CPU", settings)
    request = compiled.create_infer_request()
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def run(feeds: dict[str, Any]) -> Any:
        return request.infer(_floats(feeds))[0].copy()

    return run, f"openvino {ov.__version__.split('-')[0]}, {used}"


def _opened(core: Any, path: Path) -> Any:
    """Its CPU plugin has no int16 ("not supported for use with oneDNN"): floats of the same."""
    model = core.read_model(path)
    for parameter in model.get_parameters():
        parameter.set_element_type(_peer("openvino").Type.f32)
    model.validate_nodes_and_infer_types()
    return model


def _floats(feeds: dict[str, Any]) -> dict[str, Any]:
    return {name: value.astype(np.float32) for name, value in feeds.items()}


def openvino_f32(path: Path, threads: int) -> tuple[Run, str]:
    """What is not int8 in fp32, as ours has it."""
    return openvino(path, threads, "f32")


ENGINES: dict[str, Callable[[Path, int], tuple[Run, str]]] = {
    f.__name__: f for f in (torch_eager, onnxruntime, openvino, openvino_f32)
}


def serve(engine: str, file: str, feeds: str, threads: str) -> None:
    """A line when ready, then CPU and wall ms and the peak of memory for each line of stdin."""
    answers = sys.stdout
    run, about = ENGINES[engine](Path(file), int(threads))
    one = next(_feeds(feeds))
    for _ in range(WARM):
        run(one)
    print(json.dumps({"about": about}), file=answers, flush=True)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        used, began = time.process_time(), time.perf_counter()
        run(one)
        wall, cpu = time.perf_counter() - began, time.process_time() - used
        preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        found = {"cpu": cpu * 1e3, "wall": wall * 1e3, "peak": _peak(), "preempted": preempted}
        print(json.dumps(found), file=answers, flush=True)


def masks(engine: str, file: str, feeds: str, out: str) -> None:
    """Of all feeds, one after another."""
    run, _ = ENGINES[engine](Path(file), 0)
    np.save(out, np.concatenate([run(one) for one in _feeds(feeds)]))


def quantize(preset: str, file: str, feeds: str, out: str) -> None:
    """NNCF's post-training quantization as it comes, with all that it is given."""
    ov, nncf = _peer("openvino"), _peer("nncf")
    model, given = _opened(ov.Core(), Path(file)), [_floats(one) for one in _feeds(feeds)]
    small = nncf.quantize(
        model, nncf.Dataset(given), preset=nncf.QuantizationPreset(preset), subset_size=len(given)
    )
    ov.save_model(small, out, compress_to_fp16=False)
    print(f"nncf {nncf.__version__}")


def _peer(name: str) -> Any:
    import importlib

    if str(PEERS) not in sys.path:
        sys.path.insert(0, str(PEERS))
    return importlib.import_module(name)


def _feeds(path: str) -> Iterator[dict[str, Any]]:
    with np.load(path) as found:
        stacks = {name: found[name] for name in found.files}
    for number in range(len(next(iter(stacks.values())))):
        yield {name: stack[number : number + 1] for name, stack in stacks.items()}


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    {"serve": serve, "masks": masks, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])
