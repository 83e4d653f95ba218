"""What must hold before a conversion begins: places that do not overlap, and the means for it."""

from __future__ import annotations

import socket
from pathlib import Path

from medpsp.dataconfig import DataConfig
from medpsp.errors import ConfigError

WORKER_MIB = 448
"""Memory of a shard task besides what its decoder may allocate: a Ray worker (230 MiB measured) and
the imports of its sandbox (150 MiB)."""


def require_places(data: DataConfig, root: Path) -> None:
    """Nothing of ours into the archive, where it would be scanned; nothing of theirs into ours.

    What lies in the folder of the shards and is in no plan is deleted.
    """
    archive, shards = data.archive.resolve(), root.resolve()
    if data.source == "dicom" and shards.is_relative_to(archive):
        raise ConfigError(f"out: {root} lies inside data.archive; take a folder outside it")
    for name in ("archive", "labels", "key_file"):
        place = getattr(data, name)
        if place and place.resolve().is_relative_to(shards):
            raise ConfigError(f"data.{name} {place}: lies inside the shards; move it out of {root}")
    if root.is_dir() and any(root.iterdir()) and not (root / "zarr.json").is_file():
        raise ConfigError(
            f"out: {root} holds something that is no shards of medpsp; take an empty folder"
        )
    if data.source == "dicom" and data.labels and not data.labels.is_dir():
        raise ConfigError(f"data.labels {data.labels}: no such folder")
    if data.crosswalk and data.crosswalk.is_dir():
        raise ConfigError(f"data.crosswalk {data.crosswalk}: a folder, expected a file to write")
    _require_private_places(data, shards)


def _require_private_places(data: DataConfig, shards: Path) -> None:
    """What holds real identifiers lies in no folder that is scanned, swept or handed on."""
    outside = {"the shards": shards, "data.archive": data.archive.resolve()}
    if data.labels:
        outside["data.labels"] = data.labels.resolve()
    for name in ("crosswalk", "index"):
        place = getattr(data, name)
        for where, folder in outside.items():
            if place and place.resolve().is_relative_to(folder):
                raise ConfigError(f"data.{name} {place}: lies inside {where}; take a path outside")
    if data.index and data.index.exists() and not data.index.is_dir():
        raise ConfigError(f"data.index {data.index}: a file, expected a folder")
    if data.index and data.index.resolve() == shards.parent:
        raise ConfigError(f"data.index {data.index}: is `out`; take a folder of its own")


def require_means(data: DataConfig) -> tuple[int, int]:
    """Memory of a shard task and of all of a machine, MiB.

    Raises:
        ConfigError: The first is more, or nobody listens at the address of the cluster: Ray itself
            would wait for minutes.
    """
    need = data.decode_memory_mib + WORKER_MIB
    budget = data.memory_mib or data.workers * need
    if budget < need:
        raise ConfigError(
            f"data.memory_mib {budget}: one shard task takes up to {need}, of which "
            f"data.decode_memory_mib is {data.decode_memory_mib}; raise the first or lower the last"
        )
    host, _, port = (data.ray_address or "").rpartition(":")
    if data.ray_address and data.ray_address != "auto":
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError) as error:
            raise no_cluster(data, error) from None
    return need, budget


def no_cluster(data: DataConfig, error: Exception) -> ConfigError:
    """The error of an address where no Ray answers."""
    return ConfigError(
        f"data.ray_address {data.ray_address}: no Ray cluster answers there "
        f"({type(error).__name__}); expected `auto` or host:port of one that `ray start --head` "
        "started, or leave it out"
    )
