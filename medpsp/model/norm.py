"""Normalisation layers of a finished network: BatchNorm, GroupNorm or SyncBatchNorm."""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from torch import nn

from medpsp.config import ModelConfig
from medpsp.errors import ConfigError

MOST_GROUPS = 32
"""Wu & He 2018, table 3."""
LEAST_CHANNELS = 4
"""Of a group: one channel alone at one pixel has no variance, and few have a poor one."""

log = logging.getLogger("medpsp")


def set_norm(model: nn.Module, config: ModelConfig) -> None:
    """Put the norm of ``config`` in place of every BatchNorm of a network; others stay.

    Scale and shift are kept. With ``group`` the statistics are lost; those of a pretrained
    ``model.backbone`` are worth a warning.
    """
    if config.norm == "sync":
        convert_sync_batchnorm(model)  # timm's, since torch's loses the activations of timm
    if config.norm == "group":
        lost = any(isinstance(m, nn.BatchNorm2d) for m in model.get_submodule("backbone").modules())
        if config.pretrained and lost:
            log.warning(
                "model.norm group: the pretrained statistics of %s are not used; expect a slower "
                "start than with batch",
                config.backbone,
            )
        _replace(model)


def check_device(config: ModelConfig, device: torch.device) -> None:
    """Whether the norm can be trained on a device.

    Raises:
        ConfigError: ``sync`` away from CUDA.
    """
    if config.norm == "sync" and device.type != "cuda":
        raise ConfigError(
            f"model.norm sync: needs CUDA, training runs on {device.type}; take group or batch"
        )


def count_groups(channels: int) -> int:
    """The most groups of equal size, at most 32, of 4 channels or more; 1 where none divide."""
    most = min(MOST_GROUPS, channels // LEAST_CHANNELS)
    return max((g for g in range(1, most + 1) if channels % g == 0), default=1)


def _replace(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(parent, name, _group_norm(child))
        else:
            _replace(child)


def _group_norm(batch: nn.BatchNorm2d) -> nn.Module:
    channels = batch.num_features
    groups = count_groups(channels)
    new: Any
    if isinstance(batch, BatchNormAct2d):  # timm's mobile nets: the activation belongs to the norm
        new = GroupNormAct(channels, groups, eps=batch.eps)
        new.drop, new.act = batch.drop, batch.act
    else:
        new = nn.GroupNorm(groups, channels, eps=batch.eps)
    new.weight, new.bias = batch.weight, batch.bias
    return new  # type: ignore[no-any-return]
