"""One DICOM file to a `SliceRef` (header) and to modality values (pixels).

One decoder per transfer syntax: pydicom would try the next plug-in after a codestream error, and
a corrupt image then comes back as a full array from a more forgiving codec.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, JPEGLSTransferSyntaxes

from medpsp.errors import DicomError
from medpsp.types import PixelDtype, SliceRef, Window

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote element values

DECODERS: dict[str, str] = {
    "1.2.840.10008.1.2": "",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1": "",  # Explicit VR Little Endian
    "1.2.840.10008.1.2.1.99": "",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.2": "",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE Lossless, by pylibjpeg-rle
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG Baseline
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81": "pyjpegls",  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 Lossless, by pylibjpeg-openjpeg
    "1.2.840.10008.1.2.4.91": "pylibjpeg",  # JPEG 2000
}
"""Transfer syntax to the one pydicom plug-in that decodes it; empty for native pixels."""

MAX_SIDE = 16384
"""Rows or columns above this are refused before any memory is asked for."""

_COLOUR = ("PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_REQUIRED = (
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
)


def read_header(path: Path, file_id: str) -> SliceRef:
    """Read the header of one file.

    Raises:
        DicomError: With code NOT_DICOM, FILE_EMPTY, FILE_UNREADABLE, NOT_IMAGE, TS_UNSUPPORTED,
            MULTIFRAME_UNSUPPORTED, PHOTOMETRIC_UNSUPPORTED, BITS_UNSUPPORTED, HDR_TRUNCATED,
            HDR_REQUIRED_MISSING, ELEM_INVALID, SIZE_LIMIT.
    """
    ds = _open(path, stop_before_pixels=True)
    with _refusing("ELEM_INVALID", "a header value is malformed"):
        _check_image(ds)
        _check_supported(ds)
        slope, intercept = _rescale(ds)
        ref = SliceRef(
            path=str(path),
            file_id=file_id,
            patient_id=str(ds.get("PatientID") or ""),
            series_uid=str(ds.SeriesInstanceUID),
            sop_uid=str(ds.SOPInstanceUID),
            modality=str(ds.get("Modality") or ""),
            rows=int(ds.Rows),
            columns=int(ds.Columns),
            dtype=modality_dtype(ds, slope, intercept),
            photometric=str(ds.PhotometricInterpretation),
            position=_numbers(ds, "ImagePositionPatient", 3),  # type: ignore[arg-type]
            orientation=_numbers(ds, "ImageOrientationPatient", 6),
            pixel_spacing=_numbers(ds, "PixelSpacing", 2),  # type: ignore[arg-type]
            window=_first_window(ds),
            series_split_key=_split_key(ds),
        )
    return ref


def read_pixels(ref: SliceRef) -> NDArray[Any]:
    """Modality values of one slice (PS3.3 C.11.1): stored value * slope + intercept.

    Returns:
        (H, W) of ``ref.dtype``; int16 only where that is exact.

    Raises:
        DicomError: PIX_TRUNCATED, TS_MISMATCH, DEC_ERROR, or a code of `read_header`.
    """
    ds = _open(Path(ref.path), stop_before_pixels=False)
    if "PixelData" not in ds:
        raise DicomError("PIX_TRUNCATED", "no Pixel Data (7FE0,0010); the file may be cut short")
    with _refusing("DEC_ERROR", "pixels not decodable"):
        _check_pixel_bytes(ds)
        values = _to_modality(ds, _decode(ds), ref.dtype)
    if values.shape != (ref.rows, ref.columns):
        raise DicomError(
            "DEC_ERROR", f"decoded shape {values.shape}, header says {(ref.rows, ref.columns)}"
        )
    return values


def modality_dtype(ds: Dataset, slope: float, intercept: float) -> PixelDtype:
    """int16 where every value the header allows is an exact int16, else float32."""
    if slope != 1 or not float(intercept).is_integer() or "ModalityLUTSequence" in ds:
        return "float32"
    bits, signed = int(ds.BitsStored), int(ds.PixelRepresentation) == 1
    low = -(2 ** (bits - 1)) if signed else 0
    high = 2 ** (bits - signed) - 1
    fits = low + intercept >= -32768 and high + intercept <= 32767
    return "int16" if fits else "float32"


@contextmanager
def _refusing(code: str, what: str) -> Iterator[None]:
    """Whatever a parser or a codec raises on bad bytes becomes a DicomError that quotes nothing.

    pydicom puts element values into its warnings and messages, so both stop here. The codec of
    pylibjpeg-rle panics with an exception that is no `Exception`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DicomError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001
        raise DicomError(code, f"{what} ({type(error).__name__})") from None


def _open(path: Path, *, stop_before_pixels: bool) -> Dataset:
    with _refusing("HDR_TRUNCATED", "not parsable"):
        try:
            if path.stat().st_size == 0:
                raise DicomError("FILE_EMPTY", "0 bytes")
            ds = pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
        except InvalidDicomError:
            raise DicomError("NOT_DICOM", "no DICM prefix after 128 bytes") from None
        except OSError as error:
            raise DicomError("FILE_UNREADABLE", f"{type(error).__name__} {error.errno}") from None
    return ds


def _check_image(ds: Dataset) -> None:
    if "Rows" in ds and "Columns" in ds:
        return
    kind = str(ds.file_meta.get("MediaStorageSOPClassUID") or ds.get("SOPClassUID") or "")
    # pydicom reads a cut file without a word
    if not kind:
        raise DicomError("HDR_TRUNCATED", "an object without SOPClassUID (0008,0016)")
    if UID(kind).name.endswith("Image Storage"):
        raise DicomError("HDR_TRUNCATED", "an image object without Rows (0028,0010)")
    raise DicomError("NOT_IMAGE", "no Rows and Columns (0028,0010), (0028,0011)")


def _check_supported(ds: Dataset) -> None:
    syntax = _syntax(ds)
    if syntax not in DECODERS:
        known = syntax if syntax.replace(".", "").isdecimal() else "missing or malformed"
        raise DicomError("TS_UNSUPPORTED", f"transfer syntax {known}")
    frames = int(ds.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DicomError("MULTIFRAME_UNSUPPORTED", f"{frames} frames, expected 1")
    rows, columns = int(ds.Rows), int(ds.Columns)
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
        raise DicomError("SIZE_LIMIT", f"{rows} x {columns}, expected 1..{MAX_SIDE}")
    photometric, samples = (
        str(ds.get("PhotometricInterpretation")),
        int(ds.get("SamplesPerPixel") or 1),
    )
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        known = photometric if photometric in _COLOUR else "missing or unknown"
        raise DicomError("PHOTOMETRIC_UNSUPPORTED", f"{known} with {samples} samples")
    for keyword in _REQUIRED:
        if ds.get(keyword) in (None, ""):
            raise DicomError("HDR_REQUIRED_MISSING", f"no {keyword}")
    stored, high = int(ds.BitsStored), int(ds.get("HighBit") or ds.BitsStored - 1)
    if high != stored - 1:  # pydicom would read the low bits regardless
        raise DicomError("BITS_UNSUPPORTED", f"HighBit {high} with BitsStored {stored}")


def _check_pixel_bytes(ds: Dataset) -> None:
    """Native pixels must be as long as the header says; PS3.5 A.4 keeps the two forms apart."""
    if UID(_syntax(ds)).is_encapsulated:
        # without its end marker pyjpegls reads on past the buffer, for seconds
        if _syntax(ds) in JPEGLSTransferSyntaxes and b"\xff\xd9" not in ds.PixelData[-64:]:
            raise DicomError("PIX_TRUNCATED", "the JPEG-LS stream has no end marker")
        return
    if ds["PixelData"].is_undefined_length:
        raise DicomError("TS_MISMATCH", "fragments of pixels under a native transfer syntax")
    need = math.ceil(int(ds.Rows) * int(ds.Columns) * int(ds.BitsAllocated) / 8)
    if len(ds.PixelData) < need:
        raise DicomError("PIX_TRUNCATED", f"{len(ds.PixelData)} bytes of pixels, expected {need}")


def _syntax(ds: Dataset) -> str:
    return str(ds.file_meta.get("TransferSyntaxUID", ""))[:64]


def _split_key(ds: Dataset) -> str:
    """What separates images of one series: kind (LOCALIZER, M, P ...) and frame of reference."""
    kinds = ds.get("ImageType") or []
    parts = [] if isinstance(kinds, str) else [str(v) for v in kinds][2:4]
    return "|".join([*parts, str(ds.get("FrameOfReferenceUID") or "")])


def _decode(ds: Dataset) -> NDArray[Any]:
    return pixel_array(ds, raw=True, decoding_plugin=DECODERS[_syntax(ds)])


def _to_modality(ds: Dataset, stored: NDArray[Any], dtype: PixelDtype) -> NDArray[Any]:
    if "ModalityLUTSequence" in ds:
        return apply_modality_lut(stored, ds).astype(np.float32)
    slope, intercept = _rescale(ds)
    if dtype == "int16":
        return (stored.astype(np.int32) + int(intercept)).astype(np.int16)
    values = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    if not np.isfinite(values).all():
        raise DicomError("ELEM_INVALID", "RescaleSlope or RescaleIntercept overflows float32")
    return values


def _rescale(ds: Dataset) -> tuple[float, float]:
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    pair = (
        1.0 if slope in (None, "") else float(slope),
        0.0 if intercept in (None, "") else float(intercept),
    )
    if not all(math.isfinite(v) for v in pair):
        raise ValueError("rescale not finite")
    return pair


def _numbers(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    value = ds.get(keyword)
    if value is None or value == "":
        return None
    numbers = tuple(float(v) for v in value)
    if len(numbers) != count or not all(math.isfinite(v) for v in numbers):
        raise ValueError(keyword)
    return numbers


def _first_window(ds: Dataset) -> Window | None:
    """First usable pair of Window Center and Width (VM 1-n; PS3.3 C.11.2.1.2)."""
    centers, widths = _listed(ds, "WindowCenter"), _listed(ds, "WindowWidth")
    for center, width in zip(centers, widths, strict=False):
        if math.isfinite(center) and math.isfinite(width) and width > 0:
            return Window(center=center, width=width)
    return None


def _listed(ds: Dataset, keyword: str) -> list[float]:
    value = ds.get(keyword)
    if value is None or value == "":
        return []
    try:
        items = [value] if isinstance(value, int | float | str) else list(value)
        return [float(v) for v in items]
    except (ValueError, TypeError):
        return []
