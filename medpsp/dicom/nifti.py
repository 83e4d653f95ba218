"""NIfTI: masks out, on the grid of the DICOM series; volumes in, for the device."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import (
    apply_orientation,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from numpy.typing import NDArray

from medpsp.dicom.placement import LPS_TO_RAS
from medpsp.errors import DicomError

SUFFIXES = (".nii", ".nii.gz")
"""Of lower case; nibabel takes upper case as well."""
NIBABEL_RAISES = (
    ImageFileError,
    HeaderDataError,
    HeaderTypeError,
    OSError,
    ValueError,  # also a quaternion longer than 1
    OverflowError,  # sizes and offsets that no file has
    MemoryError,
    EOFError,
    zlib.error,
)
"""What a damaged file may raise where it is opened or read."""
_HEADER = 352
"""Bytes before the voxels: the NIfTI-1 header and an empty extension."""
_LEVEL = 1
"""Of gzip: masks are runs of one value, and level 9 takes several times as long for 10 % less."""
_BLOCK = 1 << 20  # bytes behind the voxels that are read at a time


def is_packed(path: Path) -> bool:
    """Whether a NIfTI file is compressed with gzip, by its name, as nibabel has it."""
    return path.name.lower().endswith(".gz")


class MaskWriter:
    """Writes a mask slice by slice as NIfTI-1, index order (column, row, slice), RAS affine.

    sform and qform both get code 1 (scanner anatomical); a sheared grid has no qform, so there
    only the sform is set. ITK reads a qform first, and would silently straighten the shear.

    Args:
        path: ``.nii`` or ``.nii.gz``; it has its name only when all is written.
        shape: (N, H, W) of the grid; places that get no slice are 0.
        affine_lps: (4, 4) index (column, row, slice) to mm LPS.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], affine_lps: NDArray[np.float64]
    ) -> None:
        self._path, self._shape, self._next = path, shape, 0
        self._partial = path.with_name(f".partial-{path.name}")
        self._raw = self._partial.open("wb")
        packed = is_packed(path)
        self._file = gzip.GzipFile("", "wb", _LEVEL, self._raw, mtime=0) if packed else self._raw
        self._file.write(_header(shape, affine_lps))

    def add(self, place: int, mask: NDArray[np.uint8]) -> None:
        """The (H, W) classes at a place of the grid; places rise."""
        self._skip_to(place)
        self._file.write(np.ascontiguousarray(mask, np.uint8).tobytes())
        self._next = place + 1

    def _skip_to(self, place: int) -> None:
        empty = bytes(self._shape[1] * self._shape[2])
        for _ in range(self._next, place):
            self._file.write(empty)

    def __enter__(self) -> MaskWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._skip_to(self._shape[0])
            self._file.close()
            self._raw.close()
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._raw.close()
            self._partial.unlink(missing_ok=True)


def _header(shape: tuple[int, int, int], affine_lps: NDArray[np.float64]) -> bytes:
    affine = LPS_TO_RAS @ affine_lps
    nothing = np.broadcast_to(np.uint8(0), shape[::-1])
    header = nib.Nifti1Image(nothing, affine).header
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    sheared = np.abs(directions.T @ directions - np.eye(3)).max() > 1e-4
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(None if sheared else affine, code=0 if sheared else 1)
    header["magic"], header["vox_offset"] = b"n+1", _HEADER
    return bytes(header.binaryblock) + bytes(_HEADER - len(header.binaryblock))


class NiftiVolume(NamedTuple):
    """A volume that is read slice by slice.

    Attributes:
        path: Of the file.
        shape: (N, H, W).
        affine: (4, 4) index (column, row, slice) to mm LPS, as nested tuples.
        placed: The header says so, by qform or sform. Else nibabel makes an affine of the spacing
            alone, which knows neither left from right nor head from feet.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    placed: bool = True

    def slices(self) -> Iterator[NDArray[Any]]:
        """(H, W) values, int16 where all of a slice are whole and fit, else float32.

        Raises:
            DicomError: NIFTI_UNREADABLE.
        """
        proxy = _loaded(self.path).dataobj
        count, rows, columns = self.shape
        size = rows * columns * proxy.dtype.itemsize
        opener = gzip.open if is_packed(self.path) else open
        with cast(BinaryIO, opener(self.path, "rb")) as file:
            try:
                file.seek(proxy.offset)
                for _ in range(count):
                    data = file.read(size)
                    if len(data) != size:
                        raise DicomError("NIFTI_UNREADABLE", "shorter than its header says")
                    stored = np.frombuffer(data, proxy.dtype).reshape(rows, columns)
                    yield _whole(stored, float(proxy.slope), float(proxy.inter))
                while file.read(_BLOCK):  # gzip looks at its checksum at the end
                    pass
            except DicomError:
                raise
            except NIBABEL_RAISES as error:
                raise DicomError("NIFTI_UNREADABLE", type(error).__name__) from None


Axes = tuple[tuple[int, int], ...]
"""For column, row and slice: axis of the patient (0 L, 1 P, 2 S), and 1 along it or -1 against."""


def axes_of(affine_lps: NDArray[np.float64]) -> Axes:
    """Which way columns, rows and slices run, to the nearest axis of the patient."""
    found = io_orientation(affine_lps)
    return tuple((int(axis), int(sign)) for axis, sign in found)


def turned(volume: NiftiVolume, axes: Axes) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The whole volume with its axes in another order and direction; no value changes.

    Args:
        volume: To read.
        axes: Wanted; what a network knows from its training.

    Returns:
        (N, H, W) values and their (4, 4) affine, index (column, row, slice) to mm LPS.

    Raises:
        DicomError: NIFTI_UNREADABLE.
    """
    values = np.stack(list(volume.slices())).transpose(2, 1, 0)
    affine = np.array(volume.affine)
    change = ornt_transform(io_orientation(affine), np.array(axes))
    moved = apply_orientation(values, change)
    return moved.transpose(2, 1, 0), affine @ inv_ornt_aff(change, values.shape)


def open_nifti(path: Path) -> NiftiVolume:
    """The grid of a NIfTI-1 or NIfTI-2 file of one grey volume.

    Raises:
        DicomError: NIFTI_UNREADABLE: no such file or a damaged one, complex or colour voxels, an
            affine that maps to no volume, or more than one volume.
    """
    image = _loaded(path)
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        raise DicomError("NIFTI_UNREADABLE", f"shape {image.shape}, expected one volume")
    if image.get_data_dtype().kind not in "iuf":
        raise DicomError("NIFTI_UNREADABLE", f"voxels of {image.get_data_dtype()}")
    affine = LPS_TO_RAS @ image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DicomError("NIFTI_UNREADABLE", "its affine maps to no volume")
    rows = tuple(tuple(float(v) for v in row) for row in affine)
    placed = any(int(image.header[name]) > 0 for name in ("qform_code", "sform_code"))
    return NiftiVolume(path, (shape[2], shape[1], shape[0]), rows, placed)


def _loaded(path: Path) -> Any:
    try:
        return nib.load(path)
    except NIBABEL_RAISES as error:
        raise DicomError("NIFTI_UNREADABLE", type(error).__name__) from None


def _whole(stored: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    plain = slope == 1 and inter == 0
    values = stored if plain else stored.astype(np.float64) * slope + inter
    limits = np.iinfo(np.int16)
    with np.errstate(invalid="ignore"):
        fits = bool((values >= limits.min).all() and (values <= limits.max).all())
        if fits and (values.dtype.kind in "iu" or (values == np.rint(values)).all()):
            return values.astype(np.int16)
    return values.astype(np.float32)
