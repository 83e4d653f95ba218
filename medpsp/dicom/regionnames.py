"""Names of the segments and regions of label objects, for who proposes classes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydicom.dataset import Dataset

from medpsp.dicom.deidentify import BODY_PARTS
from medpsp.dicom.items import items_of, number_of, reading, text_of
from medpsp.dicom.labelref import KINDS
from medpsp.dicom.names import LONGEST_NAME
from medpsp.dicom.rtstruct import CLOSED
from medpsp.dicom.segheader import read_header
from medpsp.errors import LabelError

_IDS = ("PatientID", "AccessionNumber", "StudyID", "OtherPatientIDs")
_WORD = re.compile(r"[^\W_]+")
_LEAST = 4
"""Letters of a word that is looked for within others; shorter ones must be words themselves."""


def region_names(ds: Dataset) -> list[tuple[str, bool]]:
    """The segments of a SEG, or the regions of an RTSTRUCT that have closed contours.

    Args:
        ds: The parsed object.

    Returns:
        Name, without what is not significant around it, and whether a word of it is one of the
        object's own persons or ids: such a name names somebody.

    Raises:
        LabelError: LABEL_KIND, LABEL_UNREADABLE, and the codes of `segheader.read_header`.
    """
    with reading("LABEL_UNREADABLE"):
        kind = KINDS.get(text_of(ds, "SOPClassUID"))
        if kind is None:
            raise LabelError("LABEL_KIND", "neither a SEG nor an RTSTRUCT")
        found = read_header(ds).names.values() if kind == "seg" else _drawn(ds)
        own = _own_words(ds)
    plain = (name[:LONGEST_NAME].strip(" \0") for name in found)
    return [(name, _is_own(name, own)) for name in plain]


def _drawn(ds: Dataset) -> Iterator[str]:
    drawn = {
        number_of(region, "ReferencedROINumber")
        for region in items_of(ds, "ROIContourSequence")
        if any(
            text_of(item, "ContourGeometricType") in CLOSED
            for item in items_of(region, "ContourSequence")
        )
    }
    for item in items_of(ds, "StructureSetROISequence"):
        if number_of(item, "ROINumber") in drawn:
            yield text_of(item, "ROIName")


def _own_words(ds: Dataset) -> set[str]:
    """Words of the names of persons, and of ids, at the top of an object."""
    persons = [str(element.value or "") for element in ds if element.VR == "PN"]
    ids = [text_of(ds, keyword) for keyword in _IDS]
    found = {word for text in persons for word in _words(text) if len(word) > 1}
    found |= {word for text in ids for word in _words(text) if len(word) >= _LEAST}
    return {word for word in found if word.upper() not in BODY_PARTS}  # Breast^Study is no person


def _is_own(name: str, own: set[str]) -> bool:
    words = _words(name)
    return any(word in words or (len(word) >= _LEAST and word in name.casefold()) for word in own)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
