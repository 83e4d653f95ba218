"""Checkpoints: whole or not there, verified on reading, the same for any number of ranks.

One folder each, ``step-00000400`` or ``stage-1-broad``; ``best`` is a symbolic link to one of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medpsp.durable import sync
from medpsp.errors import CheckpointError

STATE, META, BEST = "state.pt", "meta.json", "best"
KEEP_LAST = 2


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where training stands.

    Attributes:
        step: Finished optimiser steps of the whole schedule.
        stage: Name of the stage that the last of them was in.
        best: Highest validation Dice so far.
        score: The last one.
        model: What the weights belong to.
        scored: Whether ``score`` is of this very step.
        bad: Steps without a finite gradient before this one, in a row.
        schedule: What gives a step number its meaning.
        content: Digest of the shards that it was trained on.
        judged: Digest of the validation slices that ``score`` is of; empty where it is not known.
    """

    step: int
    stage: str
    best: float
    score: float
    model: dict[str, Any]
    scored: bool = True
    bad: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    content: str = ""
    judged: str = ""


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Any], state: TrainState) -> Path:
    """Write ``folder/name/{state.pt, meta.json}``; a crash leaves it whole or not there.

    Only one process writes to a folder. What is in the way of the name is a damaged checkpoint:
    training starts from the newest whole one, so it writes higher steps only.

    Args:
        folder: Checkpoints of the run.
        name: ``step-00000400`` or ``stage-1-broad``.
        tensors: Model and optimiser state; loads with ``weights_only=True``.
        state: Goes into meta.json together with the SHA-256 of itself and state.pt.
    """
    target, partial = folder / name, folder / f".{name}.partial"
    for stale in folder.glob(".*.partial"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
        _write(partial / STATE, data)
        meta = asdict(state)
        meta["sha256"] = _digest(hashlib.sha256(data), meta)
        _write(partial / META, json.dumps(meta, indent=1).encode())
        sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def rewrite_state(path: Path, state: TrainState) -> None:
    """Change what a checkpoint says of itself; its tensors stay."""
    with (path / STATE).open("rb") as file:
        tensors = hashlib.file_digest(file, "sha256")
    meta = asdict(state)
    meta["sha256"] = _digest(tensors, meta)
    partial = path / f".{META}.partial"
    _write(partial, json.dumps(meta, indent=1).encode())
    partial.replace(path / META)
    sync(path)


def mark_best(path: Path) -> None:
    """Make ``best`` beside a checkpoint lead to it, in one rename."""
    link, fresh = path.with_name(BEST), path.with_name(f".{BEST}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(path.name)
    if link.is_dir() and not link.is_symlink():  # copied by something that follows links
        shutil.rmtree(link)
    fresh.replace(link)
    sync(path.parent)


def keep_as_best(path: Path) -> None:
    """Mark a checkpoint by the name of its step: that of a stage's end is written again where the
    stage is lengthened."""
    if not path.name.startswith("step-"):
        tensors, state = load_checkpoint(path, torch.device("cpu"))
        path = save_checkpoint(path.parent, f"step-{state.step:08d}", tensors, state)
    mark_best(path)


def prune(folder: Path, step: int) -> None:
    """Keep the last two step checkpoints, the best, and every stage's end.

    Args:
        folder: Checkpoints of the run.
        step: Last one done. What lies above it was left out as damaged, and does not count.
    """
    best = (folder / BEST).resolve()
    names = (f"step-{number:08d}" for number in _steps(folder) if number <= step)
    for path in [folder / name for name in names][:-KEEP_LAST]:
        if path.resolve() != best:
            partial = folder / f".{path.name}.partial"  # whole under its name, or not there
            path.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    found = (re.fullmatch(r"step-(\d{8})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def whole_checkpoints(folder: Path) -> tuple[dict[Path, TrainState], list[str]]:
    """Those that verify, and what is said of those that do not."""
    found: dict[Path, TrainState] = {}
    damaged: list[str] = []
    for path in sorted((*folder.glob("step-*"), *folder.glob("stage-*"))):
        try:
            found[path] = read_state(path)
        except CheckpointError as error:
            damaged.append(str(error))
    return found, damaged


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that verifies; None where there is none at all.

    Raises:
        CheckpointError: There are checkpoints, but none verifies.
    """
    found, damaged = whole_checkpoints(folder)
    if damaged and not found:
        raise CheckpointError(f"{damaged[0]}; delete {folder} to start anew")
    return newest_of(found)


def newest_of(found: dict[Path, TrainState]) -> Path | None:
    """Of the highest step; None of none."""
    return max(found, key=lambda path: (found[path].step, path.name), default=None)


def best_of(found: dict[Path, TrainState]) -> Path | None:
    """Of the highest score, of equal ones the later; None where none is scored."""
    scored = [path for path, state in found.items() if state.scored]
    return max(scored, key=lambda p: (found[p].score, found[p].step, p.name), default=None)


def read_state(path: Path) -> TrainState:
    """Verify a checkpoint and read its meta.json.

    Raises:
        CheckpointError: A file is missing or the SHA-256 of both does not match.
    """
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        with (path / STATE).open("rb") as file:
            tensors = hashlib.file_digest(file, "sha256")
        expected = meta.pop("sha256")
        found = _digest(tensors, meta)
        state = TrainState(**meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: unreadable ({type(error).__name__})") from None
    if found != expected:
        raise CheckpointError(f"checkpoint {path}: damaged, SHA-256 is not the one in {META}")
    return state


def load_checkpoint(path: Path, device: torch.device) -> tuple[dict[str, Any], TrainState]:
    """Verified tensors and state.

    Only tensors and plain values are read: a file that asks for anything else to be called is
    refused, whatever its SHA-256.

    Raises:
        CheckpointError: As `read_state`, or it holds something else than tensors and plain values.
    """
    state = read_state(path)
    try:
        tensors = torch.load(path / STATE, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {STATE} is not a file of tensors ({type(error).__name__}); it was "
            "not written by medpsp, so do not use it"
        ) from None
    return tensors, state


def _digest(tensors: hashlib._Hash, meta: dict[str, Any]) -> str:
    tensors.update(json.dumps(meta, sort_keys=True).encode())
    return tensors.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
