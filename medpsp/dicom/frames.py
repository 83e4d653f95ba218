"""What the header says of one frame: functional groups, geometry, grouping keys.

Per-frame functional groups override shared ones, which override the top level (PS3.3 C.7.6.16).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast, get_args

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medpsp.dicom.codestream import Layout
from medpsp.intensity import valid_windows
from medpsp.types import SpacingSource, VoiFunction, Window

PROJECTION = frozenset("CR DX MG XA RF IO PX RG".split())
_CM = 3
"""Physical units code of a region of ultrasound in cm (C.8.5.5.1.5)."""

Numbers = tuple[float, ...]
Point = tuple[float, float, float]


def functional(ds: Dataset, frame: int, macro: str, keyword: str) -> Any:
    """An element of a functional group of one frame, else of the top level; None if nowhere."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        sequence = ds.get(groups)
        if not sequence:
            continue
        items = sequence[frame if groups.startswith("Per") else 0].get(macro)
        value = items[0].get(keyword) if items else None
        if value not in (None, ""):
            return value
    value = ds.get(keyword)
    return None if value in (None, "") else value


def numbers(value: Any, count: int) -> Numbers | None:
    """``count`` numbers, or None where the element is absent or empty.

    One that is not finite passes: `group_series` refuses the frame that it belongs to.

    Raises:
        ValueError: Another number of values, or one that is no number.
    """
    if value is None or (isinstance(value, MultiValue) and not value):
        return None
    found = tuple(float(v) for v in value)
    if len(found) != count:
        raise ValueError("not the numbers expected")
    return found


def position(ds: Dataset, frame: int, frames: int) -> Point | None:
    """ImagePositionPatient of a frame, mm LPS.

    A multi-frame object without functional groups has one position for all frames: that of RT
    dose moves along the normal by GridFrameOffsetVector (C.8.8.3.2), others have none of their own.
    """
    value = functional(ds, frame, "PlanePositionSequence", "ImagePositionPatient")
    found = cast(Point | None, numbers(value, 3))
    if found is None or frames == 1 or "PerFrameFunctionalGroupsSequence" in ds:
        return found
    offsets, plane = ds.get("GridFrameOffsetVector"), orientation(ds, frame)
    if not offsets or not plane:
        return None
    step = float(offsets[frame]) - float(offsets[0])
    (a, b, c), (d, e, f) = plane[:3], plane[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    x, y, z = (p + n * step for p, n in zip(found, normal, strict=True))
    return x, y, z


def orientation(ds: Dataset, frame: int) -> Numbers | None:
    """ImageOrientationPatient of a frame: six direction cosines."""
    return numbers(functional(ds, frame, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)


def spacing(ds: Dataset, frame: int, modality: str) -> tuple[Numbers | None, SpacingSource]:
    """(between rows, between columns) in mm and how far to trust it (G8).

    PixelSpacing lies in the patient's plane; of a projection only if calibrated. Else the
    detector's spacing, or the region calibration of ultrasound. Never invented.
    """
    plane = numbers(functional(ds, frame, "PixelMeasuresSequence", "PixelSpacing"), 2)
    detector = numbers(ds.get("ImagerPixelSpacing") or None, 2) or numbers(
        ds.get("NominalScannedPixelSpacing") or None, 2
    )
    if modality == "US" and plane is None:
        found = _ultrasound_spacing(ds)
        return found, "ultrasound" if found else ""
    if modality not in PROJECTION:
        return plane, "patient" if plane else ""
    calibrated = bool(ds.get("PixelSpacingCalibrationType"))
    if plane and (calibrated or (detector and plane != detector)):
        return plane, "calibrated"
    if plane or detector:
        return plane or detector, "detector"
    return None, ""


def image_regions(ds: Dataset) -> list[Dataset]:
    """Regions of ultrasound that show 2-D tissue or colour flow (C.8.5.5.1.1, C.8.5.5.1.2)."""
    regions = ds.get("SequenceOfUltrasoundRegions") or []
    return [
        r
        for r in regions
        if r.get("RegionSpatialFormat") == 1 and r.get("RegionDataType") in (1, 2)
    ]


def image_box(ds: Dataset) -> tuple[int, int, int, int] | None:
    """(first row, first column, rows, columns) around the image regions, clipped to the image."""
    corners = [
        [
            int(r.RegionLocationMinY0),
            int(r.RegionLocationMinX0),
            int(r.RegionLocationMaxY1),
            int(r.RegionLocationMaxX1),
        ]
        for r in image_regions(ds)
    ]
    if not corners:
        return None
    top, left = (max(0, min(c[k] for c in corners)) for k in (0, 1))
    bottom = min(int(ds.Rows) - 1, max(c[2] for c in corners))
    right = min(int(ds.Columns) - 1, max(c[3] for c in corners))
    if bottom < top or right < left:
        return None
    return top, left, bottom - top + 1, right - left + 1


def _ultrasound_spacing(ds: Dataset) -> Numbers | None:
    found = {
        (abs(float(r.PhysicalDeltaY)) * 10, abs(float(r.PhysicalDeltaX)) * 10)
        for r in image_regions(ds)
        if r.get("PhysicalUnitsXDirection") == _CM and r.get("PhysicalUnitsYDirection") == _CM
    }
    return found.pop() if len(found) == 1 and min(min(f) for f in found) > 0 else None


def rescaling(ds: Dataset, frame: int) -> tuple[float, float, bool]:
    """Slope, intercept of a frame, and whether the header gives them; RT dose has a scaling.

    Raises:
        ValueError: Not finite.
    """
    macro = "PixelValueTransformationSequence"
    slope = functional(ds, frame, macro, "RescaleSlope")
    intercept = functional(ds, frame, macro, "RescaleIntercept")
    if slope is None and ds.get("DoseGridScaling") not in (None, ""):
        slope = ds.DoseGridScaling
    pair = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if not all(math.isfinite(v) for v in pair):
        raise ValueError("rescale not finite")
    return (*pair, slope is not None or intercept is not None)


def window(ds: Dataset, frame: int) -> tuple[Window | None, bool]:
    """First usable pair of Window Center and Width, and whether there was any value at all (P6)."""
    macro = "FrameVOILUTSequence"
    centers = _listed(functional(ds, frame, macro, "WindowCenter"))
    widths = _listed(functional(ds, frame, macro, "WindowWidth"))
    function: Any = str(functional(ds, frame, macro, "VOILUTFunction") or "LINEAR").upper()
    if function in get_args(VoiFunction):
        for found in valid_windows(centers, widths):
            if found.width >= 1 or function != "LINEAR":
                return replace(found, function=function), True
    return None, bool(centers or widths)


def padding(ds: Dataset, layout: Layout) -> tuple[float | None, float | None]:
    """Padding value and the other end of its range, as stored values (C.7.5.1.1.2).

    VR US under signed pixels, or SS under others, is a common slip: the bits are meant.
    """
    prefix = {32: "Float", 64: "DoubleFloat"}[layout.allocated] if layout.floating else ""
    found: list[float | None] = [None, None]
    for n, keyword in enumerate((f"{prefix}PixelPaddingValue", f"{prefix}PixelPaddingRangeLimit")):
        value, span = ds.get(keyword), 2**layout.allocated
        if not isinstance(value, int | float):
            continue
        if layout.signed and value >= span // 2:
            value -= span
        elif value < 0 and not (layout.signed or layout.floating):
            value += span
        found[n] = float(value)
    return found[0], found[1]


def _listed(value: Any) -> list[float]:
    items = [value] if isinstance(value, int | float | str) else list(value or [])
    found = []
    for item in items:
        try:
            found.append(float(item))
        except (TypeError, ValueError):
            found.append(math.nan)
    return found


def collision_key(ds: Dataset, frame: int) -> tuple[str, ...]:
    """What tells slices of one position apart: echo, time, b-value, acquisition, kernel (S3)."""
    echo = functional(ds, frame, "MREchoSequence", "EffectiveEchoTime")
    content = "FrameContentSequence"
    time = functional(ds, frame, content, "TemporalPositionIndex")
    diffusion = "MRDiffusionSequence"
    parts = (
        echo if echo is not None else (ds.get("EchoTime"), ds.get("EchoNumbers")),
        time if time is not None else ds.get("TemporalPositionIdentifier"),
        functional(ds, frame, "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime")
        or ds.get("TriggerTime"),
        (
            functional(ds, frame, diffusion, "DiffusionBValue"),
            functional(ds, frame, diffusion, "DiffusionGradientDirectionSequence")
            or ds.get("DiffusionGradientOrientation"),
        ),
        functional(ds, frame, content, "FrameAcquisitionNumber") or ds.get("AcquisitionNumber"),
        functional(ds, frame, "CTReconstructionSequence", "ConvolutionKernel"),
    )
    return tuple(str(part) for part in parts)


def split_key(ds: Dataset, frame: int) -> str:
    """What separates images of one series: kind (LOCALIZER, M, P), frame of reference, stack."""
    kinds = ds.get("ImageType") or []
    words = [] if isinstance(kinds, str) else [str(v) for v in kinds][2:4]
    for macro in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence"):
        kind = functional(ds, frame, macro, "FrameType")
        words += [str(v) for v in kind][2:4] if isinstance(kind, MultiValue) else []
    stack = functional(ds, frame, "FrameContentSequence", "StackID")
    return "|".join([*words, str(ds.get("FrameOfReferenceUID") or ""), str(stack)])
