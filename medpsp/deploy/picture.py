"""One picture a series: overlays side by side, with a legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medpsp.deploy.stream import Segmented
from medpsp.intensity import class_colour, overlay

TILE, COLUMNS, MAX_TILES, LEGEND, TITLE = 224, 4, 8, 32, 26
"""Pixels of a tile's longer side, tiles a row, tiles at most, pixels of the lines below them."""


class Sheet:
    """Collects evenly spaced slices of what the mask covers; of all where it covers none.

    Args:
        classes: Names for the legend; the first is the background.
        title: What the series is, free of identities.
    """

    def __init__(self, classes: tuple[str, ...], title: str) -> None:
        self._classes, self._title = classes, title
        self._covered, self._all = _Spread(), _Spread()

    def add(self, item: Segmented) -> None:
        """The next slice."""
        self._all.add(item)
        if item.mask.any():
            self._covered.add(item)

    def save(self, path: Path) -> None:
        """Write the PNG."""
        found = (self._covered.kept or self._all.kept)[: 2 * MAX_TILES]
        count = min(MAX_TILES, len(found))
        chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).round().astype(int)]
        tile = chosen[0][1].size
        rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
        size = max(tile[0] * columns, 2 * TILE), tile[1] * rows + TITLE + LEGEND
        sheet = Image.new("RGB", size, "black")
        for number, (place, picture) in enumerate(chosen):
            corner = (number % COLUMNS * tile[0], number // COLUMNS * tile[1])
            sheet.paste(picture, corner)
            at = (corner[0] + 5, corner[1] + 3)
            number_slice(sheet, at, place)
        title = f"{self._title}, {count} of {self._all.count} slices"
        font, at = ImageFont.load_default(size=15), (10, tile[1] * rows + 6)
        ImageDraw.Draw(sheet).text(at, title, fill="white", font=font)
        _legend(sheet, self._classes)
        sheet.save(path)


def number_slice(sheet: Image.Image, at: tuple[int, int], place: int) -> None:
    """Write the number of a slice so that it is read on black and on white: with an outline."""
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(sheet).text(
        at, f"slice {place}", fill="white", font=font, stroke_width=2, stroke_fill="black"
    )


class _Spread:
    """Evenly spaced slices of a stream of unknown length: at twice as many as are shown, every
    other one goes, and only every other one is taken from then on."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, Image.Image]] = []
        self._step, self.count = 1, 0

    def add(self, item: Segmented) -> None:
        if self.count % self._step == 0:
            if len(self.kept) == 2 * MAX_TILES:
                del self.kept[1::2]
                self._step *= 2
            if self.count % self._step == 0:
                self.kept.append((item.place, _thumbnail(item)))
        self.count += 1


def _thumbnail(item: Segmented) -> Image.Image:
    height, width = item.mask.shape
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(overlay(item.unit, item.mask)).resize(size)


def _legend(sheet: Image.Image, classes: tuple[str, ...]) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    x, y = 10, sheet.height - LEGEND + 8
    for index, name in enumerate(classes[1:], 1):
        draw.rectangle((x, y, x + 14, y + 14), fill=class_colour(index))
        draw.text((x + 20, y - 2), name, fill="white", font=font)
        x += 38 + int(draw.textlength(name, font=font))
