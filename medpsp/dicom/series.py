"""Slices to series: one image of each identity, group, order along the normal, find the grid.

Identity comes from UIDs and frame numbers, order from positions. Folders, file names and
InstanceNumber play no part, and the order of the input makes no difference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from medpsp.dicom.geometry import (
    Run,
    affine_of,
    axes_of,
    check_slice,
    cut_runs,
    fill_gaps,
    irregular,
    is_tilted,
    joints,
    near_groups,
)
from medpsp.dicom.patients import Refused, settle_patients
from medpsp.dicom.rivals import SamePixels, name_of, one_of_each
from medpsp.dicom.stacks import Stack, apart, by_contrast
from medpsp.errors import GeometryError
from medpsp.types import ReadPolicy, Series, SliceRef

SAME_GRID_TOL = 1e-3
"""Direction cosines (absolute) and pixel spacings (relative) this close are one grid."""


def group_series(
    slices: Iterable[SliceRef], policy: ReadPolicy, same_pixels: SamePixels
) -> tuple[list[Series], Refused]:
    """Group and order slices; whatever is in no series comes back with a reason.

    Objects of one SOPInstanceUID are one image if headers and pixels agree: all but one are
    refused as DUP_IDENTICAL. Where they differ nobody knows which is right: DUP_CONFLICT for
    all, unless just one version decodes. So it is with images of one position that nothing in
    the header tells apart: DUP_IDENTICAL or DUP_POSITION. Images without patient geometry become
    series without an affine: the frames of one object, or the single images of one
    SeriesInstanceUID.

    Args:
        slices: Frames in any order.
        policy: ``gaps`` counts here.
        same_pixels: Whether these images decode, and to the same values; asked only where two
            images claim one identity or one place.

    Returns:
        The series, sorted by (patient, series UID, first position), and the refused slices with
        GEOM_NONFINITE, GEOM_BAD_IOP, GEOM_BAD_SPACING, DUP_IDENTICAL, DUP_CONFLICT, DUP_POSITION,
        MISSING_SLICES, UNEVEN_SPACING or PATIENT_CONFLICT. Codes in ``Series.flags``:
        GEOM_MISSING, SINGLE_SLICE, GANTRY_TILT, MISSING_SLICES, UNEVEN_SPACING, BY_TIME,
        MIXED_CONTRAST.
    """
    known, refused = settle_patients(slices)
    flat: dict[tuple[object, ...], list[SliceRef]] = defaultdict(list)
    solid: dict[tuple[object, ...], list[SliceRef]] = defaultdict(list)
    for frames in one_of_each(sorted(known, key=name_of), same_pixels, refused):
        told_apart = {(r.position, r.contrast_key, r.collision_key) for r in frames}
        cine = len(frames) > 1 and len(told_apart) == 1
        for ref in frames:
            try:
                check_slice(ref.position or (), ref.orientation or (), ref.pixel_spacing or ())
            except GeometryError as error:
                refused.append((ref, error))
                continue
            if cine or _has_no_place(ref):
                flat[(*_kind(ref), ref.pixel_spacing, ref.frames > 1 and ref.place)].append(ref)
            else:
                solid[_kind(ref)].append(ref)
    series = [_pictures(members) for members in flat.values()]
    for members in solid.values():
        for plane in _planes(members):
            for stack in apart(plane, same_pixels, refused):
                for part in by_contrast(stack):
                    series += _volumes(part, policy.gaps, refused)
    series.sort(
        key=lambda s: (s.first.patient_id, s.first.series_uid, s.z_mm[:1], name_of(s.first))
    )
    return series, sorted(refused, key=lambda pair: name_of(pair[0]))


def _has_no_place(ref: SliceRef) -> bool:
    """Whether the patient plane is unknown; a spacing at the detector is none of that plane."""
    return (
        None in (ref.position, ref.orientation, ref.pixel_spacing)
        or ref.spacing_source == "detector"
    )


def _kind(ref: SliceRef) -> tuple[object, ...]:
    """What images of one series share; int16 and float32 mix where slopes differ by slice."""
    return (
        ref.patient_id,
        ref.study_uid,
        ref.series_uid,
        ref.modality,
        ref.rows,
        ref.columns,
        ref.channels,
        ref.photometric,
        ref.spacing_source,
        ref.frame_of_reference,
        ref.series_split_key,
    )


def _one_dtype(refs: Sequence[SliceRef]) -> tuple[SliceRef, ...]:
    """float32 for all where some need it: a slice whose slope happens to be 1 is no gap."""
    if len({ref.dtype for ref in refs}) == 1:
        return tuple(refs)
    return tuple(replace(ref, dtype="float32") for ref in refs)


def _pictures(refs: list[SliceRef]) -> Series:
    """Images without a place, by file and frame."""
    volumetric = refs[0].modality in ("CT", "MR") and _has_no_place(refs[0])
    flags = ("GEOM_MISSING",) if volumetric else ()
    return Series(slices=_one_dtype(refs), affine=None, z_mm=(), flags=flags)


def _planes(refs: list[SliceRef]) -> Iterator[Stack]:
    """Slices of one direction and pixel spacing, ordered along the normal."""
    grids: dict[int, list[SliceRef]] = defaultdict(list)
    rows = [
        (*(r.orientation or ()), *(math.log(v) for v in r.pixel_spacing or ())) for r in refs
    ]  # differences of logarithms are relative
    for ref, number in zip(refs, near_groups(rows, SAME_GRID_TOL), strict=True):
        grids[number].append(ref)
    for grid in grids.values():
        turns = {r.orientation or () for r in grid}
        axes = axes_of(np.median(list(turns), axis=0).tolist())
        coords = np.array([r.position for r in grid], dtype=np.float64) @ axes.T
        yield Stack(grid, axes, coords).take(np.argsort(coords[:, 2], kind="stable").tolist())


def _volumes(stack: Stack, gaps: str, refused: Refused) -> list[Series]:
    """A stack as one series where its steps are equal, else as the policy has it."""
    coords = stack.coords
    runs = cut_runs(coords)
    if len(runs) > 1:
        if gaps == "reject":
            error = irregular(coords, joints(coords, runs))
            refused += [(ref, error) for ref in stack.refs]
            return []
        if gaps == "fill":
            runs = fill_gaps(coords, runs)
    codes = ["MISSING_SLICES" if n > 1 else "UNEVEN_SPACING" for n in joints(coords, runs)]
    return [
        _volume(stack, run, {*stack.flags, *codes[max(0, i - 1) : i + 1]})  # cuts at either end
        for i, run in enumerate(runs)
    ]


def _volume(stack: Stack, run: Run, flags: set[str]) -> Series:
    refs = stack.refs[run.start : run.stop]
    coords = stack.coords[run.start : run.stop]
    if len(refs) == 1:
        flags.add("SINGLE_SLICE")
    elif is_tilted(coords):
        flags.add("GANTRY_TILT")
    if run.grid:
        flags.add("MISSING_SLICES")
    ends = np.array([refs[0].position, refs[-1].position], dtype=np.float64)
    return Series(
        slices=_one_dtype(refs),
        affine=affine_of(stack.axes, refs[0].pixel_spacing or (), ends, run.places[-1]),
        z_mm=tuple(coords[:, 2].tolist()),
        grid=run.grid,
        flags=tuple(sorted(flags)),
    )
