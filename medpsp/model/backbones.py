"""timm backbones as feature extractors."""

from __future__ import annotations

import difflib
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from medpsp.config import ModelConfig
from medpsp.errors import ConfigError
from medpsp.modelconfig import BACKBONES, OTHER

ASLEEP = 1e-5
"""Scales up to this are a branch that does nothing yet."""
UNFIT = (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError)
"""What timm's models raise where they know no feature maps, no stride or no such image size."""


def build_backbone(config: ModelConfig) -> Any:
    """A backbone that returns its maps from fine to coarse.

    Weights: random for ``pretrained: false``, timm's download for ``true``, a local file of the
    whole timm model (.safetensors or .pth) for a path. A stem of 3 colours becomes one of 1 channel
    by its sum, one of n channels by repeating the colours, times 3 / n.

    Returns:
        A timm ``FeatureListNet`` or alike with ``feature_info``. Every parameter takes part in the
        last map: what timm builds behind it is dropped.

    Raises:
        ConfigError: The weights cannot be had or do not fit, or another timm model gives no maps
            of the strides that are asked for.
    """
    name = timm_name(config.backbone)
    extra: dict[str, Any] = {"in_chans": config.channels, **_strides(config, name)}
    if isinstance(config.pretrained, Path):
        _check_weights(config.pretrained, name)
        extra["pretrained_cfg_overlay"] = {"file": str(config.pretrained)}
    try:
        backbone = timm.create_model(
            name, pretrained=bool(config.pretrained), features_only=True, **extra
        )
    except (OSError, *UNFIT) as error:
        if not config.pretrained:
            raise _unfit(config, type(error).__name__) from error
        raise ConfigError(
            f"model.pretrained {config.pretrained}: no weights for {name} "
            f"({type(error).__name__}); give a local file, or false for random weights"
        ) from None
    _cut(backbone)
    if not config.pretrained:
        wake(backbone)
    if config.backbone not in BACKBONES:
        _check_maps(backbone, config)
    return backbone


def wake(backbone: nn.Module) -> None:
    """Let residual branches that timm starts at nothing take part from the first step.

    Weights of 0 in the last norm of a block (Goyal et al. 2017) and layer scales of 1e-6 (Touvron
    et al. 2021) are for long schedules. In our short ones from random weights they cost much:
    ResNet18, `shallow`, cardiac MR at 96 x 96, 200 steps: Dice 0.48 with them, 0.78 without.
    """
    for module in backbone.modules():
        for name, weight in module.named_parameters(recurse=False):
            scale = name == "gamma" or (name == "weight" and isinstance(module, _BatchNorm))
            if scale and float(weight.detach().abs().max()) <= ASLEEP:
                nn.init.ones_(weight)


def timm_name(backbone: str) -> str:
    """The name that timm knows, without our ``timm/``.

    Raises:
        ConfigError: It knows none.
    """
    name = backbone.removeprefix(OTHER)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean '{OTHER}{near[0]}'?" if near else ""
        raise ConfigError(
            f"model.backbone {backbone}: timm {timm.__version__} has none{hint}; "
            "`timm.list_models()` names all"
        )
    return name


def _strides(config: ModelConfig, name: str) -> dict[str, Any]:
    """Arguments of timm for the output stride: dilation for ``classic``, else fewer maps."""
    stride = config.output_stride
    if stride == 32:
        return {}  # not all models know of strides
    if config.head == "classic":
        return {"output_stride": stride}
    try:
        with torch.device("meta"):
            info = timm.create_model(name, features_only=True).feature_info
    except UNFIT as error:
        raise _unfit(config, type(error).__name__) from None
    return {"out_indices": tuple(range(sum(s <= stride for s in info.reduction())))}


def _cut(backbone: Any) -> None:
    """Drop what lies behind the last map; timm itself does, except in its mobile nets."""
    last = backbone.feature_info.get_dicts()[-1]
    if "stage" in last:
        backbone.blocks = backbone.blocks[: last["stage"]]


def _check_maps(backbone: Any, config: ModelConfig) -> None:
    """Whether the maps of a model that no test knows have the size that its description says.

    Raises:
        ConfigError: They have not, or a parameter takes part in none, which would stop DDP.
    """
    info, size = backbone.feature_info, 64
    training = backbone.training
    backbone.eval()  # keeps BatchNorm statistics as they are
    try:
        maps = backbone(torch.zeros(1, config.channels, size, size))
        maps[-1].sum().backward()
    except UNFIT as error:
        raise _unfit(config, f"{type(error).__name__} at {size} x {size} pixels") from None
    unused = [n for n, p in backbone.named_parameters() if p.grad is None]
    backbone.zero_grad(set_to_none=True)
    backbone.train(training)
    found = [tuple(m.shape[1:]) for m in maps]
    strides = info.reduction()
    said = [(c, size // s, size // s) for c, s in zip(info.channels(), strides, strict=True)]
    kinds = 2 if config.head == "refine" else 1  # it needs a finer one
    fits = strides[-1] == config.output_stride and len(set(strides)) >= kinds
    if found != said or len(found) < 2 or not fits:
        raise _unfit(config, f"strides {strides}, maps {found} of {size} x {size}")
    if unused:
        raise _unfit(config, f"{len(unused)} parameters are in no map, the first: {unused[0]}")


def _unfit(config: ModelConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"model.backbone {config.backbone}: no maps up to stride {config.output_stride} for head "
        f"{config.head} ({reason}); take another output_stride, head or model"
    )


def _check_weights(path: Path, backbone: str) -> None:
    """Whether a file holds every weight of a timm model.

    Asked beforehand, because timm loads the mobile nets with ``strict=False``: a file with other
    names would leave them at random without a word.

    Raises:
        ConfigError: No such file, not one of weights, or of another network.
    """
    if not path.is_file():
        raise ConfigError(
            f"model.pretrained {path}: no such file; give a .safetensors or .pth of timm's "
            f"{backbone}"
        )
    unreadable = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError)
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except (*unreadable, pickle.UnpicklingError, SafetensorError) as error:
        raise ConfigError(
            f"model.pretrained {path}: not a file of weights ({type(error).__name__}); give a "
            f".safetensors or .pth of timm's {backbone}"
        ) from None
    with torch.device("meta"):
        full = timm.create_model(backbone)
    head = full.pretrained_cfg["classifier"]
    needed = [n for n in full.state_dict() if not n.endswith("num_batches_tracked")]
    missing = [n for n in needed if n not in state and not n.startswith(head)]
    if missing:
        raise ConfigError(
            f"model.pretrained {path}: {len(missing)} weights of {backbone} are not there, the "
            f"first: {missing[0]}; give a .safetensors or .pth of timm's {backbone}"
        )
    known = full.state_dict()
    if more := [n for n in state if n not in known and not n.startswith(head)]:
        raise ConfigError(
            f"model.pretrained {path}: {len(more)} weights in it are not of {backbone}, the first: "
            f"{more[0]} (a larger network?); give a .safetensors or .pth of timm's {backbone}"
        )
