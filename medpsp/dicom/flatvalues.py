"""The elements that the way of an image asks for, and their values as pydicom gives them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.tag import BaseTag

KEPT = tuple(
    """
    SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID StudyDate AcquisitionDate ContentDate
    AcquisitionDateTime AcquisitionTime ContentTime Modality ConversionType Manufacturer
    PresentationLUTShape PatientID BodyPartExamined KVP EchoTime EchoNumbers
    SecondaryCaptureDeviceID SecondaryCaptureDeviceManufacturer
    SecondaryCaptureDeviceManufacturerModelName SecondaryCaptureDeviceSoftwareVersions TriggerTime
    ImagerPixelSpacing ConvolutionKernel FrameAcquisitionDateTime DiffusionBValue
    DiffusionGradientOrientation EffectiveEchoTime NominalScannedPixelSpacing
    NominalCardiacTriggerDelayTime FrameAcquisitionNumber TemporalPositionIndex StackID FrameType
    StudyInstanceUID SeriesInstanceUID AcquisitionNumber ImagePositionPatient
    ImageOrientationPatient FrameOfReferenceUID TemporalPositionIdentifier
    DimensionOrganizationType SamplesPerPixel PhotometricInterpretation PlanarConfiguration
    NumberOfFrames Rows Columns PixelSpacing BitsAllocated BitsStored HighBit PixelRepresentation
    PixelPaddingValue PixelPaddingRangeLimit FloatPixelPaddingValue FloatPixelPaddingRangeLimit
    DoubleFloatPixelPaddingValue DoubleFloatPixelPaddingRangeLimit PixelSpacingCalibrationType
    BurnedInAnnotation SpecimenLabelInImage WindowCenter WindowWidth RescaleIntercept RescaleSlope
    RescaleType VOILUTFunction GridFrameOffsetVector DoseGridScaling
    """.split()
)
"""What the way of an image asks a header for; `tests/test_flat.py` looks through its sources."""
UNUSUAL = tuple(
    """
    DirectoryRecordSequence PerFrameFunctionalGroupsSequence SharedFunctionalGroupsSequence
    ModalityLUTSequence VOILUTSequence SequenceOfUltrasoundRegions
    DiffusionGradientDirectionSequence RedPaletteColorLookupTableDescriptor
    GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
    """.split()
)
"""Asked for too, but where one of them is there, pydicom reads the object."""
META = ("MediaStorageSOPClassUID", "TransferSyntaxUID")
KEYWORDS = frozenset((*KEPT, *UNUSUAL))
_PLAIN = frozenset(("CS", "DA", "TM", "DT"))


class FlatHeader:
    """The wanted elements of an ordinary file, with the values that pydicom would give.

    Values are shared between headers: nobody may change them.
    """

    __slots__ = ("_elements",)

    def __init__(self, elements: dict[str, tuple[str, bytes]]) -> None:
        self._elements = elements

    def get(self, key: str, default: Any = None, /) -> Any:
        """The value of an element, or ``default`` where it is absent.

        Raises:
            KeyError: No keyword of `KEPT` or `UNUSUAL`: its absence here would say nothing.
        """
        element = self._elements.get(key)
        if element is not None:
            return value_of(*element)
        if key not in KEYWORDS and key not in META:
            raise KeyError(key)
        return default

    def __contains__(self, key: str, /) -> bool:
        if key not in KEYWORDS:
            raise KeyError(key)
        return key in self._elements

    def __getattr__(self, name: str, /) -> Any:
        element = self._elements.get(name)
        if element is None:
            raise AttributeError(name)
        return value_of(*element)

    @property
    def file_meta(self) -> FlatHeader:
        """The elements of group 0002; no keyword is in both groups."""
        return self


@lru_cache(maxsize=8192)
def value_of(vr: str, raw: bytes) -> Any:
    """The value that pydicom makes of the bytes of an element, ASCII where they are text.

    Raises:
        Exception: Whatever pydicom's converters raise.
    """
    if vr in _PLAIN and raw and b"\\" not in raw:
        return raw.decode("ascii").rstrip(" \0")
    element = RawDataElement(BaseTag(0), vr, len(raw), raw, 0, False, True)
    return convert_raw_data_element(element).value
