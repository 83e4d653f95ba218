"""Walk an archive and read the header of every object: one row for each, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from medpsp.dicom.codes import refusal
from medpsp.dicom.container import Found, walk_objects
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.series import group_series
from medpsp.errors import ArchiveError, SourceError
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


def label_head(box: Sandbox, place: Place) -> tuple[str, str]:
    """`labelref.label_head` in a child; empty texts where even that cannot be read."""
    try:
        (kind, patient), _ = box.call("label_head", place=place)
    except SourceError:
        return "", ""
    return str(kind), str(patient)


class _Read(NamedTuple):
    file_id: str
    refs: list[SliceRef]
    row: ScanRow | None = None
    label: LabelFile | None = None


def _read_all(
    root: Path, policy: ReadPolicy, file_id: Callable[[str], str], pool: SandboxPool
) -> Iterator[_Read]:
    """Every object once: its frames, or its row, and for a label object that too."""

    def read(box: Sandbox, found: Found) -> _Read:
        name, code, detail = file_id(found.name), found.code, found.detail
        if not code:
            try:
                return _Read(name, box.headers(found.place, name, policy))
            except SourceError as error:
                code, detail = error.code, error.detail
        row = refusal(name, code, detail)
        if code == "LABEL_OBJECT":
            return _Read(name, [], row, LabelFile(place=found.place, file_id=name, kind=detail))
        if found.code or row.status != "quarantined":
            return _Read(name, [], row)
        kind, patient = label_head(box, found.place)
        if not kind:
            return _Read(name, [], row)
        why = {"code": code, "detail": detail, "patient_id": patient}
        return _Read(name, [], row, LabelFile(place=found.place, file_id=name, kind=kind, **why))

    for _, item in pool.map(read, walk_objects(root)):
        yield item
