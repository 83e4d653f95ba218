"""Walk an archive and read the header of every object: one row for each, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medpsp.dicom.codes import refusal
from medpsp.dicom.container import Found, walk_objects
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.series import group_series
from medpsp.errors import ArchiveError, SourceError
from medpsp.types import Place, ReadPolicy, ScanRow, Series, SliceRef


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFile:
    """A SEG (``seg``) or RT Structure Set (``rtstruct``) that the walk met."""

    place: Place
    file_id: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What an archive holds.

    Attributes:
        series: In a fixed order.
        rows: Every object or frame that is in no series, label objects among them.
        labels: SEG and RTSTRUCT objects.
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

    def read(box: Sandbox, found: Found) -> list[SliceRef] | SourceError:
        try:
            return box.headers(found.place, file_id(found.name), policy)
        except SourceError as error:
            return error

    def openable() -> Iterator[Found]:
        nonlocal objects
        for found in walk_objects(root):
            objects += 1
            if found.code:
                rows.append(refusal(file_id(found.name), found.code, found.detail))
            else:
                yield found

    for found, result in pool.map(read, openable()):
        advance()
        if not isinstance(result, SourceError):
            refs.extend(result)
            continue
        name = file_id(found.name)
        rows.append(refusal(name, result.code, result.detail))
        if result.code == "LABEL_OBJECT":
            labels.append(LabelFile(place=found.place, file_id=name, kind=result.detail))
    if not objects:
        raise ArchiveError(f"archive {root}: holds no file; give the root of the DICOM files")
    series, refused = group_series(refs, policy, pool.same_pixels)
    rows += [refusal(r.file_id, e.code, e.detail, r.frame) for r, e in refused]
    return Scan(series=series, rows=rows, labels=labels, objects=objects)


def find_labels(root: Path, file_id: Callable[[str], str], pool: SandboxPool) -> list[LabelFile]:
    """SEG and RTSTRUCT objects below a folder of their own; the rest there is passed over."""

    def read(box: Sandbox, found: Found) -> str:
        try:
            box.headers(found.place, "", ReadPolicy(modalities=()))
        except SourceError as error:
            return error.detail if error.code == "LABEL_OBJECT" else ""
        return ""

    objects = (found for found in walk_objects(root) if not found.code)
    return [
        LabelFile(place=found.place, file_id=file_id(found.name), kind=kind)
        for found, kind in pool.map(read, objects)
        if kind
    ]
