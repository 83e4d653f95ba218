"""Slices of one series from flat headers: what they have in common is worked out once.

A `SliceRef` is a function of the raw wanted elements and the policy. `_Template` keeps the one of a
slice before, by all of them but those in `VARYING`, and works out anew what these lead to.
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from medpsp.dicom import frames
from medpsp.dicom.flat import Flat, Kind, is_ordinary, plain_text
from medpsp.dicom.flatvalues import FlatHeader
from medpsp.dicom.parse import refusing
from medpsp.dicom.slices import slices_of
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy, SliceRef

VARYING = {
    "sop_uid": ("SOPInstanceUID",),
    "position": ("ImagePositionPatient",),
    "times": tuple(
        "AcquisitionDateTime AcquisitionDate AcquisitionTime ContentDate ContentTime".split()
    ),
    "collision_key": ("TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber"),
    "window": ("WindowCenter", "WindowWidth"),
}
"""Fields of a `SliceRef` of one frame, and elements that only this field depends on, and a flag on
SOPInstanceUID and on the window."""

MOST_TEMPLATES, MOST_VALUES = 64, 512
"""Kept at once: series of one kind of header, and values of the fields of a series."""

_NUMBER = rb" *([+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?) *"
_POINT = re.compile(rb"\\".join([_NUMBER] * 3)).fullmatch
_UID = re.compile(rb"[0-9.]+").fullmatch

_FIND: dict[str, Callable[[FlatHeader], Any]] = {
    "position": lambda ds: frames.position(ds, 0, 1),
    "times": lambda ds: frames.times(ds, 0),
    "collision_key": lambda ds: frames.collision_key(ds, 0),
    "window": lambda ds: frames.window(ds, 0),
}


class _Plan(NamedTuple):
    """For one kind of header: indices of the values that vary, by field, and of all others."""

    fields: dict[str, tuple[int, ...]]
    fixed: tuple[int, ...]
    templates: OrderedDict[tuple[ReadPolicy, tuple[bytes, ...]], _Template]


@lru_cache(maxsize=128)
def _plan(kind: Kind) -> _Plan:
    at = {keyword: n for n, keyword in enumerate(kind.keywords)}
    fields = {f: tuple(at[k] for k in keys if k in at) for f, keys in VARYING.items()}
    fields = {field: places for field, places in fields.items() if places}
    varying = {n for places in fields.values() for n in places}
    return _Plan(fields, tuple(n for n in at.values() if n not in varying), OrderedDict())


class _Template:
    """The `SliceRef` of a slice, to make that of another one from it."""

    def __init__(self, ref: SliceRef) -> None:
        self.fields = {name: getattr(ref, name) for name in SliceRef.__slots__}
        self.invalid = "VOI_INVALID" in ref.flags
        self.seen: dict[tuple[str, tuple[bytes, ...]], Any] = {}

    def filled(self, flat: Flat, plan: _Plan) -> dict[str, Any] | None:
        """Fields of another slice; None where its flags may be others, or a value is malformed."""
        found, values = dict(self.fields), flat.values
        for field, places in plan.fields.items():
            raw = tuple([values[n] for n in places])
            value = self._value(field, raw, flat)
            if value is None:
                return None
            found[field] = value
        return found

    def _value(self, field: str, raw: tuple[bytes, ...], flat: Flat) -> Any:
        if field == "sop_uid":
            uid = raw[0].rstrip(b"\0")
            return uid.decode() if _UID(uid) else None
        if field == "position" and (point := _POINT(raw[0])):
            return tuple(map(float, point.groups()))
        value = self.seen.get((field, raw))
        if value is None:
            if len(self.seen) >= MOST_VALUES:
                self.seen.clear()
            value = self.seen[field, raw] = self._found(field, flat)
        return value

    def _found(self, field: str, flat: Flat) -> Any:
        try:
            with refusing("ELEM_INVALID", "a header value is malformed"):
                value = _FIND[field](flat.header)
        except DicomError:
            return None
        if field != "window":
            return value
        window, given = value
        return window if self.invalid == (given and window is None) else None


def slices_of_flat(
    flat: Flat, place: Place, file_id: str, policy: ReadPolicy
) -> list[SliceRef] | None:
    """`slices_of` for an ordinary header; None where pydicom is to read it.

    Raises:
        DicomError: As `slices_of`.
    """
    plan = _plan(flat.kind)
    key = policy, tuple([flat.values[n] for n in plan.fixed])
    template = plan.templates.get(key)
    if template is not None:
        texts = [flat.values[n] for places in plan.fields.values() for n in places]
        found = template.filled(flat, plan) if plain_text(texts) else None
        if found is not None:
            found["path"], found["member"], found["file_id"] = place.path, place.member, file_id
            return [SliceRef(**found)]
    if not is_ordinary(flat):
        return None
    parsed = flat.parsed(io.BytesIO(), flat.value_at)  # no pixel is looked at: there is one frame
    refs = slices_of(parsed, place, file_id, policy)
    if refs[0].sop_uid:  # without one it has a flag that another slice need not have
        plan.templates[key] = _Template(refs[0])
    if len(plan.templates) > MOST_TEMPLATES:
        plan.templates.popitem(last=False)
    return refs
