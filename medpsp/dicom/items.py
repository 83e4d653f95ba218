"""Elements of label objects that may be damaged: what pydicom raises becomes a LabelError."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from medpsp.errors import LabelError

_PYDICOM_RAISES = (
    ValueError,  # also numbers that are none, and lengths that do not fit
    TypeError,
    AttributeError,
    LookupError,  # also unknown character sets
    NotImplementedError,
    OverflowError,
    RecursionError,
    EOFError,
    OSError,
    struct.error,
)


@contextmanager
def reading(code: str) -> Iterator[None]:
    """Elements are converted when they are touched: damage shows then, with values in the text.

    Raises:
        LabelError: ``code``, with the kind of the error and nothing of its text.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote element values
            yield
    except LabelError:
        raise
    except _PYDICOM_RAISES as error:
        raise LabelError(code, f"an element cannot be read ({type(error).__name__})") from None


def items_of(ds: Dataset, *keywords: str) -> list[Dataset]:
    """The items of a sequence, or of sequences inside it; empty where one is missing."""
    found = [ds]
    for keyword in keywords:
        values = [item.get(keyword) for item in found]
        found = [item for value in values if isinstance(value, Items) for item in value]
    return found


def numbers_of(ds: Dataset, keyword: str) -> tuple[float, ...]:
    """The numbers of an element; empty where it is missing."""
    value = ds.get(keyword)
    if value is None or value == "":
        return ()
    values = (value,) if isinstance(value, str | int | float) else tuple(value)
    return tuple(float(v) for v in values)


def number_of(ds: Dataset, keyword: str) -> int | None:
    """The first number of an element as an integer; None where it is missing."""
    values = numbers_of(ds, keyword)
    return int(values[0]) if values else None


def text_of(ds: Dataset, keyword: str) -> str:
    """The text of an element; empty where it is missing."""
    value = ds.get(keyword)
    return "" if value is None else str(value).strip(" \0")


def texts_of(found: list[Dataset], keyword: str) -> list[str]:
    """The texts of an element in several items, without empty ones."""
    return [text for item in found if (text := text_of(item, keyword))]
