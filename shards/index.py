"""The index (one row a slice, Parquet) and the manifest (one JSON file) of a set of shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.durable import sync
from medpsp.errors import ShardError
from medpsp.types import Split, VoiFunction, Window
from shards.layout import FORMAT
from shards.sealed import SealError, claims_seal, is_sealed, sealed_bytes

MANIFEST, INDEX, OBJECTS = "manifest.json", "index.parquet", "objects.parquet"
SHARDS = "shards.parquet"
REPORT = "report.html"
_REPAIR = "run `medpsp check --repair`"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRow:
    """One slice of the index. No field identifies a person.

    Attributes:
        bucket, slot: Where the slice lies.
        patient, series: Pseudonyms.
        slice_index: Place on the regular grid of its series, from 0; the affine counts in it.
        modality: (0008,0060), or IMAGE8 and OT of plain images.
        photometric: (0028,0004); MONOCHROME1 also where PresentationLUTShape says so.
        z_mm: Distance along the normal, mm; NaN without geometry.
        spacing: (between rows, between columns, between slices), mm; NaN where unknown.
        spacing_source: Trust of the first two; see `SliceRef.pixel_spacing`.
        affine: 16 numbers, rows first, index (column, row, slice) of the series to mm LPS.
        window_center, window_width, window_function: What the network is shown, modality units.
        voi_center, voi_width, voi_function: What the file recorded (0028,1050), (0028,1051),
            (0028,1056); NaN and empty if absent.
        order: Keyed hash of the patient in [0, 1); stages take patients below their fraction.
        labelled: False where nothing says what is what: the label is all 255.
        histogram: Pixels of each class, then of ignore.
        file_id, frame: Pseudonym of the object, frame within it.
        flags: Codes of what is unusual about slice or series.
        padding: Share of the pixels that hold PixelPaddingValue.
        study_day: Day of the study, moved by a keyed offset of the patient; -1 unless asked for.
        manufacturer, body_part: Of a closed vocabulary, or empty.
        crc32c: Of the modality values as little-endian bytes: equal slices have equal ones.
        dhash: `dhash.difference_hash` of them: near to that of a copy in other grey values.
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
    frame: int = 0
    window_function: VoiFunction = "LINEAR_EXACT"
    voi_function: str = ""
    spacing_source: str = ""
    flags: tuple[str, ...] = ()
    padding: float = 0.0
    study_day: int = -1
    manufacturer: str = ""
    body_part: str = ""
    crc32c: int = 0
    dhash: str = ""

    @property
    def window(self) -> Window:
        """The window that the network is shown."""
        return Window(
            center=self.window_center, width=self.window_width, function=self.window_function
        )

    @property
    def inverted(self) -> bool:
        """True where low values are bright."""
        return self.photometric == "MONOCHROME1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRow:
    """One object of the archive: a file, or a member of a zip or tar file.

    Attributes:
        status: kept if any of its frames is.
        code: Why it, or the first of its frames that is not, is not kept; empty if all are.
        frames, kept: Number of frames that the scan saw, and that are in the shards.
    """

    file_id: str
    status: str
    code: str
    detail: str
    frames: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the shards hold, how they were made, and what became of every object found.

    Attributes:
        shards: Number of shards; `SHARDS` has their files.
        tables: SHA-256 of every table and every zarr.json.
        slices: Rows of the index.
        torn: Kept objects that lost frames.
        counts: Objects by status: kept, skipped, quarantined, duplicate.
        codes: Objects by reason code, also of kept ones that lost frames.
        deid: How the shards were de-identified, in the terms of PS3.15 E.
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
    shards: int
    slices: int
    torn: int
    counts: dict[str, int]
    codes: dict[str, int]
    deid: dict[str, Any]
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
    sync(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_objects(root: Path) -> list[ObjectRow]:
    """Rows of the object table, in the order of ``file_id``.

    Raises:
        ShardError: No such table at ``root``, or not readable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [ObjectRow(**row) for row in pq.read_table(root / OBJECTS).to_pylist()]
    except (OSError, pa.ArrowException, TypeError) as error:
        raise ShardError(
            f"shards {root}: {OBJECTS} cannot be read ({type(error).__name__}); "
            "run `medpsp shards` first"
        ) from None


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
        lists = ("spacing", "affine", "histogram", "flags")
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


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Put it in place, durably: JSON for people, sealed."""
    write_bytes_durably(root / MANIFEST, sealed_bytes(asdict(manifest), indent=1))


def read_manifest(root: Path) -> Manifest:
    """Read the manifest.

    Raises:
        ShardError: Missing or of another format; `SealError` where it is damaged.
    """
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(
            f"shards {root}: no {MANIFEST}; run `medpsp shards` to its end first, or try a "
            "setting on the shards of another run with `medpsp sweep`"
        ) from None
    except OSError as error:
        raise ShardError(f"shards {root}: {MANIFEST} unreadable ({type(error).__name__})") from None
    try:
        tree = json.loads(data)
    except ValueError as error:
        kind = type(error).__name__
        raise SealError(f"shards {root}: {MANIFEST} unreadable ({kind}); {_REPAIR}") from None
    found = tree.get("version") if isinstance(tree, dict) else "none"
    other = (
        f"shards {root}: manifest format {found}, expected {FORMAT}; "
        "`medpsp shards` converts them anew"
    )
    if found != FORMAT and not claims_seal(data):
        raise ShardError(other)
    if not is_sealed(data):
        raise SealError(f"shards {root}: {MANIFEST} is not what was written; {_REPAIR}")
    if found != FORMAT:
        raise ShardError(other)
    del tree["sha256"]
    try:
        return Manifest(**{**tree, "classes": tuple(tree["classes"])})
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"shards {root}: {MANIFEST} lacks fields ({type(error).__name__}); "
            "run `medpsp shards` again"
        ) from None


def count_slices(root: Path) -> int:
    """How many slices there are, for a progress bar; 0 where the manifest is damaged.

    Raises:
        ShardError: No manifest, or one of another format.
    """
    try:
        return read_manifest(root).slices
    except SealError:
        return 0


def class_pixels(rows: Sequence[SliceRow], classes: int) -> NDArray[np.int64]:
    """(K,) pixels of each class over the rows, ignore left out."""
    total = np.zeros(classes, dtype=np.int64)
    for row in rows:
        total += np.array(row.histogram[:classes], dtype=np.int64)
    return total


def reject_fraction(manifest: Manifest) -> float:
    """Share of objects that are quarantined or lost frames, among those and the kept ones."""
    bad = manifest.counts["quarantined"] + manifest.torn
    return bad / max(1, manifest.counts["quarantined"] + manifest.counts["kept"])
