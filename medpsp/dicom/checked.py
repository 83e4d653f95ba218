"""Answers of a child whose fields are of the types that they should be."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from medpsp.dicom.labelref import LabelRef
from medpsp.errors import DicomError, LabelError
from medpsp.types import SliceRef

_REFS = TypeAdapter(list[SliceRef])
_TARGET = TypeAdapter(LabelRef)


def checked_refs(tree: Any) -> list[SliceRef]:
    """Frames from their fields.

    Raises:
        DicomError: ELEM_INVALID.
    """
    try:
        return _REFS.validate_python(tree)
    except ValidationError as error:
        raise DicomError("ELEM_INVALID", f"{error.error_count()} header values") from None


def checked_target(tree: Any) -> LabelRef:
    """What a label object references, from its fields.

    Raises:
        LabelError: LABEL_UNREADABLE.
    """
    try:
        return _TARGET.validate_python(tree)
    except ValidationError as error:
        raise LabelError("LABEL_UNREADABLE", f"{error.error_count()} references") from None
