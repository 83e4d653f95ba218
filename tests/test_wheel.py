"""The wheel, as a device gets it: base requirements only, in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from launch.phantom import Phantom, draw, write_series
from medpsp.deploy.inputs import GraphInput
from medpsp.intensity import CT_WINDOW

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    hatchling = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(hatchling, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("device") / "venv"
    uv = Path(sys.executable).parent / "uv"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    fast = [str(uv), "pip", "install", "-q", "--python", python, *constraints, str(wheel)]
    slow = [python, "-m", "pip", "install", "-q", *constraints, str(wheel)]
    if not uv.exists() or subprocess.run(fast, capture_output=True, check=False).returncode:
        subprocess.run(slow, check=True)
    return venv / "bin"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_wheel_holds_the_packages_and_the_shipped_files(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert tops == {"medpsp", "shards", "launch", "medpsp_data", f"medpsp-{version}.dist-info"}
    assert "medpsp_data/configs/demo.yaml" in names
    assert "medpsp_data/constraints.txt" in names
    assert any(name.startswith("medpsp_data/slurm/") for name in names)
    assert {f"{p}/py.typed" for p in ("medpsp", "shards", "launch")} <= set(names)


def test_device_has_no_training_packages(device: Path, tmp_path: Path):
    listed = run([str(device / "python"), "-m", "pip", "list", "--format=json"], tmp_path)
    installed = {item["name"].lower() for item in json.loads(listed.stdout)}
    assert "onnxruntime" in installed
    assert not installed & {"torch", "ray", "zarr", "pyarrow", "albumentations", "onnx", "submitit"}


def test_device_finds_shipped_configs_and_names_what_is_missing(device: Path, tmp_path: Path):
    listed = run([str(device / "medpsp"), "config", "list"], tmp_path)
    assert listed.stdout.split() == sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
    failed = run([str(device / "medpsp"), "backbones"], tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].endswith("pip install 'medpsp[all]'")
    assert "Traceback" not in failed.stderr


def test_device_has_a_doctor(device: Path, tmp_path: Path):
    """Without torch, Ray and Zarr: notes that name the extras, and no problem."""
    done = run([str(device / "medpsp"), "doctor"], tmp_path)
    said = " ".join(done.stdout.split())
    assert done.stderr == ""
    assert re.search(r"decoders ok all 17 transfer syntaxes", said)
    assert "for `medpsp train`: pip install 'medpsp[train]'" in said
    assert "missing: google-crc32c, numcodecs, pyarrow, ray, zarr" in said
    assert "tested versions ok all as in constraints.txt" in said
    problems = re.findall(r"^(.{18}) problem", done.stdout, re.MULTILINE)
    assert done.returncode == bool(problems)
    assert set(map(str.strip, problems)) <= {"run folder", "temporary files"}  # of this machine


def test_device_predicts_on_dicom(device: Path, tmp_path: Path):
    """A model that marks what is brighter than half of the window."""
    phantom = Phantom(shape=(3, 40, 50))
    hu, _ = draw(phantom, 1)
    write_series(tmp_path / "dicom", "P1", hu, phantom)
    write_threshold_model(tmp_path / "model.onnx")
    command = [str(device / "medpsp"), "predict", "model.onnx", "dicom", "out"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    import nibabel as nib

    mask = np.asarray(nib.load(tmp_path / "out" / "series-000.nii.gz").dataobj)
    expected = (hu > 40).astype(np.uint8)
    np.testing.assert_array_equal(mask.transpose(2, 1, 0), expected)


def write_threshold_model(path: Path) -> None:
    """Bright is what is above 40.5 HU, the middle of the window, by a graph on whole numbers."""
    helper, kind, uint8 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    weights = onnx.numpy_helper.from_array(
        np.array([[[[-1.0]]], [[[1.0]]]], dtype=np.float32), "weights"
    )
    bias = onnx.numpy_helper.from_array(np.array([40.5, -40.5], dtype=np.float32), "bias")
    axis = onnx.numpy_helper.from_array(np.array([1]), "axis")
    node, info = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node("Cast", ["image"], ["values"], to=kind),
            node("Conv", ["values", "weights", "bias"], ["logits"]),
            node("Softmax", ["logits"], ["shares"], axis=1),
            node("ReduceMax", ["shares", "axis"], ["confidence"], keepdims=0),
            node("ArgMax", ["logits"], ["index"], axis=1, keepdims=0),
            node("Cast", ["index"], ["mask"], to=uint8),
        ],
        "threshold",
        [info("image", onnx.TensorProto.INT16, ["N", 1, "H", "W"])],
        [
            info("mask", uint8, ["N", "H", "W"]),
            info("confidence", kind, ["N", "H", "W"]),
            info("logits", kind, ["N", 2, "H", "W"]),
        ],
        [weights, bias, axis],
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    entry = model.metadata_props.add()
    entry.key = "medpsp"
    given = GraphInput(windows=(CT_WINDOW,)).to_json()
    tile = {"size": [32, 32], "overlap": 0.5}
    told = {"classes": ["dark", "bright"], "modalities": ["CT"], "window": None, "tile": tile}
    entry.value = json.dumps({**told, "input": given})
    path.write_bytes(model.SerializeToString())
