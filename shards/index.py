"""The index (one row a slice, Parquet) and the manifest (one JSON file) of a set of shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import ShardError
from medpsp.types import Split, Window
from shards.layout import FORMAT

MANIFEST, INDEX, REJECTS = "manifest.json", "index.parquet", "rejects.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRow:
    """One slice of the index. No field identifies a person.

    Attributes:
        bucket, slot: Where the slice lies.
        patient, series: Pseudonyms.
        slice_index: Position along the normal within its series, from 0.
        z_mm: Distance along the normal, mm; NaN without geometry.
        spacing: (between rows, between columns, between slices), mm; NaN where unknown.
        affine: 16 numbers, rows first, index (column, row, slice) of the series to mm LPS.
        window_center, window_width: What the network is shown, modality units.
        voi_center, voi_width: What the file recorded (0028,1050), (0028,1051); NaN if absent.
        histogram: Pixels of each class, then of ignore.
    """

    bucket: str
    slot: int
    patient: str
    series: str
    slice_index: int
    modality: str
    photometric: str
    z_mm: float
    spacing: tuple[float, float, float]
    affine: tuple[float, ...]
    window_center: float
    window_width: float
    voi_center: float
    voi_width: float
    split: Split
    order: float
    labelled: bool
    histogram: tuple[int, ...]
    file_id: str

    @property
    def window(self) -> Window:
        """The window that the network is shown."""
        return Window(center=self.window_center, width=self.window_width)

    @property
    def inverted(self) -> bool:
        """True where low values are bright."""
        return self.photometric == "MONOCHROME1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the shards hold, how they were made, and what became of every object found.

    Attributes:
        shards: Name, digest of the plan and SHA-256 of the files of each.
        tables: SHA-256 of index, reject table and every zarr.json.
        settings: `layout.data_settings` of the configuration.
        data_id: Equal only where no patient can be in another split and no label or window can
            differ: a checkpoint belongs to one.
    """

    version: int
    tool: str
    classes: tuple[str, ...]
    key_fingerprint: str
    settings: dict[str, Any]
    data_id: str
    shards: tuple[dict[str, Any], ...]
    counts: dict[str, int]
    codes: dict[str, int]
    tables: dict[str, str]


def write_bytes_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write to a temporary sibling, fsync, rename, fsync the folder: whole or not at all.

    Args:
        path: Folders above it are made.
        data: All of it.
        mode: Of the file from the moment it exists, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_table(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as Parquet; an empty table keeps its columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({c: [row[c] for row in rows] for c in columns})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes_durably(path, sink.getvalue().to_pybytes())


def read_index(root: Path, split: Split | None = None) -> tuple[SliceRow, ...]:
    """Rows of the index in the order of (bucket, slot), optionally of one split.

    Raises:
        ShardError: No index at ``root``, or not readable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / INDEX
    try:
        rows = pq.read_table(path).to_pylist()
        lists = ("spacing", "affine", "histogram")
        return tuple(
            SliceRow(**{**row, **{key: tuple(row[key]) for key in lists}})
            for row in rows
            if split is None or row["split"] == split
        )
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise ShardError(
            f"shards {root}: {INDEX} cannot be read ({type(error).__name__}); "
            "run `medpsp shards` first"
        ) from None


def read_manifest(root: Path) -> Manifest:
    """Read the manifest.

    Raises:
        ShardError: Missing, damaged, or of another format.
    """
    path = root / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"shards {root}: no {MANIFEST}; run `medpsp shards` to its end first"
        ) from None
    except (OSError, ValueError) as error:
        raise ShardError(f"shards {root}: {MANIFEST} unreadable ({type(error).__name__})") from None
    if not isinstance(tree, dict) or tree.get("version") != FORMAT:
        found = tree.get("version") if isinstance(tree, dict) else "none"
        raise ShardError(f"shards {root}: manifest format {found}, expected {FORMAT}")
    try:
        lists = {key: tuple(tree[key]) for key in ("classes", "shards")}
        return Manifest(**{**tree, **lists})
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"shards {root}: {MANIFEST} lacks fields ({type(error).__name__}); "
            "run `medpsp shards` again"
        ) from None


def class_pixels(rows: Sequence[SliceRow], classes: int) -> NDArray[np.int64]:
    """(K,) pixels of each class over the rows, ignore left out."""
    total = np.zeros(classes, dtype=np.int64)
    for row in rows:
        total += np.array(row.histogram[:classes], dtype=np.int64)
    return total


def reject_fraction(manifest: Manifest) -> float:
    """Share of quarantined objects among kept and quarantined ones."""
    bad = manifest.counts["quarantined"]
    return bad / max(1, bad + manifest.counts["kept"])
