"""Rows of a header scan, put aside by columns: an archive may have more than memory holds.

What they say is real, so the file has no name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from medpsp.dataconfig import DataConfig
from medpsp.dicom.sandbox import SandboxPool
from medpsp.dicom.scan import LabelFile
from medpsp.errors import ArchiveError
from medpsp.identity import pseudonym
from medpsp.types import Place, ScanRow, SliceRef
from shards.components import KEYS
from shards.record import read_ref, ref_text
from shards.spool import Span, Spool, packed, unpacked

FRAME, REFUSED, LABEL = "frame", "refused", "label"
ROWS_AT_ONCE = 16384
_SCHEMA = pa.schema([*((name, pa.string()) for name in KEYS), ("value", pa.string())])
_REF_KEYS = KEYS[1:-2]  # between the kind and the place


class Headers:
    """What a scan found: frames, refused objects, label objects.

    Attributes:
        objects: Number of objects found.
    """

    def __init__(self) -> None:
        self._spool, self._spans, self.objects = Spool(), list[Span](), 0
        self._waiting: list[tuple[str, ...]] = []

    @classmethod
    def scan(
        cls, data: DataConfig, key: bytes, pool: SandboxPool, advance: Callable[[], None]
    ) -> Headers:
        """Read all headers below ``data.archive``.

        Raises:
            ArchiveError: Folder missing, or without any object.
        """
        from medpsp.dicom.scan import _read_all

        found = cls()
        for item in _read_all(data.archive, data.policy, partial(file_id, key), pool):
            found.add(item.refs, [item.row] if item.row else [], [item.label] if item.label else [])
            found.objects += 1
            advance()
        if not found.objects:
            raise ArchiveError(
                f"archive {data.archive}: holds no file; give the root of the DICOM files"
            )
        return found

    def add(
        self,
        refs: Iterable[SliceRef] = (),
        rows: Iterable[ScanRow] = (),
        labels: Iterable[LabelFile] = (),
    ) -> None:
        """Put rows aside, in this order."""
        for ref in refs:
            keys = [getattr(ref, name) for name in _REF_KEYS]
            self._waiting.append((FRAME, *keys, *ref.place, ref_text(ref)))
        for row in rows:
            self._add_other(REFUSED, row.file_id, [row.status, row.code, row.detail, row.frame])
        for file in labels:
            values = [*file.place, file.kind, file.code, file.detail, file.patient_id]
            self._add_other(LABEL, file.file_id, values)
        if len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, in the order in which they came."""
        self._flush()
        for span in self._spans:
            batch = unpacked(self._spool.read(span))
            yield batch if columns is None else batch.select(list(columns))

    def _add_other(self, kind: str, name: str, values: list[object]) -> None:
        blank = [""] * (len(KEYS) - 1)
        self._waiting.append((kind, *blank, json.dumps([name, *values])))

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            columns = [
                pa.array(map(_text, column), pa.string()) for column in zip(*rows, strict=True)
            ]
            batch = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
            self._spans.append(self._spool.append(packed(batch)))


def file_id(key: bytes, name: str) -> str:
    """Pseudonym of an object from its name relative to the archive."""
    # a name that is not UTF-8 holds surrogates, which have no bytes
    return pseudonym(key, "file", name.encode("utf-8", "backslashreplace").decode())


def refs_of(batch: pa.RecordBatch) -> list[SliceRef]:
    """The frames of a batch."""
    kinds, values = (batch[name].to_pylist() for name in ("kind", "value"))
    return [read_ref(v) for k, v in zip(kinds, values, strict=True) if k == FRAME]


def rows_of(batch: pa.RecordBatch) -> list[ScanRow]:
    """The refused objects of a batch."""
    return [
        ScanRow(file_id=name, status=status, code=code, detail=detail, frame=frame)
        for name, status, code, detail, frame in _others(batch, REFUSED)
    ]


def labels_of(batch: pa.RecordBatch) -> list[LabelFile]:
    """The label objects of a batch; each has a row of a refused one too."""
    return [
        LabelFile(
            place=Place(path, member),
            file_id=name,
            kind=kind,
            code=code,
            detail=detail,
            patient_id=patient,
        )
        for name, path, member, kind, code, detail, patient in _others(batch, LABEL)
    ]


def _others(batch: pa.RecordBatch, kind: str) -> Iterator[list[Any]]:
    kinds, values = (batch[name].to_pylist() for name in ("kind", "value"))
    return (json.loads(v) for k, v in zip(kinds, values, strict=True) if k == kind)


def _text(value: str) -> str:
    """Text that Arrow takes; names of files need not be UTF-8, and hold surrogates then."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
