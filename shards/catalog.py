"""The header catalogue of an archive: one row a frame, refused object or label object.

A scan reads only files that are new or changed. Partitions of the order of the walk are finished
one after another, so a scan that is killed goes on where it was. Pseudonyms are not in it: they
are made when rows are read, so the key neither lies beside real identifiers nor goes to the
children, which touch the bytes of strangers, and a new key costs no new scan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medpsp import __version__
from medpsp.dataconfig import DataConfig
from medpsp.dicom.sandbox import SandboxPool
from medpsp.dicom.scan import LabelFile
from medpsp.dicom.walk import walk_files
from medpsp.errors import ArchiveError
from medpsp.types import ReadPolicy, ScanRow
from shards.components import LeftOut
from shards.headers import COLUMNS, FRAME, LABEL, REFUSED, STAMP, RowReader, file_id
from shards.partition import KINDS, Part, lists, read_part
from shards.partstore import FolderStore, NamelessStore, PartStore
from shards.rescan import Advance, BatchReader, Rescan

FOLDER = "catalog"
FORMAT = 2
SCANNER = "shards.scanner"
"""Module of the children of a scan."""
PART_ROWS = 65536
ALL = (*COLUMNS, *STAMP)
_ROWS_AT_ONCE = 16384
_NONE = np.zeros(0, np.int64)


class Catalog:
    """What a scan found: frames, refused objects, label objects.

    Args:
        store: Holds the partitions.
        parts: In the order of the walk.
        reader: Of their rows.

    Attributes:
        objects: Number of objects found.
    """

    def __init__(self, store: PartStore, parts: Sequence[Part], reader: RowReader) -> None:
        self._store, self._parts, self._reader = store, parts, reader
        self.objects = sum(part.objects for part in parts)

    @classmethod
    def scan(
        cls,
        data: DataConfig,
        key: bytes,
        pool: SandboxPool,
        advance: Advance,
        part_rows: int = PART_ROWS,
    ) -> Catalog:
        """Read the headers below ``data.archive`` that the catalogue in ``data.index`` lacks.

        Args:
            data: Of the configuration. Nobody else may be at work in its index: `locked`.
            key: Of the pseudonyms.
            pool: Children of the module `SCANNER`.
            advance: For progress.
            part_rows: Of a partition.

        Raises:
            ArchiveError: Folder missing, or without any object.
            ShardError: The catalogue cannot be written.
        """
        walk = walk_files(data.archive)
        first = next(walk, None)  # before anything is forgotten for a folder that is not there
        if first is None:
            raise ArchiveError(
                f"archive {data.archive}: holds no file; give the root of the DICOM files"
            )
        store: PartStore = NamelessStore()
        if data.index is not None:
            store = FolderStore(data.index / FOLDER, _identity(data.archive, data.policy))
        root = os.path.join(data.archive, "")
        read = BatchReader(root, data.policy)
        parts = Rescan(store, part_rows, advance).run(chain([first], walk), read, pool)
        return cls(store, parts, RowReader(root, partial(file_id, key)))

    def batches(self, kind: str, columns: Iterable[str] = ALL) -> Iterator[pa.RecordBatch]:
        """All rows of one kind, in the order of the walk.

        Args:
            kind: `FRAME`, `REFUSED` or `LABEL`.
            columns: To read.

        Raises:
            ShardError: A partition is damaged.
        """
        columns = list(columns)
        for part in self._parts:
            if not {FRAME: part.frames, REFUSED: part.refused, LABEL: part.labels}[kind]:
                continue
            table = read_part(self._store.get(part), {*columns, "kind"})
            found = table.filter(pc.equal(table["kind"], KINDS[kind])).select(columns)
            yield from found.combine_chunks().to_batches(max_chunksize=_ROWS_AT_ONCE)

    def left_out(self) -> LeftOut:
        """The images of modalities that are not asked for."""
        series: set[str] = set()
        images: list[LeftOut] = []
        for batch in self.batches(REFUSED, ("common", "series_uid", "sop_uid")):
            some = batch.filter(pc.equal(batch["common"], "MODALITY_SKIPPED"))
            series.update(some["series_uid"].to_pylist())
            images.append(LeftOut.of((), some["sop_uid"].to_pylist()))
        whole = [part.images for part in images]
        return LeftOut.of(series, ())._replace(images=np.concatenate(whole) if whole else _NONE)

    def rows_of(self, batch: pa.RecordBatch) -> Iterator[ScanRow]:
        """The refused objects that a batch of `REFUSED` holds."""
        return self._reader.rows(lists(batch))

    def labels_of(self, batch: pa.RecordBatch) -> Iterator[LabelFile]:
        """The label objects that a batch of `LABEL` holds; each has a refused row too."""
        return self._reader.labels(lists(batch))


def _identity(archive: Path, policy: ReadPolicy) -> str:
    """What must be equal for rows to mean the same."""
    facts = [FORMAT, __version__, os.path.realpath(archive), asdict(policy)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
