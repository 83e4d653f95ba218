"""What became of every object of an archive: one row each, however many there are.

An object is a number here, the 64 bits of its pseudonym; of each, memory holds some 30 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medpsp.types import STATUSES, Status

GRAVITY: tuple[Status, ...] = ("kept", "skipped", "duplicate", "quarantined")
"""Of several rows of one object the gravest gives its code, then the one of the first frame."""

_ROW = np.dtype(
    [("file_id", "<u8"), ("gravity", "u1"), ("reason", "<u4"), ("frame", "<i4"), ("lost", "?")]
)
_AT_ONCE = 65536


class Totals(NamedTuple):
    """Counts over all objects.

    Attributes:
        objects: Number of objects.
        counts: Objects by status.
        codes: Objects by reason code, also of kept ones that lost frames.
        torn: Kept objects that lost frames.
    """

    objects: int
    counts: dict[str, int]
    codes: dict[str, int]
    torn: int


class Fates:
    """Collects slices that are kept and rows of what is not, in any number of pieces."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint64]] = []
        self._rows: list[NDArray[Any]] = []
        self._reasons: dict[tuple[str, str], int] = {}

    def keep(self, file_ids: Sequence[str]) -> None:
        """Note the objects of slices in the shards, one entry a slice."""
        self._kept.append(_numbers(file_ids))

    def refuse(self, rows: pa.RecordBatch) -> None:
        """Note rows with the columns of `ScanRow`."""
        columns = {name: rows[name].to_pylist() for name in rows.schema.names}
        self.refuse_columns(columns)

    def refuse_columns(self, columns: dict[str, list[Any]]) -> None:
        """`refuse` for lists."""
        table = np.zeros(len(columns["file_id"]), _ROW)
        if not len(table):
            return
        gravity = {status: number for number, status in enumerate(GRAVITY)}
        pairs = zip(columns["code"], columns["detail"], strict=True)
        table["file_id"] = _numbers(columns["file_id"])
        table["gravity"] = [gravity[status] for status in columns["status"]]
        table["reason"] = [self._reasons.setdefault(p, len(self._reasons)) for p in pairs]
        table["frame"] = columns["frame"]
        table["lost"] = table["frame"] >= 0
        self._rows.append(table)

    def codes(self) -> Counter[str]:
        """Rows of each code."""
        names = [code for code, _ in self._reasons]
        found: Counter[str] = Counter()
        for table in self._rows:
            for reason, count in zip(*np.unique(table["reason"], return_counts=True), strict=True):
                found[names[reason]] += int(count)
        return found

    def finish(self) -> tuple[Totals, Iterator[dict[str, list[Any]]]]:
        """Counts, and the rows of `ObjectRow` by column in the order of ``file_id``, in pieces."""
        ids = np.concatenate(self._kept) if self._kept else np.zeros(0, np.uint64)
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, _ROW)
        self._kept, self._rows = [], []
        # the first row of every object is then its gravest
        order = np.lexsort([rows["frame"], -rows["gravity"].astype(np.int8), rows["file_id"]])
        rows = rows[order]
        known, kept = np.unique(ids, return_counts=True)
        named, first = np.unique(rows["file_id"], return_index=True)
        lost = np.add.reduceat(rows["lost"], first, dtype=np.int64) if len(named) else first
        objects = np.union1d(known, named)
        table = np.zeros(
            len(objects), [("kept", "<i8"), ("frames", "<i8"), ("status", "u1"), ("reason", "<i8")]
        )
        table["reason"] = -1
        table["kept"][np.searchsorted(objects, known)] = kept
        place = np.searchsorted(objects, named)
        table["frames"][place] = lost
        table["frames"] += table["kept"]
        table["status"][place] = rows["gravity"][first]
        table["reason"][place] = rows["reason"][first]
        table["status"][table["kept"] > 0] = 0
        return self._totals(table), self._pieces(objects, table)

    def _totals(self, table: NDArray[Any]) -> Totals:
        statuses = np.bincount(table["status"], minlength=len(GRAVITY)).tolist()
        reasons = np.bincount(table["reason"] + 1, minlength=len(self._reasons) + 1)[1:].tolist()
        codes: Counter[str] = Counter()
        for (code, _), count in zip(self._reasons, reasons, strict=True):
            if code and count:
                codes[code] += count
        return Totals(
            objects=len(table),
            counts={name: statuses[GRAVITY.index(name)] for name in STATUSES},
            codes=dict(sorted(codes.items())),
            torn=int(np.count_nonzero((table["kept"] > 0) & (table["kept"] < table["frames"]))),
        )

    def _pieces(
        self, objects: NDArray[np.uint64], table: NDArray[Any]
    ) -> Iterator[dict[str, list[Any]]]:
        reasons = [*self._reasons, ("", "")]  # the last one is number -1
        for begin in range(0, len(objects), _AT_ONCE):
            part = table[begin : begin + _AT_ONCE]
            pairs = [reasons[number] for number in part["reason"].tolist()]
            yield {
                "file_id": [f"{n:016x}" for n in objects[begin : begin + _AT_ONCE].tolist()],
                "status": [GRAVITY[number] for number in part["status"].tolist()],
                "code": [code for code, _ in pairs],
                "detail": [detail for _, detail in pairs],
                "frames": part["frames"].tolist(),
                "kept": part["kept"].tolist(),
            }


def _numbers(names: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([int(name, 16) for name in names], dtype=np.uint64)
