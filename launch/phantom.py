"""A DICOM factory: CT- and MR-like phantoms as real DICOM files with NIfTI masks.

The demo and the tests are built on it. The anatomy is a body ellipse with liver, two kidneys,
spine and, in some patients, lesions in the liver; places, sizes, contrast and noise differ from
patient to patient, so a mask that ignores the image scores badly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from medpsp.dicom.placement import LPS_TO_RAS

CLASSES = ("background", "liver", "kidney", "lesion")
_HU = {"air": -1000, "body": -10, "spine": 300, "liver": 70, "kidney": 140, "lesion": 15}


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """How a patient is imaged.

    Attributes:
        shape: Slices, rows, columns.
        spacing: Between slices, rows, columns; mm.
        tilt_deg: Gantry tilt about the x axis: slices are sheared against the table.
        oblique_deg: Rotation of the whole grid about the z axis.
        modality: CT has rescale and window; MR has neither, and arbitrary units.
        syntax: Transfer syntax to store the pixels in.
        bits: BitsStored of the CT values.
    """

    shape: tuple[int, int, int] = (12, 128, 128)
    spacing: tuple[float, float, float] = (5.0, 2.6, 2.6)
    tilt_deg: float = 0.0
    oblique_deg: float = 0.0
    modality: str = "CT"
    syntax: UID = ExplicitVRLittleEndian
    bits: int = 12

    def affine_lps(self) -> NDArray[np.float64]:
        """(4, 4) index (column, row, slice) to mm LPS."""
        dz, dy, dx = self.spacing
        turn, tilt = np.deg2rad(self.oblique_deg), np.deg2rad(self.tilt_deg)
        across = np.array([np.cos(turn), np.sin(turn), 0.0])
        down = np.array([-np.sin(turn), np.cos(turn), 0.0])
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1] = across * dx, down * dy
        affine[:3, 2] = np.array([0.0, 0.0, dz]) + down * dz * np.tan(tilt)
        affine[:3, 3] = [-self.shape[2] * dx / 2, -self.shape[1] * dy / 2, -700.0]
        return affine


def draw(phantom: Phantom, seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Draw one patient.

    Returns:
        HU (N, H, W) int16 and class indices (N, H, W) uint8 of `CLASSES`.
    """
    rng = np.random.default_rng(seed)
    slices, rows, columns = phantom.shape
    # relative coordinates: z in [0, 1], y and x in [-1, 1]
    z = ((np.arange(slices) + 0.5) / slices)[:, None, None]
    y = np.linspace(-1, 1, rows)[None, :, None] - rng.uniform(-0.12, 0.12)
    x = np.linspace(-1, 1, columns)[None, None, :] - rng.uniform(-0.12, 0.12)
    scale = rng.uniform(0.85, 1.1)
    y, x = y / scale, x / scale

    def ellipsoid(
        centre: tuple[float, float, float], radii: tuple[float, float, float]
    ) -> NDArray[np.bool_]:
        place = [c + rng.normal(0, 0.03) for c in centre]
        size = [r * rng.uniform(0.85, 1.15) for r in radii]
        grid = (z - place[0]) ** 2 / size[0] ** 2 + (y - place[1]) ** 2 / size[1] ** 2
        return np.asarray(grid + (x - place[2]) ** 2 / size[2] ** 2 < 1)

    body = np.broadcast_to((y / 0.62) ** 2 + (x / 0.85) ** 2 < 1, phantom.shape)
    spine = np.broadcast_to((y - 0.42) ** 2 + x**2 < 0.11**2, phantom.shape)
    liver = ellipsoid((0.55, -0.1, -0.4), (0.45, 0.32, 0.36)) & body
    kidneys = ellipsoid((0.4, 0.25, -0.42), (0.3, 0.15, 0.12))
    kidneys = (kidneys | ellipsoid((0.4, 0.25, 0.42), (0.3, 0.15, 0.12))) & body
    liver &= ~kidneys
    lesion = np.zeros(phantom.shape, dtype=bool)
    for _ in range(int(rng.integers(1, 3))):
        spot = (rng.uniform(0.4, 0.7), rng.uniform(-0.22, 0.02), rng.uniform(-0.52, -0.28))
        lesion |= ellipsoid(spot, (0.16, 0.12, 0.12)) & liver
    hu = np.full(phantom.shape, _HU["air"], dtype=np.float64)
    label = np.zeros(phantom.shape, dtype=np.uint8)
    for name, region, index in (
        ("body", body, 0),
        ("spine", spine & body, 0),
        ("liver", liver, 1),
        ("kidney", kidneys, 2),
        ("lesion", lesion, 3),
    ):
        hu[region] = _HU[name] + (rng.normal(0, 8) if name != "body" else 0)
        label[region] = index
    return np.round(hu + _noise(rng, phantom.shape)).clip(-1024, 3000).astype(np.int16), label


def _noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Noise with some correlation in the plane, as reconstruction leaves it; HU."""
    white = rng.normal(0, 22, shape)
    return (white + np.roll(white, 1, 1) + np.roll(white, 1, 2) + np.roll(white, 1, (1, 2))) / 2


def write_series(
    folder: Path, patient: str, values: NDArray[np.int16], phantom: Phantom
) -> list[Path]:
    """Write one DICOM file a slice; names and InstanceNumber run against the anatomy.

    Args:
        folder: Created; gets ``IM0001`` and so on, without a suffix, as scanners do.
        patient: PatientID; the PatientName is made from it.
        values: (N, H, W): HU for CT, arbitrary units for MR.
        phantom: Geometry and storage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    affine = phantom.affine_lps()
    study, series = (generate_uid(entropy_srcs=[patient, kind, str(folder)]) for kind in "ab")
    paths = []
    for index in range(len(values)):
        ds = _header(patient, phantom, affine, index)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[patient, "frame"])
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(index)])
        ds.InstanceNumber = len(values) - index
        _set_pixels(ds, values[index], phantom)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if phantom.syntax.is_compressed and not phantom.syntax.is_deflated:
            ds.compress(phantom.syntax, generate_instance_uid=False)
        else:
            ds.file_meta.TransferSyntaxUID = phantom.syntax
        path = folder / f"IM{len(values) - index:04d}"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _header(patient: str, phantom: Phantom, affine: NDArray[np.float64], index: int) -> Dataset:
    ds = Dataset()
    ds.PatientID, ds.PatientName = patient, f"Phantom^{patient}"
    ds.PatientBirthDate, ds.StudyDate, ds.AccessionNumber = "19500101", "20200101", f"ACC{patient}"
    ds.Modality = phantom.modality
    ds.SOPClassUID = CTImageStorage if phantom.modality == "CT" else MRImageStorage
    ds.Manufacturer, ds.SliceThickness = "medpsp phantom", f"{phantom.spacing[0]:.4f}"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    position = affine[:3, 3] + index * affine[:3, 2]
    directions = [affine[:3, i] / np.linalg.norm(affine[:3, i]) for i in (0, 1)]
    ds.ImagePositionPatient = [f"{v:.6f}" for v in position]
    ds.ImageOrientationPatient = [f"{v:.8f}" for d in directions for v in d]
    ds.PixelSpacing = [f"{phantom.spacing[1]:.6f}", f"{phantom.spacing[2]:.6f}"]
    return ds


def _set_pixels(ds: Dataset, values: NDArray[np.int16], phantom: Phantom) -> None:
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, phantom.bits, phantom.bits - 1
    ds.PixelRepresentation = 0
    offset = 0
    if phantom.modality == "CT":
        offset = 1024
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "-1024", "HU"
        ds.WindowCenter, ds.WindowWidth = "40", "400"
    stored = (values.astype(np.int32) + offset).clip(0, 2**phantom.bits - 1)
    ds.PixelData = stored.astype("<u2" if phantom.syntax.is_little_endian else ">u2").tobytes()
    ds["PixelData"].VR = "OW"


def to_mr(hu: NDArray[np.int16], seed: int) -> NDArray[np.int16]:
    """HU to arbitrary positive units with a scale of its own for each patient."""
    gain = np.random.default_rng(seed).uniform(2, 5)
    return ((hu.astype(np.float64) + 200).clip(0, 600) * gain).round().astype(np.int16)


def write_mask(path: Path, label: NDArray[np.uint8], phantom: Phantom) -> None:
    """Write a mask as ITK-SNAP users have it: NIfTI in RAS, other axis order than the DICOM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(label.transpose(2, 1, 0), LPS_TO_RAS @ phantom.affine_lps())
    image = nib.as_closest_canonical(image)
    image.set_sform(image.affine, code=1)
    image.set_qform(None, code=0)
    nib.save(image, path)


def write_archive(root: Path, patients: int, phantom: Phantom, seed: int = 0) -> tuple[Path, Path]:
    """A small messy archive.

    Series folders named by nothing useful, a text file, an empty file and a truncated one among
    them; masks in a folder of their own.

    Returns:
        The DICOM root and the mask root.
    """
    dicom, masks = root / "dicom", root / "masks"
    for number in range(patients):
        patient = f"PHANTOM{number:03d}"
        hu, label = draw(phantom, seed * 1000 + number)
        values = hu if phantom.modality == "CT" else to_mr(hu, number)
        write_series(dicom / f"{number % 3}" / f"S{number:05d}", patient, values, phantom)
        write_mask(masks / f"{patient}.nii.gz", label, phantom)
    (dicom / "README.txt").write_text("exported by hand\n", encoding="utf-8")
    (dicom / "0" / "EMPTY").write_bytes(b"")
    whole = next(iter(sorted((dicom / "0" / "S00000").iterdir()))).read_bytes()
    (dicom / "0" / "CUT").write_bytes(whole[:400])
    return dicom, masks
