"""What may show a person: burned-in text, faces, and what of the header is allowed out.

An allow-list: nothing leaves a header but numbers, and words of the closed vocabularies below.
"""

from __future__ import annotations

import re

from pydicom._uid_dict import UID_dictionary

from medpsp.dicom.header import Header

BURNED_IN_MODALITIES = frozenset(
    "US IVUS SC HC OT DOC XA RF CF DF DS VF PX ES GM XC".split()  # CF to VF: retired fluoroscopy
)
"""Devices that draw text into the pixels; CT and MR do not (PS3.15 E.3.1)."""

SCREEN_WORDS = ("SAVE", "SCREEN", "CAPTURE")
_CAPTURED_BY = (
    "ConversionType",  # DV, DI, WSD, SD, SI, DF: digitized, of a workstation, scanned
    "SecondaryCaptureDeviceID",
    "SecondaryCaptureDeviceManufacturer",
    "SecondaryCaptureDeviceManufacturerModelName",
    "SecondaryCaptureDeviceSoftwareVersions",
)
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and below it the multi-frame ones
_PLACED = ("ImagePositionPatient", "PerFrameFunctionalGroupsSequence")

MANUFACTURERS = {
    "agfa": "agfa", "bruker": "bruker", "canon": "canon", "carestream": "carestream",
    "elekta": "elekta", "esaote": "esaote", "fuji": "fujifilm", "ge": "ge", "gems": "ge",
    "general electric": "ge", "hitachi": "hitachi", "hologic": "hologic", "mindray": "mindray",
    "philips": "philips", "samsung": "samsung", "shimadzu": "shimadzu", "siemens": "siemens",
    "toshiba": "toshiba", "uih": "united imaging", "united imaging": "united imaging",
    "varian": "varian",
}  # fmt: skip
"""What the header calls a maker, and its name here."""

FACES = frozenset(
    "BRAIN CEREBELLUM CHEEK CIRCLEOFWILLIS EAR EYE EYELID FACE HEAD HEADNECK IAC JAW MANDIBLE "
    "MAXILLA MOUTH NOSE ORBIT PAROTID PITUITARY SCALP SINUS SKULL TMJ TONGUE WHOLEBODY "
    "ZYGOMA".split()
)
BODY_PARTS = FACES | frozenset(
    "ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BREAST CALF CAROTID CERVIX "
    "CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COCCYX COLON CORONARYARTERY CSPINE CTSPINE ELBOW "
    "ESOPHAGUS EXTREMITY FEMUR FINGER FOOT GALLBLADDER HAND HEART HIP HUMERUS KIDNEY KNEE LARYNX "
    "LEG LIVER LSPINE LSSPINE LUNG MEDIASTINUM NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV "
    "OVARY PANCREAS PATELLA PELVIS PHARYNX PROSTATE RECTUM RIB SCAPULA SHOULDER SPINE SPLEEN "
    "SSPINE STERNUM STOMACH TESTIS THIGH THORAX THUMB THYMUS THYROID TLSPINE TOE TRACHEA TSPINE "
    "URETER UTERUS WRIST".split()
)
"""Defined terms of BodyPartExamined (PS3.16 Annex L), and some that devices write."""


def burned_in_suspected(ds: Header, modality: str) -> bool:
    """True where pixels may hold a name; an absent BurnedInAnnotation (0028,0301) is unknown.

    Its word counts, YES or NO. Without it a device that draws text, a captured or scanned screen,
    or a derived image without a place in the patient is suspected. Derived ones with a place are
    reformatted volumes: of 53 of CT, MR and PT looked at none holds text.
    """
    said = str(ds.get("BurnedInAnnotation") or "").strip().upper()
    if said in ("YES", "NO"):
        return said == "YES"
    words = image_type(ds)
    kind = str(ds.get("SOPClassUID") or "")
    return (
        modality in BURNED_IN_MODALITIES
        or kind == _SECONDARY_CAPTURE
        or kind.startswith(f"{_SECONDARY_CAPTURE}.")
        or any(ds.get(keyword) for keyword in _CAPTURED_BY)
        or any(word in " ".join(words) for word in SCREEN_WORDS)
        or ({"DERIVED", "SECONDARY"} <= set(words) and not any(key in ds for key in _PLACED))
    )


def slide_label(ds: Header) -> bool:
    """True for the photographs of a slide's paper label that whole-slide series carry."""
    said = str(ds.get("SpecimenLabelInImage") or "").strip().upper()
    return said == "YES" or bool({"LABEL", "OVERVIEW"} & set(image_type(ds)))


def face_possible(modality: str, part: str) -> bool:
    """True where a face could be rendered from the volume."""
    return modality in ("CT", "MR", "PT") and part in FACES


def manufacturer(ds: Header) -> str:
    """A value of `MANUFACTURERS`, or empty; short names count as whole words only (Merge, AGE)."""
    words = " ".join(re.findall("[a-z]+", str(ds.get("Manufacturer") or "").lower()))
    for name, known in MANUFACTURERS.items():
        if name in (words if len(name) > 3 else words.split()):
            return known
    return ""


def uid_name(uid: str) -> str:
    """Name of a UID that the standard defines; any other may have been made for one patient."""
    known = UID_dictionary.get(uid)
    return known[0] if known else "private or unknown"


def body_part(ds: Header) -> str:
    """One of `BODY_PARTS`, or empty."""
    text = "".join(c for c in str(ds.get("BodyPartExamined") or "").upper() if c.isalpha())
    return text if text in BODY_PARTS else ""


def image_type(ds: Header) -> list[str]:
    """The values of ImageType (0008,0008) in capitals."""
    value = ds.get("ImageType") or []
    return [value.upper()] if isinstance(value, str) else [str(v).upper() for v in value]
