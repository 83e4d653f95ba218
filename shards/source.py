"""Slices of a planned part from their sources: decoded, windowed, labelled, one after another.

Everything that touches a source's bytes runs in the sandbox of this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.codes import refusal
from medpsp.dicom.names import NameRule
from medpsp.dicom.read import Pixels
from medpsp.dicom.sandbox import Sandbox, shared_sandbox
from medpsp.dicom.values import luma
from medpsp.errors import DicomError, LabelError, SourceError
from medpsp.intensity import needs_series_values, series_window
from medpsp.types import IGNORE, ScanRow, Series, SliceRef, Window
from shards.layout import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteSettings:
    """What decides the bytes of a shard besides its sources.

    The last two are limits of the sandbox and decide nothing; see `text`.
    """

    source: str
    labels: NameRule
    label_map: tuple[tuple[int, int], ...]
    mask_geometry: str
    mask_resample: str
    window: Window | None
    header_window: bool
    padding: str
    shard_slices: int
    decode_seconds: int = 30
    decode_memory_mib: int = 1024

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.labels.classes)

    @property
    def text(self) -> str:
        """Stable text of what decides the bytes, for the plan's digest."""
        tree = asdict(self)
        del tree["decode_seconds"], tree["decode_memory_mib"]
        return json.dumps(tree, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slice:
    """One slice as it goes into a shard.

    Attributes:
        number: Within ``Series.slices``.
        image: (H, W) or (H, W, 3).
        label: (H, W) class indices and 255.
        labelled: False where nothing says what is what: the label is all 255.
        padding: Share of the pixels that are padding.
        flags: Codes about the labels of the series, beside those of slice and series.
    """

    number: int
    image: NDArray[Any]
    label: NDArray[np.uint8]
    labelled: bool
    window: Window
    padding: float
    flags: tuple[str, ...]


def read_part(part: Part, settings: WriteSettings, refused: list[ScanRow]) -> Iterator[Slice]:
    """Every readable slice of a part; the others go to ``refused``."""
    series = part.planned.series
    wanted = range(part.start, part.stop)
    box = shared_sandbox(settings.decode_seconds, settings.decode_memory_mib)

    def refuse(number: int, error: SourceError) -> None:
        ref = series.slices[number]
        refused.append(refusal(ref.file_id, error.code, error.detail, ref.frame))

    try:
        volume, flags = _volume_labels(series, settings, box)
    except SourceError as error:
        for number in wanted:
            refuse(number, error)
        return
    pixels, series_wide = _pixels(part, settings, box, refuse)
    for number, (image, padding) in pixels.items():
        try:
            label, labelled = _slice_label(series, number, volume, settings, box)
        except SourceError as error:
            refuse(number, error)
            continue
        window = series.slices[number].window if settings.header_window else None
        if padding is not None and settings.padding == "ignore":
            label = np.where(padding & (label == 0), np.uint8(IGNORE), label)
        yield Slice(
            number=number,
            image=image,
            label=label,
            labelled=labelled,
            window=window or series_wide,
            padding=0.0 if padding is None else float(padding.mean()),
            flags=flags,
        )


def _pixels(
    part: Part, settings: WriteSettings, box: Sandbox, refuse: Callable[[int, SourceError], None]
) -> tuple[dict[int, Pixels], Window]:
    """The slices of the part, and the window of the series, for which all of it may be needed."""
    series, wanted = part.planned.series, range(part.start, part.stop)
    first = series.first
    whole = needs_series_values(first.modality, settings.window, first.channels)
    whole = whole and not (settings.header_window and all(ref.window for ref in series.slices))
    pixels: dict[int, Pixels] = {}
    shown: list[NDArray[Any]] = []
    for number in range(len(series.slices)) if whole else wanted:
        try:
            found = _read_image(series.slices[number], settings.source, series, box)
        except SourceError as error:
            if number in wanted:
                refuse(number, error)
            continue
        if whole:  # padding says nothing about the range of the values
            shown.append(
                found.values[~found.padding] if found.padding is not None else found.values
            )
        if number in wanted:
            pixels[number] = found
    values = np.concatenate([v.ravel() for v in shown]) if shown else np.zeros(0)
    return pixels, series_window(first.modality, settings.window, values, first.channels)


def _read_image(ref: SliceRef, source: str, series: Series, box: Sandbox) -> Pixels:
    first = series.first
    pixels = box.frame(ref) if source == "dicom" else Pixels(box.image(ref.place), None)
    if source == "voc" and first.channels == 1 and pixels.values.ndim == 3:
        pixels = Pixels(luma(pixels.values), None)
    shape = (first.rows, first.columns, 3)[: 3 if first.channels == 3 else 2]
    values = pixels.values
    if values.shape != shape or values.dtype != first.dtype:  # numpy would cut it to fit
        raise DicomError(
            "PIX_UNLIKE_SERIES",
            f"{values.shape} {values.dtype}, its series is {shape} {first.dtype}",
        )
    return pixels


def _volume_labels(
    series: Series, settings: WriteSettings, box: Sandbox
) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
    """(N, H, W) classes on the grid of a series; None for PNG masks and no mask."""
    if not series.masks or series.mask_kind == "png":
        return None, ()
    rule, geometry, resample = settings.labels, settings.mask_geometry, settings.mask_resample
    try:
        volume = box.labels(series, rule, geometry, resample)
    except DicomError as error:  # the images are sound
        raise LabelError("LABEL_UNREADABLE", f"{error.code}: {error.detail}") from None
    return volume.values, tuple(sorted(volume.notes))


def _slice_label(
    series: Series,
    number: int,
    volume: NDArray[np.uint8] | None,
    settings: WriteSettings,
    box: Sandbox,
) -> tuple[NDArray[np.uint8], bool]:
    shape = (series.first.rows, series.first.columns)
    if volume is not None:
        return volume[series.grid_index[number]], True
    if not series.masks:
        return np.full(shape, IGNORE, dtype=np.uint8), False
    place = series.masks[number]
    return box.mask(place, shape, dict(settings.label_map), settings.classes), True
