"""Small pictures of series for the report: which to show, and how."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medpsp.dicom.deidentify import BURNED_IN_MODALITIES
from medpsp.errors import ShardError
from medpsp.intensity import class_colour, to_unit
from medpsp.types import IGNORE, Window
from shards.figures import Columns, first_of_series
from shards.reader import ShardReader

LONGEST = 150
"""Pixels of the longer side: anatomy shows, small print does not."""

PARTS = (0.25, 0.5, 0.75)
"""Of the labelled range: the ends of an organ show little."""

OPACITY = 0.45
BICUBIC, BOX = Image.Resampling.BICUBIC, Image.Resampling.BOX  # box: no label beyond its pixels


class Case(NamedTuple):
    """One series of the report.

    Attributes:
        row: Of one of its slices, in the columns.
        slices: Number of its slices.
        labelled: Whether any of them has a label.
        first, last: Slice index of the first and last one that shows a class; -1 for none.
        shown: Rows to draw.
    """

    row: int
    slices: int
    labelled: bool
    first: int
    last: int
    shown: tuple[int, ...]


class Thumb(NamedTuple):
    """PNG of the slice, and RGBA PNG of its label; the latter empty where no class shows."""

    image: bytes
    label: bytes


def withheld(columns: Columns, burned_in: str) -> dict[int, str]:
    """Series whose pixels may show who it is, by the row of their first slice, and why.

    Nothing of the kinds of image that devices write names into, where the configuration keeps
    them unlooked at. Of a head that may show a face only axial slices: they cut the face, sagittal
    ones are its profile.
    """
    codes, rows = columns.flags
    doubtful = set(columns.series[rows[codes == "PHI_BURNED_IN"]].tolist())
    faces = set(columns.series[rows[codes == "RECOGNIZABLE_FACE_POSSIBLE"]].tolist())
    found = {}
    for row in first_of_series(columns).tolist():
        series, normal = columns.series[row], np.abs(columns.normal[row])
        names = columns.modality[row] in BURNED_IN_MODALITIES and burned_in == "keep"
        if names or series in doubtful:
            found[row] = "may show a name"
        elif series in faces and not normal[2] > normal[:2].max():
            found[row] = "may show a face"
    return found


def choose_cases(columns: Columns, hidden: dict[int, str], most: int) -> list[Case]:
    """The series to show: labelled ones first, of as many patients as there are.

    Among these the keyed order of the patients decides, so the choice is neither that of a person
    nor that of a run.
    """
    ranks: dict[str, int] = defaultdict(int)
    labelled = set(columns.series[columns.labelled].tolist())
    order = []
    for row in sorted(first_of_series(columns).tolist(), key=lambda r: str(columns.series[r])):
        patient, series = str(columns.patient[row]), str(columns.series[row])
        if row not in hidden:
            order.append((series not in labelled, ranks[patient], columns.order[row], series, row))
            ranks[patient] += 1
    return [_case(columns, row) for *_, row in sorted(order)[:most]]


def _case(columns: Columns, row: int) -> Case:
    rows = np.flatnonzero(columns.series == columns.series[row])
    rows = rows[np.argsort(columns.slice_index[rows], kind="stable")]
    showing = rows[columns.histogram[rows, 1:-1].any(axis=1)]
    pool = showing if len(showing) else rows
    places = np.round(np.array(PARTS) * (len(pool) - 1)).astype(int)
    ends = columns.slice_index[showing[[0, -1]]].tolist() if len(showing) else [-1, -1]
    return Case(
        row=row,
        slices=len(rows),
        labelled=bool(columns.labelled[rows].any()),
        first=ends[0],
        last=ends[1],
        shown=tuple(pool[np.unique(places)].tolist()),
    )


def draw(reader: ShardReader, columns: Columns, row: int) -> Thumb | None:
    """Draw one slice; None where that fails, which is for `medpsp check` to say more about."""
    try:
        image, label = reader.read(str(columns.bucket[row]), int(columns.slot[row]))
        center, width = columns.window[row].tolist()
        step = max(1, max(label.shape) // 1024)
        shown = to_unit(
            image[::step, ::step],
            Window(center=center, width=width),
            inverted=bool(columns.photometric[row] == "MONOCHROME1"),
        )
        size = fitted(label.shape, columns.spacing[row, :2])
        grey = Image.fromarray((shown * 255).astype(np.uint8)).resize(size, BICUBIC)
        tint = _tint(label[::step, ::step])
        over = Image.fromarray(tint).resize(size, BOX) if tint.any() else None
        return Thumb(_png(grey), _png(over) if over else b"")
    except (ShardError, OSError, ValueError, MemoryError):
        return None


def fitted(shape: tuple[int, ...], spacing: NDArray[np.float64]) -> tuple[int, int]:
    """Width and height in pixels of a picture of (H, W) pixels, true to their spacing (y, x)."""
    known = np.isfinite(spacing).all() and (spacing > 0).all()
    height, width = np.array(shape) * (spacing if known else 1.0)
    longest = max(height, width)
    least = LONGEST / 8  # a line of pixels is still to be seen
    wide, high = (round(max(least, LONGEST * v / longest)) for v in (width, height))
    return wide, high


def _tint(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 4) RGBA; background and ignore are clear."""
    table = np.zeros((256, 4), dtype=np.uint8)
    for index in range(1, IGNORE):
        table[index] = (*class_colour(index), round(255 * OPACITY))
    return table[label]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
