"""timm backbones as feature extractors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError

from medpsp.config import ModelConfig
from medpsp.errors import ConfigError


def build_backbone(config: ModelConfig) -> Any:
    """A backbone that returns its maps from fine to coarse.

    Weights: random for ``pretrained: false``, timm's download for ``true``, a local file of the
    whole timm model (.safetensors or .pth) for a path. Stems are summed to ``in_channels``.

    Returns:
        A timm ``FeatureListNet`` or alike with ``feature_info``.

    Raises:
        ConfigError: The weights cannot be had or do not fit.
    """
    extra: dict[str, Any] = {}
    if isinstance(config.pretrained, Path):
        _check_weights(config.pretrained, config.backbone)
        extra["pretrained_cfg_overlay"] = {"file": str(config.pretrained)}
    try:
        return timm.create_model(
            config.backbone,
            pretrained=bool(config.pretrained),
            features_only=True,
            output_stride=config.output_stride,
            in_chans=config.in_channels,
            **extra,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if not config.pretrained:
            raise
        raise ConfigError(
            f"model.pretrained {config.pretrained}: no weights for {config.backbone} "
            f"({type(error).__name__}); give a local file, or false for random weights"
        ) from None


def _check_weights(path: Path, backbone: str) -> None:
    """Whether a file holds every weight of a timm model.

    Asked beforehand, because timm loads the mobile nets with ``strict=False``: a file with other
    names would leave them at random without a word.

    Raises:
        ConfigError: No such file, not one of weights, or of another network.
    """
    if not path.is_file():
        raise ConfigError(f"model.pretrained {path}: no such file")
    unreadable = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError)
    try:
        state = timm.models.load_state_dict(str(path))
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
