"""Pictures of a slice with the contours of truth and prediction."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medpsp.intensity import class_colour
from medpsp.train.pictures import BOTH, PREDICTED, TRUTH, UNKNOWN, outline
from medpsp.types import IGNORE
from shards.dataset import read_unit
from shards.thumbs import fitted

if TYPE_CHECKING:
    from launch.scores import Case
    from shards.reader import ShardReader

LARGER = 2.3
"""Than the thumbnails of the archive report: contours lie within a millimetre of each other."""

TINT, IGNORED = 110, (*UNKNOWN, 120)
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


class Pictures(NamedTuple):
    """PNG of the slice; RGBA PNG of its true classes, whether there are any, and of the contours
    of both."""

    image: bytes
    truth: bytes
    marked: bool
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
    marked = bool(((label > 0) & (label != IGNORE)).any())
    return Pictures(_png(image), _png(_tinted(truth)), marked, _png(_contours(truth, found)))


def _tinted(label: NDArray[np.uint8]) -> Image.Image:
    """True classes in their colours, what is ignored in grey."""
    table = np.zeros((256, 4), dtype=np.uint8)
    for index in range(1, IGNORE):
        table[index] = (*class_colour(index), TINT)
    table[IGNORE] = IGNORED
    return Image.fromarray(table[label])


def _contours(truth: NDArray[np.uint8], found: NDArray[np.uint8]) -> Image.Image:
    """Both contours in one picture; what is ignored in grey, without any."""
    known = truth != IGNORE
    first, second = (outline(mask) & known for mask in (np.where(known, truth, 0), found))
    drawn = np.zeros((*truth.shape, 4), dtype=np.uint8)
    drawn[~known] = IGNORED
    for where, colour in ((second, PREDICTED), (first, TRUTH), (first & second, BOTH)):
        drawn[where] = (*colour, 255)
    return Image.fromarray(drawn)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
