"""Walk a folder tree and read the header of every file: one row for each, whatever it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from medpsp.dicom.read import read_header
from medpsp.dicom.series import group_series
from medpsp.errors import ArchiveError, DicomError
from medpsp.types import ScanRow, Series, SliceRef, Status

NOT_DAMAGED = frozenset(
    {"NOT_DICOM", "NOT_IMAGE", "MODALITY_SKIPPED", "NOT_REGULAR", "NOT_LISTED", "LABEL_NONE"}
)
"""Codes of objects that are whole but not for us; everything else refused is quarantined."""


def walk_files(root: Path) -> Iterator[Path]:
    """Every file below ``root`` in sorted order; links to folders are not followed.

    Raises:
        ArchiveError: The folder does not exist or cannot be listed.
    """
    if not root.is_dir():
        raise ArchiveError(f"archive {root}: no such folder; give the root of the DICOM files")

    def refuse(error: OSError) -> None:
        raise ArchiveError(f"archive: a folder cannot be listed ({type(error).__name__})") from None

    for folder, names, files in os.walk(root, onerror=refuse):
        names.sort()
        for name in names:
            if (Path(folder) / name).is_symlink():  # not followed, but not forgotten either
                yield Path(folder) / name
        for name in sorted(files):
            yield Path(folder) / name


def scan_folder(
    root: Path,
    modalities: tuple[str, ...] | None,
    file_id: Callable[[str], str],
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Series], list[ScanRow]]:
    """Read all headers below ``root`` and group them.

    Args:
        root: Folder of DICOM files in any arrangement.
        modalities: Modalities to keep; None keeps all.
        file_id: Turns the path relative to ``root`` into the name used in every message.
        advance: Called once a file, for progress.

    Returns:
        Series in a fixed order, and the rows of every file that is in none of them.

    Raises:
        ArchiveError: Folder missing, or without any file.
    """
    refs: list[SliceRef] = []
    rows: list[ScanRow] = []
    count = 0
    for path in walk_files(root):
        count += 1
        name = file_id(path.relative_to(root).as_posix())
        try:
            if not path.is_file():
                raise DicomError("NOT_REGULAR", "not a regular file, or a link to nowhere")
            ref = read_header(path, name)
            if modalities is not None and ref.modality not in modalities:
                raise DicomError("MODALITY_SKIPPED", "modality not in data.modalities")
            refs.append(ref)
        except DicomError as error:
            rows.append(refusal(name, error.code, error.detail))
        advance()
    if not count:
        raise ArchiveError(f"archive {root}: holds no file; give the root of the DICOM files")
    series, refused = group_series(refs)
    rows.extend(refusal(ref.file_id, error.code, error.detail) for ref, error in refused)
    return series, rows


def refusal(file_id: str, code: str, detail: str) -> ScanRow:
    """The row of an object that is not kept."""
    status: Status = "quarantined"
    if code in NOT_DAMAGED:
        status = "skipped"
    elif code == "DUP_SOP_UID":
        status = "duplicate"
    return ScanRow(file_id=file_id, status=status, code=code, detail=detail)
