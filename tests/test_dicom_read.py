"""Stored bits to modality values, exactly, or a reason code that quotes nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from launch.codestreams import ENCODERS, fragmented
from launch.phantom import Phantom
from medpsp.dicom.codestream import LOSSY
from medpsp.dicom.decode import NATIVE
from medpsp.dicom.read import read_headers, read_pixels
from medpsp.dicom.sandbox import Sandbox
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy, Window
from tests.encoded import write_object
from tests.factory import (
    header_of,
    one_slice,
    ramp,
    rle_that_overruns,
    set_frame,
    set_raw,
    stored,
    values_of,
)

STORED = (ramp((1, 40, 36))[0] + 1024).astype("<u2")


def code_of(path: Path) -> str:
    with pytest.raises(DicomError) as caught:
        values_of(path)
    return caught.value.code


def test_ct_becomes_exact_int16_hu(tmp_path: Path) -> None:
    path = stored(tmp_path / "f", [[0, 1], [1024, 4095]])
    values = values_of(path)
    assert values.dtype == np.int16
    assert values.tolist() == [[-1024, -1023], [0, 3071]]


@pytest.mark.parametrize(
    ("bits", "signed", "slope", "intercept", "dtype"),
    [
        (12, 0, "1", "-1024", "int16"),
        (12, 0, "2", "0", "float32"),
        (12, 0, "1", "0.5", "float32"),
        (15, 0, "1", "0", "int16"),  # at most 32767
        (15, 0, "1", "1", "float32"),  # 32768 does not fit
        (16, 0, "1", "0", "float32"),  # 65535 does not fit
        (16, 0, "1", "-32768", "int16"),  # -32768 .. 32767
        (16, 1, "1", "0", "int16"),
        (16, 1, "1", "-1", "float32"),  # -32769 does not fit
    ],
)
def test_int16_only_where_every_value_the_header_allows_fits(
    tmp_path: Path, bits: int, signed: int, slope: str, intercept: str, dtype: str
) -> None:
    raw = np.array([[0, 1, 2 ** (bits - signed) - 1]])
    scale = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    path = stored(tmp_path / "f", raw, bits, signed, Modality="MR", **scale)
    assert header_of(path).dtype == dtype
    values = values_of(path)
    assert values.dtype == dtype
    assert values.tolist() == (raw * float(slope) + float(intercept)).tolist()


def test_ct_is_int16_and_the_slice_that_leaves_it_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "f", [[0, 33791]], 16)
    assert values_of(path).tolist() == [[-1024, 32767]]
    assert code_of(stored(path, [[0, 33792]], 16)) == "VALUE_RANGE"


def test_fractional_slope_and_intercept(tmp_path: Path) -> None:
    path = stored(tmp_path / "f", [[3, 100]], RescaleSlope="0.5", RescaleIntercept="0.25")
    assert values_of(path).tolist() == [[1.75, 50.25]]


@pytest.mark.parametrize("empty", [None, ""])
def test_without_rescale_the_stored_value_stands(tmp_path: Path, empty: str | None) -> None:
    path = stored(tmp_path / "f", [[7, 4095]], RescaleSlope=empty, RescaleIntercept=empty)
    values = values_of(path)
    assert values.dtype == np.int16
    assert values.tolist() == [[7, 4095]]


def test_modality_lut_goes_before_the_rescale(tmp_path: Path) -> None:
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [4, 10, 16], "US"
    item.LUTData = [100, 200, 300, 401]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    path = stored(tmp_path / "f", [[0, 10], [12, 99]], ModalityLUTSequence=[item])
    values = values_of(path)
    assert values.dtype == np.float32
    assert values.tolist() == [[100, 100], [300, 401]]  # ends of the table hold beyond it


def test_twelve_signed_bits_below_garbage(tmp_path: Path) -> None:
    raw = [[0x0FFF, 0x0800, 0x07FF], [0xF7FF, 0x1001, 0xA800]]
    path = stored(tmp_path / "f", raw, 12, 1, RescaleIntercept="0")
    assert values_of(path).tolist() == [[-1, -2048, 2047], [2047, 1, -2048]]


def test_monochrome1_is_recorded_and_never_inverted(tmp_path: Path) -> None:
    path = stored(tmp_path / "f", [[0, 1024, 4095]], PhotometricInterpretation="MONOCHROME1")
    ref = header_of(path)
    assert ref.photometric == "MONOCHROME1"
    assert read_pixels(ref).tolist() == [[-1024, 0, 3071]]


@pytest.mark.parametrize(
    ("center", "width", "window"),
    [
        ("40", "400", Window(center=40, width=400, function="LINEAR")),
        (
            ["300", "40"],
            ["0", "350"],
            Window(center=40, width=350, function="LINEAR"),
        ),  # the first has no width
        (["40", "300"], "400", Window(center=40, width=400, function="LINEAR")),
        ("40", None, None),
        ("40", "-1", None),
        ("", "", None),
    ],
)
def test_first_usable_window(
    tmp_path: Path, center: object, width: object, window: Window | None
) -> None:
    path = stored(tmp_path / "f", [[0]], WindowCenter=center, WindowWidth=width)
    assert header_of(path).window == window


def test_header_fields(tmp_path: Path) -> None:
    phantom = Phantom(shape=(1, 40, 36), spacing=(5.0, 2.5, 0.75))
    path = one_slice(tmp_path / "f", phantom=phantom)
    (ref,) = read_headers(Place(str(path)), "the id", ReadPolicy())
    assert (ref.file_id, ref.patient_id, ref.modality) == ("the id", "PATIENT", "CT")
    assert (ref.rows, ref.columns, ref.pixel_spacing) == (40, 36, (2.5, 0.75))
    assert ref.position == (-13.5, -50.0, -700.0)  # half of 36 * 0.75 and of 40 * 2.5
    assert ref.orientation == (1, 0, 0, 0, 1, 0)


def set_values(**elements: object) -> Callable[[Dataset], None]:
    def edit(ds: Dataset) -> None:
        for keyword, value in elements.items():
            setattr(ds, keyword, value)

    return edit


def drop(keyword: str) -> Callable[[Dataset], None]:
    return lambda ds: ds.__delattr__(keyword)


def raw(keyword: str, value: bytes) -> Callable[[Dataset], None]:
    return lambda ds: set_raw(ds, keyword, value)


def halve_pixels(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[:1440]


def two_values_of_colour(ds: Dataset) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.PixelData = ds.PixelData + ds.PixelData + ds.PixelData


def lossless_jpeg(ds: Dataset) -> None:
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
    set_frame(ds, b"\xff\xd8\xff\xd9")


def broken_rle(ds: Dataset) -> None:
    ds.Rows, ds.Columns = 8, 8
    ds.file_meta.TransferSyntaxUID = RLELossless
    set_frame(ds, rle_that_overruns())


REFUSED: list[tuple[str, Callable[[Dataset], None]]] = [
    ("PIX_TRUNCATED", halve_pixels),
    ("PIX_TRUNCATED", drop("PixelData")),
    ("DEC_ERROR", broken_rle),
    ("PIX_TRUNCATED", set_values(NumberOfFrames=2)),
    ("BITS_UNSUPPORTED", two_values_of_colour),
    ("DEC_ERROR", set_values(PhotometricInterpretation="PALETTE COLOR")),  # without a table
    ("PHOTOMETRIC_UNSUPPORTED", set_values(PhotometricInterpretation="CMYK")),
    ("HDR_REQUIRED_MISSING", drop("PhotometricInterpretation")),
    ("DEC_ERROR", lossless_jpeg),
    ("TS_UNSUPPORTED", raw("TransferSyntaxUID", b"1.2.3.4")),
    ("HDR_TRUNCATED", drop("Rows")),
    ("HDR_TRUNCATED", drop("Columns")),
    ("HDR_REQUIRED_MISSING", drop("BitsAllocated")),
    ("HDR_REQUIRED_MISSING", drop("BitsStored")),
    ("HDR_REQUIRED_MISSING", drop("PixelRepresentation")),
    ("SIZE_LIMIT", set_values(Rows=0)),
    ("PIX_TRUNCATED", set_values(Columns=65535)),
    ("SIZE_LIMIT", set_values(Rows=65535, Columns=65535)),
    ("SIZE_LIMIT", set_values(NumberOfFrames=200001)),
    ("SIZE_LIMIT", set_values(NumberOfFrames=-1)),
    ("BITS_UNSUPPORTED", set_values(BitsStored=17)),
    ("BITS_UNSUPPORTED", set_values(HighBit=16)),
    ("BITS_UNSUPPORTED", set_values(HighBit=10)),
    ("BITS_UNSUPPORTED", set_values(BitsAllocated=24)),
    ("HDR_REQUIRED_MISSING", raw("Rows", b"")),
    ("ELEM_INVALID", raw("Rows", b"\x28\x00\x28\x00")),
    ("ELEM_INVALID", raw("Rows", b"abc")),
    ("ELEM_INVALID", raw("NumberOfFrames", b"1A")),
    ("ELEM_INVALID", set_values(PixelRepresentation=2)),
    ("ELEM_INVALID", set_values(PlanarConfiguration=256)),
    ("ELEM_INVALID", raw("RescaleSlope", b"one")),
    ("ELEM_INVALID", raw("RescaleSlope", b"0")),
    ("ELEM_INVALID", raw("RescaleSlope", b"-0.0")),
    ("ELEM_INVALID", raw("RescaleSlope", b"1\\2 ")),
    ("ELEM_INVALID", raw("RescaleIntercept", b"nan ")),
    ("ELEM_INVALID", raw("RescaleIntercept", b"inf ")),
    ("ELEM_INVALID", raw("RescaleSlope", b"1e300 ")),
    ("ELEM_INVALID", raw("PixelSpacing", b"2.6 ")),
    ("ELEM_INVALID", raw("PixelSpacing", b"2,6\\2,6 ")),
    ("ELEM_INVALID", raw("ImagePositionPatient", b"0\\0 ")),
    ("ELEM_INVALID", raw("ImageOrientationPatient", b"1\\0\\0\\0\\1")),
    ("ELEM_INVALID", raw("ImageOrientationPatient", b"1\\0\\0\\0\\one\\0")),
]


@pytest.mark.parametrize(("code", "edit"), REFUSED)
def test_reason_codes(tmp_path: Path, code: str, edit: Callable[[Dataset], None]) -> None:
    assert code_of(one_slice(tmp_path / "f", edit)) == code


@pytest.mark.parametrize("value", [b"nan ", b"inf ", b"-inf"])
@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept", "PixelSpacing"])
def test_numbers_that_are_none_are_refused_before_any_pixel(
    tmp_path: Path, keyword: str, value: bytes
) -> None:
    path = one_slice(tmp_path / "f", raw(keyword, value))
    with pytest.raises(DicomError, match="ELEM_INVALID"):
        header_of(path)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "FILE_EMPTY"),
        (b"not an image\n", "FILE_TOO_SHORT"),
        (b"not an image, but longer\n", "NOT_DICOM"),
        (b"\0" * 400, "NOT_DICOM"),
        (b"\0" * 128 + b"DICM", "HDR_TRUNCATED"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 40, "HDR_TRUNCATED"),
    ],
)
def test_files_that_are_no_dicom(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    assert code_of(path) == code


def test_fragments_under_a_native_syntax(tmp_path: Path) -> None:
    path = write_object(tmp_path / "f", STORED, RLELossless)
    whole = path.read_bytes()
    assert whole.count(RLELossless.encode()) == 1
    path.write_bytes(whole.replace(RLELossless.encode(), ExplicitVRLittleEndian.encode()))
    assert code_of(path) == "TS_MISMATCH"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert code_of(tmp_path / "gone") == "FILE_UNREADABLE"
    assert code_of(tmp_path) == "NOT_REGULAR"


def test_file_that_changed_between_header_and_pixels(tmp_path: Path) -> None:
    ref = header_of(stored(tmp_path / "f", [[1, 2]]))
    stored(tmp_path / "f", [[1], [2]])
    with pytest.raises(DicomError, match="DEC_ERROR"):
        read_pixels(ref)


CANARY = b"CANARY7"


@pytest.mark.parametrize(
    ("keyword", "code"),
    [
        ("PhotometricInterpretation", "PHOTOMETRIC_UNSUPPORTED"),
        ("SamplesPerPixel", "ELEM_INVALID"),
        ("Rows", "ELEM_INVALID"),
        ("Columns", "ELEM_INVALID"),
        ("BitsStored", "ELEM_INVALID"),
        ("HighBit", "ELEM_INVALID"),
        ("PixelRepresentation", "ELEM_INVALID"),
        ("NumberOfFrames", "ELEM_INVALID"),
        ("RescaleSlope", "ELEM_INVALID"),
        ("RescaleIntercept", "ELEM_INVALID"),
        ("PixelSpacing", "ELEM_INVALID"),
        ("ImagePositionPatient", "ELEM_INVALID"),
        ("ImageOrientationPatient", "ELEM_INVALID"),
    ],
)
def test_a_malformed_value_is_never_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keyword: str, code: str
) -> None:
    path = one_slice(tmp_path / "f", raw(keyword, CANARY))
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        with pytest.raises(DicomError) as caught:
            values_of(path)
    assert caught.value.code == code
    assert not warned
    assert "CANARY" not in repr(caught.value) + caplog.text


@pytest.mark.parametrize(
    "keyword",
    [
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "SpecificCharacterSet",
        "WindowCenter",
    ],
)
def test_a_value_nobody_needs_is_neither_fatal_nor_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keyword: str
) -> None:
    path = one_slice(tmp_path / "f", raw(keyword, CANARY + b"\xff\\=^1A"))
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        assert values_of(path).shape == (40, 36)
    assert not warned
    assert "CANARY" not in caplog.text


@pytest.mark.parametrize(
    ("uid", "flags"),
    [
        (b"1_2_840_10008_1_2_1", set()),  # what some workstations write
        (CANARY, {"TS_INVALID", "GUESSED_TS"}),
        (b"\0", {"TS_MISSING", "GUESSED_TS"}),
    ],
)
def test_a_mangled_transfer_syntax(tmp_path: Path, uid: bytes, flags: set[str]) -> None:
    path = one_slice(tmp_path / "f")
    known = ExplicitVRLittleEndian.encode() + b"\0"
    path.write_bytes(path.read_bytes().replace(known, uid.ljust(len(known), b"\0")))
    assert set(header_of(path).flags) == flags
    assert (values_of(path) == ramp((1, 40, 36))[0]).all()


@pytest.mark.parametrize("code", ["PIX_TRUNCATED", "DEC_ERROR", "HDR_TRUNCATED", "ELEM_INVALID"])
def test_the_patient_is_in_no_message(tmp_path: Path, code: str) -> None:
    broken = next(edit for name, edit in REFUSED if name == code)

    def edit(ds: Dataset) -> None:
        ds.PatientID = ds.PatientName = ds.AccessionNumber = "CANARY7"
        broken(ds)

    with pytest.raises(DicomError) as caught:
        values_of(one_slice(tmp_path / "f", edit))
    assert "CANARY" not in repr(caught.value)


@pytest.mark.parametrize("syntax", [*NATIVE, *(s for s in ENCODERS if s not in LOSSY)])
def test_a_file_cut_anywhere_gives_a_code_or_the_whole_image(tmp_path: Path, syntax: str) -> None:
    path = write_object(tmp_path / "f", STORED, syntax)
    whole, codes = path.read_bytes(), set()
    for length in [*range(0, len(whole), 19), *range(len(whole) - 20, len(whole))]:
        path.write_bytes(whole[:length])
        try:
            assert (values_of(path) == STORED).all()  # only the end marker is lost
        except DicomError as error:
            codes.add(error.code)
    assert {"FILE_EMPTY", "NOT_DICOM", "HDR_TRUNCATED"} <= codes


@pytest.mark.parametrize("syntax", [s for s in ENCODERS if s not in LOSSY])
def test_a_cut_codestream_is_refused(tmp_path: Path, syntax: str) -> None:
    frame = ENCODERS[syntax](STORED)
    for length in range(2, len(frame) - 8, 40):
        path = write_object(tmp_path / "f", STORED, syntax, PixelData=fragmented([frame[:length]]))
        assert code_of(path) in ("PIX_TRUNCATED", "DEC_ERROR" if syntax == RLELossless else "")


UNREGISTERED = [b"1.2.19610305.777555", b"1.2.840.10008.196103"]


def with_syntax(path: Path, old: bytes, new: bytes) -> Path:
    """pydicom writes no syntax that it does not know."""
    path.write_bytes(path.read_bytes().replace(old, new.ljust(len(old), b"\0")))
    return path


@pytest.mark.parametrize("uid", UNREGISTERED)
def test_a_uid_that_nobody_registered_is_not_quoted(tmp_path: Path, uid: bytes) -> None:
    def edit(ds: Dataset) -> None:
        set_raw(ds, "SOPClassUID", uid)
        del ds.Rows

    with pytest.raises(DicomError) as caught:
        values_of(one_slice(tmp_path / "f", edit))
    assert str(caught.value) == "NOT_IMAGE: private or unknown"
    path = with_syntax(one_slice(tmp_path / "g"), ExplicitVRLittleEndian.encode() + b"\0", uid)
    with pytest.raises(DicomError) as caught:
        values_of(path)
    assert str(caught.value) == "TS_UNSUPPORTED: transfer syntax: private or unknown"


def test_a_registered_transfer_syntax_is_named(tmp_path: Path) -> None:
    path = write_object(tmp_path / "f", STORED, "1.2.840.10008.1.2.4.80")
    path = with_syntax(path, b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.4.66")
    with pytest.raises(DicomError, match=r"JPEG Lossless, Hierarchical \(Process 29\)"):
        values_of(path)


@pytest.mark.parametrize("value", [b"P3", b" P3 ", b"P3\0", b"  P3\0\0"])
def test_spaces_around_a_patient_id_mean_nothing(tmp_path: Path, value: bytes) -> None:
    ref = header_of(one_slice(tmp_path / "f", raw("PatientID", value)))
    assert (ref.patient_id, ref.flags) == ("P3", ())


@pytest.mark.parametrize("edit", [drop("PatientID"), raw("PatientID", b" "), raw("PatientID", b"")])
def test_a_missing_patient_id_is_flagged(tmp_path: Path, edit: Callable[[Dataset], None]) -> None:
    ref = header_of(one_slice(tmp_path / "f", edit))
    assert (ref.patient_id, ref.flags) == ("", ("PATIENT_ID_MISSING",))


@pytest.mark.parametrize(
    ("said", "shape", "shown"),
    [
        ("MONOCHROME2", "INVERSE", "MONOCHROME1"),
        ("MONOCHROME1", "INVERSE", "MONOCHROME1"),
        ("MONOCHROME2", "IDENTITY", "MONOCHROME2"),
        ("MONOCHROME1", "IDENTITY", "MONOCHROME1"),
    ],
)
def test_presentation_lut_shape(tmp_path: Path, said: str, shape: str, shown: str) -> None:
    fields = {"PhotometricInterpretation": said, "PresentationLUTShape": shape}
    path = stored(tmp_path / "f", [[0, 1024]], **fields)
    assert header_of(path).photometric == shown
    assert values_of(path).tolist() == [[-1024, 0]]  # never of the values


@pytest.mark.parametrize(
    ("modality", "unit", "flags", "key"),
    [
        ("CT", None, (), "AXIAL|HU||None"),
        ("CT", "HU", (), "AXIAL|HU||None"),
        ("CT", "US", ("RESCALE_NOT_HU",), "AXIAL|US||None"),
        ("MR", None, (), "AXIAL|||None"),
        ("MR", "US", (), "AXIAL|US||None"),
    ],
)
def test_unit_of_the_values(
    tmp_path: Path, modality: str, unit: str | None, flags: tuple[str, ...], key: str
) -> None:
    fields = {"Modality": modality, "RescaleType": unit or "", "FrameOfReferenceUID": ""}
    kind = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ref = header_of(stored(tmp_path / "f", [[0]], ImageType=kind, **fields))
    assert (ref.flags, ref.series_split_key) == (flags, key)


def test_values_three_to_five_of_the_image_type_keep_series_apart(tmp_path: Path) -> None:
    kinds = [["DERIVED", "PRIMARY", "DIXON", "NONE", kind, "x"] for kind in ("WATER", "FAT")]
    keys = [
        header_of(
            stored(tmp_path / "f", [[0]], ImageType=kind, FrameOfReferenceUID="")
        ).series_split_key
        for kind in kinds
    ]
    assert keys == ["DIXON|NONE|WATER|HU||None", "DIXON|NONE|FAT|HU||None"]


def test_contrast_and_times_of_a_header(tmp_path: Path) -> None:
    def edit(ds: Dataset) -> None:
        ds.EchoTime, ds.DiffusionBValue, ds.ConvolutionKernel, ds.KVP = "1E1", 1000.0, "B30f", "120"
        ds.AcquisitionNumber, ds.TriggerTime = 3, "40.0"
        ds.AcquisitionDate, ds.AcquisitionTime, ds.ContentTime = "20200102", "10:00:01.5", "1000"

    ref = header_of(one_slice(tmp_path / "f", edit))
    assert ref.contrast_key == ("10", "1000", "B30f", "120")
    assert ref.collision_key == ("", "40", "", "3", "")
    assert ref.times == ("20200102100001.5", "1000")


def regions(*boxes: tuple[int, int, int, int]) -> Callable[[Dataset], None]:
    """(first row, first column, last row, last column) of tissue, in 40 rows of 36 columns."""

    def edit(ds: Dataset) -> None:
        ds.Modality, items = "US", []
        for top, left, bottom, right in boxes:
            item = Dataset()
            item.RegionSpatialFormat, item.RegionDataType = 1, 1
            item.RegionLocationMinY0, item.RegionLocationMinX0 = top, left
            item.RegionLocationMaxY1, item.RegionLocationMaxX1 = bottom, right
            items.append(item)
        ds.SequenceOfUltrasoundRegions = items

    return edit


BLANK = ReadPolicy(burned_in="blank")


def test_what_lies_between_two_regions_is_blanked(tmp_path: Path) -> None:
    path = one_slice(tmp_path / "f", regions((2, 3, 11, 12), (20, 5, 29, 34)))
    ref = header_of(path, BLANK)
    assert ref.region == ((2, 3, 10, 10), (20, 5, 10, 30))
    assert ref.flags == ("PHI_BLANKED",)
    expected = np.zeros((40, 36))
    for part in (np.s_[2:12, 3:13], np.s_[20:30, 5:35]):
        expected[part] = ramp((1, 40, 36))[0][part]
    np.testing.assert_array_equal(read_pixels(ref), expected)


@pytest.mark.parametrize(
    ("boxes", "refused"),
    [
        ([(0, 0, 39, 35)], True),
        ([(0, 0, 65535, 65535)], True),
        ([(0, 0, 39, 17), (0, 18, 39, 35)], True),  # the two halves
        ([(2, 0, 39, 35)], True),  # 38 of 40 rows are 95 %
        ([(3, 0, 39, 35)], False),
        ([(0, 0, 25, 35), (0, 0, 25, 35)], False),  # 65 %, twice
    ],
)
def test_regions_that_leave_nothing_to_blank(
    tmp_path: Path, boxes: list[tuple[int, int, int, int]], refused: bool
) -> None:
    path = one_slice(tmp_path / "f", regions(*boxes))
    if not refused:
        assert header_of(path, BLANK).flags == ("PHI_BLANKED",)
        return
    with pytest.raises(DicomError, match="PHI_BURNED_IN: its regions are"):
        header_of(path, BLANK)


def test_regions_survive_the_way_through_the_sandbox(tmp_path: Path) -> None:
    path = one_slice(tmp_path / "f", regions((2, 3, 11, 12), (20, 5, 29, 34)))
    with Sandbox() as box:
        (ref,) = box.headers(Place(str(path)), "id", BLANK)
        assert ref == header_of(path, BLANK)
        np.testing.assert_array_equal(box.frame(ref).values, read_pixels(ref))
