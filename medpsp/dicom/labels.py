"""NIfTI masks (ITK-SNAP) onto DICOM slices, by affine and never by shape."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from medpsp.dicom.names import LabelVolume
from medpsp.dicom.nifti import NIBABEL_RAISES, SUFFIXES, is_packed
from medpsp.dicom.placement import (
    CORNER_TOL_VOXEL,
    Floats,
    Grid,
    nearest_mask,
    place_mask,
    unsheared,
)
from medpsp.dicom.walk import system_said
from medpsp.errors import LabelError
from medpsp.types import IGNORE, SliceRef

_MOST_EXTENSIONS = 1 << 24  # bytes after the header; nibabel reads what the header asks for
_PADDED, _SMALL = 8, 1 << 26  # voxels of a mask: 8 times the image's and 512 x 512 x 256 more
_DEFLATE_RATIO = 1032  # the most that deflate can reach
_LONGEST_TABLE = 1 << 16
_SLAB = 1 << 21  # voxels that are converted at a time: 16 MiB as float64
_INTEGERS = (np.uint8, np.int16, np.int32, np.int64, np.uint64)


def read_nifti_mask(
    path: Path,
    grid: Grid,
    geometry: Literal["affine", "index"] = "affine",
    resample: Literal["never", "nearest"] = "never",
) -> LabelVolume:
    """Read a NIfTI mask and lay it on the grid of a DICOM series.

    Args:
        path: .nii or .nii.gz file.
        grid: Of the series.
        geometry: index: the order of the voxels counts, the affine does not; shapes must agree.
        resample: nearest: what fits no other way is taken by nearest voxel.

    Returns:
        (N, H, W) values of the first type of uint8, int16, int32 ... that holds them, 0 where
        the mask file does not reach. Notes: MASK_PARTIAL_COVER, MASK_MADE_ON_UNSHEARED,
        MASK_RESAMPLED, MASK_BY_INDEX, MASK_INDEX_NOT_AFFINE.

    Raises:
        LabelError: MASK_MISSING, MASK_UNREADABLE, MASK_SIZE_LIMIT, MASK_NOT_3D, MASK_NO_XFORM,
            MASK_SQ_DISAGREE, MASK_NOT_INTEGRAL, MASK_GRID_MISMATCH, MASK_OUTSIDE_IMAGE,
            MASK_ELSEWHERE, FILE_UNREADABLE.
    """
    if not path.is_file():
        raise LabelError("MASK_MISSING", "no file at the place that label_pattern names")
    try:
        image = _open(path, math.prod(grid.shape))
        values = _values(image)
        ras = _affine(image) if geometry == "affine" else None
    except LabelError:
        raise
    except NIBABEL_RAISES as error:
        if why := system_said(error):
            raise LabelError("FILE_UNREADABLE", f"the mask: {why}") from None
        raise LabelError("MASK_UNREADABLE", f"not a NIfTI file ({type(error).__name__})") from None
    if ras is None:
        return _by_index(values, image, grid)
    return _by_affine(values, ras, grid, resample)


def _open(path: Path, voxels: int) -> Any:
    """The image with its values unread, after a check of what its header asks memory for."""
    if not path.name.lower().endswith(SUFFIXES):
        raise LabelError("MASK_UNREADABLE", "the name must end in .nii or .nii.gz")
    packed = is_packed(path)
    with ImageOpener(path) as file:
        head = file.read(540)
    second = head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
    kind: Any = nib.Nifti2Header if second else nib.Nifti1Header
    if len(head) < kind.sizeof_hdr:
        raise LabelError("MASK_UNREADABLE", f"{len(head)} bytes, a header has {kind.sizeof_hdr}")
    offset = float(kind(head[: kind.sizeof_hdr], check=False)["vox_offset"])
    if packed and not offset <= _MOST_EXTENSIONS:  # also NaN
        raise LabelError("MASK_SIZE_LIMIT", "header extensions of over 16 MiB")
    # neither mapped, which counts as memory of ours, nor inflated from the start for each slab
    image: Any = nib.load(path, mmap=False, keep_file_open=True)
    found = math.prod(image.shape)
    if found > _PADDED * voxels + _SMALL:
        raise LabelError("MASK_SIZE_LIMIT", f"{found} voxels, the image has {voxels}")
    need = found * image.get_data_dtype().itemsize
    have = path.stat().st_size * (_DEFLATE_RATIO if packed else 1)
    if not 0 < need <= have:
        raise LabelError("MASK_UNREADABLE", f"the header asks for {need} bytes, the file is short")
    return image


def _values(image: Any) -> NDArray[Any]:
    """(i, j, k) values, slab by slab: whole, 512 x 512 x 400 of float64 are 800 MiB."""
    shape, extra = tuple(image.shape[:3]), image.shape[3:]
    if len(shape) < 3 or set(extra) - {1} or image.get_data_dtype().fields is not None:
        raise LabelError("MASK_NOT_3D", f"{len(image.shape)}-D, expected one value a voxel in 3-D")
    out: NDArray[Any] = np.empty(shape, dtype=np.uint8, order="F")
    planes = max(1, _SLAB // math.prod(shape[:2]))
    for start in range(0, shape[2], planes):
        index = (slice(None), slice(None), slice(start, start + planes), *(0 for _ in extra))
        slab = np.asarray(image.dataobj[index])
        slab = slab if slab.dtype.kind in "iu" else integral(slab)
        held, low, high = np.iinfo(out.dtype), int(slab.min()), int(slab.max())
        if low < held.min or high > held.max:
            low, high = min(low, int(out[..., :start].min(initial=0))), max(high, held.max)
            out = out.astype(next(t for t in _INTEGERS if _holds(t, low, high)))
        out[..., start : start + planes] = slab
    return out


def _holds(kind: type[np.integer[Any]], low: int, high: int) -> bool:
    return np.iinfo(kind).min <= low and high <= np.iinfo(kind).max


def _by_affine(values: NDArray[Any], ras: Floats, grid: Grid, resample: str) -> LabelVolume:
    if grid.affine is None:
        raise LabelError("MASK_GRID_MISMATCH", "the images have no patient geometry")
    notes: dict[str, int] = {}
    where = grid.shape, grid.partial, notes
    try:
        return LabelVolume(place_mask(values, ras, grid.affine, *where), notes)
    except LabelError as error:
        if error.code != "MASK_GRID_MISMATCH":
            raise
        mismatch = error
    for upright in unsheared(grid.affine, grid.shape[0]):
        try:
            placed = place_mask(values, ras, upright, *where)
        except LabelError as error:
            if error.code != "MASK_GRID_MISMATCH":
                raise
        else:
            return LabelVolume(placed, {**notes, "MASK_MADE_ON_UNSHEARED": 1})
    if resample == "never":
        raise mismatch
    placed = nearest_mask(values, ras, grid.affine, *where)
    return LabelVolume(placed, {**notes, "MASK_RESAMPLED": 1})


def _by_index(values: NDArray[Any], image: Any, grid: Grid) -> LabelVolume:
    one_object = len({uid for uid, _ in grid.slots}) == 1 and len(grid.slots) == grid.shape[0]
    if grid.affine is None and not one_object:
        raise LabelError(
            "MASK_GRID_MISMATCH",
            f"{grid.shape[0]} single images without a position have no order that a mask could "
            "follow; data.mask_geometry=index needs positions or the frames of one object",
        )
    placed = values.transpose(2, 1, 0)
    if placed.shape != grid.shape:
        raise LabelError(
            "MASK_GRID_MISMATCH",
            f"mask {values.shape}, image {grid.shape[::-1]}; data.mask_geometry=index needs both "
            "to be equal",
        )
    notes = {"MASK_BY_INDEX": 1}
    try:
        meant = _by_affine(values, _affine(image), grid, "never").values
    except ValueError:  # there is no usable affine, which is what this option is for
        return LabelVolume(placed, notes)
    if (meant != placed).any():
        notes["MASK_INDEX_NOT_AFFINE"] = 1
    return LabelVolume(placed, notes)


def map_labels(values: NDArray[Any], label_map: dict[int, int], classes: int) -> NDArray[np.uint8]:
    """Mask values to class indices.

    Args:
        values: Integers, any shape.
        label_map: Value to class index or 255; empty for the identity.
        classes: Number of classes K; the identity accepts 0..K-1 and 255.

    Raises:
        LabelError: MASK_LABEL_UNKNOWN with the values that have no class.
    """
    legal = label_map or {**{i: i for i in range(classes)}, IGNORE: IGNORE}
    if not values.size:
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = int(values.min()), int(values.max())
    if high - low >= _LONGEST_TABLE:
        found, index = np.unique(values, return_inverse=True)
        return _classes_of(found, legal)[index].reshape(values.shape)
    seen = np.zeros(high - low + 1, dtype=np.bool_)
    for plane in values:  # one at a time: as 64-bit integers a volume takes gigabytes
        seen[plane.astype(np.int64) - low] = True
    found = np.flatnonzero(seen)
    table = np.zeros(len(seen), dtype=np.uint8)
    table[found] = _classes_of(found + low, legal)
    out = np.empty(values.shape, dtype=np.uint8)
    for number, plane in enumerate(values):
        out[number] = table[plane.astype(np.int64) - low]
    return out


def _classes_of(found: NDArray[Any], legal: dict[int, int]) -> NDArray[np.uint8]:
    unknown = [int(v) for v in found if int(v) not in legal]
    if unknown:
        raise LabelError(
            "MASK_LABEL_UNKNOWN",
            f"values {unknown[:8]} have no class; add them to data.label_map (255 ignores)",
        )
    return np.array([legal[int(v)] for v in found], dtype=np.uint8)


def _affine(image: Any) -> NDArray[np.float64]:
    header = image.header
    if not hasattr(header, "get_sform"):
        raise LabelError("MASK_UNREADABLE", "not a NIfTI file")
    sform, scode = header.get_sform(coded=True)
    qform, qcode = header.get_qform(coded=True)
    if not scode and not qcode:
        raise LabelError("MASK_NO_XFORM", "sform_code and qform_code are both 0")
    affine: NDArray[np.float64] = np.asarray(sform if scode else qform, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise LabelError("MASK_NO_XFORM", "the affine is singular")
    if scode and qcode:
        apart = np.linalg.inv(affine) @ np.asarray(qform, dtype=np.float64) - np.eye(4)
        far = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        far = far * np.array([*(np.array((*image.shape, 1)[:3]) - 1), 1])
        if np.abs(far @ apart.T).max() > CORNER_TOL_VOXEL:
            raise LabelError("MASK_SQ_DISAGREE", "sform and qform differ by over 0.1 voxel")
    return affine


def integral(values: NDArray[Any]) -> NDArray[np.int64]:
    """Mask values as int64.

    Raises:
        LabelError: MASK_NOT_INTEGRAL.
    """
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    whole = values.dtype.kind == "f" and np.isfinite(values).all()
    if not whole or (values != np.round(values)).any():
        raise LabelError("MASK_NOT_INTEGRAL", "mask values are not whole numbers")
    return values.astype(np.int64)


def mask_path(root: Path, pattern: str, ref: SliceRef, archive: Path) -> Path:
    """Where the mask of a series should lie.

    Args:
        root: Folder of the masks.
        pattern: ``data.label_pattern``, whose fields the configuration has checked.
        ref: Any slice of the series.
        archive: Root of the images; ``folder`` is relative to it.

    Raises:
        LabelError: MASK_OUTSIDE_ROOT where a header value would lead out of ``root``, LABEL_NONE
            where it cannot be a file name.
    """
    relative = pattern.format(
        PatientID=ref.patient_id,
        SeriesInstanceUID=ref.series_uid,
        Modality=ref.modality,
        folder=Path(ref.path).parent.relative_to(archive).as_posix(),
    )
    # by text, not by resolve(): links that the owner put below root may lead anywhere
    parts = PurePosixPath(relative).parts
    if relative.startswith("/") or ".." in parts:
        raise LabelError("MASK_OUTSIDE_ROOT", "a header value leads out of data.labels")
    if "\0" in relative or any(len(os.fsencode(part)) > 255 for part in parts):
        raise LabelError("LABEL_NONE", "a header value is no file name")
    return root / relative
