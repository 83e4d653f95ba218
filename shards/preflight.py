"""What must hold before a conversion begins: places that do not overlap, and the means for it."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from pathlib import Path

from medpsp.dataconfig import DataConfig
from medpsp.errors import ConfigError, ShardError, Unreachable
from shards.bucket import is_marked
from shards.commit import COMMITS
from shards.index import MANIFEST
from shards.sealed import claims_seal
from shards.slots import PLAN, is_plan

_CROSSWALK = re.compile(rb"[0-9a-f]{16}\t")
WORKER_MIB = 448
"""Memory of a shard task besides what its decoder may allocate: a Ray worker (230 MiB measured) and
the imports of its sandbox (150 MiB)."""


def require_places(data: DataConfig, root: Path) -> None:
    """Nothing of ours into the archive, where it would be scanned; nothing of theirs into ours.

    What lies in the folder of the shards and is in no plan is deleted.

    Args:
        data: Of the configuration.
        root: Folder of the shards; it need not exist.

    Raises:
        ConfigError: Two places overlap, one is taken by something else, or the labels are missing.
    """
    archive, shards = data.archive.resolve(), root.resolve()
    if data.source == "dicom" and shards.is_relative_to(archive):
        raise ConfigError(f"out: {root} lies inside data.archive; take a folder outside it")
    for name in ("archive", "labels", "key_file"):
        place = getattr(data, name)
        if place and place.resolve().is_relative_to(shards):
            raise ConfigError(f"data.{name} {place}: lies inside the shards; move it out of {root}")
    if root.is_dir() and _is_strange(root):
        raise ConfigError(
            f"out: {root} holds something that is no shards of medpsp; take an empty folder"
        )
    if data.source == "dicom" and data.labels and not data.labels.is_dir():
        raise ConfigError(f"data.labels {data.labels}: no such folder")
    _require_labels_apart(data, shards)
    if data.source == "dicom" and data.labels and not any(data.labels.iterdir()):
        raise ConfigError(f"data.labels {data.labels}: an empty folder; is it mounted?")
    _require_private_places(data, shards)
    if data.crosswalk:
        _require_crosswalk(data.crosswalk, data.key_file)


def _is_strange(root: Path) -> bool:
    """Whether there is something in a folder where medpsp never wrote."""
    names = {path.name for path in root.iterdir()}
    if all(name[0] == "." and name.endswith(".partial") for name in names):
        return False
    return not (is_marked(root) or _has_manifest(root) or is_plan(root / PLAN) or _has_commit(root))


def _has_manifest(root: Path) -> bool:
    """One of ours, of any version, whole or not."""
    data = _bytes(root / MANIFEST)
    try:
        tree = json.loads(data)
    except ValueError:
        return claims_seal(data)
    return claims_seal(data) or (isinstance(tree, dict) and {"version", "classes"} <= tree.keys())


def _has_commit(root: Path) -> bool:
    return any(claims_seal(_bytes(path)) for path in (root / COMMITS).glob("*.json"))


def _bytes(path: Path) -> bytes:
    """Of a regular file; empty where there is none that can be read."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""


def _require_labels_apart(data: DataConfig, shards: Path) -> None:
    """Label objects are scanned, so their folder holds no other objects."""
    if data.source != "dicom" or data.labels is None or data.label_format == "nifti":
        return
    labels, archive = data.labels.resolve(), data.archive.resolve()
    if shards.is_relative_to(labels):
        raise ConfigError(f"out: {shards} lies inside data.labels; take a folder outside it")
    if archive != labels and archive.is_relative_to(labels):
        raise ConfigError(
            f"data.labels {data.labels}: data.archive lies inside it, and all of it would be read "
            "twice; give the same folder for both, or one that holds the labels only"
        )


def _require_crosswalk(path: Path, key_file: Path | None) -> None:
    """Nothing but an older crosswalk is written over."""
    if path.is_dir():
        raise ConfigError(f"data.crosswalk {path}: a folder, expected a file to write")
    same = key_file and key_file.exists() and path.exists() and path.samefile(key_file)
    if same:
        raise ConfigError(f"data.crosswalk {path}: is data.key_file; take another file")
    if not path.exists():
        return
    if not path.is_file():
        raise ConfigError(f"data.crosswalk {path}: no regular file; take another path")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConfigError(f"data.crosswalk {path}: cannot be read ({error.strerror})") from None
    if not _CROSSWALK.match(head):
        raise ConfigError(
            f"data.crosswalk {path}: a file that is no crosswalk is there, and would be written "
            "over; take another path"
        )


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


def no_ray(error: Exception) -> ShardError:
    """The error of a Ray that does not start on this machine."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return ShardError(
        f"ray: does not start here ({type(error).__name__}); its files go to {folder}, which must "
        f"be writable, have some room (ulimit -f, too) and a short path ({len(folder)} characters; "
        "a socket below it has 107 in all); set RAY_TMPDIR to another folder"
    )


def task_error(name: str, error: Exception) -> ShardError:
    """Why the task of a shard failed: the kind of error alone, where its words may hold paths."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, Unreachable):
        return Unreachable(f"shard {name}: {cause}")
    said = f"worker failed ({type(cause).__name__})"
    if isinstance(cause, OSError):
        said = os.strerror(cause.errno) if cause.errno else "I/O error"
    return ShardError(f"shard {name}: {said}; mend it and run again")
