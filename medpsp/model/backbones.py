"""timm backbones as feature extractors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

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
        if not config.pretrained.is_file():
            raise ConfigError(f"model.pretrained {config.pretrained}: no such file")
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
