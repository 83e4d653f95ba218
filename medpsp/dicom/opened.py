"""The object that was read last: its frames follow one another, as two looks at one of them."""

from __future__ import annotations

import os
from functools import lru_cache

from medpsp.dicom.flat import parse_flat
from medpsp.dicom.header import Header
from medpsp.dicom.parse import Parsed, parse
from medpsp.types import Place


def opened(place: Place) -> Parsed[Header]:
    """The header of an image object, by the short way where it is an ordinary file.

    Raises:
        DicomError: As `parse`.
    """
    try:
        found = os.stat(place.path)
    except (OSError, ValueError):  # `parse` says what is wrong
        return _opened(place, (0, 0))
    return _opened(place, (found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=1)
def _opened(place: Place, stamp: tuple[int, int]) -> Parsed[Header]:
    """``stamp`` tells a file that was changed."""
    flat = None if place.member else parse_flat(place.path)
    return flat or parse(place)
