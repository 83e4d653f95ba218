"""ONNX files: what they compute, what they say about themselves, what int8 touches."""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from launch.export import one_tile_each
from medpsp.config import ModelConfig
from medpsp.deploy.export import IR_VERSION, export_onnx
from medpsp.deploy.quantize import quantize_int8
from medpsp.deploy.session import class_masks, open_session
from medpsp.deploy.verify import SHAPES, check_parity, mask_agreement
from medpsp.errors import ExportError, ParityError
from medpsp.model.psp import PSPNet, build_model
from medpsp.tiles import Tiling
from medpsp.train.sliding import probabilities

CLASSES = 3
TOLERANCE = 1e-4
TILING = Tiling((80, 72))
METADATA = {"classes": ["background", "liver", "lésion"], "step": 7, "window": None}
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
    export_onnx(model, fp32, 1, 18, METADATA)
    quantize_int8(fp32, int8, iter(images(8)), {**METADATA, "int8": "QDQ"})
    return Exported(model, fp32, int8)


def test_network_and_file_agree_at_every_size(exported: Exported) -> None:
    rows = check_parity(exported.model, exported.fp32, 1, TOLERANCE)
    assert [row.shape for row in rows] == list(SHAPES)
    assert max(row.relative for row in rows) <= TOLERANCE
    assert all(row.relative <= row.max_abs_diff for row in rows)
    assert sum(row.changed for row in rows) <= 2  # a tie may break either way
    session = open_session(exported.fp32)
    assert session.get_inputs()[0].shape[1] == 1
    assert all(isinstance(session.get_inputs()[0].shape[i], str) for i in (0, 2, 3))
    batch = np.concatenate(images(5, (65, 79)))
    with torch.no_grad():
        expected = exported.model(torch.from_numpy(batch))[0].numpy()
    found = session.run(None, {"image": batch})[0]
    assert found.shape == (5, CLASSES, 65, 79)
    assert np.abs(found - expected).max() <= TOLERANCE
    assert set(np.unique(expected.argmax(1))) == {0, 1, 2}  # not an empty agreement
    assert expected.std() > 1


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
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    depthwise = [node for node in convolutions if groups_of(node) > 1]
    dense = [node for node in convolutions if groups_of(node) == 1]
    mobile = "mobilenetv3" in str(type(exported.model.backbone)).lower()
    assert len(depthwise) == (12 if mobile else 0)  # of the 15 blocks of MobileNetV3 Large
    assert all(node.input[1] in constants for node in depthwise)
    for node in dense:
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
    tiling, batch = Tiling((64, 48), 0.25), np.concatenate(images(3, (112, 112)))
    batch = np.ascontiguousarray(batch[..., : shape[0], : shape[1]])
    shares = probabilities(exported.model, torch.from_numpy(batch), tiling)
    found = class_masks(open_session(exported.fp32), batch, tiling)
    assert found.shape == (3, *shape)
    assert (found != shares.argmax(1).numpy()).sum() <= 2  # a tie may break either way
    assert len(np.unique(found)) > 1
    with torch.no_grad():
        whole = exported.model(torch.from_numpy(batch))[0].argmax(1).numpy()
    assert (found != whole).sum() > 20  # the pyramid would see something else


def test_calibration_runs_through_the_tiles() -> None:
    tiling = Tiling((64, 48), 0.0)
    some = [np.full((1, 1, 64, 90), n, np.float32) for n in range(3)]
    some = [image + np.linspace(0, 0.5, 90, dtype=np.float32) for image in some]
    found = list(one_tile_each(some, tiling))
    assert [tile.shape for tile in found] == [(1, 1, 64, 48)] * 3
    for tile, image, left in zip(found, some, (0, 42, 0), strict=True):
        np.testing.assert_array_equal(tile, image[..., left : left + 48])


def test_int8_masks_agree_with_fp32_masks(exported: Exported) -> None:
    fresh = images(12, (80, 72))[8:]
    assert mask_agreement(exported.fp32, exported.fp32, fresh, CLASSES, TILING) == 1
    agreement = mask_agreement(exported.fp32, exported.int8, fresh, CLASSES, TILING)
    assert 0.8 < agreement < 1


def test_mask_agreement_by_hand(tmp_path: Path) -> None:
    """Files that call the upper half and the upper three quarters of an image class 1."""
    paths = [tmp_path / "half.onnx", tmp_path / "most.onnx"]
    for path, level in zip(paths, (0.5, 0.25), strict=True):
        node = onnx.helper.make_node("Constant", [], ["level"], value_float=level)
        graph = onnx.helper.make_graph(
            [
                node,
                onnx.helper.make_node("Sub", ["image", "level"], ["one"]),
                onnx.helper.make_node("Neg", ["one"], ["zero"]),
                onnx.helper.make_node("Concat", ["zero", "one"], ["logits"], axis=1),
            ],
            "threshold",
            [onnx.helper.make_tensor_value_info("image", 1, ["N", 1, "H", "W"])],
            [onnx.helper.make_tensor_value_info("logits", 1, ["N", 2, "H", "W"])],
        )
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    ramp = np.repeat(np.float32([0.9, 0.6, 0.3, 0.1]), 5).reshape(1, 1, 4, 5)
    found = mask_agreement(*paths, [ramp, ramp], 2, Tiling((4, 5)))
    assert found == pytest.approx(2 * 10 / (10 + 15))  # two rows against three


def test_a_changed_weight_is_noticed(exported: Exported, tmp_path: Path) -> None:
    proto = onnx.load(exported.fp32)
    weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values[0] += 0.05
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(proto, tmp_path / "tampered.onnx")
    with pytest.raises(ParityError, match=r"tampered\.onnx at \(N,H,W\)=.* logits differ by"):
        check_parity(exported.model, tmp_path / "tampered.onnx", 1, TOLERANCE)
    with pytest.raises(ParityError, match=r"allowed 1e-12 \(export\.parity_tolerance\)"):
        check_parity(exported.model, exported.fp32, 1, 1e-12)


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
    odd = Elsewhere(exported.model, 47, change)
    with pytest.raises(ParityError, match=r"\(N,H,W\)=\(1, 33, 47\)"):
        check_parity(odd, exported.fp32, 1, TOLERANCE)


def test_two_exports_are_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    loggers = [logging.getLogger(), logging.getLogger("torch.onnx")]
    levels = [logger.level for logger in loggers]
    loggers[0].setLevel(logging.INFO)
    again, int8 = tmp_path / "again" / "model.onnx", tmp_path / "again.int8.onnx"
    export_onnx(copy.deepcopy(exported.model).train(), again, 1, 18, METADATA)
    assert again.read_bytes() == exported.fp32.read_bytes()
    quantize_int8(again, int8, iter(images(8)), {**METADATA, "int8": "QDQ"})
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
    with pytest.raises(ExportError, match="asked for opset 11, the exporter wrote 18"):
        export_onnx(Plain(1), tmp_path / "old.onnx", 1, 11, {})
    assert list(tmp_path.iterdir()) == []
    export_onnx(Plain(3), tmp_path / "new.onnx", 3, 20, {})
    proto = onnx.load(tmp_path / "new.onnx")
    assert [o.version for o in proto.opset_import] == [20]
    check_parity(Plain(3), tmp_path / "new.onnx", 3, 10.0)  # three channels pass through
