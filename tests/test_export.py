"""ONNX files: what they compute, what they say about themselves, what int8 touches."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from launch.export import refusal
from launch.exportplace import beside, take_the_place
from launch.rundir import RunDir
from medpsp.config import Config, ModelConfig
from medpsp.configio import load_config
from medpsp.deploy.export import IR_VERSION, export_onnx
from medpsp.deploy.folders import nothing_left
from medpsp.deploy.gates import (
    Scores,
    Slice,
    dice_gates,
    latency,
    latency_gate,
    least_dice,
    refused_by,
    scores,
)
from medpsp.deploy.graph import DeployGraph
from medpsp.deploy.inputs import GraphInput
from medpsp.deploy.quantize import Quantizer
from medpsp.deploy.session import (
    LOGITS,
    Feeds,
    class_masks,
    feeds_of,
    open_session,
    run_graph,
)
from medpsp.deploy.verify import SHAPES, Example, check_parity
from medpsp.errors import ConfigError, ExportError, ParityError
from medpsp.model.psp import PSPNet, build_model
from medpsp.tiles import Tiling
from medpsp.train.sliding import probabilities
from medpsp.types import Window

CLASSES = 3
TOLERANCE = 1e-4
TILING = Tiling((80, 72))
METADATA = {"classes": ["background", "liver", "lésion"], "step": 7, "window": None}
GIVEN = GraphInput(windows=(Window(center=500, width=1000),))
"""Shows 0 to 1000 as 0 to 1."""
NETS = {
    "mobile": ModelConfig(
        backbone="mobilenetv3_large_100",
        head="refine",
        psp_channels=16,
        decoder_channels=16,
        dropout=0,
    ),
    "classic": ModelConfig(
        backbone="resnet18", head="classic", output_stride=8, psp_channels=16, aux=False, dropout=0
    ),
}
torch.set_num_threads(1)


@dataclass(frozen=True)
class Exported:
    """A network and its two files."""

    model: PSPNet
    fp32: Path
    int8: Path


def images(count: int, size: tuple[int, int] = (64, 64)) -> list[NDArray[np.float32]]:
    """Blobs of several greys; noise alone would leave every pixel the same class."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: size[0], : size[1]]
    out = []
    for _ in range(count):
        image = rng.normal(0.2, 0.03, size)
        for value in (0.4, 0.7, 0.9):
            row, column, radius = rng.uniform(8, size[0] - 8), rng.uniform(8, size[1] - 8), 10
            image[(y - row) ** 2 + (x - column) ** 2 < radius**2] = value
        out.append(np.clip(image, 0, 1).astype(np.float32)[None, None])
    return out


def raw(images: list[NDArray[np.float32]]) -> list[NDArray[np.int16]]:
    """As a scanner gives them."""
    return [(image * 1000).round().astype(np.int16) for image in images]


def feeds(count: int) -> list[Feeds]:
    return [{"image": image} for image in raw(images(count))]


EXAMPLES = [Example(image, None) for image in raw(images(4, (80, 72)))]


def lively(config: ModelConfig) -> PSPNet:
    """A network whose normalisation statistics and logits are not those of a fresh one."""
    torch.manual_seed(0)
    model = build_model(config, CLASSES)
    generator = torch.Generator().manual_seed(1)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(0.8 + 0.4 * torch.rand(len(module.weight), generator=generator))
                module.bias.copy_(0.2 * torch.randn(len(module.bias), generator=generator))
                module.momentum = 0.5
        for image in images(12, (96, 96)):  # statistics of real activations, so that none explodes
            model(torch.from_numpy(np.concatenate([image, image[..., ::-1]])))
        model.eval()
        logits = model(torch.from_numpy(np.concatenate(images(4))))[0]
        spread = logits.std((0, 2, 3))
        model.classify.weight.mul_(3 / spread[:, None, None, None])
        model.classify.bias.copy_(-3 * logits.mean((0, 2, 3)) / spread)
    return model


@pytest.fixture(scope="module", params=list(NETS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    model = lively(NETS[request.param])
    fp32, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    export_onnx(DeployGraph(model, GIVEN, confidence=True), fp32, 18, METADATA)
    Quantizer(fp32, feeds(8), "cpu").write(int8, {**METADATA, "int8": "QDQ"})
    return Exported(model, fp32, int8)


def parity(exported: Exported, path: Path | None = None, tolerance: float = TOLERANCE) -> list:
    graph = DeployGraph(exported.model, GIVEN, confidence=True)
    return check_parity(graph, path or exported.fp32, GIVEN, EXAMPLES, tolerance)


def test_network_and_file_agree_at_every_size(exported: Exported) -> None:
    rows = parity(exported)
    assert [row.shape for row in rows] == list(SHAPES)
    assert len(SHAPES) >= 20
    assert sum(h % 32 > 0 and w % 32 > 0 for _, h, w in SHAPES) >= 10
    assert max(row.relative for row in rows) <= TOLERANCE
    assert all(row.relative <= row.max_abs_diff for row in rows)
    assert sum(row.changed for row in rows) == 0
    session = open_session(exported.fp32)
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape[1]) == ("image", "tensor(int16)", 1)
    assert all(isinstance(image.shape[i], str) for i in (0, 2, 3))
    values = np.concatenate(raw(images(5, (65, 79))))
    with torch.no_grad():
        expected = exported.model(torch.from_numpy(values / np.float32(1000)))[0].numpy()
    assert [o.name for o in session.get_outputs()] == ["mask", "logits", "confidence"]
    mask, logits, confidence = session.run(None, {"image": values})
    assert (mask.shape, mask.dtype) == ((5, 65, 79), np.uint8)
    assert logits.shape == (5, CLASSES, 65, 79)
    assert np.abs(logits - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
    np.testing.assert_array_equal(mask, logits.argmax(1))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(confidence, shares.max(1), atol=1e-5)
    assert set(np.unique(expected.argmax(1))) == {0, 1, 2}  # not an empty agreement
    assert expected.std() > 1


@pytest.mark.parametrize("opset", [11, 13])
def test_old_runtimes_get_the_same_network(exported: Exported, tmp_path: Path, opset: int) -> None:
    old = tmp_path / "old.onnx"
    given = GraphInput(context=0)  # windows as an input, too
    export_onnx(DeployGraph(exported.model, given), old, opset, METADATA)
    proto = onnx.load(old)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert not re.search(rb"\.py\b", proto.SerializeToString()[:2000])
    windows = np.float32([[[0, 1000, 0]], [[1000, -1000, 0]]])[:, :1]
    examples = [Example(one.image, windows[n % 2 : n % 2 + 1]) for n, one in enumerate(EXAMPLES)]
    rows = check_parity(DeployGraph(exported.model, given), old, given, examples, TOLERANCE)
    assert sum(row.changed for row in rows) == 0


def test_files_say_what_they_are(exported: Exported) -> None:
    expected = {exported.fp32: METADATA, exported.int8: {**METADATA, "int8": "QDQ"}}
    for path, metadata in expected.items():
        proto = onnx.load(path)
        assert [(o.domain, o.version) for o in proto.opset_import if not o.domain] == [("", 18)]
        assert proto.ir_version == IR_VERSION
        assert [(m.key, json.loads(m.value)) for m in proto.metadata_props] == [
            ("medpsp", metadata)
        ]
        custom = open_session(path).get_modelmeta().custom_metadata_map
        assert json.loads(custom["medpsp"]) == metadata
        onnx.checker.check_model(proto, full_check=True)


def test_no_source_path_is_left_in_the_bytes(exported: Exported) -> None:
    places = [Path(m.__file__).parent for m in (torch, onnx, np)] + [Path(__file__).parents[1]]
    for path in (exported.fp32, exported.int8):
        data = path.read_bytes()
        assert [place for place in places if str(place).encode() in data] == []
        assert b"site-packages" not in data
        proto = onnx.load(path)
        for weight in proto.graph.initializer:
            weight.ClearField("raw_data")  # three bytes may stand there by chance
        assert not re.search(rb"\.py\b", proto.SerializeToString())
        assert not list(path.parent.glob(".*.partial"))


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in proto.graph.node for name in node.output}


def groups_of(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def test_int8_takes_convolutions_and_leaves_depthwise_and_pooling(exported: Exported) -> None:
    proto = onnx.load(exported.int8)
    made_by, nodes = producers(proto), proto.graph.node
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) > 10
    convolutions = [node for node in nodes if node.op_type in ("Conv", "FusedConv")]
    whole = [node for node in convolutions if node.input[1] in constants]
    mobile = "mobilenetv3" in str(type(exported.model.backbone)).lower()
    depthwise = [node for node in convolutions if groups_of(node) > 1]
    assert len(depthwise) == (12 if mobile else 0)  # of the 15 blocks of MobileNetV3 Large
    assert [node for node in depthwise if node in whole] == whole
    assert len(whole) == (10 if mobile else 0)  # two lie between ReLUs of int8 layers
    for node in convolutions:
        if node in whole:
            continue
        weight = made_by[node.input[1]]
        assert weight.op_type == "DequantizeLinear", node.name
        assert made_by[node.input[0]].op_type == "DequantizeLinear", node.name
        values, scale = constants[weight.input[0]], constants[weight.input[1]]
        assert values.dtype == np.int8
        assert np.abs(values.astype(int)).max() <= 64  # seven bits: no saturation without VNNI
        assert scale.shape == (values.shape[0],)  # one for each output channel
    pooling = [node for node in nodes if node.op_type == "MatMul"]
    assert len(pooling) == 2 + 4  # and one for each bin, to spread it again
    wide, both, *spreading = pooling
    assert all(made_by[node.input[1]].op_type == "Reshape" for node in spreading)
    assert made_by[wide.input[1]].op_type == "Transpose"  # of weights made from the runtime shape,
    assert made_by[both.input[0]].op_type == "Div"  # so there is nothing constant to quantize
    assert both.input[1] == wide.output[0]
    assert exported.int8.stat().st_size < 0.5 * exported.fp32.stat().st_size


@pytest.mark.parametrize("shape", [(96, 112), (40, 100), (33, 31)])
def test_the_device_cuts_tiles_as_evaluation_does(
    exported: Exported, shape: tuple[int, int]
) -> None:
    """Larger than a tile, larger along one side, smaller."""
    tiling, values = Tiling((64, 48), 0.25), np.concatenate(raw(images(3, (112, 112))))
    values = np.ascontiguousarray(values[..., : shape[0], : shape[1]])
    batch = torch.from_numpy(values / np.float32(1000))
    shares = probabilities(exported.model, batch, tiling)
    found = class_masks(open_session(exported.fp32), GIVEN, values, None, tiling)
    assert found.shape == (3, *shape)
    assert (found != shares.argmax(1).numpy()).sum() <= 2  # a tie may break either way
    assert len(np.unique(found)) > 1
    with torch.no_grad():
        whole = exported.model(batch)[0].argmax(1).numpy()
    assert (found != whole).sum() > 20  # the pyramid would see something else


@dataclass(frozen=True)
class One:
    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    window: None = None


def test_int8_masks_agree_with_fp32_masks(exported: Exported) -> None:
    sessions = {"fp32": open_session(exported.fp32), "cpu": open_session(exported.int8)}
    label = np.zeros((80, 72), np.uint8)
    label[20:40] = 1
    slices: list[Slice] = [One(image, label) for image in raw(images(12, (80, 72))[8:])]
    found = scores(sessions, slices, GIVEN, CLASSES, TILING)
    assert found["fp32"].agreement == 1
    assert (found["fp32"].changed, found["fp32"].worst) == (0, ())
    assert 0.8 < found["cpu"].agreement < 1
    worst = found["cpu"].worst
    assert len(worst) == 3
    assert worst[0].pixels >= worst[1].pixels >= worst[2].pixels > 0
    total = sum((one.fp32 != one.other).sum() for one in worst)
    assert total <= found["cpu"].changed * 4 * 80 * 72 + 0.5


def test_scores_by_hand(tmp_path: Path) -> None:
    """Files that call the upper half and the upper three quarters of an image class 1."""
    paths = [tmp_path / "half.onnx", tmp_path / "most.onnx"]
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    for path, level in zip(paths, (5, 2), strict=True):
        nodes = [
            node("Constant", [], ["level"], value_int=level),
            node("Cast", ["image"], ["wide"], to=7),
            node("Squeeze", ["wide", "one"], ["plane"]),
            node("Constant", [], ["one"], value_ints=[1]),
            node("Greater", ["plane", "level"], ["above"]),
            node("Cast", ["above"], ["mask"], to=2),
        ]
        nodes.insert(0, nodes.pop(3))
        graph = onnx.helper.make_graph(
            nodes,
            "threshold",
            [info("image", 5, ["N", 1, "H", "W"])],
            [info("mask", 2, ["N", "H", "W"])],
        )
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    ramp = np.repeat(np.int16([9, 6, 3, 1]), 5).reshape(1, 1, 4, 5)
    label = np.uint8([[1] * 5, [1] * 5, [1] * 5, [255] * 5])
    files = {"fp32": open_session(paths[0]), "cpu": open_session(paths[1])}
    found = scores(files, [One(ramp, label)] * 2, GIVEN, 2, Tiling((4, 5)))
    assert [one.number for one in found["cpu"].worst] == [0, 1]
    again = scores(files, [One(ramp, label)] * 3, GIVEN, 2, Tiling((4, 5)), ["a", "a", "b"])
    assert [one.number for one in again["cpu"].worst] == [0, 2]  # of a case one slice
    assert found["cpu"].agreement == pytest.approx(2 * 10 / (10 + 15))  # two rows against three
    assert found["cpu"].changed == pytest.approx(0.25)
    assert found["fp32"].against_labels[1] == pytest.approx(2 * 10 / (10 + 15))
    assert found["cpu"].against_labels[1] == 1
    classes = ("background", "liver")
    agree, drop = dice_gates("cpu", 0.95, found["cpu"], found["fp32"], classes)
    assert (agree.name, agree.passed, drop.name, drop.passed) == (
        "cpu_dice",
        False,
        "cpu_drop",
        True,
    )
    assert "Dice 0.8000, expected 0.95" in agree.says
    assert "Dice of liver against the labels is 0.2000 higher" in drop.says
    _, drop = dice_gates("cpu", 0.5, found["fp32"], found["cpu"], classes)
    assert (drop.passed, "0.2000 lower" in drop.says) == (False, True)


def test_a_refusal_names_file_gate_finding_bound_and_what_to_do(tmp_path: Path) -> None:
    nothing = Scores(against_fp32=(1.0, np.nan), against_labels=(1.0, 0.0), changed=0.0)
    better = replace(nothing, against_labels=(1.0, 0.2))
    gates = dice_gates("cpu", 0.99, nothing, better, ("background", "liver"))
    slow = latency_gate([{"cpu": np.array([3.0]), "fp32": np.array([2.0])}])
    refused = refused_by([*gates, slow], {"latency": "a shared machine"})
    assert refused == gates
    assert refused_by(gates, {"cpu_dice": "a trial", "cpu_drop": "a trial"}) == []
    data = {"archive": tmp_path, "classes": ["background", "liver"], "key_file": tmp_path / "k"}
    config = Config.model_validate({"out": "runs/my liver", "data": data})
    command = (
        "medpsp export 'runs/my liver/config.yaml' export.allow.cpu_dice='your reason' "
        "export.allow.cpu_drop='your reason'"
    )
    assert refusal(config, refused) == (
        "export: refused model.int8.onnx (cpu_dice: no mask has any foreground, neither of fp32, "
        "expected Dice 0.99 between them; cpu_drop: Dice of liver against the labels is 0.2000 "
        "lower than that of fp32, at most 0.005 lower is expected); written to runs/my "
        "liver/export: model.onnx, model.int8.trt.onnx, model.fp16.onnx and their dossier; "
        f"train longer, or let it pass with a reason, which the dossier shows: {command}"
    )
    options = shlex.split(command)[3:]  # can be given once a reason is in it
    given = {"out": "runs/my liver", "data": {k: str(v) for k, v in data.items()}}
    (tmp_path / "c.yaml").write_text(
        json.dumps(given | {"data": {**given["data"], "classes": data["classes"]}})
    )
    with pytest.raises(ConfigError, match=r"'your reason' is no reason; say in 8 characters"):
        load_config(tmp_path / "c.yaml", options)
    options = [text.replace("your reason", "a <test>") for text in options]
    assert load_config(tmp_path / "c.yaml", options).export.allow == {
        "cpu_dice": "a <test>",
        "cpu_drop": "a <test>",
    }
    said = refusal(config, [slow], ["model.int8.onnx"])
    assert "latency: int8 takes 1.50 of the time" in said
    assert "(of the earlier export model.int8.onnx is gone); let it pass" in said  # no training


def test_half_a_work_is_not_left(tmp_path: Path) -> None:
    def attempt() -> None:
        with nothing_left(tmp_path / "half"):
            (tmp_path / "half").mkdir()
            (tmp_path / "half" / "model.onnx").touch()
            raise ParityError("it differs")

    with pytest.raises(ParityError):
        attempt()
    assert not (tmp_path / "half").exists()
    with nothing_left(tmp_path / "half"):
        (tmp_path / "half").mkdir()
    assert (tmp_path / "half").exists()
    with pytest.raises(OSError, match="No space left") as full, nothing_left(tmp_path / "half"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write has it: no file
    assert full.value.filename == str(tmp_path)


MODELS, PAPERS = (
    ("model.onnx", "model.int8.onnx"),
    ("dossier.html", "dossier.json", "sbom.cdx.json"),
)


def test_a_dossier_is_there_only_with_the_files_that_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far it comes before it is killed."""
    replace_by, left = Path.replace, [0]

    def killed(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace_by(path, target)

    for steps in range(len(MODELS) + len(PAPERS) + 1):
        target = RunDir(tmp_path / str(steps))
        target.export.mkdir(parents=True)
        for name in (*MODELS, "model.fp16.onnx", *PAPERS, "notes.txt"):
            (target.export / name).write_text("old")
        run = beside(target)
        run.export.mkdir()
        for name in (*MODELS, *PAPERS):
            (run.export / name).write_text("new")
        left[0] = steps
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            if steps < len(MODELS) + len(PAPERS):
                with pytest.raises(KeyboardInterrupt):
                    take_the_place(run, target)
                assert not target.export_report.exists()
                continue
            assert take_the_place(run, target) == ["model.fp16.onnx"]
        found = {path.name: path.read_text() for path in target.export.iterdir()}
        assert found == {**dict.fromkeys((*MODELS, *PAPERS), "new"), "notes.txt": "old"}
        assert not run.export.exists()


def test_a_place_that_cannot_be_taken_is_known_before_the_work(tmp_path: Path) -> None:
    run, other = RunDir(tmp_path / "run"), tmp_path / "other"
    run.root.mkdir()
    run.export.write_text("")
    with pytest.raises(ExportError, match=r"run/export: a file; move it away, and export again$"):
        beside(run)
    run.export.unlink()
    run.export.symlink_to(other / "export")
    with pytest.raises(ExportError, match="a link to nowhere"):
        beside(run)
    other.mkdir()
    assert beside(run).export == other / ".export.partial"  # a rename leads over no disk's end
    beside(run).export.mkdir()
    (other / "export").mkdir()
    assert take_the_place(beside(run), run) == []


def test_bounds_are_those_of_the_backbone() -> None:
    assert least_dice("cpu", "resnet18") == least_dice("cpu", "convnext_tiny") == 0.99
    assert least_dice("cpu", "efficientnet_b0") == least_dice("trt", "convnext_tiny") == 0.97
    assert least_dice("cpu", "mobilenetv3_large_100") == least_dice("cpu", "timm/some") == 0.95
    assert least_dice("trt", "mobilenetv3_large_100") == least_dice("trt", "timm/some") == 0.93
    assert least_dice("half", "resnet18") == 0.998


def test_latency_is_that_of_pairs(exported: Exported) -> None:
    (one,) = feeds(1)
    found = latency({"fp32": exported.fp32, "cpu": exported.int8}, one, threads=1, rounds=3)
    assert {name: times.shape for name, times in found.items()} == {"fp32": (3,), "cpu": (3,)}
    assert min(times.min() for times in found.values()) > 0
    slow = {"fp32": np.array([1.0, 2, 3]), "cpu": np.array([2.0, 2, 3])}
    fast = {"fp32": np.array([2.0, 2, 4]), "cpu": np.array([1.0, 3, 2])}
    assert latency_gate([slow]).passed  # the median pair is as fast
    assert latency_gate([slow, fast]).says.startswith("int8 takes 0.50 of the time")
    assert not latency_gate([{"fp32": np.ones(3), "cpu": np.full(3, 1.1)}]).passed


def test_a_changed_weight_is_noticed(exported: Exported, tmp_path: Path) -> None:
    proto = onnx.load(exported.fp32)
    weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values[0] += 0.05
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(proto, tmp_path / "tampered.onnx")
    with pytest.raises(ParityError, match=r"tampered\.onnx at \(N,H,W\)=.* logits differ by"):
        parity(exported, tmp_path / "tampered.onnx")
    with pytest.raises(ParityError, match=r"allowed 1e-12 \(export\.parity_tolerance\)"):
        parity(exported, tolerance=1e-12)


class Elsewhere(nn.Module):
    """A network that goes wrong at one size only."""

    def __init__(self, model: nn.Module, width: int, change: float) -> None:
        super().__init__()
        self.model, self.width, self.change = model, width, change

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        logits = self.model(x)[0]
        return (logits + self.change if x.shape[-1] == self.width else logits), None


@pytest.mark.parametrize("change", [1.0, float("nan"), float("inf")])
def test_a_difference_at_one_size_is_noticed(exported: Exported, change: float) -> None:
    odd = DeployGraph(Elsewhere(exported.model, 47, change), GIVEN, confidence=True)
    with pytest.raises(ParityError, match=r"\(N,H,W\)=\(1, 33, 47\)"):
        check_parity(odd, exported.fp32, GIVEN, EXAMPLES, TOLERANCE)


def test_a_pixel_of_another_class_is_noticed(exported: Exported) -> None:
    """However small the difference of the logits is against the largest of them."""

    class Turned(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            mask, *others = DeployGraph(exported.model, GIVEN, confidence=True)(image)
            mask[:, 0, 0] = 2 - mask[:, 0, 0]  # 0 to 2, 2 to 0
            mask[:, -1, -1] = 1 - mask[:, -1, -1].clamp(max=1)
            return mask, *others

    with pytest.raises(ParityError, match=r"\d pixels? of another class although"):
        check_parity(Turned(), exported.fp32, GIVEN, EXAMPLES, TOLERANCE)


def test_two_exports_are_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    loggers = [logging.getLogger(), logging.getLogger("torch.onnx")]
    levels = [logger.level for logger in loggers]
    loggers[0].setLevel(logging.INFO)
    again, int8 = tmp_path / "again" / "model.onnx", tmp_path / "again.int8.onnx"
    graph = DeployGraph(copy.deepcopy(exported.model).train(), GIVEN, confidence=True)
    export_onnx(graph, again, 18, METADATA)
    assert again.read_bytes() == exported.fp32.read_bytes()
    Quantizer(again, feeds(8), "cpu").write(int8, {**METADATA, "int8": "QDQ"})
    assert int8.read_bytes() == exported.int8.read_bytes()
    assert [logger.level for logger in loggers] == [logging.INFO, levels[1]]
    loggers[0].setLevel(levels[0])


class Plain(nn.Module):
    """One convolution in the network's clothes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


def test_the_exporter_may_not_substitute_an_opset(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="asked for opset 10, the exporter wrote 18"):
        export_onnx(DeployGraph(Plain(1), GIVEN), tmp_path / "old.onnx", 10, {})
    assert list(tmp_path.iterdir()) == []
    colours = GraphInput(dtype="uint8", colours=3, windows=(Window(center=127.5, width=255),))
    plain = Plain(3)
    export_onnx(DeployGraph(plain, colours), tmp_path / "new.onnx", 20, {})
    proto = onnx.load(tmp_path / "new.onnx")
    assert [o.version for o in proto.opset_import] == [20]
    rng = np.random.default_rng(0)
    some = [Example(rng.integers(0, 256, (1, 3, 30, 40), np.uint8), None)]
    graph = DeployGraph(plain, colours)
    check_parity(graph, tmp_path / "new.onnx", colours, some, TOLERANCE)


class Gelu(Plain):
    """With what ConvNeXt has between its layers."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.gelu(self.layer(x)), None


def test_gelu_is_one_node_at_run_time_and_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = tmp_path / "turned.onnx", Gelu(1)
    export_onnx(DeployGraph(plain, GIVEN), path, 18, {})
    monkeypatch.setattr("medpsp.deploy.export.turn_gelu", lambda proto: None)
    export_onnx(DeployGraph(plain, GIVEN), tmp_path / "as_it_was.onnx", 18, {})
    image = np.arange(-200, 500, dtype=np.int16).reshape(1, 1, 25, 28)
    feeds = feeds_of(image, None)
    before, after = (
        run_graph(open_session(file, optimise=False), feeds, LOGITS)[0]
        for file in (tmp_path / "as_it_was.onnx", path)
    )
    np.testing.assert_array_equal(before, after)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    ort.InferenceSession(path, options)
    kinds = {node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node}
    assert "Gelu" in kinds
    assert "Erf" not in kinds
