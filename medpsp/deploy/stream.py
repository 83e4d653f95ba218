"""Slices of one series on their way to the network, few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.channels import neighbours
from medpsp.deploy.inputs import as_planes, window_rows
from medpsp.deploy.modelfile import ModelFile
from medpsp.dicom.read import Pixels
from medpsp.errors import DicomError
from medpsp.intensity import ValueCounts, needs_series_values, series_window, to_unit
from medpsp.types import FloatArray, Window

BATCH = 4
"""Slices at once through the network."""


class Frame(NamedTuple):
    """A decoded slice: its number in the series, its place on the grid, its pixels."""

    number: int
    place: int
    pixels: Pixels


class Segmented(NamedTuple):
    """A slice with its answer.

    Attributes:
        number: Of the slice in its series.
        place: On the grid of the series.
        unit: (H, W) or (H, W, 3) in [0, 1], as the network saw it; for pictures.
        mask: (H, W) class ids.
    """

    number: int
    place: int
    unit: FloatArray
    mask: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How the slices of one series are seen.

    Attributes:
        modality: Decides the window where the model carries none.
        inverted: True for MONOCHROME1.
        headers: The window of each slice's header.
        colour: The slices are RGB.
    """

    modality: str
    inverted: bool = False
    headers: Sequence[Window | None] = ()
    colour: bool = False


def needs_counts(model: ModelFile, seen: Seen) -> bool:
    """Whether all slices have to be looked at before the first one is shown."""
    channels = 3 if seen.colour else 1
    return not model.views and needs_series_values(seen.modality, model.window, channels)


def count_values(frames: Iterable[Frame]) -> ValueCounts:
    """Of a whole series, padding left out."""
    counts = ValueCounts()
    for frame in frames:
        padding = frame.pixels.padding
        counts.add(frame.pixels.values, None if padding is None else ~padding)
    return counts


def segment(
    model: ModelFile, frames: Iterable[Frame], seen: Seen, counts: ValueCounts
) -> Iterator[Segmented]:
    """Answers, slice by slice; no more than a few batches are held.

    Args:
        model: That answers.
        frames: Slices by their place on the grid.
        seen: How they are shown.
        counts: Of the values of the series, where `needs_counts` says so.

    Raises:
        DicomError: COLOUR_FOR_GREY_MODEL, INPUT_FOR_MODEL.
    """
    if seen.colour and model.given.colours == 1:
        raise DicomError("COLOUR_FOR_GREY_MODEL", "trained with model.in_channels 1")
    channels = 3 if seen.colour else 1
    window = series_window(seen.modality, model.window, counts, channels)
    own = seen.headers if model.header_window and channels == 1 else ()

    def shown(frame: Frame) -> Window:
        return (own[frame.number] if own else None) or window

    batch: list[tuple[Frame, Window, NDArray[Any]]] = []
    for near in _with_neighbours(frames, model.given.context):
        middle = near[len(near) // 2]
        batch.append((middle, shown(middle), _planes(model, near)))
        if len(batch) == BATCH:
            yield from _answered(model, batch, seen.inverted)
            batch.clear()
    if batch:
        yield from _answered(model, batch, seen.inverted)


def _answered(
    model: ModelFile, batch: Sequence[tuple[Frame, Window, NDArray[Any]]], inverted: bool
) -> Iterator[Segmented]:
    rows = [window_rows(_views(model, window, inverted), inverted) for _, window, _ in batch]
    masks = model.masks(np.stack([planes for *_, planes in batch]), np.stack(rows))
    for (frame, window, _), mask in zip(batch, masks, strict=True):
        unit = to_unit(frame.pixels.values, window, inverted)
        yield Segmented(frame.number, frame.place, unit, mask)


def _views(model: ModelFile, window: Window, inverted: bool) -> tuple[Window, ...]:
    views = model.views or (window,)
    constant = model.given.windows
    if constant and (views != constant or inverted):
        what = "MONOCHROME1" if inverted else f"window {window.center:g}/{window.width:g}"
        raise DicomError("INPUT_FOR_MODEL", f"{what}, the graph has its windows in it")
    return views


def _planes(model: ModelFile, near: Sequence[Frame]) -> NDArray[Any]:
    try:
        return as_planes([frame.pixels.values for frame in near], model.given)
    except ValueError as error:
        raise DicomError("INPUT_FOR_MODEL", str(error)) from None


def _with_neighbours(frames: Iterable[Frame], context: int) -> Iterator[list[Frame]]:
    """Each slice in the middle of its neighbours; see `channels.neighbours`.

    Whatever lies between them, those of a slice are among the ``context`` slices before it and
    behind it.
    """
    held: deque[Frame] = deque()
    source, here = iter(frames), 0
    while True:
        while len(held) <= here + context and (frame := next(source, None)):
            held.append(frame)
        if here == len(held):
            return
        places = {frame.place: number for number, frame in enumerate(held)}
        yield [held[number] for number in neighbours(places, held[here].place, context)]
        if here == context:
            held.popleft()
        else:
            here += 1
