"""Which series a SEG or RTSTRUCT belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial

from medpsp.dicom import rtstruct, segheader
from medpsp.dicom.container import open_place
from medpsp.dicom.items import items_of, reading, text_of, texts_of
from medpsp.dicom.parse import refusing
from medpsp.errors import LabelError
from medpsp.types import MaskKind, Place, Series

KINDS: dict[str, MaskKind] = {
    "1.2.840.10008.5.1.4.1.1.66.4": "seg",  # Segmentation Storage
    "1.2.840.10008.5.1.4.1.1.66.7": "seg",  # Label Map Segmentation Storage
    "1.2.840.10008.5.1.4.1.1.481.3": "rtstruct",  # RT Structure Set Storage
}
PATIENT_ID = 0x00100020
MOST_POINTS = 256
"""Sampled of an object, to tell which series holds them."""
MOST_UIDS = 100_000
"""References to images that are looked at."""

ON_SLICE = 0.1
"""How far a contour or frame may lie from a slice, in slices, to count as drawn on it."""

SOME, TIE = 1e-9, 0.05
MOSTLY = 0.9
"""Share of the points that a series must hold: any if it is referenced, most if it is not; two
series whose shares differ by less than `TIE` fit equally well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRef:
    """What a label object says of the images it was made on; real identifiers, memory only.

    Attributes:
        frames_of_reference: One, or for RTSTRUCT several.
        points: mm LPS, at most `MOST_POINTS`: the first pixel of frames, the first point of
            contours.
    """

    kind: MaskKind
    patient_id: str
    frames_of_reference: tuple[str, ...] = ()
    series_uids: tuple[str, ...] = ()
    sop_uids: tuple[str, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()


def label_target(ds: Dataset) -> LabelRef:
    """Read the references of a SEG or RTSTRUCT.

    Raises:
        LabelError: LABEL_KIND for any other object, LABEL_UNREADABLE, and the codes of the two
            ``sample_points``.
    """
    with reading("LABEL_UNREADABLE"):
        kind = KINDS.get(text_of(ds, "SOPClassUID"))
        if kind is None:
            raise LabelError("LABEL_KIND", "neither a SEG nor an RTSTRUCT")
        frames = [text_of(ds, "FrameOfReferenceUID")]
        series = items_of(ds, "ReferencedSeriesSequence")
        images = items_of(ds, "ReferencedSeriesSequence", "ReferencedInstanceSequence")
        images += items_of(ds, "SourceImageSequence")
        groups = ("DerivationImageSequence", "SourceImageSequence")
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            images += items_of(ds, name, *groups)
        for item in items_of(ds, "ReferencedFrameOfReferenceSequence"):
            frames.append(text_of(item, "FrameOfReferenceUID"))
            series += items_of(item, "RTReferencedStudySequence", "RTReferencedSeriesSequence")
        images += [image for item in series for image in items_of(item, "ContourImageSequence")]
        images += items_of(ds, "ROIContourSequence", "ContourSequence", "ContourImageSequence")
        for item in items_of(ds, "StructureSetROISequence"):
            frames.append(text_of(item, "ReferencedFrameOfReferenceUID"))
        series_uids = set(texts_of(series, "SeriesInstanceUID"))
        sop_uids = set(texts_of(images[:MOST_UIDS], "ReferencedSOPInstanceUID"))
        patient = text_of(ds, "PatientID")
    sample = segheader.sample_points if kind == "seg" else rtstruct.sample_points
    return LabelRef(
        kind=kind,
        patient_id=patient,
        frames_of_reference=tuple(sorted(set(frames) - {""})),
        series_uids=tuple(sorted(series_uids)),
        sop_uids=tuple(sorted(sop_uids)),
        points=tuple(sample(ds, MOST_POINTS)),
    )


def label_head(place: Place) -> tuple[str, str]:
    """What an object says at its very start, so that one which ends early tells whose it is.

    Returns:
        Kind (seg, rtstruct, or empty for any other object) and PatientID; the real one, for
        memory only.

    Raises:
        SourceError: LABEL_UNREADABLE, or a code of `open_place`.
    """
    with open_place(place) as stream, refusing("LABEL_UNREADABLE", "no header"):
        ds = read_partial(stream, stop_when=lambda tag, vr, length: tag > PATIENT_ID, force=True)
        kind = text_of(ds, "SOPClassUID") or text_of(ds.file_meta, "MediaStorageSOPClassUID")
        return KINDS.get(kind, ""), text_of(ds, "PatientID")


def match_series(
    ref: LabelRef,
    series: Sequence[Series],
    elsewhere: bool = False,
    name_of: Callable[[Series], str] = lambda item: "",
) -> tuple[int, ...]:
    """Find the series that a label object was made on.

    First by referenced image, then by referenced series; where the object references nothing
    that is there, by position among the series of the same patient and frame of reference (which
    may be missing, but not differ). Where several series are left, positions decide.

    Args:
        ref: Of the object.
        series: All that it may be meant for.
        elsewhere: It references images that are left out: it is of these, if of none in ``series``.
        name_of: Pseudonym of a series, for the message.

    Returns:
        Indices. More than one are parts of one series (split at a gap) or images of it at the same
        places (echoes); each is then a `Grid` with ``partial``.

    Raises:
        LabelError: LABEL_UNMATCHED, LABEL_AMBIGUOUS, LABEL_OTHER_MODALITY.
    """
    images, uids = set(ref.sop_uids), set(ref.series_uids)
    imaged = [i for i, s in enumerate(series) if any(r.sop_uid in images for r in s.slices)]
    named = imaged or [i for i, s in enumerate(series) if s.first.series_uid in uids]
    if len(named) == 1:
        return (named[0],)
    if elsewhere and not named:
        raise LabelError(
            "LABEL_OTHER_MODALITY", "drawn on images of a modality that is not in data.modalities"
        )
    pool = named or [i for i, s in enumerate(series) if _may_belong(ref, s)]
    on = {i: _on_slices(ref.points, series[i]) for i in pool}
    groups: dict[str, list[int]] = defaultdict(list)
    for i in pool:
        groups[series[i].first.series_uid].append(i)
    shares = {uid: _share([on[i] for i in group]) for uid, group in groups.items()}
    best = max(shares.values(), default=0.0)
    least = SOME if named else MOSTLY
    fit = {uid for uid, share in shares.items() if share >= max(least, best - TIE)}
    if not fit:
        raise LabelError(
            "LABEL_UNMATCHED",
            f"no reference leads to an image, and of {len(shares)} series that may be meant none "
            f"holds {least:.0%} or more of its {len(ref.points)} positions",
        )
    if len(fit) > 1:
        which = (series[groups[uid][0]] for uid in sorted(fit))
        said = sorted(f"{item.first.modality} {name_of(item)}".strip() for item in which)
        raise LabelError(
            "LABEL_AMBIGUOUS",
            f"it references no image that is there, and {len(fit)} series fit equally well: "
            f"{', '.join(said)}",
        )
    return tuple(i for i in groups[fit.pop()] if on[i].any())


def _may_belong(ref: LabelRef, series: Series) -> bool:
    frame = series.first.frame_of_reference
    same = not frame or not ref.frames_of_reference or frame in ref.frames_of_reference
    return bool(ref.patient_id) and ref.patient_id == series.first.patient_id and same


def _on_slices(points: Sequence[Sequence[float]], series: Series) -> NDArray[np.bool_]:
    """(P,) which points lie on a slice of a series, inside its borders."""
    if series.affine is None or not points:
        return np.zeros(len(points), dtype=np.bool_)
    to_index = np.linalg.inv(np.array(series.affine))
    index = np.array(points) @ to_index[:3, :3].T + to_index[:3, 3]
    nearest, size = np.round(index), np.array(series.shape[::-1])
    inside = ((nearest >= 0) & (nearest < size)).all(axis=1)
    taken = np.isin(nearest[:, 2], series.grid_index)
    return np.asarray(inside & taken & (np.abs(index[:, 2] - nearest[:, 2]) <= ON_SLICE))


def _share(parts: Sequence[NDArray[np.bool_]]) -> float:
    """Share of the points that lie on any part."""
    return float(np.any(parts, axis=0).mean()) if len(parts[0]) else 0.0
