"""Animated GIF, frame by frame."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHOWN = 10
"""Hundredths of a second for a frame."""

HEAD = 13
"""Bytes before the colours: signature and logical screen descriptor (GIF89a 17, 18)."""

PLACE = 10
"""Bytes of an image descriptor (GIF89a 20)."""


class GifWriter:
    """Writes an endless animation and holds one frame at a time.

    Pillow 13 keeps every frame of an animation until the end (18 MB for 290 of 256 x 256), and
    drops one that equals the one before it. So it encodes single frames here, each with 256 colours
    of its own, and they are put together as GIF89a says.

    Args:
        path: It has its name only when all is written; no frame, no file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._empty = path, True
        self._partial = path.with_name(f".partial-{path.name}")
        self._file = self._partial.open("wb")

    def add(self, frame: NDArray[np.uint8]) -> None:
        """The next (H, W, 3) RGB; all are of one size, at most 65535 a side."""
        if self._empty:
            height, width = frame.shape[:2]
            self._file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0))
            self._file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # without end
        self._file.write(b"!\xf9\x04" + struct.pack("<BHBB", 0, SHOWN, 0, 0))
        self._file.write(_image(frame))
        self._empty = False

    def __enter__(self) -> GifWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                self._file.write(b";")
            if kind is None and not self._empty:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)


def _image(frame: NDArray[np.uint8]) -> bytes:
    """Image descriptor, own colours and compressed pixels: a GIF of Pillow's, its parts turned."""
    picture = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, "GIF")
    whole = buffer.getvalue()
    bits = whole[HEAD - 3] & 7  # a table of 2 << bits colours
    start = HEAD + 3 * (2 << bits)
    place, pixels = whole[start : start + PLACE], whole[start + PLACE : -1]
    flags = bytes([place[-1] | 0x80 | bits])
    return place[:-1] + flags + whole[HEAD:start] + pixels
