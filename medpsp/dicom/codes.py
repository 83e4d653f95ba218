"""Reason codes: what became of an object, in words, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

from medpsp.types import ScanRow, Status


class Code(NamedTuple):
    """Status of an object with this code, what it means, what to do."""

    status: Status
    meaning: str
    action: str


CODES: dict[str, Code] = {
    "NOT_DICOM": Code("skipped", "no DICOM file", "nothing"),
    "NOT_IMAGE": Code("skipped", "a DICOM object without pixels", "nothing"),
    "MODALITY_SKIPPED": Code("skipped", "modality not asked for", "add it to data.modalities"),
    "NOT_REGULAR": Code("skipped", "no regular file", "nothing"),
    "NOT_LISTED": Code("skipped", "in none of the split lists", "list it"),
    "LABEL_NONE": Code("skipped", "no mask for the series", "see data.label_pattern"),
    "LABEL_OBJECT": Code("skipped", "a SEG or RTSTRUCT", "data.label_format reads it"),
    "DICOMDIR": Code("skipped", "a directory of files", "nothing: the files themselves are read"),
    "LOCALIZER": Code("skipped", "a localizer", "data.non_volumes=keep keeps it"),
    "SC_IMAGE": Code("skipped", "a secondary capture", "data.non_volumes=keep keeps it"),
    "DOSE_REPORT": Code("skipped", "a dose sheet", "data.non_volumes=keep keeps it"),
    "DUP_IDENTICAL": Code("duplicate", "the same image again", "nothing"),
}


def refusal(file_id: str, code: str, detail: str, frame: int = -1) -> ScanRow:
    """The row of an object, or of one frame, that is not kept."""
    known = CODES.get(code)
    status: Status = known.status if known else "quarantined"
    return ScanRow(file_id=file_id, status=status, code=code, detail=detail, frame=frame)
