"""What evaluation and export start from: labelled rows and the best network of a run."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.errors import CheckpointError, ConfigError, ShardError

if TYPE_CHECKING:
    from medpsp.model.psp import PSPNet
    from shards.index import Manifest, SliceRow


BY_CASE, POOLED = "Dice, mean of cases", "Dice, pooled over voxels"
"""The two Dice of `launch.scores`, wherever one is shown; the first one is the headline."""
NO_BETTER = "no better since, so more steps would not help; more patients or augmentation may"
FEW_PATIENTS = 10
"""Below, a percentile interval is known to be too narrow."""
ENOUGH = 100
"""Steps from which on a network has begun to learn at all."""


def early(best: int, last: int) -> bool:
    """Whether validation was best in the first half of the steps, and fell behind in the second."""
    return last >= ENOUGH and best <= last // 2


def labelled_rows(config: Config) -> tuple[SliceRow, ...]:
    """Labelled rows of the index, which fit the configuration.

    Raises:
        ConfigError: Some are in colour, and the network takes grey only.
        ShardError: The shards were made with other classes, or nothing is labelled.
    """
    from shards.index import read_index, read_manifest

    require_fit(config, read_manifest(config.shards))
    rows = tuple(row for row in read_index(config.shards) if row.labelled)
    if not rows:
        raise ShardError(f"shards {config.shards}: no labelled slice; set data.labels")
    colour = sum(row.bucket.endswith("_uint8") for row in rows)
    if colour and config.model.in_channels == 1:
        raise ConfigError(
            f"model.in_channels 1: {colour} of {len(rows)} labelled slices are in colour; set "
            "model.in_channels=3 (grey slices are then repeated)"
        )
    return rows


def require_fit(config: Config, manifest: Manifest) -> None:
    """Shards must have been made with the settings that their readers have.

    Raises:
        ShardError: They were not.
    """
    from shards.layout import changed_settings

    if changed := changed_settings(config.data, manifest.settings):
        raise ShardError(
            f"shards {config.shards}: made with other {', '.join(changed)}; run `medpsp shards` "
            "again, or set it back"
        )


def load_trained(config: Config) -> tuple[PSPNet, int]:
    """The best network of a run, and its step.

    Raises:
        CheckpointError: Not trained yet, or trained with another network.
    """
    path = RunDir(config.out).checkpoints / "best"
    if not path.is_dir():  # said before torch takes its seconds to import
        raise CheckpointError(
            f"checkpoint {path}: not there; run `medpsp train` first, which also finds the best "
            "one that is left"
        )
    import torch

    from medpsp.model.psp import build_model
    from medpsp.train.checkpoint import load_checkpoint
    from medpsp.train.ema import scored_weights
    from medpsp.train.same import anew, other_network
    from shards.index import read_manifest

    try:
        tensors, state = load_checkpoint(path, torch.device("cpu"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; `medpsp train` goes on from the newest whole one and marks the best one left"
        ) from None
    if changes := other_network(state.model, config, read_manifest(config.shards).data_id):
        raise CheckpointError(
            f"checkpoint {path}: {'; '.join(changes)}; set it back, or {anew(path)}"
        )
    model = build_model(config.model.untrained, len(config.data.classes))
    model.load_state_dict(scored_weights(tensors))
    return model.eval(), state.step


def weights_digest(model: PSPNet) -> str:
    """SHA-256 of all weights and statistics: says whether scores and files are of one network."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.cpu().numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def number(value: float) -> float | None:
    """A float for JSON, to four digits: NaN, where a class occurs nowhere, becomes null."""
    return None if np.isnan(value) else round(float(value), 4)


def shown(value: float | None) -> str:
    """Three digits, or n/a."""
    return "n/a" if value is None else f"{value:.3f}"
