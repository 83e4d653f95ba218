"""What an archive holds, for a proposal: headers of all of it, or of runs of files spread over it.

Nothing is written. What is found holds real identifiers, for memory only.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from medpsp.dicom.codes import is_no_dicom
from medpsp.dicom.sandbox import SandboxPool
from medpsp.dicom.scan import LabelFile
from medpsp.dicom.series import group_series
from medpsp.dicom.walk import Entry, walk_files
from medpsp.errors import ArchiveError, ConfigError
from medpsp.types import MaskKind, ReadPolicy, Series, SliceRef
from shards.catalog import FOLDER, PART_ROWS, Catalog
from shards.components import LeftOut
from shards.headers import FILE, FRAME, LABEL, REFUSED, RowReader
from shards.masks import Aims, dicom_masks
from shards.partition import Part, lists
from shards.partstore import FolderStore, NamelessStore, locked
from shards.rescan import Advance, BatchReader, Rescan

log = logging.getLogger("medpsp")
ALL = ReadPolicy(burned_in="keep")
"""Every modality; what may show a name is flagged PHI_BURNED_IN, not refused."""
MOST_FRAMES = 400_000
"""Frames in memory, 1 KB each."""
RUN = 1000
"""Files one after another of a sample: most often whole series, which a file here and there of each
would not show."""
MOST_LABELS = 300
"""Label objects whose references are read; one may take a second."""
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found below a folder.

    Attributes:
        root: The folder.
        met: Files that are there, or objects that an index knows.
        read: How many of them were looked at.
        series: Of the images, masks not looked for.
        codes: Objects and frames in no series, by reason code.
        labels: SEG and RTSTRUCT objects.
        others: Names below the root of files that are no DICOM.
        indexed: It was an index that was looked at, not the folder.
    """

    root: Path
    met: int
    read: int
    series: tuple[Series, ...]
    codes: Counter[str]
    labels: tuple[LabelFile, ...]
    others: tuple[str, ...]
    indexed: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.read == self.met

    @property
    def no_dicom(self) -> bool:
        """Whether nothing that was looked at is DICOM."""
        return not self.series and not self.labels and all(map(is_no_dicom, self.codes))


class Matched(NamedTuple):
    """Series with the label objects of one kind that belong to them.

    Attributes:
        series: All, in their order; those without a label object as they were.
        read: Label objects that were looked at.
        codes: Of those that belong to no series.
    """

    series: tuple[Series, ...]
    read: int
    codes: Counter[str]


def survey_folder(
    root: Path, most: int, pool: SandboxPool, advance: Advance, policy: ReadPolicy = ALL
) -> Survey:
    """Read the headers below a folder.

    Args:
        root: Of an archive, or of labels.
        most: Files to read; of more than that, runs of files spread evenly are.
        pool: Children of the module `catalog.SCANNER`.
        advance: For progress.
        policy: What to keep.

    Raises:
        ArchiveError: Folder missing, or without any object.
    """
    entries, met = _chosen(root, most)
    top = os.path.join(root, "")
    store = NamelessStore()
    read = min(met, most)
    parts = Rescan(store, PART_ROWS, advance).run(entries, BatchReader(top, policy), pool)
    reader = RowReader(top, str)
    return _survey(Catalog(store, parts, reader), reader, root, (met, read))


def survey_index(index: Path, root: Path, most: int) -> Survey:
    """Read what an index (`data.index`) knows of an archive; nothing of it is changed.

    Args:
        index: As a run with ``data.index`` left it.
        root: Of the archive.
        most: Objects to look at, in whole partitions spread evenly; one at least.

    Raises:
        ConfigError: No index, or one of another archive.
        ShardError: It is damaged, or a command is at work on it.
    """
    store = FolderStore(index / FOLDER, "")
    if not index.is_dir() or not (parts := store.known()):
        raise ConfigError(
            f"--index {index}: holds no scan; expected the folder that data.index of an earlier "
            "run named"
        )
    with locked(index):
        parts = store.known()
        if not any(os.path.lexists(os.path.join(root, part.last)) for part in parts):
            raise ConfigError(f"--index {index}: knows none of the files of {root}")
        chosen = _spread(parts, most)
        met, read = (sum(part.objects for part in some) for some in (parts, chosen))
        reader = RowReader(os.path.join(root, ""), str)
        return _survey(Catalog(store, chosen, reader), reader, root, (met, read), indexed=True)


def match_labels(
    series: Sequence[Series],
    files: Sequence[LabelFile],
    kind: MaskKind,
    pool: SandboxPool,
    others: Sequence[Series] = (),
) -> Matched:
    """Find the series that label objects belong to.

    Args:
        series: Of the images; masks that they have count no more.
        files: Label objects; more than `MOST_LABELS` of a kind are sampled.
        kind: ``seg`` or ``rtstruct``.
        pool: Children that read them.
        others: Series of modalities that are left out: objects of theirs are not of ``series``.
    """
    wanted = [file for file in files if file.kind == kind]
    wanted = evenly(wanted, MOST_LABELS)
    bare = [replace(item, masks=(), mask_kind="", mask_partial=False) for item in series]
    with _quiet():  # its warnings name objects; here they are counted
        refs = [ref for item in others for ref in item.slices]
        left = LeftOut.of((ref.series_uid for ref in refs), (ref.sop_uid for ref in refs))
        aims = Aims(wanted, pool, left)
        some = aims.some(range(len(aims.links)))
        found, fate = dicom_masks(bare, some, aims.robbed, kind, lambda item: "")
    codes = Counter(row.code for row in (*aims.fate, *fate) if row.status != "kept")
    return Matched(tuple(found), len(wanted), codes)


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """All, or so many of them at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]


def _chosen(root: Path, most: int) -> tuple[Iterator[Entry], int]:
    """Files to read, and how many there are."""
    walk = walk_files(root)
    head = list(islice(walk, most + 1))
    if not head:
        raise ArchiveError(f"archive {root}: holds no file; give the root of the DICOM files")
    if len(head) <= most:
        return iter(head), len(head)
    met = len(head) + sum(1 for _ in walk)
    head.clear()
    count = max(1, most // RUN)
    starts = [place * met // count for place in range(count)]
    inside = (start + n for start in starts for n in range(most // count))
    return _at(walk_files(root), inside), met


def _at(walk: Iterator[Entry], places: Iterator[int]) -> Iterator[Entry]:
    """The entries at rising places."""
    wanted = next(places, None)
    for place, entry in enumerate(walk):
        if wanted is None:
            return
        if place == wanted:
            yield entry
            wanted = next(places, None)


def _spread(parts: Sequence[Part], most: int) -> list[Part]:
    """Partitions at equal distances with at most so many objects together, one at least."""
    count = len(parts)
    while count > 1 and sum(part.objects for part in evenly(parts, count)) > most:
        count -= 1
    return evenly(parts, count)


def _survey(
    catalog: Catalog,
    reader: RowReader,
    root: Path,
    seen: tuple[int, int],
    *,
    indexed: bool = False,
) -> Survey:
    refs = islice(_refs(catalog, reader), MOST_FRAMES)
    # copies are equal until `medpsp shards` has looked at their pixels
    series, refused = group_series(refs, ALL, lambda some: True)
    codes = Counter(error.code for _, error in refused)
    others: list[str] = []
    for batch in catalog.batches(REFUSED):
        rows = lists(batch)
        codes.update(rows["common"])
        others += [
            os.fsdecode(name)
            for name, code in zip(rows[FILE], rows["common"], strict=True)
            if is_no_dicom(code)
        ]
    labels = tuple(f for batch in catalog.batches(LABEL) for f in catalog.labels_of(batch))
    met, read = seen
    return Survey(
        root=root,
        met=met,
        read=read,
        series=tuple(series),
        codes=codes,
        labels=labels,
        others=tuple(dict.fromkeys(others)),  # members of a zip file have its name
        indexed=indexed,
    )


def _refs(catalog: Catalog, reader: RowReader) -> Iterator[SliceRef]:
    for batch in catalog.batches(FRAME):
        yield from reader.refs(lists(batch))


@contextmanager
def _quiet() -> Iterator[None]:
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
