"""NIfTI masks (ITK-SNAP) onto DICOM slices, by affine and never by shape."""

from __future__ import annotations

import os
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from numpy.typing import NDArray

from medpsp.errors import ConfigError, LabelError
from medpsp.types import IGNORE, SliceRef

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CORNER_TOL_VOXEL = 0.1
"""Largest distance of a mapped grid corner from a voxel centre; catches 0.05 rad and 5 %."""

_NIBABEL_RAISES = (
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


def read_nifti_mask(
    path: Path, affine_lps: NDArray[np.float64], shape: tuple[int, int, int]
) -> NDArray[np.int64]:
    """Read a NIfTI mask and lay it on the grid of a DICOM series.

    Args:
        path: .nii or .nii.gz file.
        affine_lps: (4, 4) index (column, row, slice) of the series to mm LPS.
        shape: (N, H, W) of the series.

    Returns:
        (N, H, W) mask values as stored, 0 where the mask file does not reach.

    Raises:
        LabelError: MASK_MISSING, MASK_UNREADABLE, MASK_NOT_3D, MASK_NO_XFORM,
            MASK_SQ_DISAGREE, MASK_NOT_INTEGRAL, MASK_GRID_MISMATCH, MASK_OUTSIDE_IMAGE.
    """
    if not path.is_file():
        raise LabelError("MASK_MISSING", "no file at the place that label_pattern names")
    try:
        image: Any = nib.load(path)
        values = np.asarray(image.dataobj)
        mask_ras = _affine(image)
    except LabelError:
        raise
    except _NIBABEL_RAISES as error:
        raise LabelError("MASK_UNREADABLE", f"not a NIfTI file ({type(error).__name__})") from None
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3 or values.dtype.fields is not None:
        raise LabelError("MASK_NOT_3D", f"{values.ndim}-D, expected one value a voxel in 3-D")
    return place_mask(integral(values), mask_ras, affine_lps, shape)


def place_mask(
    mask: NDArray[np.int64],
    mask_ras: NDArray[np.float64],
    affine_lps: NDArray[np.float64],
    shape: tuple[int, int, int],
) -> NDArray[np.int64]:
    """Transpose, flip and paste a mask onto a series grid, bit-exact, without interpolation.

    The map from series index to mask index must be a signed permutation with an integral
    offset, tested at the corners of the grid, where small errors of rotation have grown.

    Args:
        mask: (i, j, k) in the order of its own affine.
        mask_ras: (4, 4) mask index to mm RAS.
        affine_lps: (4, 4) series index (column, row, slice) to mm LPS.
        shape: (N, H, W) of the series.

    Raises:
        LabelError: MASK_GRID_MISMATCH or MASK_OUTSIDE_IMAGE.
    """
    slices, rows, columns = shape
    if slices == 1:  # one slice has no distance to the next: take the mask's along that direction
        affine_lps = affine_lps.copy()
        normal = affine_lps[:3, 2] / np.linalg.norm(affine_lps[:3, 2])
        lengths = np.linalg.norm(mask_ras[:3, :3], axis=0)
        along = np.abs((LPS_TO_RAS[:3, :3] @ normal) @ (mask_ras[:3, :3] / lengths))
        affine_lps[:3, 2] = normal * lengths[int(along.argmax())]
    to_mask = np.linalg.inv(mask_ras) @ LPS_TO_RAS @ affine_lps
    turn = np.round(to_mask[:3, :3])
    offset = np.round(to_mask[:3, 3])
    size = np.array([columns, rows, slices])
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (size - 1)
    error = corners @ (to_mask[:3, :3] - turn).T + (to_mask[:3, 3] - offset)
    worst = float(np.abs(error).max())
    permutes = bool((np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all())
    if not permutes or worst > CORNER_TOL_VOXEL:
        raise LabelError(
            "MASK_GRID_MISMATCH",
            f"mask {mask.shape} does not lie on the image grid {(columns, rows, slices)}: "
            f"a corner is off by {worst:.2f} voxel, at most {CORNER_TOL_VOXEL} allowed",
        )
    axes = [int(np.flatnonzero(turn[:, axis])[0]) for axis in range(3)]  # mask axis of each ours
    out = np.zeros((columns, rows, slices), dtype=np.int64)
    ours, theirs = [], []
    for axis, mask_axis in enumerate(axes):
        index = np.arange(size[axis]) * int(turn[mask_axis, axis]) + int(offset[mask_axis])
        inside = (index >= 0) & (index < mask.shape[mask_axis])
        ours.append(np.flatnonzero(inside))
        theirs.append(index[inside])
    part = mask.transpose(axes)[np.ix_(*theirs)]
    out[np.ix_(*ours)] = part
    lost = int(np.count_nonzero(mask)) - int(np.count_nonzero(part))
    if lost:
        raise LabelError("MASK_OUTSIDE_IMAGE", f"{lost} labelled voxels lie outside the image")
    return out.transpose(2, 1, 0)


def map_labels(
    values: NDArray[np.int64], label_map: dict[int, int], classes: int
) -> NDArray[np.uint8]:
    """Mask values to class indices.

    Args:
        values: Any shape.
        label_map: Value to class index or 255; empty for the identity.
        classes: Number of classes K; the identity accepts 0..K-1 and 255.

    Raises:
        LabelError: MASK_LABEL_UNKNOWN with the values that have no class.
    """
    legal = label_map or {**{i: i for i in range(classes)}, IGNORE: IGNORE}
    found, inverse = np.unique(values, return_inverse=True)
    unknown = [int(v) for v in found if int(v) not in legal]
    if unknown:
        raise LabelError(
            "MASK_LABEL_UNKNOWN",
            f"values {unknown[:8]} have no class; add them to data.label_map (255 ignores)",
        )
    lookup = np.array([legal[int(v)] for v in found], dtype=np.uint8)
    return lookup[inverse].reshape(values.shape)


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
        pattern: With fields PatientID, SeriesInstanceUID, Modality and folder.
        ref: Any slice of the series.
        archive: Root of the images; ``folder`` is relative to it.

    Raises:
        ConfigError: The pattern has an unknown field.
        LabelError: MASK_OUTSIDE_ROOT where a header value would lead out of ``root``, LABEL_NONE
            where it cannot be a file name.
    """
    try:
        relative = pattern.format(
            PatientID=ref.patient_id,
            SeriesInstanceUID=ref.series_uid,
            Modality=ref.modality,
            folder=Path(ref.path).parent.relative_to(archive).as_posix(),
        )
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ConfigError(
            f"data.label_pattern '{pattern}': fields are {{PatientID}}, {{SeriesInstanceUID}}, "
            "{Modality} and {folder}"
        ) from None
    # by text, not by resolve(): links that the owner put below root may lead anywhere
    parts = PurePosixPath(relative).parts
    if relative.startswith("/") or ".." in parts:
        raise LabelError("MASK_OUTSIDE_ROOT", "a header value leads out of data.labels")
    if "\0" in relative or any(len(os.fsencode(part)) > 255 for part in parts):
        raise LabelError("LABEL_NONE", "a header value is no file name")
    return root / relative
