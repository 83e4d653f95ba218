"""Answers of a child whose fields are of the types that they should be."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medpsp.dicom.labelref import LabelRef
from medpsp.errors import DicomError, LabelError
from medpsp.types import SliceRef

_REFS = TypeAdapter(list[SliceRef])
_TARGET = TypeAdapter(LabelRef)
_TEXTS = [field.name for field in fields(SliceRef) if field.type == "str"]


def checked_refs(tree: Any) -> list[SliceRef]:
    """Frames from their fields. Texts that they share are kept once.

    Raises:
        DicomError: ELEM_INVALID.
    """
    try:
        refs = _REFS.validate_python(tree)
    except ValidationError as error:
        raise DicomError("ELEM_INVALID", f"{error.error_count()} header values") from None
    return [_shared(ref) for ref in refs]


def _shared(ref: SliceRef) -> SliceRef:
    texts: dict[str, Any] = {name: sys.intern(getattr(ref, name)) for name in _TEXTS}
    return replace(ref, **texts)


def checked_target(tree: Any) -> LabelRef:
    """What a label object references, from its fields.

    Raises:
        LabelError: LABEL_UNREADABLE.
    """
    try:
        return _TARGET.validate_python(tree)
    except ValidationError as error:
        raise LabelError("LABEL_UNREADABLE", f"{error.error_count()} references") from None
