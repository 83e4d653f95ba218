"""A small archive with canaries in every place that can hold text, sound and broken.

Eight patients of four slices, each in another transfer syntax and container, with NIfTI masks, SEG
and RTSTRUCT; ultrasound with a name in its pixels; objects that fail in as many ways as there are
error paths; and a VOC archive.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from nibabel.nifti1 import Nifti1Extension
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pack_bits
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    RLELossless,
)

from launch.codestreams import jpeg
from launch.phantom import Phantom, draw, write_mask, write_series
from medpsp.identity import split_of
from tests.canary import Canaries
from tests.factory import set_raw
from tests.labelled import RTSTRUCT, SEG, contour, frame_of, item, region, rtstruct, seg
from tests.trapmaker import Archive, Volume, enhanced

PATIENTS = 8
SHAPE = Phantom(shape=(4, 48, 48))
SMALL = Phantom(shape=(1, 16, 16))
SYNTAXES = (
    *(ExplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGLosslessSV1),
    *(ImplicitVRLittleEndian, RLELossless, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian),
)
ELEMENTS = """
OtherPatientIDs OtherPatientNames PatientBirthName PatientMotherBirthName PatientBirthDate
PatientBirthTime PatientAddress PatientTelephoneNumbers PatientComments PatientReligiousPreference
EthnicGroup Occupation AdditionalPatientHistory IssuerOfPatientID MilitaryRank BranchOfService
CountryOfResidence RegionOfResidence MedicalRecordLocator MedicalAlerts Allergies ResponsiblePerson
ResponsibleOrganization PatientInstitutionResidence ClinicalTrialSubjectID ClinicalTrialSiteName
PatientName PatientWeight PatientSize LastMenstrualDate
StudyID AccessionNumber StudyDescription StudyComments StudyDate StudyTime AdmittingDate
SeriesDescription ProtocolName SeriesDate SeriesTime SeriesNumber ImageComments
DerivationDescription
AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionComments AcquisitionNumber
ContentDate ContentTime InstanceCreationDate InstanceCreationTime
InstitutionName InstitutionAddress InstitutionalDepartmentName ReferringPhysicianName
ReferringPhysicianAddress ReferringPhysicianTelephoneNumbers PhysiciansOfRecord
PerformingPhysicianName NameOfPhysiciansReadingStudy OperatorsName RequestingPhysician
RequestingService ScheduledPerformingPhysicianName RequestedProcedureDescription
RequestedProcedureID PerformedProcedureStepDescription PerformedProcedureStepID
PerformedProcedureStepStartDate PerformedProcedureStepStartTime ScheduledProcedureStepID
ScheduledProcedureStepStartDate AdmissionID CurrentPatientLocation PerformedLocation
FillerOrderNumberImagingServiceRequest PlacerOrderNumberImagingServiceRequest ContrastBolusAgent
StationName DeviceSerialNumber SoftwareVersions ManufacturerModelName DetectorID GantryID PlateID
CassetteID RetrieveAETitle PerformedStationAETitle ScheduledStationAETitle PerformedStationName
DateOfLastCalibration SequenceName ConvolutionKernel PositionReferenceIndicator
StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID InstanceCreatorUID StorageMediaFileSetUID
IrradiationEventUID SynchronizationFrameOfReferenceUID DeviceUID
""".split()
NEEDED = """
NumberOfFrames RescaleSlope RescaleIntercept PixelSpacing ImagePositionPatient ImageType
ImageOrientationPatient WindowCenter WindowWidth InstanceNumber BitsAllocated SamplesPerPixel Rows
SpecificCharacterSet SOPClassUID SOPInstanceUID TransferSyntaxUID Modality PatientID EchoTime
PhotometricInterpretation SeriesInstanceUID StudyDate BurnedInAnnotation
GridFrameOffsetVector PlanarConfiguration DimensionOrganizationType TriggerTime
""".split()
"""Elements that the reader converts, for values that do not convert."""
FIRST = b"\x08\x00\x08\x00CS"
"""What a data set starts with: ImageType."""


@dataclass(frozen=True)
class Planted:
    """Where it is.

    Attributes:
        dicom, masks: The archive and its NIfTI masks.
        voc: A VOC archive.
        device: The series of one patient, and every broken object, for `predict`.
        odd: A folder without any DICOM object.
        key: A key that puts patients into all splits.
        patients: PatientIDs, in order.
    """

    dicom: Path
    masks: Path
    voc: Path
    device: Path
    odd: Path
    key: str
    patients: tuple[str, ...]


def plant(ds: Dataset, known: Canaries, who: str) -> None:
    """Put a canary into every element that is not needed, into sequences, private and odd places.

    The PatientID stays that of the caller.
    """
    for keyword in ELEMENTS:
        # days are short, so few of them: each more raises the odds of finding one by chance
        day = dictionary_VR(keyword) in ("DA", "DT")
        own = who.startswith("patient") and keyword in ("StudyDate", "PatientBirthDate")
        setattr(ds, keyword, known.value("all" if day and not own else who, keyword))
    ds.Manufacturer = f"{known.text(f'{who} Manufacturer')} SIEMENS"
    ds.BodyPartExamined = known.text(f"{who} BodyPartExamined")
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", known.text(f"{who} ImageType")]
    ds.ICCProfile = known.text(f"{who} ICC").encode() * 13
    _sequences(ds, known, who)
    _private(ds, known, who)
    _overlays(ds, known, who)
    ds.add_new(0xFFFCFFFC, "OB", known.text(f"{who} padding").encode())
    meta = ds.file_meta
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.ImplementationVersionName = known.text(f"{who} ImplementationVersionName")
    meta.ImplementationClassUID = known.uid(f"{who} ImplementationClassUID")
    meta.SourceApplicationEntityTitle = known.text(f"{who} SourceApplicationEntityTitle")
    meta.PrivateInformationCreatorUID = known.uid(f"{who} PrivateInformationCreatorUID")
    meta.PrivateInformation = known.text(f"{who} PrivateInformation").encode()
    ds.preamble = known.text(f"{who} preamble").encode().ljust(128, b"\0")


def _sequences(ds: Dataset, known: Canaries, who: str) -> None:
    """Two levels deep and more."""

    def given(where: str, *keywords: str, **elements: Any) -> Dataset:
        return item(**{k: known.value(f"{who} {where}", k) for k in keywords}, **elements)

    def code(where: str) -> list[Dataset]:
        return [given(f"code of {where}", "CodeValue", "CodingSchemeDesignator", "CodeMeaning")]

    ds.RequestAttributesSequence = [
        given(
            "request",
            *("RequestedProcedureID", "ScheduledProcedureStepDescription"),
            ScheduledProtocolCodeSequence=code("protocol"),
        )
    ]
    ds.ReferringPhysicianIdentificationSequence = [
        given(
            "physician",
            *("InstitutionName", "PersonAddress", "PersonTelephoneNumbers"),
            PersonIdentificationCodeSequence=code("physician"),
        )
    ]
    ds.ReferencedImageSequence = [
        given(
            "reference",
            *("ReferencedSOPClassUID", "ReferencedSOPInstanceUID"),
            PurposeOfReferenceCodeSequence=code("purpose"),
        )
    ]
    ds.OtherPatientIDsSequence = [
        given(
            "other",
            *("PatientID", "IssuerOfPatientID"),
            IssuerOfPatientIDQualifiersSequence=[given("issuer", "UniversalEntityID")],
        )
    ]
    ds.OriginalAttributesSequence = [
        given(
            "original",
            *("SourceOfPreviousValues", "ModifyingSystem"),
            AttributeModificationDateTime=known.moment("all modification"),
            ModifiedAttributesSequence=[
                given(
                    "modified",
                    *("PatientName", "PatientID", "AccessionNumber"),
                    PatientBirthDate=known.date("all modified birth"),
                    OtherPatientIDsSequence=[given("deep", "PatientID")],
                )
            ],
        )
    ]


def _private(ds: Dataset, known: Canaries, who: str) -> None:
    inner = item(PatientName=known.name(f"{who} private name"))
    inner.private_block(0x13, known.text(f"{who} inner creator"), create=True).add_new(
        1, "LO", known.text(f"{who} inner private")
    )
    block = ds.private_block(0x11, known.text(f"{who} creator"), create=True)
    block.add_new(1, "LO", known.text(f"{who} private LO"))
    block.add_new(2, "SQ", [inner])
    block.add_new(3, "UN", known.text(f"{who} private UN").encode())
    block.add_new(4, "OB", known.text(f"{who} private OB").encode("utf-16-le"))
    ds.add_new(0x00099999, "UN", known.text(f"{who} private without creator").encode())
    ds.add_new(0x00089998, "UN", known.text(f"{who} UN").encode())


def _overlays(ds: Dataset, known: Canaries, who: str) -> None:
    drawn = known.text(f"{who} OverlayData").encode().ljust(ds.Rows * ds.Columns // 8, b"\0")
    for element, vr, value in (
        (0x0010, "US", ds.Rows),
        (0x0011, "US", ds.Columns),
        (0x0022, "LO", known.text(f"{who} OverlayDescription")),
        (0x0040, "CS", "G"),
        (0x0050, "SS", [1, 1]),
        (0x0100, "US", 1),
        (0x0102, "US", 0),
        (0x1500, "LO", known.text(f"{who} OverlayLabel")),
        (0x3000, "OW", drawn),
        (0x4000, "LT", known.text(f"{who} OverlayComments")),
    ):
        ds[Tag(0x6000, element)] = DataElement(Tag(0x6000, element), vr, value)
    ds.add_new(0x50002500, "LO", known.text(f"{who} CurveLabel"))


def planted_slices(
    folder: Path, known: Canaries, who: str, values: NDArray[np.int16], phantom: Phantom
) -> list[Dataset]:
    """CT slices in order of position, all elements planted; ``folder`` is for scratch."""
    compressed = phantom.syntax.is_encapsulated
    plain = replace(phantom, syntax=ExplicitVRLittleEndian) if compressed else phantom
    found = []
    for k, path in enumerate(write_series(folder, known.text(f"{who} PatientID"), values, plain)):
        ds = pydicom.dcmread(path)
        path.unlink()
        ds.SOPInstanceUID = known.uid(f"{who} SOPInstanceUID {k}")
        plant(ds, known, who)
        if phantom.syntax == JPEGLosslessSV1:
            ds.PixelData = encapsulate([_commented(ds.pixel_array, known, who)])
            ds.file_meta.TransferSyntaxUID = phantom.syntax
        elif compressed:
            ds.compress(phantom.syntax, generate_instance_uid=False)
        found.append(ds)
    return found


def _commented(values: NDArray[Any], known: Canaries, who: str) -> bytes:
    """A lossless JPEG with a comment, Exif and ICC segments."""
    stream = jpeg(values, lossless=True, predictor=1, bitspersample=12)
    extra = b""
    for marker, start in ((0xFE, b""), (0xE1, b"Exif\0\0"), (0xE2, b"ICC_PROFILE\0\1\1")):
        body = start + known.text(f"{who} JPEG segment {marker:X}").encode()
        extra += struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    return stream[:2] + extra + stream[2:]


def raw(ds: Dataset, **how: Any) -> bytes:
    """As a file, whatever is wrong with it; ``how`` of `pydicom.dcmwrite`."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(buffer, **how)
    return buffer.getvalue()


def write_planted(root: Path, known: Canaries) -> Planted:
    """Write all of it below ``root``, which holds no canary in its own name."""
    dicom, masks, scratch = root / "dicom", root / "masks", root / "scratch"
    patients = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, syntax in enumerate(SYNTAXES):
            who = f"patient {number}"
            patients.append(known.text(f"{who} PatientID"))
            hu, label = draw(SHAPE, number)
            files = {
                f"{known.text(f'{who} file {k}')}.dcm": raw(ds)
                for k, ds in enumerate(
                    planted_slices(scratch, known, who, hu, replace(SHAPE, syntax=syntax))
                )
            }
            _store(dicom, known, number, files)
            if number == 0:
                _write(root / "device" / known.text("device folder"), files)
            mask = masks / f"{patients[-1]}.nii.gz"
            write_mask(mask, label, SHAPE)
            _plant_mask(mask, known, who)
            _write(dicom / known.text("labels"), label_objects(known, who, label))
        _odd_masks(root, known)
        _ultrasound(dicom / known.text("ultrasound"), known)
        _enhanced(dicom / known.text("enhanced folder"), known)
        for name, data in broken_objects(scratch, known):
            for folder in (root / "device", dicom):
                _write(folder / known.text("broken"), {known.text(f"broken file {name}"): data})
        for folder in (root / "odd", dicom / known.text("odd")):
            _odd_files(folder, known)
        _voc(root / "voc", known)
    return Planted(
        dicom=dicom,
        masks=masks,
        voc=root / "voc",
        device=root / "device",
        odd=root / "odd",
        key=_key_for(patients),
        patients=tuple(patients),
    )


def _key_for(patients: list[str]) -> str:
    """The first key with two patients in each held-out split."""
    for number in count():
        key = f"key of the canaries {number}"
        splits = [split_of(key.encode(), p, 0.25, 0.25) for p in patients]
        if splits.count("val") == splits.count("test") == 2:
            return key
    raise AssertionError


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _store(dicom: Path, known: Canaries, number: int, files: dict[str, bytes]) -> None:
    """A patient's files: plain, in zip, in tar, gzip'd, or below a name that is not UTF-8."""
    who = f"patient {number}"
    folder = dicom / known.text(f"{who} folder") / known.text(f"{who} subfolder")
    folder.mkdir(parents=True)
    if number == 1:
        with zipfile.ZipFile(folder / f"{known.text('zip')}.zip", "w") as archive:
            archive.comment = known.text("zip comment").encode()
            for name, data in files.items():
                archive.writestr(f"{known.text('zip folder')}/{name}", data)
    elif number == 2:
        with tarfile.open(folder / f"{known.text('tar')}.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"{known.text('tar folder')}/{name}")
                info.size, info.uname, info.gname = (
                    len(data),
                    known.text("tar user"),
                    known.text("tar group"),
                )
                info.pax_headers = {"comment": known.text("tar comment")}
                tar.addfile(info, io.BytesIO(data))
    elif number == 5:
        _write(folder, {f"{name}.gz": gzip.compress(data) for name, data in files.items()})
    elif number == 6:
        odd = os.fsencode(folder) + b"/" + known.text("odd folder").encode() + b"_\xfc\xe4"
        os.mkdir(odd)
        for name, data in files.items():
            with open(odd + b"/\xe9" + name.encode(), "wb") as file:
                file.write(data)
    else:
        _write(folder, files)


def _plant_mask(path: Path, known: Canaries, who: str) -> None:
    """Text fields of a NIfTI header, and an extension."""
    image = nib.load(path)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = known.text(f"{who} NIfTI {field}").encode()
    comment = known.text(f"{who} NIfTI extension").encode()
    image.header.extensions.append(Nifti1Extension("comment", comment))
    nib.save(image, path)


def label_objects(known: Canaries, who: str, label: NDArray[np.uint8]) -> dict[str, bytes]:
    """A SEG of the liver, an RTSTRUCT with a square, each also with a name that is no class."""
    affine, images = (
        SHAPE.affine_lps(),
        [known.uid(f"{who} SOPInstanceUID {k}") for k in range(len(label))],
    )
    frames = [frame_of(affine, k, n, uid) for n in (1, 2) for k, uid in enumerate(images)]
    names = {1: "liver", 2: known.text(f"{who} SegmentLabel")}
    mask = seg("BINARY", frames, names, affine, label.shape[1:])
    for part in mask.SegmentSequence:
        part.SegmentDescription = known.text(f"{who} SegmentDescription")
        part.SegmentAlgorithmName = known.text(f"{who} SegmentAlgorithmName")
        part.TrackingID, part.TrackingUID = known.text(f"{who} TrackingID"), known.uid(f"{who} T")
    mask.BitsAllocated = mask.BitsStored = mask.SamplesPerPixel = 1
    mask.HighBit = mask.PixelRepresentation = 0
    mask.PhotometricInterpretation = "MONOCHROME2"
    mask.PixelData = pack_bits(np.concatenate([label == 1, label == 2]).astype(np.uint8))
    corners = np.array([(20, 20), (28, 20), (28, 28), (20, 28)])
    square = np.column_stack([corners, np.full(4, 1), np.ones(4)]) @ affine.T
    region = [contour(square[:, :3])]
    region[0].ContourImageSequence = [item(ReferencedSOPInstanceUID=images[1])]
    regions = rtstruct({"Kidney": region, known.text(f"{who} ROIName"): region})
    regions.StructureSetROISequence[0].ROIDescription = known.text(f"{who} ROIDescription")
    regions.StructureSetLabel = known.text(f"{who} StructureSetLabel")
    regions.StructureSetDate = known.date(f"{who} StructureSetDate")
    regions.StructureSetName = known.text(f"{who} StructureSetName")
    found = {}
    for kind, ds, uid in (("SEG", mask, SEG), ("RTSTRUCT", regions, RTSTRUCT)):
        ds.PatientID = known.text(f"{who} PatientID")
        ds.PatientName = known.name(f"{who} PatientName")
        ds.SOPInstanceUID = known.uid(f"{who} {kind} SOPInstanceUID")
        for keyword in ("FrameOfReferenceUID", "StudyInstanceUID"):
            setattr(ds, keyword, known.value(who, keyword))
        for keyword in ("ContentCreatorName", "ContentDescription", "ContentLabel", "ContentDate"):
            setattr(ds, keyword, known.value(f"{who} {kind}", keyword))
        ds.SeriesInstanceUID = known.uid(f"{who} {kind} SeriesInstanceUID")
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = uid
        ds.preamble = known.text(f"{who} {kind} preamble").encode().ljust(128, b"\0")
        found[known.text(f"{who} {kind} file")] = raw(ds)
    return found


def _odd_masks(root: Path, known: Canaries) -> None:
    """Three patients whose masks are refused, and one without."""
    for kind in ("unknown value", "moved", "garbage", "none"):
        who = f"mask {kind}"
        hu, label = draw(SMALL, 99)
        slices = planted_slices(root / "scratch", known, who, hu, SMALL)
        _write(
            root / "dicom" / known.text(f"{who} folder"),
            {f"{known.text(f'{who} file')}": raw(slices[0])},
        )
        path = root / "masks" / f"{known.text(f'{who} PatientID')}.nii.gz"
        if kind == "unknown value":
            write_mask(path, label + np.uint8(77), SMALL)
        elif kind == "moved":
            write_mask(path, label, replace(SMALL, spacing=(5.0, 2.7, 2.6)))
        elif kind == "garbage":
            path.write_bytes(known.text(f"{who} content").encode() * 50)


def _ultrasound(folder: Path, known: Canaries) -> None:
    """Colour clips with a name in their first row: with a region below it, and without any."""
    for kind in ("with region", "without region"):
        who = f"ultrasound {kind}"
        (ds,) = planted_slices(
            folder / "scratch", known, who, np.zeros((1, 16, 16), np.int16), SMALL
        )
        (folder / "scratch").rmdir()
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            del ds[keyword]
        ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.3.1", "US"
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit, ds.NumberOfFrames = 7, 2
        frames = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
        burned = known.text(f"{who} pixels").encode()
        frames.reshape(2, -1)[:, 5 : 5 + len(burned)] = np.frombuffer(burned, np.uint8)
        ds.PixelData = frames.tobytes()
        if kind == "with region":
            ds.SequenceOfUltrasoundRegions = [region(2, 4, 13, 15)]
        _write(folder, {known.text(f"{who} file"): raw(ds)})


def _enhanced(folder: Path, known: Canaries) -> None:
    """One object of four frames, with canaries in the functional groups of each."""
    volume = Volume(shape=(4, 16, 16))

    def edit(groups: Dataset, v: int, k: int) -> None:
        who, content = f"enhanced frame {k}", groups.FrameContentSequence[0]
        content.StackID = known.text("enhanced StackID")
        content.FrameLabel = known.text(f"{who} FrameLabel")
        content.FrameComments = known.text(f"{who} FrameComments")
        content.FrameAcquisitionDateTime = known.moment("enhanced FrameAcquisitionDateTime")
        code = item(CodeMeaning=known.text(f"{who} CodeMeaning"))
        source = item(
            ReferencedSOPInstanceUID=known.uid(f"{who} source"),
            PurposeOfReferenceCodeSequence=[code],
        )
        groups.DerivationImageSequence = [
            item(
                DerivationDescription=known.text(f"{who} DerivationDescription"),
                SourceImageSequence=[source],
            )
        ]

    folder.mkdir()
    enhanced(Archive(folder), [volume], [(0, k) for k in range(4)], edit)
    path = folder / "enhanced"
    ds = pydicom.dcmread(path)
    ds.PatientID = known.text("enhanced PatientID")
    ds.SOPInstanceUID = known.uid("enhanced SOPInstanceUID")
    plant(ds, known, "enhanced")
    path.unlink()
    _write(folder, {known.text("enhanced file"): raw(ds)})


def broken_objects(scratch: Path, known: Canaries) -> Iterator[tuple[str, bytes]]:
    """Objects that fail each in its own way, every one full of canaries: (name, bytes)."""

    def fresh(name: str, syntax: UID = ExplicitVRLittleEndian) -> Dataset:
        hu = np.arange(256, dtype=np.int16).reshape(1, 16, 16)
        return planted_slices(scratch, known, name, hu, replace(SMALL, syntax=syntax))[0]

    for keyword in NEEDED:
        ds = fresh(f"malformed {keyword}")
        set_raw(ds, keyword, known.text(f"malformed {keyword}").encode())
        yield f"malformed {keyword}", raw(ds)
    for keyword in ("SOPClassUID", "TransferSyntaxUID", "MediaStorageSOPClassUID"):
        for name, value in (
            ("private", known.uid(f"private {keyword}")),
            ("unknown", f"1.2.840.10008.{known.number(f'unknown {keyword}')}"),
        ):
            ds = fresh(f"{name} {keyword}")
            set_raw(ds, keyword, value.encode())
            if keyword != "TransferSyntaxUID":  # without Rows it is no image, and named
                del ds.Rows
            how = {"implicit_vr": False, "little_endian": True, "force_encoding": True}
            yield f"{name} {keyword}", raw(ds, **how)
    for number, odd in enumerate(("../../{0}", "/{0}", "{0}\0", "{0}" * 30)):
        name = f"PatientID that is no file name {number}"
        ds = fresh(name)
        set_raw(ds, "PatientID", odd.format(known.text(name)).encode())
        yield name, raw(ds)
    whole = raw(fresh("cut"))
    for length in (20, 131, 132, 140, 300, 700, 2000, 4000, len(whole) - 300, len(whole) - 700):
        yield f"cut at {length}", whole[:length]
    yield "no preamble", raw(fresh("no preamble"))[132:]
    data = raw(fresh("no meta"))
    yield "no meta", data[data.index(FIRST) :]
    name = known.name("long element PatientName").encode()
    data = raw(fresh("long element"))
    at = data.index(name) - 2
    yield "long element", data[:at] + b"\xfe\xff" + data[at + 2 :]
    yield "odd VR", data.replace(b"\x10\x00\x10\x00PN", b"\x10\x00\x10\x00QZ")
    yield from _broken_pixels(fresh, known)
    yield from _other_objects(fresh, known)


def malformed(data: bytes, known: Canaries, who: str) -> Iterator[tuple[str, bytes]]:
    """A DICOM file once for each of its elements, in sequences too, with text for its value."""
    for path in list(_paths(pydicom.dcmread(io.BytesIO(data)))):
        ds: Any = pydicom.dcmread(io.BytesIO(data))
        item = ds
        for tag in path[:-1]:
            item = item[tag].value[0]
        value = known.text(f"{who} {path}").encode()
        item[path[-1]] = RawDataElement(
            path[-1], item[path[-1]].VR, len(value), value, 0, False, True
        )
        try:
            yield f"{who} {path}", raw(ds)
        except (TypeError, ValueError):  # pydicom needs it, to write the others
            continue


def _paths(ds: Dataset, above: tuple[BaseTag, ...] = ()) -> Iterator[tuple[BaseTag, ...]]:
    for element in ds:
        yield (*above, element.tag)
        if element.VR == "SQ" and element.value:
            yield from _paths(element.value[0], (*above, element.tag))


def _broken_pixels(fresh: Callable[..., Dataset], known: Canaries) -> Iterator[tuple[str, bytes]]:
    ds = fresh("cut codestream", JPEGLosslessSV1)
    ds.PixelData = ds.PixelData[:200] + b"\0" * (len(ds.PixelData[:200]) % 2)
    yield "cut codestream", raw(ds)
    ds = fresh("text for pixels", JPEGLosslessSV1)
    ds.PixelData = encapsulate([known.text("text for pixels").encode() * 20])
    yield "text for pixels", raw(ds)
    ds = fresh("text for RLE", RLELossless)
    ds.PixelData = encapsulate([known.text("text for RLE").encode() * 20])
    yield "text for RLE", raw(ds)
    ds = fresh("screen")
    ds.BurnedInAnnotation = "YES"
    yield "screen", raw(ds)
    yield "deep", _nested(raw(fresh("deep")), known.text("deep text").encode())
    ds = fresh("short pixels")
    ds.PixelData = known.text("short pixels").encode()
    yield "short pixels", raw(ds)


def _nested(data: bytes, text: bytes) -> bytes:
    """300 sequences in each other at the start of a data set, a text in the innermost."""
    opened = b"\x40\x00\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closed = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    inner = b"\x40\x00\x60\xa1LO" + struct.pack("<H", len(text)) + text
    start = data.index(FIRST)
    return data[:start] + opened * 300 + inner + closed * 300 + data[start:]


def _other_objects(fresh: Callable[..., Dataset], known: Canaries) -> Iterator[tuple[str, bytes]]:
    """Reports, directories, label objects that cannot be used."""
    for name, uid in (
        ("report", "1.2.840.10008.5.1.4.1.1.88.11"),
        ("PDF", "1.2.840.10008.5.1.4.1.1.104.1"),
        ("DICOMDIR", "1.2.840.10008.1.3.10"),
    ):
        ds = fresh(name)
        del ds.Rows, ds.Columns, ds.PixelData
        ds.SOPClassUID = uid
        ds.EncapsulatedDocument = known.text(f"{name} document").encode()
        ds.FileSetID = known.text(f"{name} FileSetID")
        yield name, raw(ds)
    for kind, uid, edits in (
        ("SEG", SEG, {"SegmentationType": "type", "NumberOfFrames": "frames"}),
        ("RTSTRUCT", RTSTRUCT, {"StructureSetLabel": "label"}),
    ):
        ds = fresh(f"broken {kind}")
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid
        for keyword, what in edits.items():
            set_raw(ds, keyword, known.text(f"broken {kind} {what}").encode())
        part = item(ContourGeometricType="CLOSED_PLANAR")
        set_raw(part, "ContourData", known.text(f"broken {kind} points").encode())
        names = item(ROIName=known.text(f"broken {kind} ROIName"))
        set_raw(names, "ROINumber", known.text(f"broken {kind} ROINumber").encode())
        ds.StructureSetROISequence = [names]
        ds.ROIContourSequence = [item(ReferencedROINumber=1, ContourSequence=[part])]
        yield f"broken {kind}", raw(ds)


def _odd_files(folder: Path, known: Canaries) -> None:
    """What is no DICOM: text, nothing, links, a pipe, damaged archives."""
    text = known.text("text file content").encode() * 30
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(known.text("damaged zip member"), text)
    whole = buffer.getvalue()
    _write(
        folder,
        {
            f"{known.text('text file')}.txt": text,
            known.text("empty file"): b"",
            known.text("cut zip"): whole[:-30],
            known.text("cut gzip"): gzip.compress(text)[:-9],
            known.text("7z"): b"7z\xbc\xaf\x27\x1c" + text,
        },
    )
    with zipfile.ZipFile(folder / known.text("nested zip"), "w") as archive:
        archive.writestr(known.text("inner zip"), whole)
    os.mkfifo(folder / known.text("pipe"))
    (folder / known.text("link to nowhere")).symlink_to(f"/nowhere/{known.text('link target')}")
    (folder / known.text("link to folder")).symlink_to(folder)


def _voc(root: Path, known: Canaries) -> None:
    """Images named after patients, with text, Exif and a profile in them."""
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    images.mkdir(parents=True)
    masks.mkdir()
    for number in range(PATIENTS):
        hu, label = draw(SHAPE, number)
        stem = f"{known.text(f'VOC patient {number}')}_{known.text(f'VOC file {number}')}"
        info = PngInfo()
        info.add_text("Author", known.text(f"VOC text {number}"))
        info.add_text("Comment", known.text(f"VOC packed text {number}"), zip=True)
        info.add_itxt("Title", known.text(f"VOC unicode text {number}"), zip=True)
        profile = known.text(f"VOC profile {number}").encode() * 20
        grey = Image.fromarray(((hu[1].clip(-160, 240) + 160) / 400 * 255).astype(np.uint8))
        grey.save(images / f"{stem}.png", pnginfo=info, icc_profile=profile)
        Image.fromarray(label[1]).save(masks / f"{stem}.png", pnginfo=info)
    (images / f"{known.text('VOC broken')}_0.png").write_bytes(known.text("VOC bytes").encode() * 9)
