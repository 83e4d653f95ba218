"""Where the masks of an exported file differ most from those of fp32: pictures for the dossier."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from medpsp.config import Config
from medpsp.deploy.dossier import OverlayFact
from medpsp.errors import ShardError
from medpsp.intensity import overlay
from medpsp.train.pictures import PREDICTED, TRUTH, Rgb, outline
from medpsp.words import many
from shards.dataset import read_unit
from shards.figures import read_columns
from shards.index import INDEX
from shards.reader import ShardReader
from shards.thumbs import fitted, withheld

if TYPE_CHECKING:
    from medpsp.deploy.gates import Differing
    from shards.index import SliceRow

SIDE, GAP = 260, 8
"""Pixels of a panel, which is square, and between two."""
NEAR, LEAST = 2.5, 0.25
"""A cut shows so many times the largest place that differs, and at least that part of the slice."""
FP32, OTHER, BOTH = TRUTH, PREDICTED, (250, 230, 60)
"""Foreground of fp32 alone, of the other file alone, two different classes."""
BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
Box = tuple[slice, slice]
Mask = NDArray[np.uint8]


def draw_largest(
    config: Config, chosen: Sequence[SliceRow], worst: Mapping[str, Sequence[Differing]]
) -> list[OverlayFact]:
    """A row of four pictures for each slice; a series that may show who it is has none.

    Args:
        config: Of the run.
        chosen: Rows of the slices that were compared.
        worst: Of each variant.
    """
    columns = read_columns(config.shards / INDEX, len(config.data.classes))
    hidden = withheld(columns, config.data.burned_in)
    reasons = {str(columns.series[row]): why for row, why in hidden.items()}
    reader = ShardReader(config.shards)
    found: list[OverlayFact] = []
    for variant, slices in worst.items():
        for one in slices:
            row = chosen[one.number]
            share = 100 * one.pixels / one.fp32.size
            title = (
                f"{variant}: patient {row.patient}, series {row.series} ({row.modality}), slice "
                f"{row.slice_index}: {many(one.pixels, 'pixel')} of "
                f"{one.fp32.size} differ{'' if one.pixels > 1 else 's'} ({share:.2g} %)"
            )
            if why := reasons.get(row.series):
                found.append({"title": f"{title}; not shown: {why}", "png": b""})
                continue
            try:
                unit = read_unit(reader, row)[0]
            except ShardError:
                found.append({"title": f"{title}; cannot be drawn", "png": b""})
                continue
            png = draw_row(unit, one.fp32, one.other, row.spacing[:2])
            found.append({"title": title, "png": png})
    return found


def draw_row(
    unit: NDArray[np.float32], fp32: Mask, other: Mask, spacing: tuple[float, ...]
) -> bytes:
    """PNG of four panels: the whole slice and where the others look; there the mask of fp32, that
    of the other file, and what differs.

    Args:
        unit: (H, W) or (H, W, 3) in [0, 1].
        fp32: (H, W) class ids.
        other: (H, W) likewise.
        spacing: mm, of rows and columns.
    """
    box = cut_of(fp32 != other, spacing)
    nothing = np.zeros_like(fp32)
    parts = [
        _whole(overlay(unit, nothing), box, spacing),
        *(_fit(overlay(unit[box], mask[box], 0.35), spacing, mask[box]) for mask in (fp32, other)),
        _fit(_differing(overlay(unit[box], nothing[box]), fp32[box], other[box]), spacing),
    ]
    sheet = Image.new("RGB", (4 * SIDE + 3 * GAP, SIDE), "white")
    for number, part in enumerate(parts):
        sheet.paste(part, (number * (SIDE + GAP), 0))
    written = io.BytesIO()
    sheet.save(written, "PNG", optimize=True)
    return written.getvalue()


def cut_of(differ: NDArray[np.bool_], spacing: tuple[float, ...]) -> Box:
    """Rows and columns around the largest place that differs, square in mm where that fits.

    Args:
        differ: (H, W), somewhere True.
        spacing: mm, of rows and columns.
    """
    places, count = ndimage.label(differ, np.ones((3, 3)))
    largest = int(np.argmax(np.bincount(places.ravel(), minlength=count + 1)[1:]))
    found = ndimage.find_objects(places)[largest]
    step = _step(spacing)
    size = np.array(differ.shape) * step
    extent = np.array([part.stop - part.start for part in found]) * step
    side = max(NEAR * extent.max(), LEAST * size.max())
    rows, columns = (
        _around((part.start + part.stop) / 2, side / mm, length)
        for part, mm, length in zip(found, step, differ.shape, strict=True)
    )
    return rows, columns


def _around(middle: float, wide: float, length: int) -> slice:
    wide = min(max(1, round(wide)), length)
    start = min(max(0, round(middle - wide / 2)), length - wide)
    return slice(start, start + wide)


def _step(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    known = np.isfinite(spacing).all() and min(spacing) > 0
    return np.array(spacing if known else (1.0, 1.0), dtype=np.float64)


def _fit(picture: Mask, spacing: tuple[float, ...], mask: Mask | None = None) -> Image.Image:
    """A panel with the picture in its middle, true to its spacing; classes of a mask outlined."""
    wide, high = fitted(picture.shape[:2], np.array(spacing, dtype=np.float64))
    scale = SIDE / max(wide, high)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    drawn = Image.fromarray(picture).resize(size, NEAREST if mask is None else BICUBIC)
    if mask is not None:
        tinted = np.asarray(drawn).copy()
        large = np.asarray(Image.fromarray(mask).resize(size, NEAREST))
        full = overlay(np.zeros(large.shape, np.float32), large, opacity=1)
        edge = outline(large)
        tinted[edge] = full[edge]
        drawn = Image.fromarray(tinted)
    panel = Image.new("RGB", (SIDE, SIDE), "black")
    panel.paste(drawn, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return panel


def _whole(picture: Mask, box: Box, spacing: tuple[float, ...]) -> Image.Image:
    """The slice with the frame of a cut."""
    panel = _fit(picture, spacing, np.zeros(picture.shape[:2], np.uint8))
    size = np.array(picture.shape[:2]) * _step(spacing)
    scale = SIDE / size.max()
    corner = (SIDE - size * scale) / 2
    ends = [
        [c + scale * mm * at for c, mm, at in zip(corner, _step(spacing), place, strict=True)]
        for place in zip(*((part.start, part.stop) for part in box), strict=True)
    ]
    (top, left), (bottom, right) = ends
    draw = ImageDraw.Draw(panel)
    draw.rectangle((left, top, right - 1, bottom - 1), outline="white", width=2)
    return panel


def _differing(picture: Mask, fp32: Mask, other: Mask) -> Mask:
    """Pixels that differ in full colour on a darker slice."""
    drawn = (picture * 0.6).astype(np.uint8)
    kinds: tuple[tuple[NDArray[np.bool_], Rgb], ...] = (
        ((fp32 > 0) & (other > 0) & (fp32 != other), BOTH),
        ((fp32 > 0) & (other == 0), FP32),
        ((fp32 == 0) & (other > 0), OTHER),
    )
    for where, colour in kinds:
        drawn[where] = colour
    return drawn
