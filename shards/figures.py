"""Counts of a set of shards for the report: tables in, numbers out, no loop over slices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.codes import code_of
from medpsp.errors import ShardError
from medpsp.types import SPLITS

TABLE_ORDER = ("quarantined", "skipped", "duplicate", "kept")
"""Of statuses in tables: what to look at comes first."""
Floats = NDArray[np.float64]
Strings = NDArray[np.str_]


class Reason(NamedTuple):
    """Objects of one code, and the commonest details among them with their number."""

    code: str
    status: str
    objects: int
    details: tuple[tuple[str, int], ...]


class Lost(NamedTuple):
    """Objects that are kept but for some frames, by the gravest code of those."""

    code: str
    objects: int
    frames: int


class Flag(NamedTuple):
    """A remark on kept slices."""

    code: str
    slices: int
    series: int


class SplitSize(NamedTuple):
    """What one split holds."""

    patients: int
    series: int
    slices: int
    labelled: int


class Columns(NamedTuple):
    """The columns of ``index.parquet`` that the report counts, N slices, K classes.

    Attributes:
        spacing: (N, 3) between rows, columns, slices, mm; NaN where unknown.
        window: (N, 2) centre and width that the network is shown.
        histogram: (N, K + 1) pixels of each class, then of ignore.
        normal: (N, 3) cross product of the directions of rows and columns; NaN without geometry.
        flags: Codes, and the number of the slice that each belongs to.
    """

    patient: Strings
    series: Strings
    split: Strings
    modality: Strings
    photometric: Strings
    bucket: Strings
    manufacturer: Strings
    body_part: Strings
    spacing_source: Strings
    labelled: NDArray[np.bool_]
    slot: NDArray[np.int64]
    slice_index: NDArray[np.int64]
    order: Floats
    z_mm: Floats
    padding: Floats
    voi_width: Floats
    spacing: Floats
    window: Floats
    histogram: NDArray[np.int64]
    normal: Floats
    flags: tuple[Strings, NDArray[np.int64]]


def read_columns(path: Path, classes: int) -> Columns:
    """Read ``index.parquet`` by column: 10^5 slices take a tenth of the time that rows take.

    Args:
        path: The file.
        classes: Number of classes K.

    Raises:
        ShardError: Not readable, or of another number of classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        derived = {"window", "normal"}
        wanted = {"window_center", "window_width", "affine", *Columns.__annotations__} - derived
        table = pq.read_table(path, columns=sorted(wanted)).combine_chunks()
        found: dict[str, Any] = {}
        for name, kind in Columns.__annotations__.items():
            if name in table.column_names and name != "flags":
                column = table[name].to_numpy()
                found[name] = column.astype(np.str_) if kind == "Strings" else column
        rows = table.num_rows
        found["spacing"] = _matrix(table["spacing"], rows, 3)
        found["histogram"] = _matrix(table["histogram"], rows, classes + 1)
        found["window"] = np.stack(
            [table[f"window_{part}"].to_numpy() for part in ("center", "width")], axis=1
        )
        found["normal"] = _normals(table["affine"], rows)
        found["flags"] = _flat(table["flags"])
        return Columns(**found)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"shards: {path.name} cannot be read ({type(error).__name__}); run `medpsp check`"
        ) from None


def _flat(column: Any) -> tuple[Any, NDArray[np.int64]]:
    """Values of a column of lists, and the row of each."""
    import pyarrow.compute as pc

    values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    values = values.astype(np.str_) if values.dtype == object else values
    return values, parents.astype(np.int64)


def _matrix(column: Any, rows: int, width: int) -> Any:
    values, _ = _flat(column)
    return values.reshape(rows, width)


def _normals(column: Any, rows: int) -> Floats:
    values, parents = _flat(column)
    normal = np.full((rows, 3), np.nan)
    if len(values):
        affines = values.reshape(-1, 4, 4)
        normal[parents[::16]] = np.cross(affines[:, :3, 0], affines[:, :3, 1])
    return normal


def count_reasons(rows: Iterable[tuple[str, str, str]], details: int = 2) -> list[Reason]:
    """Objects that are not kept, by code; in `TABLE_ORDER`, then the commonest code first.

    Args:
        rows: (status, code, detail) of every object.
        details: How many details to give for a code.
    """
    counts = Counter(row for row in rows if row[0] != "kept")
    by_code: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for (status, code, detail), number in counts.items():
        by_code[status, code].append((detail, number))
    found = [
        Reason(
            code,
            status,
            sum(number for _, number in each),
            tuple(sorted(each, key=lambda d: (-d[1], d[0]))[:details]),
        )
        for (status, code), each in by_code.items()
    ]
    return sorted(found, key=lambda r: (TABLE_ORDER.index(r.status), -r.objects, r.code))


def count_lost(rows: Iterable[tuple[str, str, int, int]]) -> list[Lost]:
    """Kept objects that lost frames.

    Args:
        rows: (status, code, frames, kept frames) of every object.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for status, code, frames, kept in rows:
        if status == "kept" and frames > kept:
            found[code].append(frames - kept)
    return [Lost(code, len(lost), sum(lost)) for code, lost in sorted(found.items())]


def count_flags(columns: Columns) -> list[Flag]:
    """Remarks on kept slices; those that quarantine elsewhere first, then the commonest."""
    codes, rows = columns.flags
    series = columns.series[rows] if len(rows) else np.zeros(0, dtype=np.str_)
    found = [
        Flag(str(code), int(number), len(np.unique(series[codes == code])))
        for code, number in zip(*np.unique(codes, return_counts=True), strict=True)
    ]
    return sorted(
        found, key=lambda f: (TABLE_ORDER.index(code_of(f.code).status), -f.slices, f.code)
    )


def count_splits(columns: Columns) -> dict[str, SplitSize]:
    """What each split holds; empty ones too."""
    found: dict[str, SplitSize] = {}
    for split in SPLITS:
        here = columns.split == split
        found[split] = SplitSize(
            patients=len(np.unique(columns.patient[here])),
            series=len(np.unique(columns.series[here])),
            slices=int(here.sum()),
            labelled=int(columns.labelled[here].sum()),
        )
    return found


def class_shares(columns: Columns) -> dict[str, tuple[Floats, Floats]]:
    """Of each split: (K,) share of the pixels, ignore left out, and (K,) share of the slices.

    Of labelled slices only; NaN where there is none.
    """
    found: dict[str, tuple[Floats, Floats]] = {}
    for split in SPLITS:
        counts = columns.histogram[(columns.split == split) & columns.labelled, :-1]
        with np.errstate(invalid="ignore"):
            pixels = counts.sum(axis=0) / np.float64(counts.sum())
            slices = (counts > 0).sum(axis=0) / np.float64(len(counts))
        found[split] = (pixels, slices)
    return found


def first_of_series(columns: Columns) -> NDArray[np.int64]:
    """Row of one slice of every series: spacings and windows are those of the series."""
    return np.unique(columns.series, return_index=True)[1].astype(np.int64)
