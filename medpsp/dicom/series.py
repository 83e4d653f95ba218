"""Slices to series: one image of each identity, group, order along the normal, find the grid.

Identity comes from UIDs and frame numbers, order from positions. Folders, file names and
InstanceNumber play no part, and the order of the input makes no difference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

from medpsp.dicom.geometry import (
    LINE_TOL_MM,
    SPACING_ATOL_MM,
    Floats,
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
from medpsp.errors import GeometryError
from medpsp.types import Place, ReadPolicy, Series, SliceRef

SAME_GRID_TOL = 1e-3
"""Direction cosines (absolute) and pixel spacings (relative) this close are one grid."""

SamePixels = Callable[[Sequence[SliceRef]], bool]
Refused = list[tuple[SliceRef, GeometryError]]
_T = TypeVar("_T")


class _Stack(NamedTuple):
    """Slices of one plane in the order of their depth."""

    refs: list[SliceRef]
    axes: Floats  # (3, 3) row direction, column direction, normal
    coords: Floats  # (N, 3) u, v, d, mm

    def take(self, wanted: Iterable[int]) -> _Stack:
        index = list(wanted)
        return _Stack([self.refs[i] for i in index], self.axes, self.coords[index])


def group_series(
    slices: Iterable[SliceRef], policy: ReadPolicy, same_pixels: SamePixels
) -> tuple[list[Series], Refused]:
    """Group and order slices; whatever is in no series comes back with a reason.

    Objects of one SOPInstanceUID are one image if headers and pixels agree: all but one are
    refused as DUP_IDENTICAL. Where they differ nobody knows which is right: DUP_CONFLICT for
    all, unless just one version decodes. So it is with images of one position that no echo,
    time, b-value, acquisition or kernel tells apart: DUP_IDENTICAL or DUP_POSITION. Images
    without patient geometry become series without an affine: the frames of one object, or the
    single images of one SeriesInstanceUID.

    Args:
        slices: Frames in any order.
        policy: ``gaps`` counts here.
        same_pixels: Whether these images decode, and to the same values; asked only where two
            images claim one identity or one place.

    Returns:
        The series, sorted by (patient, series UID, first position), and the refused slices with
        GEOM_NONFINITE, GEOM_BAD_IOP, GEOM_BAD_SPACING, DUP_IDENTICAL, DUP_CONFLICT, DUP_POSITION,
        MISSING_SLICES or UNEVEN_SPACING. Codes in ``Series.flags``: GEOM_MISSING, SINGLE_SLICE,
        GANTRY_TILT, MISSING_SLICES, UNEVEN_SPACING.
    """
    refused: Refused = []
    flat: dict[tuple[object, ...], list[SliceRef]] = defaultdict(list)
    solid: dict[tuple[object, ...], list[SliceRef]] = defaultdict(list)
    for frames in _one_of_each(sorted(slices, key=_name), same_pixels, refused):
        cine = len(frames) > 1 and len({(r.position, r.collision_key) for r in frames}) == 1
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
            for stack in _apart(plane, same_pixels, refused):
                series += _volumes(stack, policy.gaps, refused)
    series.sort(key=lambda s: (s.first.patient_id, s.first.series_uid, s.z_mm[:1], _name(s.first)))
    return series, sorted(refused, key=lambda pair: _name(pair[0]))


def _name(ref: SliceRef) -> tuple[object, ...]:
    return ref.file_id, ref.frame, ref.path, ref.member, ref.sop_uid


def _one_of_each(
    refs: list[SliceRef], same_pixels: SamePixels, refused: Refused
) -> Iterator[list[SliceRef]]:
    """The frames of each object, every SOPInstanceUID once."""
    by_uid: dict[object, dict[Place, list[SliceRef]]] = defaultdict(lambda: defaultdict(list))
    for ref in refs:
        by_uid[ref.sop_uid or ref.place][ref.place].append(ref)
    for objects in by_uid.values():
        if len(objects) == 1:
            yield from objects.values()
            continue
        # flags tell how the bytes came, inside a zip file for one
        headers = {
            tuple(replace(r, path="", member="", file_id="", flags=()) for r in frames)
            for frames in objects.values()
        }
        copies: list[list[SliceRef]] = []
        if len(headers) == 1:
            copies = _agreeing(
                list(objects.values()), lambda some: all(map(same_pixels, zip(*some, strict=True)))
            )
        yield from copies[:1]
        same = GeometryError("DUP_IDENTICAL", "an object of this SOPInstanceUID is kept")
        other = GeometryError(
            "DUP_CONFLICT", f"{len(objects)} objects of one SOPInstanceUID differ, or are damaged"
        )
        for frames in objects.values():
            if frames not in copies[:1]:
                refused += [(ref, same if frames in copies else other) for ref in frames]


def _agreeing(images: list[_T], alike: Callable[[list[_T]], bool]) -> list[_T]:
    """The images that are equal once damaged ones are set aside; none if whole ones differ."""
    if alike(images):
        return images
    whole = [image for image in images if alike([image])]
    return whole if 0 < len(whole) < len(images) and alike(whole) else []


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


def _planes(refs: list[SliceRef]) -> Iterator[_Stack]:
    """Slices of one direction and pixel spacing, ordered along the normal."""
    grids: dict[int, list[SliceRef]] = defaultdict(list)
    rows = [
        (*(r.orientation or ()), *(math.log(v) for v in r.pixel_spacing or ())) for r in refs
    ]  # differences of logarithms are relative
    for ref, number in zip(refs, near_groups(rows, SAME_GRID_TOL), strict=True):
        grids[number].append(ref)
    for grid in grids.values():
        turns = {r.orientation or () for r in grid}
        middle = np.median(list(turns), axis=0).tolist() if len(turns) > 1 else turns.pop()
        axes = axes_of(middle)
        coords = np.array([r.position for r in grid], dtype=np.float64) @ axes.T
        yield _Stack(grid, axes, coords).take(np.argsort(coords[:, 2], kind="stable").tolist())


def _apart(stack: _Stack, same_pixels: SamePixels, refused: Refused) -> Iterator[_Stack]:
    """Split slices that lie where others lie, into as few stacks as will do.

    By the first of these that works: place within the plane, echo, time, b-value, acquisition,
    kernel, then pairs of them and so on. Scanners change some of these within one volume, so
    none counts where fewer stacks do without it, or where no two positions collide.
    """
    coords = stack.coords
    apart = np.diff(coords[:, 2]) > SPACING_ATOL_MM
    if apart.all():
        yield stack
        return
    places = [0, *np.cumsum(apart).tolist()]
    beside = near_groups([tuple(c) for c in coords[:, :2].tolist()], LINE_TOL_MM)
    width = max(len(ref.collision_key) for ref in stack.refs)
    keys = [
        (number, *ref.collision_key, *[""] * (width - len(ref.collision_key)))
        for number, ref in zip(beside, stack.refs, strict=True)
    ]
    claims: dict[object, list[int]] = defaultdict(list)
    for i, claim in enumerate(zip(places, keys, strict=True)):
        claims[claim].append(i)
    kept: list[int] = []
    for rivals in claims.values():
        kept += _settle(stack.refs, rivals, same_pixels, refused)
    kept.sort()
    parts: dict[object, list[int]] = defaultdict(list)
    for i, label in zip(
        kept, _labels([places[i] for i in kept], [keys[i] for i in kept]), strict=True
    ):
        parts[label].append(i)
    for members in parts.values():
        yield stack.take(members)


def _settle(
    refs: list[SliceRef], rivals: list[int], same_pixels: SamePixels, refused: Refused
) -> list[int]:
    """Which of the slices that nothing tells apart stay: one, or none."""
    if len(rivals) == 1:
        return rivals
    rivals = sorted(rivals, key=lambda i: _name(refs[i]))
    copies = _agreeing(rivals, lambda some: same_pixels([refs[i] for i in some]))
    same = GeometryError("DUP_IDENTICAL", "an equal image of this position is kept")
    other = GeometryError(
        "DUP_POSITION", f"{len(rivals)} images of one position differ, or are damaged"
    )
    refused += [(refs[i], same if i in copies else other) for i in rivals if i not in copies[:1]]
    return copies[:1]


def _labels(places: list[int], keys: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Parts of the keys that differ wherever places agree, with the fewest values."""
    columns = list(zip(*keys, strict=True))
    labels, fewest = keys, len(set(keys))
    for size in range(1, len(columns)):
        for chosen in combinations(columns, size):
            tried = list(zip(*chosen, strict=True))
            parts = len(set(tried))
            if parts < fewest and len(set(zip(places, tried, strict=True))) == len(places):
                labels, fewest = tried, parts
    return labels


def _volumes(stack: _Stack, gaps: str, refused: Refused) -> list[Series]:
    """A stack as one series where its steps are equal, else as the policy has it."""
    coords = stack.coords
    runs = cut_runs(coords)
    if len(runs) > 1 and gaps == "reject":
        error = irregular(coords, joints(coords, runs))
        refused += [(ref, error) for ref in stack.refs]
        return []
    if len(runs) > 1 and gaps == "fill":
        runs = fill_gaps(coords, runs)
    codes = ["MISSING_SLICES" if n > 1 else "UNEVEN_SPACING" for n in joints(coords, runs)]
    return [
        _volume(stack, run, {*codes[max(0, i - 1) : i + 1]})  # of the cuts at either end
        for i, run in enumerate(runs)
    ]


def _volume(stack: _Stack, run: Run, flags: set[str]) -> Series:
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
