"""Pictures of a slice with the contours of truth and prediction."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from medpsp.types import IGNORE
from shards.dataset import read_unit
from shards.thumbs import class_colour, fitted

if TYPE_CHECKING:
    from launch.scores import Case
    from shards.reader import ShardReader

Rgb = tuple[int, int, int]
TRUTH: Rgb = (0, 235, 235)
PREDICTED: Rgb = (255, 60, 220)
BOTH: Rgb = (255, 255, 255)
"""Of the contours: no class has them, and of two that differ one is the brighter."""

LARGER = 2.3
"""Than the thumbnails of the archive report: contours lie within a millimetre of each other."""

LINE = 5
"""Pixels of the neighbourhood whose labels are compared: a line is half of it wide."""

TINT, UNKNOWN = 110, (128, 128, 128, 120)
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


class Pictures(NamedTuple):
    """PNG of the slice; RGBA PNG of its true classes, and of the contours of both."""

    image: bytes
    truth: bytes
    contours: bytes


def draw_case(reader: ShardReader, case: Case) -> Pictures:
    """Draw the slice of a case with the most disagreement, true to its pixel spacing.

    Raises:
        ShardError: It cannot be read.
    """
    unit, label = read_unit(reader, case.drawn)
    predicted = np.frombuffer(zlib.decompress(case.mask), np.uint8).reshape(label.shape)
    wide, high = fitted(label.shape, np.array(case.drawn.spacing[:2]))
    size = (round(wide * LARGER), round(high * LARGER))
    image = Image.fromarray((unit * 255).astype(np.uint8)).resize(size, BICUBIC)
    truth, found = (
        np.asarray(Image.fromarray(m).resize(size, NEAREST)) for m in (label, predicted)
    )
    return Pictures(*(_png(p) for p in (image, _tinted(truth), _contours(truth, found))))


def _tinted(label: NDArray[np.uint8]) -> Image.Image:
    """True classes in their colours, what is ignored in grey."""
    table = np.zeros((256, 4), dtype=np.uint8)
    for index in range(1, IGNORE):
        table[index] = (*class_colour(index), TINT)
    table[IGNORE] = UNKNOWN
    return Image.fromarray(table[label])


def _contours(truth: NDArray[np.uint8], found: NDArray[np.uint8]) -> Image.Image:
    """Both contours in one picture; what is ignored in grey, without any."""
    known = truth != IGNORE
    first, second = (_outline(mask) & known for mask in (np.where(known, truth, 0), found))
    drawn = np.zeros((*truth.shape, 4), dtype=np.uint8)
    drawn[~known] = UNKNOWN
    for where, colour in ((second, PREDICTED), (first, TRUTH), (first & second, BOTH)):
        drawn[where] = (*colour, 255)
    return Image.fromarray(drawn)


def _outline(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels of a class that have another one near them."""
    changes = ndimage.maximum_filter(mask, LINE) != ndimage.minimum_filter(mask, LINE)
    outline: NDArray[np.bool_] = changes & (mask > 0)
    return outline


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
