"""Whose slices are whose: no patient may end up as two, nor two as one.

Patients go to train, val or test as a whole, so a mistake here leaks what is tested into training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath

from medpsp.errors import GeometryError
from medpsp.types import SliceRef

Refused = list[tuple[SliceRef, GeometryError]]


def settle_patients(slices: Iterable[SliceRef]) -> tuple[list[SliceRef], Refused]:
    """Give every slice a patient, or refuse it.

    A SeriesInstanceUID is of one patient: where its slices name two, all are refused. A slice
    without PatientID belongs to the patient that the others of its series name; without one, its
    study stands for the patient, else its series, its frame of reference, or its folder: slices
    whose headers were emptied are a volume still.

    Returns:
        The slices, and the refused ones with PATIENT_CONFLICT.
    """
    refs = list(slices)
    named: dict[str, set[str]] = defaultdict(set)
    for ref in refs:
        if ref.series_uid and ref.patient_id:
            named[ref.series_uid].add(ref.patient_id)
    kept: list[SliceRef] = []
    refused: Refused = []
    for ref in refs:
        patients = named.get(ref.series_uid, set())
        if len(patients) > 1:
            error = f"{len(patients)} values of PatientID in one SeriesInstanceUID"
            refused.append((ref, GeometryError("PATIENT_CONFLICT", error)))
        elif ref.patient_id:
            kept.append(ref)
        else:
            file = PurePath(ref.path, ref.member)
            alone = stand_in(ref.study_uid, ref.series_uid, ref.frame_of_reference, file)
            kept.append(replace(ref, patient_id=next(iter(patients), alone)))
    return kept, refused


def stand_in(study_uid: str, series_uid: str, frame_of_reference: str, file: PurePath) -> str:
    """What stands for the patient of a slice that nothing names: the first of these that is there.

    Args:
        study_uid: StudyInstanceUID, or empty.
        series_uid: SeriesInstanceUID, or empty.
        frame_of_reference: FrameOfReferenceUID, or empty.
        file: Of the slice, its member behind it; its folder counts.
    """
    if study_uid:
        return f"study:{study_uid}"
    if series_uid:
        return f"series:{series_uid}"
    if frame_of_reference:
        return f"frame:{frame_of_reference}"
    return f"folder:{file.parent}"
