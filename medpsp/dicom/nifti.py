"""Masks out: NIfTI on the grid of the DICOM series."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.placement import LPS_TO_RAS


def write_nifti_mask(path: Path, mask: NDArray[np.uint8], affine_lps: NDArray[np.float64]) -> None:
    """Write a (N, H, W) mask as NIfTI-1, index order (column, row, slice), RAS affine.

    sform and qform both get code 1 (scanner anatomical); a sheared grid has no qform, so there
    only the sform is set. ITK reads a qform first, and would silently straighten the shear.
    """
    affine = LPS_TO_RAS @ affine_lps
    image = nib.Nifti1Image(mask.transpose(2, 1, 0), affine)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    sheared = np.abs(directions.T @ directions - np.eye(3)).max() > 1e-4
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(None if sheared else affine, code=0 if sheared else 1)
    partial = path.with_name(f".partial-{path.name}")  # the suffix decides the format
    try:
        nib.save(image, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
