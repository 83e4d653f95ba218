"""One picture a series: overlays side by side, with a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medpsp.intensity import CLASS_COLOURS, overlay
from medpsp.types import FloatArray

TILE, COLUMNS, MAX_TILES, LEGEND = 224, 4, 8, 32
"""Pixels of a tile's longer side, tiles a row, tiles at most, pixels of the legend line."""


def write_sheet(
    path: Path,
    show: Callable[[int], FloatArray],
    mask: NDArray[np.uint8],
    classes: tuple[str, ...],
    names: Sequence[int],
) -> None:
    """Draw evenly spaced slices of what the mask covers.

    Args:
        path: PNG to write.
        show: Number of a slice to (H, W) or (H, W, 3) in [0, 1].
        mask: (N, H, W) class indices.
        classes: Names for the legend; the first is the background.
        names: What to call each slice.
    """
    covered = np.flatnonzero(mask.any(axis=(1, 2)))
    pool = covered if covered.size else np.arange(len(mask))
    count = min(MAX_TILES, len(pool))
    chosen = pool[np.linspace(0, len(pool) - 1, count).round().astype(int)]
    height, width = mask.shape[1:]
    scale = TILE / max(height, width)
    tile = (max(1, round(width * scale)), max(1, round(height * scale)))
    rows = -(-count // COLUMNS)
    columns = min(count, COLUMNS)
    sheet = Image.new("RGB", (max(tile[0] * columns, 2 * TILE), tile[1] * rows + LEGEND), "black")
    for place, index in enumerate(chosen):
        picture = Image.fromarray(overlay(show(int(index)), mask[index])).resize(tile)
        corner = (place % COLUMNS * tile[0], place // COLUMNS * tile[1])
        sheet.paste(picture, corner)
        ImageDraw.Draw(sheet).text(
            (corner[0] + 5, corner[1] + 3), f"{names[index]}", fill=(170, 170, 170)
        )
    _legend(sheet, classes)
    sheet.save(path)


def _legend(sheet: Image.Image, classes: tuple[str, ...]) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    x, y = 10, sheet.height - LEGEND + 8
    for index, name in enumerate(classes[1:]):
        red, green, blue = (int(v) for v in CLASS_COLOURS[1 + index % (len(CLASS_COLOURS) - 1)])
        draw.rectangle((x, y, x + 14, y + 14), fill=(red, green, blue))
        draw.text((x + 20, y - 2), name, fill="white", font=font)
        x += 38 + int(draw.textlength(name, font=font))
