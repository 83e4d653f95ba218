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
from medpsp.dicom.header import Header
from medpsp.intensity import valid_windows
from medpsp.types import Box, SpacingSource, VoiFunction, Window

PROJECTION = frozenset("CR DX MG XA RF IO PX RG".split())
_CM = 3
"""Physical units code of a region of ultrasound in cm (C.8.5.5.1.5)."""

Numbers = tuple[float, ...]
Point = tuple[float, float, float]


def functional(ds: Header, frame: int, macro: str, keyword: str) -> Any:
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


def position(ds: Header, frame: int, frames: int) -> Point | None:
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


def orientation(ds: Header, frame: int) -> Numbers | None:
    """ImageOrientationPatient of a frame: six direction cosines."""
    return numbers(functional(ds, frame, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)


def spacing(ds: Header, frame: int, modality: str) -> tuple[Numbers | None, SpacingSource]:
    """(between rows, between columns) in mm and how far to trust it.

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


def image_regions(ds: Header) -> list[Dataset]:
    """Regions of ultrasound that show 2-D tissue or colour flow (C.8.5.5.1.1, C.8.5.5.1.2)."""
    regions = ds.get("SequenceOfUltrasoundRegions") or []
    return [
        r
        for r in regions
        if r.get("RegionSpatialFormat") == 1 and r.get("RegionDataType") in (1, 2)
    ]


def image_boxes(ds: Header) -> tuple[Box, ...]:
    """The image regions, clipped to the image; one that lies outside is left out."""
    found = []
    for r in image_regions(ds):
        top, left = max(0, int(r.RegionLocationMinY0)), max(0, int(r.RegionLocationMinX0))
        bottom = min(int(ds.Rows) - 1, int(r.RegionLocationMaxY1))
        right = min(int(ds.Columns) - 1, int(r.RegionLocationMaxX1))
        if bottom >= top and right >= left:
            found.append((top, left, bottom - top + 1, right - left + 1))
    return tuple(found)


def _ultrasound_spacing(ds: Header) -> Numbers | None:
    found = {
        (abs(float(r.PhysicalDeltaY)) * 10, abs(float(r.PhysicalDeltaX)) * 10)
        for r in image_regions(ds)
        if r.get("PhysicalUnitsXDirection") == _CM and r.get("PhysicalUnitsYDirection") == _CM
    }
    return found.pop() if len(found) == 1 and min(min(f) for f in found) > 0 else None


def rescaling(ds: Header, frame: int) -> tuple[float, float, bool]:
    """Slope, intercept of a frame, and whether the header gives them; RT dose has a scaling.

    Raises:
        ValueError: Not finite, or a slope of 0, which leaves no image.
    """
    macro = "PixelValueTransformationSequence"
    slope = functional(ds, frame, macro, "RescaleSlope")
    intercept = functional(ds, frame, macro, "RescaleIntercept")
    if slope is None and ds.get("DoseGridScaling") not in (None, ""):
        slope = ds.DoseGridScaling
    pair = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if not all(math.isfinite(v) for v in pair):
        raise ValueError("rescale not finite")
    if pair[0] == 0:
        raise ValueError("slope 0")
    return (*pair, slope is not None or intercept is not None)


def rescale_type(ds: Header, frame: int) -> str:
    """Unit of the modality values (0028,1054); HU where CT has none (C.11.1.1.2)."""
    unit = functional(ds, frame, "PixelValueTransformationSequence", "RescaleType")
    return str(unit or ("HU" if ds.get("Modality") == "CT" else "")).strip().upper()


def photometric(ds: Header, layout: Layout) -> str:
    """How the values are shown: MONOCHROME2 that a presentation LUT inverts is MONOCHROME1.

    MONOCHROME1 is the pair of INVERSE and stays what it is (C.11.6.1.2).
    """
    inverse = str(ds.get("PresentationLUTShape") or "").strip().upper() == "INVERSE"
    return "MONOCHROME1" if inverse and layout.photometric == "MONOCHROME2" else layout.photometric


def mend_palette(ds: Header, layout: Layout) -> None:
    """The first value mapped has the sign of the pixels (C.7.6.3.1.5), whatever its VR."""
    for colour in ("Red", "Green", "Blue"):
        descriptor = ds.get(f"{colour}PaletteColorLookupTableDescriptor")
        if isinstance(descriptor, list | MultiValue) and len(descriptor) == 3:
            first = int(descriptor[1]) % 2**16
            descriptor[1] = first - 2**16 if layout.signed and first >= 2**15 else first


def window(ds: Header, frame: int) -> tuple[Window | None, bool]:
    """First usable pair of Window Center and Width, and whether there was any value at all."""
    macro = "FrameVOILUTSequence"
    centers = _listed(functional(ds, frame, macro, "WindowCenter"))
    widths = _listed(functional(ds, frame, macro, "WindowWidth"))
    function: Any = str(functional(ds, frame, macro, "VOILUTFunction") or "LINEAR").upper()
    if function in get_args(VoiFunction):
        for found in valid_windows(centers, widths):
            if found.width >= 1 or function != "LINEAR":
                return replace(found, function=function), True
    return None, bool(centers or widths)


def padding(ds: Header, layout: Layout) -> tuple[float | None, float | None]:
    """Padding value and the other end of its range, of all allocated bits (C.7.5.1.1.2).

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


def contrast_key(ds: Header, frame: int) -> tuple[str, ...]:
    """What makes another image of the same place: echo, b-value, kernel, tube voltage."""
    echo = functional(ds, frame, "MREchoSequence", "EffectiveEchoTime")
    return (
        _plain(echo if echo is not None else ds.get("EchoTime")),
        _plain(functional(ds, frame, "MRDiffusionSequence", "DiffusionBValue")),
        _plain(functional(ds, frame, "CTReconstructionSequence", "ConvolutionKernel")),
        _plain(functional(ds, frame, "CTXRayDetailsSequence", "KVP")),
    )


def collision_key(ds: Header, frame: int) -> tuple[str, ...]:
    """What may change within one volume: time, trigger, direction, acquisition, echo number."""
    content = "FrameContentSequence"
    time = functional(ds, frame, content, "TemporalPositionIndex")
    return (
        _plain(time if time is not None else ds.get("TemporalPositionIdentifier")),
        _plain(
            functional(
                ds, frame, "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"
            )
            or ds.get("TriggerTime")
        ),
        _plain(
            functional(ds, frame, "MRDiffusionSequence", "DiffusionGradientDirectionSequence")
            or ds.get("DiffusionGradientOrientation")
        ),
        _plain(
            functional(ds, frame, content, "FrameAcquisitionNumber") or ds.get("AcquisitionNumber")
        ),
        _plain(ds.get("EchoNumbers")),
    )


def times(ds: Header, frame: int) -> tuple[str, str]:
    """Of acquisition and of content, sortable as text; empty where the header has none."""
    taken = functional(ds, frame, "FrameContentSequence", "FrameAcquisitionDateTime")
    taken = taken or ds.get("AcquisitionDateTime") or _date_and_time(ds, "Acquisition")
    return str(taken).strip(), _date_and_time(ds, "Content")


def _date_and_time(ds: Header, what: str) -> str:
    time = str(ds.get(f"{what}Time") or "").replace(":", "").strip()
    return f"{ds.get(f'{what}Date') or ''}{time}" if time else ""


def _plain(value: Any) -> str:
    """Text of a value, the same for 10, 10.0 and 1E1."""
    if isinstance(value, int | float):
        return f"{float(value):.6g}"
    return "" if value is None else str(value)


def split_key(ds: Header, frame: int) -> str:
    """What separates images of one series: kind, unit, frame of reference, stack.

    The kind is values 3 to 5 of ImageType, for example LOCALIZER, M or P, and WATER of Dixon.
    """
    kinds = ds.get("ImageType") or []
    words = [] if isinstance(kinds, str) else [str(v) for v in kinds][2:5]
    for macro in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence"):
        kind = functional(ds, frame, macro, "FrameType")
        words += [str(v) for v in kind][2:5] if isinstance(kind, MultiValue) else []
    words.append(rescale_type(ds, frame))
    stack = functional(ds, frame, "FrameContentSequence", "StackID")
    return "|".join([*words, str(ds.get("FrameOfReferenceUID") or ""), str(stack)])
