"""Arrays to pictures: contours, confusion matrix, reliability diagram. RGB uint8, no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medpsp.intensity import overlay
from medpsp.train.calibration import BINS, Bins, calibration_error
from medpsp.train.metrics import Counts
from medpsp.types import IGNORE

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Rgb = tuple[int, int, int]
TRUTH: Rgb = (0, 235, 235)
PREDICTED: Rgb = (255, 60, 220)
BOTH: Rgb = (255, 255, 255)
"""Of the contours; no class has them."""
UNKNOWN: Rgb = (128, 128, 128)
LEAST_SIDE = 640
"""Of a case, in pixels: contours of smaller ones hide what they enclose, and TensorBoard enlarges
pixels, so that letters of smaller ones are jagged."""
LETTERS = 20
"""Pixels of the letters below a case."""
LINE = 7
"""Pixels of the neighbourhood whose labels are compared."""
WHITE, BLACK, GREY, BLUE, RED = "#ffffff", "#202020", "#b0b0b0", "#0072b2", "#d55e00"
PLOT = 400
"""Side of the reliability diagram without its margins."""
NAME = 14
"""Letters of a class name that are shown."""


def tinted_rows(
    images: NDArray[np.float32], truth: NDArray[np.uint8], predicted: NDArray[np.uint8]
) -> Picture:
    """Rows of image, truth, prediction in the colours of the classes.

    Args:
        images: (N, H, W) or (N, H, W, 3) in [0, 1].
        truth: (N, H, W) class indices; what is ignored, padding too, is grey beside the image.
        predicted: (N, H, W) class indices.
    """
    rows = [
        np.concatenate([overlay(i, np.zeros_like(t)), _known(i, t, t), _known(i, p, t)], axis=1)
        for i, t, p in zip(images, truth, predicted, strict=True)
    ]
    return np.concatenate(rows)


def _known(
    image: NDArray[np.float32], mask: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> Picture:
    drawn = overlay(image, mask)
    drawn[truth == IGNORE] = UNKNOWN
    return drawn


def contoured(
    image: NDArray[np.float32],
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    caption: str,
) -> Picture:
    """The image above itself with the contours of truth and prediction, and a caption.

    Args:
        image: (H, W) or (H, W, 3) in [0, 1].
        truth: (H, W) class indices; what is ignored is grey.
        predicted: (H, W) class indices.
        caption: One line.
    """
    times = -(-LEAST_SIDE // max(truth.shape))
    plain, wanted, found = (
        m.repeat(times, 0).repeat(times, 1)
        for m in (overlay(image, np.zeros_like(truth)), truth, predicted)
    )
    known = wanted != IGNORE
    drawn = plain.copy()
    drawn[~known] = UNKNOWN
    first = outline(np.where(known, wanted, 0)) & known
    second = outline(found) & known
    for where, colour in ((second, PREDICTED), (first, TRUTH), (first & second, BOTH)):
        drawn[where] = colour
    both = np.concatenate([plain, drawn])  # TensorBoard shows pictures of one width
    sheet = Image.new("RGB", (both.shape[1], both.shape[0] + 2 * LETTERS), BLACK)
    sheet.paste(Image.fromarray(both))
    draw, at = ImageDraw.Draw(sheet), LETTERS // 2
    legend = ((caption, BOTH), ("truth", TRUTH), ("prediction", PREDICTED), ("both", BOTH))
    for text, colour in legend:
        draw.text((at, both.shape[0] + LETTERS // 2), text, fill=colour, font=_font(LETTERS))
        at += round(draw.textlength(text, font=_font(LETTERS))) + LETTERS
    return np.asarray(sheet)


def outline(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels of a class beside another one, (H, W); the background has none."""
    changes = ndimage.maximum_filter(mask, LINE) != ndimage.minimum_filter(mask, LINE)
    edge: NDArray[np.bool_] = changes & (mask > 0)
    return edge


def confusion_picture(counts: Counts, names: Sequence[str]) -> Picture:
    """Truth in rows, each row in per cent of its pixels.

    Args:
        counts: (K, K) as of `confusion`; a class without pixels has an empty row.
        names: (K) of the classes.
    """
    total = counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)
    cell = int(np.clip(900 // len(names), 24, 84))
    left, top = 120, 64
    sheet = Image.new("RGB", (left + cell * len(names) + 16, top + cell * len(names) + 16), WHITE)
    draw, font = ImageDraw.Draw(sheet), _font(13)
    draw.text((8, 8), "rows: truth, columns: prediction, % of the row", fill=BLACK, font=font)
    for row, name in enumerate(names):
        middle = top + row * cell + cell // 2
        draw.text((left - 8, middle), name[:NAME], fill=BLACK, font=font, anchor="rm")
        letters = name[: max(3, cell // 8)]
        draw.text((left + middle - top, top - 8), letters, fill=BLACK, font=_font(12), anchor="mb")
        for column, value in enumerate(share[row]):
            x, y = left + column * cell, top + row * cell
            shade = tuple(round(255 + (c - 255) * float(value)) for c in (0, 76, 140))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade, outline=GREY)
            if total[row] and cell >= 44:
                ink = WHITE if value > 0.5 else BLACK
                place = (x + cell // 2, y + cell // 2)
                draw.text(place, f"{100 * value:.1f}", fill=ink, font=font, anchor="mm")
    return np.asarray(sheet)


def reliability_picture(bins: Bins) -> Picture:
    """How often a confidence is right: bars on the diagonal are honest, below it too sure.

    Args:
        bins: (3, B) as of `calibration_bins`.
    """
    voxels, confidence, right = bins
    left, top = 56, 52
    sheet = Image.new("RGB", (left + PLOT + 20, top + PLOT + 52), WHITE)
    draw, font = ImageDraw.Draw(sheet), _font(13)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * PLOT, top + (1 - y) * PLOT

    error = float(calibration_error(bins))
    title = f"expected calibration error {error:.3f}, {int(voxels.sum()):,} pixels"
    draw.text((left, 8), title, fill=BLACK, font=font)
    for tick in np.linspace(0, 1, 6):
        draw.line((at(0, tick), at(1, tick)), fill="#e4e4e4")
        draw.text((at(0, tick)[0] - 6, at(0, tick)[1]), f"{tick:.1f}", BLACK, font, anchor="rm")
        draw.text((at(tick, 0)[0], at(tick, 0)[1] + 6), f"{tick:.1f}", BLACK, font, anchor="mt")
    for place in np.flatnonzero(voxels):
        height, sure = (v[place] / voxels[place] for v in (right, confidence))
        (x0, y0), (x1, y1) = at(place / BINS, height), at((place + 1) / BINS, 0)
        draw.rectangle((x0 + 1, y0, x1 - 1, y1), fill=BLUE)
        x, y = at(sure, sure)
        draw.line((x, y, x, at(sure, height)[1]), fill=RED, width=3)  # what is missing
    draw.line((at(0, 0), at(1, 1)), fill=BLACK)
    draw.rectangle((*at(0, 1), *at(1, 0)), outline=BLACK)
    middle = at(0.5, 0)
    draw.text((middle[0], middle[1] + 28), "confidence", BLACK, font, anchor="mt")
    draw.text((left, top - 12), "share that is right", BLACK, _font(12), anchor="lm")
    return np.asarray(sheet)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
