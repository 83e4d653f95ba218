"""Masks of series: NIfTI files by name, SEG and RTSTRUCT objects by what they reference."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from medpsp.dataconfig import DataConfig
from medpsp.dicom.checked import checked_target
from medpsp.dicom.codes import refusal
from medpsp.dicom.labelref import LabelRef, match_series
from medpsp.dicom.labels import mask_path
from medpsp.dicom.sandbox import Sandbox, SandboxPool
from medpsp.dicom.scan import LabelFile
from medpsp.dicom.walk import leads_nowhere
from medpsp.errors import LabelError, SourceError
from medpsp.types import MaskKind, Place, ScanRow, Series
from shards.components import LeftOut, Link, link_of
from shards.spool import Span, Spool

log = logging.getLogger("medpsp")
Reasons = dict[int, tuple[str, str]]
"""Number of a series to the code and detail of why it has no mask."""


class Aim(NamedTuple):
    """A label object, what it references, and whether that is an image that is left out."""

    file: LabelFile
    target: LabelRef
    elsewhere: bool = False


class Aims:
    """Label objects that can be read, put aside: one may reference 10^5 images.

    Attributes:
        links: Of each, for `components.cut_catalog`.
        fate: Rows of those that cannot be used.
        robbed: Patients of these: what they label may be background in other masks.

    Args:
        files: Label objects.
        pool: Children that read them.
        left: Images that are not asked for.
    """

    def __init__(self, files: Iterable[LabelFile], pool: SandboxPool, left: LeftOut) -> None:
        self._spool, self._spans = Spool(), list[Span]()
        self.links: list[Link] = []
        self.fate: list[ScanRow] = []
        self.robbed: set[str] = set()
        for file, (target, patient) in pool.map(_target, files):
            if isinstance(target, SourceError):
                self.fate.append(_refused(file, target))
                self.robbed.add(patient)
            else:
                self.links.append(link_of(patient, target.series_uids, target.sop_uids))
                known = left.holds(self.links[-1])
                text = json.dumps([asdict(file), asdict(target), known])
                self._spans.append(self._spool.append(text.encode()))

    def some(self, numbers: Iterable[int]) -> Iterator[Aim]:
        """Those of these numbers, in the order of `links`."""
        for number in numbers:
            file, target, known = json.loads(self._spool.read(self._spans[number]))
            place = Place(*file["place"])
            yield Aim(LabelFile(**{**file, "place": place}), checked_target(target), known)


def nifti_masks(series: Sequence[Series], data: DataConfig) -> tuple[list[Series], Reasons]:
    """Series with the masks that ``data.label_pattern`` names.

    Parts of a series that was split at a gap share one: `SeriesFile.finish` tells.
    """
    found: list[Series] = []
    reasons: Reasons = {}
    root = data.labels or data.archive
    for number, item in enumerate(series):
        masks: tuple[Place, ...] = ()
        try:
            path = mask_path(root, data.label_pattern, item.first, data.archive)
            masks = (Place(str(path)),) if is_there(path, root) else ()
        except LabelError as error:
            reasons[number] = (error.code, error.detail)
        except (OSError, ValueError) as error:  # its text would hold the PatientID
            known = getattr(error, "errno", None)
            reasons[number] = (
                ("FILE_UNREADABLE", f"the mask: {os.strerror(known)}")
                if known and known not in _NO_NAME
                else ("LABEL_NONE", "a header value makes no file name")
            )
        found.append(replace(item, masks=masks, mask_kind="nifti" if masks else ""))
    return found, reasons


_NO_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)


def is_there(path: Path, root: Path) -> bool:
    """Whether there is a file.

    Raises:
        OSError: It cannot be told, or a link on the way leads nowhere: it may be there another
            time.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if leads_nowhere(path, root):
            raise
        return False


def dicom_masks(
    series: Sequence[Series],
    aims: Iterable[Aim],
    robbed: Iterable[str],
    kind: MaskKind,
    name_of: Callable[[Series], str],
) -> tuple[list[Series], list[ScanRow]]:
    """Series with the label objects that belong to them, and a row for each object.

    One that fits nowhere marks the labelled series of its patient: what it labels may be
    background there. One of images that are left out is no labels of theirs.

    Args:
        series: All that the objects may be meant for.
        aims: Label objects.
        robbed: Patients of whom other label objects could not be used.
        kind: Of the objects.
        name_of: Pseudonym of a series, for messages.
    """
    masks: dict[int, list[Place]] = {}
    shared: set[int] = set()
    fate: list[ScanRow] = []
    robbed = set(robbed)
    index = _Index(series)
    for file, target, elsewhere in aims:
        some = index.of(target)
        try:
            matched = match_series(target, [series[number] for number in some], elsewhere, name_of)
        except SourceError as error:
            fate.append(_refused(file, error))
            robbed |= {target.patient_id} if fate[-1].status == "quarantined" else set()
            continue
        numbers = [some[place] for place in matched]
        for number in numbers:
            masks.setdefault(number, []).append(file.place)
        shared.update(numbers if len(numbers) > 1 else ())
        fate.append(ScanRow(file_id=file.file_id, status="kept", code="LABEL_USED"))
    found = list(series)
    for number, places in masks.items():
        item = found[number]
        known = item.first.patient_id in robbed - {""}
        found[number] = replace(
            item,
            masks=tuple(places),
            mask_kind=kind,
            mask_partial=number in shared,
            flags=item.flags + ("LABEL_INCOMPLETE",) * known,
        )
    return found, fate


class _Index:
    """Which series a label object may be meant for: `match_series` looks at all it is given."""

    def __init__(self, series: Sequence[Series]) -> None:
        self._images: dict[str, set[int]] = defaultdict(set)
        self._series: dict[str, set[int]] = defaultdict(set)
        self._patients: dict[str, set[int]] = defaultdict(set)
        for number, item in enumerate(series):
            self._series[item.first.series_uid].add(number)
            self._patients[item.first.patient_id].add(number)
            for ref in item.slices:
                self._images[ref.sop_uid].add(number)

    def of(self, target: LabelRef) -> list[int]:
        found = set(self._patients.get(target.patient_id, ()))
        for uid in target.series_uids:
            found |= self._series.get(uid, set())
        for uid in target.sop_uids:
            found |= self._images.get(uid, set())
        return sorted(found)


def _target(box: Sandbox, file: LabelFile) -> tuple[LabelRef | SourceError, str]:
    """What a label object references, or why it cannot be used; and the patient, if it says so."""
    if file.code:
        return LabelError(file.code, file.detail), file.patient_id
    try:
        target = box.label_target(file.place)
    except SourceError as error:
        return error, box.label_head(file.place)[1]
    return target, target.patient_id


def _refused(file: LabelFile, error: SourceError) -> ScanRow:
    row = refusal(file.file_id, error.code, error.detail)
    if row.status == "quarantined":
        log.warning("label object %s: %s; data.crosswalk tells its file", file.file_id, error)
    return row
