"""Walk an archive and read the header of every object: one row for each, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from medpsp.dicom.codes import refusal
from medpsp.dicom.container import Found, walk_objects
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.series import group_series
from medpsp.errors import ArchiveError, OtherModality, SourceError
from medpsp.types import Place, ReadPolicy, ScanRow, Series, SliceRef


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFile:
    """A SEG (``seg``) or RT Structure Set (``rtstruct``) that the walk met.

    Attributes:
        code, detail: Why it cannot be used; empty where its header is whole.
        patient_id: Of a damaged one that says it; the real one, for memory only.
    """

    place: Place
    file_id: str
    kind: str
    code: str = ""
    detail: str = ""
    patient_id: str = ""


class Read(NamedTuple):
    """What one object is: its frames, or its row, and for a label object that too.

    Attributes:
        uids: Of the series and the image, where it is one of a modality that is not asked for.
    """

    file_id: str
    refs: list[SliceRef]
    row: ScanRow | None = None
    label: LabelFile | None = None
    uids: tuple[str, str] = ("", "")


class Reader(Protocol):
    """What reads objects: a `Sandbox`, or a process that is the child of one."""

    def headers(self, place: Place, file_id: str, policy: ReadPolicy) -> list[SliceRef]:
        """`read.read_headers`."""

    def label_head(self, place: Place) -> tuple[str, str]:
        """`labelref.label_head`; empty texts where even that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What an archive holds.

    Attributes:
        series: In a fixed order.
        rows: Every object or frame that is in no series, label objects among them.
        labels: SEG and RTSTRUCT objects, damaged ones too.
        objects: Number of objects found; each is in a series or has a row.
    """

    series: list[Series]
    rows: list[ScanRow]
    labels: list[LabelFile]
    objects: int


def scan_folder(
    root: Path,
    policy: ReadPolicy,
    file_id: Callable[[str], str],
    pool: SandboxPool,
    advance: Callable[[], None] = lambda: None,
) -> Scan:
    """Read all headers below ``root`` and group them.

    Args:
        root: Folder of DICOM files in any arrangement, zip and tar files among them.
        policy: What to keep.
        file_id: Turns the name of an object, relative to ``root``, into its name in every message.
        pool: Children that read the headers.
        advance: Called once an object, for progress.

    Raises:
        ArchiveError: Folder missing, or without any object.
    """
    refs: list[SliceRef] = []
    rows: list[ScanRow] = []
    labels: list[LabelFile] = []
    objects = 0
    for item in _read_all(root, policy, file_id, pool):
        objects += 1
        advance()
        refs += item.refs
        rows += [item.row] if item.row else []
        labels += [item.label] if item.label else []
    if not objects:
        raise ArchiveError(f"archive {root}: holds no file; give the root of the DICOM files")
    series, refused = group_series(refs, policy, pool.same_pixels)
    rows += [refusal(r.file_id, e.code, e.detail, r.frame) for r, e in refused]
    return Scan(series=series, rows=rows, labels=labels, objects=objects)


def find_labels(root: Path, file_id: Callable[[str], str], pool: SandboxPool) -> Scan:
    """SEG and RTSTRUCT objects below a folder of their own; every object there has a row.

    Returns:
        No series; images that lie there are LABEL_NOT.

    Raises:
        ArchiveError: No such folder.
    """
    rows: list[ScanRow] = []
    labels: list[LabelFile] = []
    for item in _read_all(root, ReadPolicy(modalities=()), file_id, pool):
        row = item.row
        if row is None or row.code == "MODALITY_SKIPPED":
            row = refusal(item.file_id, "LABEL_NOT", "an image, no label object")
        rows.append(row)
        labels += [item.label] if item.label else []
    return Scan(series=[], rows=rows, labels=labels, objects=len(rows))


def read_object(reader: Reader, found: Found, file_id: str, policy: ReadPolicy) -> Read:
    """What one object is.

    Args:
        reader: Opens it, unless the walk says why not.
        found: Of the walk.
        file_id: Its name in every message.
        policy: What to keep.
    """
    if found.code:
        return Read(file_id, [], refusal(file_id, found.code, found.detail))
    try:
        return Read(file_id, reader.headers(found.place, file_id, policy))
    except SourceError as error:
        return no_image(reader, found.place, file_id, error)


def no_image(reader: Reader, place: Place, file_id: str, error: SourceError) -> Read:
    """What an object is whose header is not that of an image for us: a label object, perhaps."""
    code, detail = error.code, error.detail
    row = refusal(file_id, code, detail)
    if isinstance(error, OtherModality):
        return Read(file_id, [], row, uids=(error.series_uid, error.sop_uid))
    if code == "LABEL_OBJECT":
        return Read(file_id, [], row, LabelFile(place=place, file_id=file_id, kind=detail))
    if row.status != "quarantined":
        return Read(file_id, [], row)
    kind, patient = reader.label_head(place)
    if not kind:
        return Read(file_id, [], row)
    why = {"code": code, "detail": detail, "patient_id": patient}
    return Read(file_id, [], row, LabelFile(place=place, file_id=file_id, kind=kind, **why))


def _read_all(
    root: Path, policy: ReadPolicy, file_id: Callable[[str], str], pool: SandboxPool
) -> Iterator[Read]:
    def read(box: Sandbox, found: Found) -> Read:
        return read_object(box, found, file_id(found.name), policy)

    for _, item in pool.map(read, walk_objects(root)):
        yield item
