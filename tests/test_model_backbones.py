"""Backbones: what of timm's models is built, and weights from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from medpsp.config import BACKBONES, ModelConfig
from medpsp.errors import ConfigError
from medpsp.model.backbones import build_backbone
from medpsp.model.psp import build_model

torch.set_num_threads(1)


def small(**changes: object) -> ModelConfig:
    return ModelConfig(**{"psp_channels": 16, "decoder_channels": 8, "aux": True, **changes})


def asleep(backbone: nn.Module) -> list[str]:
    """Scales that leave a branch out."""
    return [
        name
        for name, weight in backbone.named_parameters()
        if name.endswith(("gamma", "bn2.weight", "bn3.weight")) and weight.abs().max() < 1e-4
    ]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_random_backbones_have_no_branch_that_sleeps(backbone: str) -> None:
    """And those of timm have: ResNet18 and ConvNeXt."""
    config = small(backbone=backbone)
    usual = timm.create_model(backbone, features_only=True, in_chans=1)
    assert bool(asleep(usual)) == (backbone in ("resnet18", "convnext_tiny"))
    assert asleep(build_backbone(config)) == []


@pytest.mark.parametrize(
    ("backbone", "stride", "deepest"),
    [
        ("mobilenetv3_large_100", 8, "blocks.2.2."),
        ("mobilenetv3_large_100", 16, "blocks.4.1."),
        ("efficientnet_b0", 8, "blocks.2.1."),
        ("efficientnet_b0", 16, "blocks.4.2."),
        ("resnet18", 8, "layer2.1."),
        ("resnet18", 16, "layer3.1."),
        ("convnext_tiny", 8, "stages_1."),
        ("convnext_tiny", 16, "stages_2."),
    ],
)
def test_shallow_has_nothing_behind_its_last_map(backbone: str, stride: int, deepest: str) -> None:
    """Layers as timm counts them, from 0; all that is there takes part, and has timm's size."""
    found = dict(
        build_backbone(
            small(backbone=backbone, head="shallow", output_stride=stride)
        ).named_parameters()
    )
    refine = build_backbone(small(backbone=backbone, output_stride=stride)).named_parameters()
    assert [name for name, _ in refine] == list(found)
    full = dict(build_backbone(small(backbone=backbone, output_stride=32)).named_parameters())
    assert list(found) == list(full)[: len(found)]
    assert len(found) < len(full)
    assert list(found)[-1].startswith(deepest)
    assert not list(full)[len(found)].startswith(deepest)


def weights_kept(old: torch.Tensor, channels: int) -> torch.Tensor:
    """What timm makes of a stem of three colours."""
    if channels == 1:
        return old.sum(dim=1, keepdim=True)
    order = [i % 3 for i in range(channels)]
    return old[:, order] * 3 / channels


def weights_file(path: Path, backbone: str) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    state = timm.create_model(backbone).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path, state


@pytest.mark.parametrize(
    ("backbone", "suffix", "stem", "deep"),
    [
        ("mobilenetv3_large_100", ".safetensors", "conv_stem.weight", "blocks.6.0.conv.weight"),
        ("efficientnet_b0", ".pth", "conv_stem.weight", "blocks.6.0.conv_pwl.weight"),
        ("resnet18", ".pth", "conv1.weight", "layer4.1.conv2.weight"),
        ("convnext_tiny", ".safetensors", "stem.0.weight", "stages.3.blocks.2.mlp.fc2.weight"),
    ],
)
def test_weights_from_a_file(
    tmp_path: Path, backbone: str, suffix: str, stem: str, deep: str
) -> None:
    path, state = weights_file(tmp_path / f"w{suffix}", backbone)
    torch.manual_seed(6)
    whole = small(backbone=backbone, pretrained=path, output_stride=32)
    built = build_backbone(whole).state_dict()
    found = {name.replace("_", "."): tensor for name, tensor in built.items()}
    summed = state[stem].sum(dim=1, keepdim=True)  # a grey image gives what three equal ones gave
    torch.testing.assert_close(found[stem.replace("_", ".")], summed)
    assert torch.equal(found[deep.replace("_", ".")], state[deep])


def test_colour_takes_the_stem_as_it_is(tmp_path: Path) -> None:
    path, state = weights_file(tmp_path / "w.pth", "resnet18")
    config = small(backbone="resnet18", pretrained=path, in_channels=3)
    model = build_model(config, 2)
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], state["conv1.weight"])
    assert model.eval()(torch.rand(1, 3, 33, 47))[0].shape == (1, 2, 33, 47)


def test_weights_of_a_larger_sibling_are_refused(tmp_path: Path) -> None:
    path, _ = weights_file(tmp_path / "w.pth", "resnet34")  # it holds all names of resnet18
    with pytest.raises(ConfigError, match=r"are not of resnet18, the first: layer1\.2"):
        build_backbone(small(backbone="resnet18", pretrained=path))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    other, _ = weights_file(tmp_path / "resnet18.pth", "resnet18")
    unrelated = tmp_path / "unrelated.safetensors"  # a mobile net would load it and stay random
    save_file({"layer": torch.zeros(2)}, unrelated)
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "cut.pth").write_bytes(other.read_bytes()[:5000])
    expected = {
        "resnet18.pth": "weights of mobilenetv3_large_100 are not there, the first: conv_stem",
        "unrelated.safetensors": "weights of mobilenetv3_large_100 are not there",
        "list.pth": "not a file of weights",
        "text.pth": "not a file of weights",
        "empty.pth": "not a file of weights",
        "text.safetensors": "not a file of weights",
        "cut.pth": "not a file of weights",
        "none.pth": "no such file",
    }
    for name, text in expected.items():
        config = small(backbone="mobilenetv3_large_100", pretrained=tmp_path / name)
        with pytest.raises(ConfigError, match=text):
            build_backbone(config)
    _, state = weights_file(tmp_path / "right.pth", "mobilenetv3_large_100")
    torch.save({**state, "conv_stem.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "shape.pth")
    with pytest.raises(ConfigError, match="no weights for mobilenetv3_large_100"):
        build_backbone(small(backbone="mobilenetv3_large_100", pretrained=tmp_path / "shape.pth"))


@pytest.mark.parametrize("context", [0, 1, 2, 4])
@pytest.mark.parametrize("colours", [1, 3])
def test_stems_for_any_number_of_channels(tmp_path: Path, colours: int, context: int) -> None:
    """1, 3, 5, 9 and 3, 9, 15, 27 channels."""
    path, state = weights_file(tmp_path / "w.pth", "resnet18")
    config = small(backbone="resnet18", pretrained=path, in_channels=colours, context=context)
    assert config.channels == colours * (2 * context + 1)
    found = build_backbone(config).state_dict()["conv1.weight"]
    torch.testing.assert_close(found, weights_kept(state["conv1.weight"], config.channels))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_six_channels_see_equal_slices_as_three_did(tmp_path: Path, backbone: str) -> None:
    path, _ = weights_file(tmp_path / "w.pth", backbone)
    two_windows = [{"center": 40, "width": 400}, {"center": 0, "width": 80}]
    six = build_backbone(small(backbone=backbone, pretrained=path, windows=two_windows, context=1))
    one = build_backbone(small(backbone=backbone, pretrained=path))
    grey = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        expected, found = one.eval()(grey), six.eval()(grey.expand(-1, 6, -1, -1))
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "head", "strides"),
    [
        ("resnet10t", "refine", [2, 4, 8, 16]),
        ("mobilenetv3_small_050", "shallow", [2, 4, 8]),
        ("regnetx_002", "classic", [2, 4, 8, 8, 8]),
    ],
)
def test_any_other_timm_model(name: str, head: str, strides: list[int]) -> None:
    model = build_model(small(backbone=f"timm/{name}", head=head), 2)
    assert model.backbone.feature_info.reduction() == strides
    logits, aux = model(torch.rand(2, 1, 33, 47), torch.arange(2))
    (logits.mean() + aux.mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "head", "text"),
    [
        ("resnet81", "refine", r"model\.backbone timm/resnet81: timm .* has none; did you mean"),
        ("hf-hub:some/where", "refine", "has none"),
        ("vit_tiny_patch16_224", "refine", "no maps up to stride 16 for head refine"),
        ("swin_tiny_patch4_window7_224", "refine", "no maps up to stride 16"),
        ("xception41p", "shallow", "no maps"),
    ],
)
def test_timm_models_that_do_not_fit(name: str, head: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        build_backbone(small(backbone=f"timm/{name}", head=head))
    assert "\n" not in str(caught.value)
