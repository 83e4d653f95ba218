"""DICOM files with one thing wrong, built on the phantom factory."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import ArrayLike, NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag

from launch.phantom import Phantom, write_series
from medpsp.dicom.read import read_headers, read_pixels
from medpsp.dicom.series import group_series
from medpsp.errors import DicomError, GeometryError
from medpsp.types import Place, ReadPolicy, Series, SliceRef

Edit = Callable[[Dataset], object]


def ramp(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Every voxel another value: 300 * slice + 7 * row + column - 900."""
    z, y, x = np.indices(shape)
    return (300 * z + 7 * y + x - 900).astype(np.int16)


def one_slice(path: Path, edit: Edit = lambda ds: None, phantom: Phantom | None = None) -> Path:
    """Write one CT slice, 40 rows of 36 columns unless told, after ``edit`` changed its header."""
    phantom = phantom or Phantom(shape=(1, 40, 36))
    values = ramp(phantom.shape)
    (made,) = write_series(path.parent / "whole", "PATIENT", values, phantom)
    ds = pydicom.dcmread(made)
    made.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is wrong, on purpose
        edit(ds)
        ds.save_as(path)
    return path


def stored(path: Path, raw: ArrayLike, bits: int = 12, signed: int = 0, **elements: object) -> Path:
    """Write a slice of given 16-bit stored values; ``elements`` replace or (None) drop elements."""
    array = np.asarray(raw)

    def edit(ds: Dataset) -> None:
        ds.Rows, ds.Columns = array.shape
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, signed
        ds.PixelData = (array.astype(np.int64) & 0xFFFF).astype("<u2").tobytes()
        for keyword, value in elements.items():
            if value is None:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)

    return one_slice(path, edit)


def set_raw(ds: Dataset, keyword: str, value: bytes) -> None:
    """Set the bytes of an element as they are, past every check of pydicom."""
    tag = Tag(keyword)
    target = ds.file_meta if tag.group == 2 else ds
    value += b" " * (len(value) % 2)
    target[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, True)


def set_frame(ds: Dataset, frame: bytes) -> None:
    """Replace the codestream of an encapsulated image."""
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].is_undefined_length = True


def rle_that_overruns() -> bytes:
    """An RLE frame of 8 x 8 pixels of 16 bits; its second segment holds 63 + 64 bytes, not 64."""
    run_64, run_63 = b"\xc1\x00", b"\xc2\x00"  # 257 minus the count, then the value
    return struct.pack("<16I", 2, 64, 66, *[0] * 13) + run_64 + run_63 + run_64


def header_of(path: Path, policy: ReadPolicy | None = None) -> SliceRef:
    """The header of a file of one frame."""
    (ref,) = read_headers(Place(str(path)), "id", policy or ReadPolicy())
    return ref


def values_of(path: Path) -> NDArray[np.generic]:
    """Header and pixels in one go."""
    return read_pixels(header_of(path))


def headers(folder: Path, policy: ReadPolicy | None = None) -> list[SliceRef]:
    """The headers of every file below ``folder``; its relative path is the ``file_id``."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        ref
        for p in paths
        for ref in read_headers(
            Place(str(p)), p.relative_to(folder).as_posix(), policy or ReadPolicy()
        )
    ]


def same_pixels(refs: Sequence[SliceRef]) -> bool:
    """Whether all decode to the same values; one that does not decode is like no other."""
    try:
        first, *others = [read_pixels(ref) for ref in refs]
    except DicomError:
        return False
    return all(first.dtype == o.dtype and np.array_equal(first, o) for o in others)


def grouped(
    refs: Iterable[SliceRef], policy: ReadPolicy | None = None
) -> tuple[list[Series], list[tuple[SliceRef, GeometryError]]]:
    """`group_series` that looks at the pixels of real files."""
    return group_series(refs, policy or ReadPolicy(), same_pixels)
