"""What the child of a shard task runs: source files to chunks, one pass over each file.

Everything that touches a source's bytes happens here, under the limits of the sandbox; what goes
back are numbers about the chunks, which it appends to files that are given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from medpsp.dicom import tasks
from medpsp.dicom.labels import map_labels
from medpsp.dicom.names import LabelVolume, NameRule
from medpsp.dicom.passthrough import SYNTAXES, kept_codestream
from medpsp.dicom.placement import grid_of
from medpsp.dicom.read import Pixels, read_frame
from medpsp.dicom.sandbox import Answer
from medpsp.dicom.values import luma
from medpsp.dicom.voc import read_image, read_mask
from medpsp.dicom.walk import file_stamp
from medpsp.errors import DicomError, SourceError
from medpsp.intensity import ValueCounts, needs_series_values
from medpsp.types import IGNORE, Place, Series, SliceRef, Window
from shards.codec import LABEL, Codec, frame_chunk, image_codec
from shards.dhash import difference_hash
from shards.record import read_record
from shards.scanfile import count_classes
from shards.settings import WriteSettings
from shards.shardfile import append_all


class Encoded(NamedTuple):
    """Numbers about one slice.

    Attributes:
        number: Within ``Series.slices``.
        sizes: Bytes of its chunks of image and label.
        histogram: Pixels of each class, then of ignore.
        labelled: False where nothing says what is what: the label is all 255.
        padding: Share of the pixels that are padding.
        crc32c, dhash: See `SliceRow`.
        values: Counts of the modality values where the window of the series needs them.
    """

    number: int
    sizes: list[int]
    histogram: list[int]
    labelled: bool
    padding: float
    crc32c: int
    dhash: str
    values: list[tuple[float, int]]


def encode(
    record: str, span: list[int], settings: str, files: list[str], at_once: int
) -> Iterator[Answer]:
    """Some slices of a series.

    The first answer is ``["labels", codes]``, when the masks of the series are read; then come
    ``["slices", items]``, of each slice an `Encoded`, after its chunks were appended to the files,
    or ``[number, code, detail]`` of one that is refused. ``["failed", errno]`` where a file takes
    no more.

    Args:
        record: Of `record_text`.
        span: First slice, and one beyond the last.
        settings: ``WriteSettings.text``.
        files: Of image and label. A pipe would cost 0.3 ms a slice of 512 x 512.
        at_once: Slices of an answer; one each costs 0.1 ms a slice more.

    Raises:
        SourceError: The masks cannot be read: no slice of the series can be used.
    """
    rules = _settings(settings)
    item = read_record(record)
    sources = dict(zip(item.source_paths, item.sources, strict=False))
    if item.series.mask_kind != "png":
        _require_unchanged(item.series.masks, sources)
    volume, notes = _volume_labels(item.series, rules, item.stamp)
    yield ["labels", list(notes)], []
    with ExitStack() as stack:
        outs = [stack.enter_context(Path(file).open("ab", buffering=0)) for file in files]
        done: list[list[Any]] = []
        for number in range(*span):
            try:
                _require_unchanged(_places_of(item.series, number), sources)
                found, chunks = _encoded(item.series, number, volume, rules)
            except SourceError as error:
                done.append([number, error.code, error.detail])
            else:
                try:
                    for out, chunk in zip(outs, chunks, strict=True):
                        append_all(out.fileno(), chunk)
                except OSError as error:
                    yield ["failed", error.errno], []
                    return
                done.append(list(found))
            if len(done) == at_once or number == span[1] - 1:
                yield ["slices", done], []
                done = []


def _places_of(series: Series, number: int) -> list[Place]:
    masks = [series.masks[number]] if series.mask_kind == "png" else []
    return [series.slices[number].place, *masks]


def _require_unchanged(places: Iterable[Place], sources: Mapping[str, tuple[int, ...]]) -> None:
    """Place, labels and split of a slice were decided for what the file was when it was scanned."""
    for place in places:
        known, now = sources.get(place.path), file_stamp(place.path)
        if known and not now:  # what reads it might call it a file without a mask
            raise DicomError("FILE_UNREADABLE", "it was there when the archive was scanned")
        if known and known != now:
            raise DicomError("SOURCE_CHANGED", "the file changed after the archive was scanned")


def main(seconds: int, memory_mib: int) -> None:
    """Answer requests from stdin until it closes."""
    tasks.main(seconds, memory_mib, {"encode": encode})


@lru_cache(maxsize=1)
def _settings(text: str) -> WriteSettings:
    tree = json.loads(text)
    names = {key: tasks.tuples(value) for key, value in tree.pop("labels").items()}
    window = tree.pop("window")
    return WriteSettings(
        **{key: tasks.tuples(value) for key, value in tree.items()},
        labels=NameRule(**names),
        window=Window(**window) if window else None,
    )


def _encoded(
    series: Series, number: int, volume: NDArray[np.uint8] | None, settings: WriteSettings
) -> tuple[Encoded, tuple[bytes, bytes]]:
    ref = series.slices[number]
    pixels = _pixels(ref, series, settings)
    label, labelled = _label(series, number, volume, settings)
    padding = pixels.padding
    if padding is not None and settings.padding == "ignore":
        label = np.where(padding & (label == 0), np.uint8(IGNORE), label)
    values = np.ascontiguousarray(pixels.values)
    counts = ValueCounts()
    needed = needs_series_values(ref.modality, settings.window, ref.channels)
    if needed and not (settings.header_window and ref.window):
        counts.add(values, None if padding is None else ~padding)
    image = _image_chunk(ref, values, image_codec(settings.profile, series.first.dtype))
    label_chunk, histogram = _label_facts(label, settings.classes)
    chunks = image, label_chunk
    found = Encoded(
        number=number,
        sizes=[len(chunk) for chunk in chunks],
        histogram=histogram,
        labelled=labelled,
        padding=0.0 if padding is None else float(np.count_nonzero(padding) / padding.size),
        crc32c=google_crc32c.value(values),
        dhash=difference_hash(values),
        values=counts.pairs,
    )
    return found, chunks


def _image_chunk(ref: SliceRef, values: NDArray[Any], codec: Codec) -> bytes:
    kept = kept_codestream(ref, codec.kind) if codec.kind in SYNTAXES else None
    return frame_chunk(kept.data, kept.offset) if kept else codec.encode(values)


def _pixels(ref: SliceRef, series: Series, settings: WriteSettings) -> Pixels:
    first = series.first
    if settings.source == "dicom":
        pixels = read_frame(ref)
    else:
        values: NDArray[Any] = read_image(Path(ref.path))
        grey = first.channels == 1 and values.ndim == 3
        pixels = Pixels(luma(values) if grey else values, None)
    shape = (first.rows, first.columns, 3)[: 3 if first.channels == 3 else 2]
    found = pixels.values
    if found.shape != shape or found.dtype != first.dtype:
        raise DicomError(
            "PIX_UNLIKE_SERIES",
            f"{found.shape} {found.dtype}, its series is {shape} {first.dtype}",
        )
    return pixels


def _label(
    series: Series, number: int, volume: NDArray[np.uint8] | None, settings: WriteSettings
) -> tuple[NDArray[np.uint8], bool]:
    shape = (series.first.rows, series.first.columns)
    if volume is not None:
        return volume[series.grid_index[number]], True
    if not series.masks:
        return _blank(shape), False
    mask = read_mask(Path(series.masks[number].path), shape)
    return map_labels(mask, dict(settings.label_map), settings.classes), True


def _volume_labels(
    series: Series, settings: WriteSettings, stamp: str
) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
    """(N, H, W) classes on the grid of a series; None for PNG masks and no mask."""
    if not series.masks or series.mask_kind == "png":
        return None, ()
    volume = _last_volume(_Masks(series, settings, stamp))
    return volume.values, tuple(sorted(volume.notes))


class _Masks:
    """The masks of a series as a key: of a long one, the next shard needs the same again."""

    def __init__(self, series: Series, settings: WriteSettings, stamp: str) -> None:
        self.series, self.settings = series, settings
        self._key = (series.masks, series.slices[0].file_id, len(series.slices), stamp)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Masks) and (self._key, self.settings) == (
            other._key,
            other.settings,
        )

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=1)
def _last_volume(masks: _Masks) -> LabelVolume:
    series, settings = masks.series, masks.settings
    grid = grid_of(series, series.mask_partial)
    options = [settings.mask_geometry, settings.mask_resample]
    return tasks.read_labels(series.mask_kind, series.masks, grid, settings.labels, options)


@lru_cache(maxsize=8)
def _blank(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    blank = np.full(shape, IGNORE, dtype=np.uint8)
    blank.flags.writeable = False
    return blank


def _label_facts(label: NDArray[np.uint8], classes: int) -> tuple[bytes, list[int]]:
    """Chunk and histogram of a label; most slices of a scan hold no structure, and share both."""
    value = int(label.flat[0])
    blank = label is _blank(label.shape)
    if blank or label.max() == label.min() == value:
        return _even_facts(label.shape, value, classes)
    return LABEL.encode(label), _histogram(label, classes)


@lru_cache(maxsize=64)
def _even_facts(shape: tuple[int, ...], value: int, classes: int) -> tuple[bytes, list[int]]:
    label = np.full(shape, value, dtype=np.uint8)
    return LABEL.encode(label), _histogram(label, classes)


def _histogram(label: NDArray[np.uint8], classes: int) -> list[int]:
    return list(count_classes(label, classes)[:-1])
