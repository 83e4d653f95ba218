"""Which images may show a name or a face, what is blanked, and what of a header may leave."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from launch import train as jobs
from medpsp.config import Config
from medpsp.dicom.deidentify import (
    BODY_PARTS,
    FACES,
    MANUFACTURERS,
    body_part,
    burned_in_suspected,
    face_possible,
    manufacturer,
    slide_label,
    uid_name,
)
from medpsp.dicom.read import read_frame, read_headers
from medpsp.errors import DicomError
from medpsp.train.loop import Run
from medpsp.types import Place, ReadPolicy, SliceRef
from shards.index import read_index
from tests.encoded import write_object
from tests.factory import one_slice, set_raw
from tests.labelled import item, region

SC, MULTI_SC = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.4"
CT, SC_LIKE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.77.1.4"
ORIGINAL, DERIVED = ["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY"]
Pixels = NDArray[Any]

# D6: names in the pixels


@pytest.mark.parametrize(("said", "suspected"), [("YES", True), ("NO", False), ("no ", False)])
def test_the_word_of_the_object_counts(said: str, suspected: bool) -> None:
    for modality, kind, conversion in product(
        "CT MR US SC XA RF ES OT PX".split(),
        (ORIGINAL, DERIVED, [*DERIVED, "SCREEN SAVE"]),
        ("", "WSD", "DI", "SI"),
    ):
        ds = item(ImageType=kind, BurnedInAnnotation=said, ConversionType=conversion)
        assert burned_in_suspected(ds, modality) is suspected, (modality, kind, conversion)


@pytest.mark.parametrize("said", [None, "", "UNKNOWN"])
def test_devices_that_draw_text_are_suspected_unless_they_deny_it(said: str | None) -> None:
    ds = item(ImageType=ORIGINAL, SOPClassUID=CT)
    if said is not None:
        ds.BurnedInAnnotation = said
    for modality in "US IVUS SC XA RF ES OT PX XC GM HC DOC CF".split():
        assert burned_in_suspected(ds, modality), modality
    assert not burned_in_suspected(ds, "CT")


@pytest.mark.parametrize(
    ("suspected", "elements"),
    [
        (False, {}),
        (False, {"ImageType": "ORIGINAL"}),
        (False, {"ImageType": ["DERIVED", "PRIMARY", "MPR"]}),
        (True, {"ImageType": DERIVED}),
        (True, {"ImageType": ["derived", "secondary", "MPR"]}),
        # a volume that was reformatted has a place in the patient, a screen has none
        (False, {"ImageType": DERIVED, "ImagePositionPatient": [0, 0, 0]}),
        (False, {"ImageType": DERIVED, "PerFrameFunctionalGroupsSequence": [Dataset()]}),
        (True, {"ImageType": [*DERIVED, "SCREEN SAVE"], "ImagePositionPatient": [0, 0, 0]}),
        (True, {"ImageType": ["ORIGINAL", "PRIMARY", "SAVED_IMAGE"]}),
        (True, {"ImageType": "SCREENSHOT"}),
        (True, {"ImageType": ["ORIGINAL", "PRIMARY", "Capture"]}),
        (True, {"ConversionType": "WSD"}),
        (True, {"ConversionType": "DI"}),
        (True, {"ConversionType": "SI", "ImagePositionPatient": [0, 0, 0]}),
        (False, {"ConversionType": ""}),
        (True, {"SecondaryCaptureDeviceManufacturer": "x"}),
        (True, {"SecondaryCaptureDeviceManufacturerModelName": "x"}),
        (True, {"SecondaryCaptureDeviceID": "x"}),
        (True, {"SecondaryCaptureDeviceSoftwareVersions": "x"}),
        (True, {"SOPClassUID": SC, "ImageType": ORIGINAL, "ImagePositionPatient": [0, 0, 0]}),
        (True, {"SOPClassUID": MULTI_SC}),
        (False, {"SOPClassUID": SC_LIKE}),
        (False, {"SOPClassUID": CT}),
    ],
)
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_ct_and_mr_are_suspected_where_they_were_captured(
    modality: str, suspected: bool, elements: dict[str, Any]
) -> None:
    assert burned_in_suspected(item(**elements), modality) is suspected


@pytest.mark.parametrize(
    ("shown", "elements"),
    [
        (True, {"ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}),
        (True, {"ImageType": ["ORIGINAL", "PRIMARY", "overview", "NONE"]}),
        (True, {"ImageType": ["ORIGINAL", "PRIMARY", "VOLUME"], "SpecimenLabelInImage": "YES"}),
        (False, {"ImageType": ["ORIGINAL", "PRIMARY", "VOLUME"], "SpecimenLabelInImage": "NO"}),
        (False, {"ImageType": ["ORIGINAL", "PRIMARY", "LABELLED"]}),
        (False, {}),
    ],
)
def test_slide_labels(shown: bool, elements: dict[str, Any]) -> None:
    assert slide_label(item(**elements)) is shown


def test_a_slide_label_is_kept_under_no_policy(tmp_path: Path) -> None:
    path = one_slice(
        tmp_path / "a", lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "X", "LABEL"])
    )
    for burned_in in ("quarantine", "blank", "keep"):
        with pytest.raises(DicomError, match="PHI_BURNED_IN: "):
            read_headers(Place(str(path)), "", policy(burned_in))


# the ultrasound region


def policy(burned_in: Any = "quarantine", **other: Any) -> ReadPolicy:
    return ReadPolicy(burned_in=burned_in, non_volumes="keep", **other)


def clip(path: Path, values: Pixels, *regions: Dataset, **elements: Any) -> Path:
    """Ultrasound without a word about what is burned in."""
    given = {"Modality": "US", "ImagePositionPatient": None, "ImageOrientationPatient": None}
    if regions:
        given["SequenceOfUltrasoundRegions"] = list(regions)
    return write_object(path, values, **{**given, **elements})


def read(path: Path, how: ReadPolicy) -> tuple[list[SliceRef], Pixels]:
    refs = read_headers(Place(str(path)), "", how)
    return refs, np.stack([read_frame(ref).values for ref in refs])


def random(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3), (3, 20, 30), (3, 20, 30, 3)])
def test_blank_keeps_the_region_bit_by_bit_and_nothing_else(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Rows 4 to 17, columns 5 to 25."""
    values = random(*shape)
    path = clip(tmp_path / "a", values, region(5, 4, 25, 17))
    refs, found = read(path, policy("blank"))
    assert len(refs) == (shape[0] if shape[0] == 3 else 1)
    colour = shape[-1] == 3
    frames = values if len(shape) == 3 + colour else values[None]
    expected = np.zeros_like(frames)
    expected[:, 4:18, 5:26] = frames[:, 4:18, 5:26]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == (np.uint8 if colour else np.int16)


def test_blank_goes_before_grey_and_keeps_every_region_of_tissue_and_flow(tmp_path: Path) -> None:
    """What lies between two regions is blanked; that of a spectrum is none."""
    values = random(20, 30, 3)
    spectrum = region(0, 0, 29, 3, RegionSpatialFormat=3, RegionDataType=3)
    flow = region(15, 6, 24, 16, RegionDataType=2)
    path = clip(tmp_path / "a", values, spectrum, region(5, 8, 10, 12), flow)
    _, found = read(path, policy("blank", colour="grey"))
    luma = (values.astype(np.int64) @ [299, 587, 114] + 500) // 1000
    expected = np.zeros_like(luma)
    for inside in (np.s_[8:13, 5:11], np.s_[6:17, 15:25]):
        expected[inside] = luma[inside]
    np.testing.assert_array_equal(found[0], expected)


def test_a_region_beyond_the_image_is_cut(tmp_path: Path) -> None:
    path = clip(tmp_path / "a", random(20, 30), region(10, 12, 4000, 5000))
    _, found = read(path, policy("blank"))
    assert not found[0, :12].any()
    assert not found[0, :, :10].any()
    assert found[0, 12:, 10:].all()


def refused(path: Path, how: ReadPolicy) -> str:
    with pytest.raises(DicomError) as caught:
        read_headers(Place(str(path)), "", how)
    return caught.value.code


def test_quarantine_is_the_default_and_keep_changes_nothing(tmp_path: Path) -> None:
    values = random(20, 30, 3)
    path = clip(tmp_path / "a", values, region(5, 4, 25, 17))
    assert ReadPolicy().burned_in == "quarantine"
    assert refused(path, policy()) == "PHI_BURNED_IN"
    refs, found = read(path, policy("keep"))
    assert not refs[0].region
    np.testing.assert_array_equal(found[0], values)
    denied = clip(tmp_path / "b", values, BurnedInAnnotation="NO")
    np.testing.assert_array_equal(read(denied, policy())[1][0], values)
    np.testing.assert_array_equal(read(denied, policy("blank"))[1][0], values)


@pytest.mark.parametrize(
    "regions",
    [
        (),
        (region(0, 0, 29, 19, RegionSpatialFormat=2),),  # M-mode
        (region(0, 0, 29, 19, RegionDataType=3),),  # spectrum
        (region(40, 0, 50, 19),),  # beside the image
        (region(9, 9, 5, 5),),  # inside out
    ],
)
def test_without_a_region_of_tissue_there_is_nothing_to_blank_to(
    tmp_path: Path, regions: tuple[Dataset, ...]
) -> None:
    path = clip(tmp_path / "a", random(20, 30), *regions)
    assert refused(path, policy("blank")) == "PHI_BURNED_IN"


def test_a_region_that_is_the_whole_image_cleans_nothing(tmp_path: Path) -> None:
    whole = clip(tmp_path / "a", random(20, 30), region(0, 0, 29, 19))
    assert refused(whole, policy("blank")) == "PHI_BURNED_IN"
    halves = clip(tmp_path / "b", random(20, 30), region(0, 0, 14, 19), region(15, 0, 29, 19))
    assert refused(halves, policy("blank")) == "PHI_BURNED_IN"


def test_other_suspects_are_not_blanked_but_quarantined(tmp_path: Path) -> None:
    path = one_slice(tmp_path / "a", lambda ds: setattr(ds, "BurnedInAnnotation", "YES"))
    assert refused(path, policy("blank")) == "PHI_BURNED_IN"


def test_a_region_that_is_no_number_is_refused_and_not_told(tmp_path: Path) -> None:
    odd = region(5, 4, 25, 17)
    set_raw(odd, "RegionLocationMinX0", b"CANARY!!")
    path = clip(tmp_path / "a", random(20, 30), odd)
    with pytest.raises(DicomError) as caught:
        read_headers(Place(str(path)), "", policy("blank"))
    assert caught.value.code == "ELEM_INVALID"
    assert "CANARY" not in str(caught.value)


def test_what_is_kept_unlooked_at_says_so(tmp_path: Path) -> None:
    """So that no picture of it is drawn."""
    flagged = []
    for said in ("YES", "NO", "UNKNOWN"):
        path = clip(tmp_path / said, random(20, 30), BurnedInAnnotation=said)
        (ref,) = read_headers(Place(str(path)), "", policy("keep"))
        flagged.append("PHI_BURNED_IN" in ref.flags)
    assert flagged == [True, False, True]


def test_tensorboard_draws_no_slice_that_may_show_a_name(
    made: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patients 1 and 4 are the validation set."""
    rows = read_index(made.shards)
    first, second = sorted({row.patient for row in rows if row.split == "val"})

    def examples(*doubtful: str) -> Any:
        flagged = tuple(
            replace(row, flags=("PHI_BURNED_IN",)) if row.patient in doubtful else row
            for row in rows
        )
        seen: list[Run] = []

        def fit(run: Run, model: object) -> Any:
            seen.append(run)
            raise InterruptedError

        monkeypatch.setattr(jobs, "labelled_rows", lambda config: flagged)
        monkeypatch.setattr("medpsp.train.loop.fit", fit)
        with pytest.raises(InterruptedError):
            jobs.train_job(made)
        return seen[0].examples

    assert set(examples().patients) == {first, second}
    assert set(examples(first).patients) == {second}
    assert examples(first, second) is None


# D7: faces


def test_a_head_may_show_a_face() -> None:
    for part in FACES:
        shown = [m for m in ("CT", "MR", "PT", "US", "CR") if face_possible(m, part)]
        assert shown == ["CT", "MR", "PT"], part
    for part in ("", "ABDOMEN", "KNEE", "CHEST", "NECK", "CSPINE"):
        assert not face_possible("CT", part)


@pytest.mark.parametrize(
    ("said", "part", "flagged"),
    [
        *(("HEAD", "HEAD", True), ("head", "HEAD", True), ("Head/Neck", "HEADNECK", True)),
        *(("CHEST", "CHEST", False), ("C-SPINE", "CSPINE", False), ("", "", False)),
        *(("Mrs. Doe's head", "", False), ("HEADER", "", False)),
    ],
)
def test_a_face_is_flagged_by_body_part(
    tmp_path: Path, said: str, part: str, flagged: bool
) -> None:
    path = one_slice(tmp_path / "a", lambda ds: setattr(ds, "BodyPartExamined", said))
    (ref,) = read_headers(Place(str(path)), "", ReadPolicy())
    assert ref.body_part == part
    assert ("RECOGNIZABLE_FACE_POSSIBLE" in ref.flags) is flagged


# D5: closed vocabularies


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("SIEMENS", "siemens"),
        ("Siemens Healthineers", "siemens"),
        ("SiemensHealthcare GmbH", "siemens"),
        ("GE MEDICAL SYSTEMS", "ge"),
        ("GE MEDICAL SYSTEMS / MIM", "ge"),
        ("GE_MEDICAL", "ge"),
        ("GE", "ge"),
        ("ge healthcare", "ge"),
        ("General Electric Co.", "ge"),
        ("GEMS Ultrasound", "ge"),
        ("Merge Healthcare", ""),
        ("AGE Medical", ""),
        ("AGFA-Gevaert", "agfa"),
        ("Agfa HealthCare", "agfa"),
        ("Philips Medical Systems, Inc.", "philips"),
        ("PHILIPS-XYZ", "philips"),
        ("TOSHIBA_MEC", "toshiba"),
        ("Toshiba Medical Systems Corporation", "toshiba"),
        ("CANON_MEC", "canon"),
        ("FUJI PHOTO FILM CO. LTD.", "fujifilm"),
        ("FUJIFILM Corporation", "fujifilm"),
        ("Hitachi Medical Corporation", "hitachi"),
        ("Hologic, Inc.", "hologic"),
        ("UIH", "united imaging"),
        ("United Imaging Healthcare", "united imaging"),
        ("uihc hospital", ""),
        ("Carestream Health", "carestream"),
        ("SAMSUNG MEDISON CO., LTD.", "samsung"),
        ("Varian Medical Systems", "varian"),
        ("Elscint", ""),
        ("Doe, Jane 1950-01-01", ""),
        ("", ""),
    ],
)
def test_manufacturers(said: str, name: str) -> None:
    assert manufacturer(item(Manufacturer=said)) == name
    assert name in {*MANUFACTURERS.values(), ""}


def test_only_words_of_the_vocabularies_come_out() -> None:
    assert (manufacturer(Dataset()), body_part(Dataset())) == ("", "")
    assert body_part(item(BodyPartExamined=["HEAD", "NECK"])) == "HEADNECK"
    assert manufacturer(item(Manufacturer=["Doe", "Siemens"])) == "siemens"
    for text in ("CANARY", "HEAD CANARY", "SIEMENSSTADT PELVIS"):
        assert body_part(item(BodyPartExamined=text)) == ""
    assert all(part.isalpha() and part.isupper() and len(part) <= 16 for part in BODY_PARTS)
    assert FACES < BODY_PARTS


def test_only_uids_of_the_standard_are_named() -> None:
    assert uid_name(CT) == "CT Image Storage"
    assert uid_name("1.2.840.10008.1.2.4.90") == "JPEG 2000 Image Compression (Lossless Only)"
    others = ("", "1.2.840.10008.19500101", "1.2.840.113619.5.2", "JANE", "1.2.3")
    assert {uid_name(uid) for uid in others} == {"private or unknown"}
