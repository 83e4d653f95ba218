"""Checkpoints: whole or not there, verified on reading, the same for any number of ranks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medpsp.errors import CheckpointError

STATE, META = "state.pt", "meta.json"
KEEP_LAST = 2


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where training stands. ``step`` counts finished optimiser steps of the whole schedule."""

    step: int
    stage: str
    best: float
    score: float
    model: dict[str, Any]


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Any], state: TrainState) -> Path:
    """Write ``folder/name/{state.pt, meta.json}``; a crash leaves the old one or the new one.

    Args:
        folder: Checkpoints of the run.
        name: ``step-00000400``, ``best`` or ``stage-full``.
        tensors: Model and optimiser state; loads with ``weights_only=True``.
        state: Goes into meta.json together with the SHA-256 of state.pt.
    """
    target, partial = folder / name, folder / f".{name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
        _write(partial / STATE, data)
        meta = {**asdict(state), "sha256": hashlib.sha256(data).hexdigest()}
        _write(partial / META, json.dumps(meta, indent=1).encode())
        _sync(partial)
        old = folder / f".{name}.{os.getpid()}.old"
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def prune(folder: Path) -> None:
    """Keep the last two step checkpoints, and every named one."""
    for path in sorted(folder.glob("step-*"))[:-KEEP_LAST]:
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that verifies; None where there is none at all.

    Raises:
        CheckpointError: There are checkpoints, but none verifies.
    """
    found = []
    damaged = []
    for path in sorted(p for p in folder.glob("*") if not p.name.startswith(".")):
        try:
            found.append((read_state(path).step, path.name == "best", path))
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged and not found:
        raise CheckpointError(f"{damaged[0]}; delete {folder} to start anew")
    # at one step the named ones hold the same tensors as step-*; `best` comes last all the same
    return max(found, key=lambda item: (item[0], not item[1]))[2] if found else None


def read_state(path: Path) -> TrainState:
    """Verify a checkpoint and read its meta.json.

    Raises:
        CheckpointError: A file is missing or the SHA-256 does not match.
    """
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        with (path / STATE).open("rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
        expected = meta.pop("sha256")
        state = TrainState(**meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: unreadable ({type(error).__name__})") from None
    if sha != expected:
        raise CheckpointError(f"checkpoint {path}: SHA-256 of {STATE} differs from {META}")
    return state


def load_checkpoint(path: Path, device: torch.device) -> tuple[dict[str, Any], TrainState]:
    """Verified tensors and state.

    Raises:
        CheckpointError: As `read_state`.
    """
    state = read_state(path)
    tensors = torch.load(path / STATE, map_location=device, weights_only=True)
    return tensors, state


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
