"""Images that claim one identity or one place: which of them stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from medpsp.dicom.patients import Refused
from medpsp.errors import GeometryError
from medpsp.types import Place, SliceRef

SamePixels = Callable[[Sequence[SliceRef]], bool]
_T = TypeVar("_T")


def name_of(ref: SliceRef) -> tuple[object, ...]:
    """What slices are sorted by, so that the order of the input makes no difference."""
    return ref.file_id, ref.frame, ref.path, ref.member, ref.sop_uid


def one_of_each(
    refs: list[SliceRef], same_pixels: SamePixels, refused: Refused
) -> Iterator[list[SliceRef]]:
    """The frames of each object, every SOPInstanceUID once.

    The others go to ``refused``: DUP_IDENTICAL, or DUP_CONFLICT for all where they differ.
    """
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
            copies = agreeing(
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


def agreeing(images: list[_T], alike: Callable[[list[_T]], bool]) -> list[_T]:
    """The images that are equal once damaged ones are set aside; none if whole ones differ."""
    if alike(images):
        return images
    whole = [image for image in images if alike([image])]
    return whole if 0 < len(whole) < len(images) and alike(whole) else []


def settle(
    refs: Sequence[SliceRef], rivals: list[int], same_pixels: SamePixels, refused: Refused
) -> list[int]:
    """Which of the slices that nothing tells apart stay: one, or none.

    The others go to ``refused``: DUP_IDENTICAL, or DUP_POSITION for all where they differ.
    """
    if len(rivals) == 1:
        return rivals
    rivals = sorted(rivals, key=lambda i: name_of(refs[i]))
    copies = agreeing(rivals, lambda some: same_pixels([refs[i] for i in some]))
    same = GeometryError("DUP_IDENTICAL", "an equal image of this position is kept")
    other = GeometryError(
        "DUP_POSITION", f"{len(rivals)} images of one position differ, or are damaged"
    )
    refused += [(refs[i], same if i in copies else other) for i in rivals if i not in copies[:1]]
    return copies[:1]
