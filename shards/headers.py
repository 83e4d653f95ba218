"""Rows of the catalogue: what a header scan found, as texts by column.

A child of the scan packs them (no Arrow there), the planner reads them back. File names are bytes:
those of old archives need not be UTF-8. Nothing here depends on the key: pseudonyms of objects are
made when rows are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from operator import attrgetter
from os import fsdecode
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.codes import refusal
from medpsp.dicom.container import MEMBER_MARK
from medpsp.dicom.scan import LabelFile, Read
from medpsp.dicom.walk import Stamp
from medpsp.identity import pseudonym
from medpsp.types import Place, ScanRow, SliceRef, Window

FRAME, REFUSED, LABEL = "frame", "refused", "label"
FILE, STAMP = "file", ("size", "mtime_ns", "ctime_ns")
UIDS = ("patient_id", "series_uid", "sop_uid", "study_uid", "frame_of_reference")
KEYS = (*UIDS, FILE, "member")
"""Columns that say which frames can have to do with each other; see `components`."""
TEXTS = ("kind", *UIDS, "member", "common", "value")
"""Columns that a child packs. Of a frame ``common`` is what most frames of a series share; of a
refused object it is the code and ``value`` the detail; of a label object its kind. A refused image
of another modality keeps the UIDs of its series and its own: labels may be drawn on it."""
COLUMNS = (*KEYS, "frame", "common", "value")
"""What `RowReader` needs."""

_OWN = ("position", "collision_key", "times")
_COMMON = tuple(
    f.name
    for f in fields(SliceRef)
    if f.name not in (*UIDS, *_OWN, "path", "member", "file_id", "frame")
)
_uids_of, _own_of, _common_of = (attrgetter(*names) for names in (("member", *UIDS), _OWN, _COMMON))


class Packed(NamedTuple):
    """Rows as arrays.

    Attributes:
        file: (R,) int32, number of the file of each row.
        frame: (R,) int32, number of the frame; -1 for other rows.
        lengths: (C, R) int32, bytes of each text of `TEXTS`.
        text: uint8, all texts, column after column.
    """

    file: NDArray[np.int32]
    frame: NDArray[np.int32]
    lengths: NDArray[np.int32]
    text: NDArray[np.uint8]


class RowBuffer:
    """Rows on their way into arrays."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, tuple[str, ...]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add_frames(self, file: int, refs: Sequence[SliceRef]) -> None:
        """Add the frames of one object.

        Args:
            file: Number of its file.
            refs: Of all of them.
        """
        for ref in refs:
            member, *uids = _uids_of(ref)
            texts = (FRAME, *uids, member, _dumps(_common_of(ref)), _dumps(_own_of(ref)))
            self._rows.append((file, ref.frame, texts))

    def add(self, file: int, member: str, item: Read) -> None:
        """Add whatever an object is.

        Args:
            file: Number of its file.
            member: Of its place.
            item: What it is.
        """
        self.add_frames(file, item.refs)
        if item.row:
            what = item.row.code, item.row.detail
            self._add_other(file, REFUSED, member, what, ("", *item.uids))
        if item.label:
            known = item.label
            value = _dumps([known.code, known.detail])
            self._add_other(file, LABEL, member, (known.kind, value), (known.patient_id,))

    def take(self) -> Packed:
        """All rows added since the last time."""
        rows, self._rows = self._rows, []
        files, frames, texts = zip(*rows, strict=True) if rows else ((), (), ())
        columns = list(zip(*texts, strict=True)) or [()] * len(TEXTS)
        flat = [text for column in columns for text in column]
        joined = "".join(flat)
        if joined.isascii():
            whole, lengths = joined.encode(), np.fromiter(map(len, flat), np.int32, len(flat))
        else:
            pieces = [
                _encoded(text, name)
                for name, column in zip(TEXTS, columns, strict=True)
                for text in column
            ]
            whole, lengths = b"".join(pieces), np.fromiter(map(len, pieces), np.int32, len(flat))
        return Packed(
            np.array(files, np.int32),
            np.array(frames, np.int32),
            lengths.reshape(len(TEXTS), len(rows)),
            np.frombuffer(whole, np.uint8),
        )

    def _add_other(
        self, file: int, kind: str, member: str, what: tuple[str, str], uids: tuple[str, ...]
    ) -> None:
        known = (*uids, *[""] * len(UIDS))[: len(UIDS)]
        self._rows.append((file, -1, (kind, *known, member, *what)))


class RowReader:
    """Rows back into what the planner works with.

    Args:
        root: What a file name is joined to, ends in a slash.
        file_id: See `medpsp.dicom.scan.scan_folder`.
    """

    def __init__(self, root: str, file_id: Callable[[str], str]) -> None:
        self._root, self._file_id = root, file_id

    def path(self, file: bytes) -> str:
        """Of a file of the archive."""
        return self._root + fsdecode(file)

    def refs(self, columns: dict[str, list[Any]]) -> Iterator[SliceRef]:
        """Frames, from columns that hold nothing else."""
        last, path, name = (b"", b""), "", ""
        rest = zip(*(columns[c] for c in (FILE, "member", "frame", "common", "value")), strict=True)
        uids = zip(*(columns[c] for c in UIDS), strict=True)
        for (file, member, frame, common, value), known in zip(rest, uids, strict=True):
            if (file, member) != last:
                last, (path, member_name, name) = (file, member), self._names(file, member)
            position, collision, times = _loads(value)[0]
            patient, series, sop, study, reference = known
            yield SliceRef(
                path=path,
                member=member_name,
                file_id=name,
                patient_id=patient,
                series_uid=series,
                sop_uid=sop,
                study_uid=study,
                frame_of_reference=reference,
                frame=frame,
                position=position and tuple(position),
                collision_key=tuple(collision),
                times=tuple(times),
                **_common(common),
            )

    def stamps(self, columns: dict[str, list[Any]]) -> Iterator[tuple[str, Stamp]]:
        """Path and stamp of the file of each row."""
        paths = map(self.path, columns[FILE])
        return zip(paths, map(Stamp, *(columns[name] for name in STAMP)), strict=True)

    def rows(self, columns: dict[str, list[Any]]) -> Iterator[ScanRow]:
        """Refused objects, from columns that hold nothing else."""
        for file, member, code, detail in _zipped(columns, FILE, "member", "common", "value"):
            yield refusal(self._names(file, member)[2], code, detail)

    def labels(self, columns: dict[str, list[Any]]) -> Iterator[LabelFile]:
        """Label objects, from columns that hold nothing else; each has a row of a refused one."""
        for file, member, kind, value, patient in _zipped(
            columns, FILE, "member", "common", "value", "patient_id"
        ):
            path, member_name, name = self._names(file, member)
            code, detail = json.loads(value)
            yield LabelFile(
                place=Place(path, member_name),
                file_id=name,
                kind=kind,
                code=code,
                detail=detail,
                patient_id=patient,
            )

    def _names(self, file: bytes, member: bytes) -> tuple[str, str, str]:
        """Path, member and pseudonym of an object."""
        name = fsdecode(file)
        if not member:
            return self._root + name, "", self._file_id(name)
        inner = fsdecode(member)
        return self._root + name, inner, self._file_id(name + MEMBER_MARK + inner)


def file_id(key: bytes, name: str) -> str:
    """Pseudonym of an object from its name relative to the archive."""
    # a name that is not UTF-8 holds surrogates, which have no bytes
    return pseudonym(key, "file", name.encode("utf-8", "backslashreplace").decode())


def _zipped(columns: dict[str, list[Any]], *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(columns[name] for name in names), strict=True)


def _encoded(text: str, column: str) -> bytes:
    """Names of members keep their bytes; in values lone surrogates have none."""
    errors = "surrogateescape" if column == "member" else "backslashreplace"
    return text.encode("utf-8", errors)


def _window_row(window: Window) -> tuple[float, float, str]:
    return window.center, window.width, window.function


_dumps = json.JSONEncoder(separators=(",", ":"), default=_window_row).encode
_loads = partial(json.JSONDecoder().raw_decode, idx=0)  # `json.loads` takes half as long again


@lru_cache(maxsize=1024)
def _common(text: str) -> dict[str, Any]:
    """Fields of a frame; not to be changed."""
    tree = dict(zip(_COMMON, json.loads(text), strict=True))
    for name in ("orientation", "pixel_spacing", "contrast_key", "flags"):
        if tree[name] is not None:
            tree[name] = tuple(tree[name])
    tree["region"] = tuple(map(tuple, tree["region"]))
    if tree["window"]:
        center, width, function = tree["window"]
        tree["window"] = Window(center=center, width=width, function=function)
    return tree
