"""A plan on disk, so that the next run and other processes find it.

``plan.parquet`` beside the shards says which series has which slots, by pseudonym, so that the
next run leaves it there. The folder ``plan`` of ``data.index`` is private and holds all that a
shard task needs. A byte of it that is not what was written is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np

from medpsp.dataconfig import DataConfig
from medpsp.errors import ShardError
from medpsp.identity import fingerprint
from shards.index import file_sha256, write_bytes_durably
from shards.layout import FORMAT
from shards.partstore import private_folder
from shards.planfile import Gathered, Plan, meaning
from shards.sealed import SealError, read_sealed, sealed_bytes
from shards.seriesfile import SeriesFile
from shards.slots import PLAN, write_slots
from shards.spool import RowSpool, Span

FOLDER = "plan"
_STATE, _HEADS, _RECORDS, _ROWS = "plan.json", "heads.npy", "records", "rows"
_NOT_THE_PLAN = frozenset(
    {"workers", "memory_mib", "ray_address", "index", "key_file", "crosswalk"}
    | {"decode_seconds", "decode_memory_mib", "max_reject_fraction"}
)


def write_plan(
    plan: Plan, data: DataConfig, key: bytes, root: Path, unread: Iterable[str] = ()
) -> None:
    """Write ``plan.parquet``, durably, and with ``data.index`` all that `open_plan` needs.

    Args:
        plan: To write.
        data, key: That it was made with.
        root: Folder of the shards.
        unread: As for `write_slots`.

    Raises:
        OSError: It cannot be written.
    """
    write_slots(root / PLAN, plan.gathered.planned, meaning(data, key), unread)
    _write_state(plan, data, key, root)


def plan_folder(data: DataConfig) -> Path | None:
    """Folder for the private files of a plan that is being made; none without ``data.index``."""
    if data.index is None:
        return None
    folder = data.index / FOLDER
    private_folder(folder)
    (folder / _STATE).unlink(missing_ok=True)
    return folder


def new_files(folder: Path | None) -> tuple[SeriesFile, RowSpool]:
    """Empty files for `Gathered`; without names where there is no folder."""
    if folder is None:
        return SeriesFile(), RowSpool()
    return SeriesFile(folder / _RECORDS), RowSpool(folder / _ROWS)


def open_plan(data: DataConfig, key: bytes, root: Path) -> Plan:
    """The plan that another process made for the shards at ``root``, this configuration and key.

    Raises:
        ShardError: There is none, or it is of other shards, configuration or key, or damaged.
    """
    again = "run `medpsp shards` with `--step plan` first"
    if data.index is None:
        raise ShardError("data.index: not set, so there is no plan that was made before; set it")
    folder = data.index / FOLDER
    try:
        state = read_sealed(folder / _STATE)
        if state["identity"] != _identity(data, key):
            raise ShardError(f"data.index: the plan is of another configuration or key; {again}")
        if not (root / PLAN).is_file() or file_sha256(root / PLAN) != state["slots"]:
            raise ShardError(f"out: the plan in data.index is not of the shards at {root}; {again}")
        data_of_heads = (folder / _HEADS).read_bytes()
        if hashlib.sha256(data_of_heads).hexdigest() != state["heads"]:
            raise ShardError(f"data.index: the plan is not what was written; {again}")
        heads = np.load(BytesIO(data_of_heads), allow_pickle=False)
        planned = SeriesFile.reopen(folder / _RECORDS, heads, tuple(state["buckets"]))
        rows = RowSpool(folder / _ROWS, [Span(*span) for span in state["rows"]])
        return Plan(
            Gathered(planned=planned, rows=rows, objects=state["objects"]), data.shard_slices
        )
    except SealError:
        raise ShardError(f"data.index: the plan is not what was written; {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"data.index: no plan that can be read ({type(error).__name__}); {again}"
        ) from None


def _write_state(plan: Plan, data: DataConfig, key: bytes, root: Path) -> None:
    if data.index is None:
        return
    planned, folder, heads = plan.gathered.planned, data.index / FOLDER, BytesIO()
    planned.sync()
    np.save(heads, planned.heads, allow_pickle=False)
    write_bytes_durably(folder / _HEADS, heads.getvalue(), mode=0o600)
    state = {
        "identity": _identity(data, key),
        "slots": file_sha256(root / PLAN),
        "heads": hashlib.sha256(heads.getvalue()).hexdigest(),
        "objects": plan.gathered.objects,
        "buckets": planned.buckets,
        "rows": plan.gathered.rows.spans,
    }
    write_bytes_durably(folder / _STATE, sealed_bytes(state), mode=0o600)


def _identity(data: DataConfig, key: bytes) -> str:
    tree = data.model_dump(mode="json", exclude=set(_NOT_THE_PLAN))
    text = json.dumps([FORMAT, fingerprint(key), tree], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
