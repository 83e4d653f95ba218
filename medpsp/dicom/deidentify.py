"""What may show a person: burned-in text, faces, and what of the header is allowed out.

An allow-list: nothing leaves a header but numbers, and words of the closed vocabularies below.
"""

from __future__ import annotations

from pydicom.dataset import Dataset

BURNED_IN_MODALITIES = frozenset(
    {"US", "IVUS", "SC", "XA", "RF", "ES", "OT", "PX", "XC", "GM", "DOC"}
)
"""Devices that draw text into the pixels; CT and MR do not (research and PS3.15 E.3.1)."""

SCREEN_WORDS = ("SAVE", "SCREEN", "CAPTURE")
MANUFACTURERS = (
    "agfa", "bruker", "canon", "carestream", "elekta", "esaote", "fujifilm", "fuji", "ge",
    "general electric", "hitachi", "hologic", "mindray", "philips", "samsung", "shimadzu",
    "siemens", "toshiba", "united imaging", "uih", "varian",
)  # fmt: skip
BODY_PARTS = frozenset(
    "ABDOMEN ANKLE ARM BLADDER BRAIN BREAST CHEST CSPINE ELBOW EXTREMITY FACE FOOT HAND HEAD "
    "HEADNECK HEART HIP JAW KIDNEY KNEE LEG LIVER LSPINE LUNG NECK ORBIT PANCREAS PELVIS PROSTATE "
    "SHOULDER SKULL SPINE SPLEEN THORAX THYROID TSPINE UTERUS WHOLEBODY WRIST".split()
)
FACES = frozenset({"HEAD", "BRAIN", "SKULL", "FACE", "HEADNECK", "ORBIT", "JAW"})


def burned_in_suspected(ds: Dataset, modality: str) -> bool:
    """True where pixels may hold a name; an absent BurnedInAnnotation (0028,0301) is unknown."""
    said = str(ds.get("BurnedInAnnotation") or "").strip().upper()
    if said in ("YES", "NO"):
        return said == "YES"
    words = " ".join(_words(ds, "ImageType"))
    captured = any(ds.get(k) for k in ("ConversionType", "SecondaryCaptureDeviceManufacturer"))
    return modality in BURNED_IN_MODALITIES or captured or any(w in words for w in SCREEN_WORDS)


def slide_label(ds: Dataset) -> bool:
    """True for the photographs of a slide's paper label that whole-slide series carry."""
    return bool({"LABEL", "OVERVIEW"} & set(_words(ds, "ImageType")))


def face_possible(modality: str, part: str) -> bool:
    """True where a face could be rendered from the volume (D7)."""
    return modality in ("CT", "MR", "PT") and part in FACES


def manufacturer(ds: Dataset) -> str:
    """One of `MANUFACTURERS`, or empty."""
    text = str(ds.get("Manufacturer") or "").lower()
    first = text.split()[:1]  # "ge" alone is in many words
    return next((n for n in MANUFACTURERS if first == [n] or (len(n) > 3 and n in text)), "")


def body_part(ds: Dataset) -> str:
    """One of `BODY_PARTS`, or empty."""
    text = "".join(c for c in str(ds.get("BodyPartExamined") or "").upper() if c.isalpha())
    return text if text in BODY_PARTS else ""


def _words(ds: Dataset, keyword: str) -> list[str]:
    value = ds.get(keyword) or []
    return [value.upper()] if isinstance(value, str) else [str(v).upper() for v in value]
