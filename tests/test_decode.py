"""From bytes to stored values to modality values and RGB: every syntax, every rule, in numbers."""

from __future__ import annotations

import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from launch.codestreams import ENCODERS, fragmented, jpeg, jpeg2k, jpegls, literal, rle, rle_of
from medpsp.dicom.codestream import LOSSY, jpeg_space
from medpsp.dicom.decode import Stored, layout_of, stored_values
from medpsp.dicom.parse import parse
from medpsp.dicom.read import Pixels, read_frame, read_headers
from medpsp.dicom.values import luma
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy, SliceRef
from tests.encoded import write_object
from tests.factory import one_slice
from tests.kernels import prints
from tests.labelled import item
from tests.mutate import NATIVE, WHEEL

KEEP = ReadPolicy(burned_in="keep", non_volumes="keep")
BASELINE, EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
LOSSLESS_JPEG, JPEG_LS = "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"
J2K, RLE = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
ROW, COLUMN = np.indices((40, 36))
GREY = (COLUMN * 50 + ROW * 20).astype("<u2")
COLOUR = np.stack([COLUMN * 3, ROW * 2, COLUMN + ROW], axis=-1).astype(np.uint8)


def stored_of(path: Path, frame: int = 0) -> Stored:
    parsed = parse(Place(str(path)))
    return stored_values(parsed, layout_of(parsed), frame)


def refs_of(path: Path, **policy: Any) -> list[SliceRef]:
    return read_headers(Place(str(path)), "id", ReadPolicy(**{**vars_of(KEEP), **policy}))


def vars_of(policy: ReadPolicy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in policy.__slots__}


def frames_of(path: Path, **policy: Any) -> list[Pixels]:
    return [read_frame(ref) for ref in refs_of(path, **policy)]


def values_of(path: Path, **policy: Any) -> NDArray[Any]:
    (pixels,) = frames_of(path, **policy)
    return pixels.values


def code_of(path: Path) -> str:
    with pytest.raises(DicomError) as caught:
        frames_of(path)
    return caught.value.code


# every transfer syntax


@pytest.mark.parametrize("syntax", [*NATIVE, *ENCODERS])
@pytest.mark.parametrize("kind", ["grey", "signed", "frames", "colour"])
def test_every_transfer_syntax(tmp_path: Path, syntax: str, kind: str) -> None:
    if (syntax, kind) in ((BASELINE, "signed"), (EXTENDED, "signed"), (EXTENDED, "colour")):
        return  # no such thing, or not one that we can write
    values = {
        "grey": GREY,
        "signed": GREY.astype("<i2") - 1500,
        "frames": np.stack([GREY, GREY + 1, GREY + 2]),
        "colour": COLOUR,
    }[kind]
    if syntax == BASELINE and kind != "colour":  # 8 bits
        values = (values // 16).astype(np.uint8)
    bits = {"BitsStored": 12, "HighBit": 11} if values.itemsize == 2 else {}
    path = write_object(tmp_path / "f", values, syntax, **bits)
    frames = values if kind == "frames" else values[None]
    assert [ref.frame for ref in refs_of(path)] == list(range(len(frames)))
    for number, expected in enumerate(frames):
        found = stored_of(path, number).values
        assert (found.dtype.kind, found.shape) == (values.dtype.kind, expected.shape)
        assert np.abs(found.astype(int) - expected).max() <= (16 if syntax in LOSSY else 0)


# P1: the bits that count


@pytest.mark.parametrize(
    ("layout", "raw", "expected"),
    [
        ((12, 11, 0), [0x0FFF, 0x1001, 0xF000], [4095, 1, 0]),  # an overlay lies in bits 12 to 15
        ((12, 11, 1), [0x0FFF, 0x1801, 0xF7FF], [-1, -2047, 2047]),
        ((12, 15, 0), [0xFFF0, 0x0010, 0x000F], [4095, 1, 0]),
        ((12, 15, 1), [0xFFF0, 0x8010, 0x7FFF], [-1, -2047, 2047]),
        ((10, 12, 0), [0xE008, 0x1FF8, 0xFFFF], [1, 1023, 1023]),
        ((1, 0, 0), [2, 3, 0xFFFF], [0, 1, 1]),
        ((16, 15, 1), [0x8000, 0xFFFF, 1], [-32768, -1, 1]),
    ],
)
@pytest.mark.parametrize("syntax", [*NATIVE, RLE])
def test_stored_bits_below_and_above_others(
    tmp_path: Path, syntax: str, layout: tuple[int, int, int], raw: list[int], expected: list[int]
) -> None:
    """BitsStored, HighBit, PixelRepresentation."""
    keywords = ("BitsStored", "HighBit", "PixelRepresentation")
    fields = dict(zip(keywords, layout, strict=True))
    path = write_object(tmp_path / "f", np.array([raw], "<u2"), syntax, Modality="MR", **fields)
    assert stored_of(path).values.tolist() == [expected]
    assert values_of(path).tolist() == [expected]


@pytest.mark.parametrize("syntax", [LOSSLESS_JPEG, JPEG_LS, J2K])
def test_sign_of_the_tag_extends_what_a_codec_gives(tmp_path: Path, syntax: str) -> None:
    values = np.array([[0x0FFF, 0x0800], [0x07FF, 0]], "<u2")
    fields = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 1}
    path = write_object(tmp_path / "f", np.tile(values, (8, 8)), syntax, **fields)
    assert stored_of(path).values[:2, :2].tolist() == [[-1, -2048], [2047, 0]]


def test_signed_codestream_under_an_unsigned_tag_is_refused(tmp_path: Path) -> None:
    path = write_object(tmp_path / "f", GREY.astype("<i2") - 9, J2K, PixelRepresentation=0)
    assert stored_of(path).flags == ("SIGN_MISMATCH",)
    assert code_of(path) == "SIGN_MISMATCH"


# P2, P3: padding and rescaling


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize(
    ("dtype", "fields", "padding"),
    [
        ("<i2", {"PixelPaddingValue": -5}, [1, 0, 0, 0]),
        ("<i2", {"PixelPaddingValue": 0xFFFB}, [1, 0, 0, 0]),  # VR US under signed pixels
        ("<u2", {"PixelPaddingValue": -5}, [1, 0, 0, 0]),  # VR SS under unsigned ones
        ("<i2", {"PixelPaddingValue": -5, "PixelPaddingRangeLimit": 1}, [1, 1, 1, 0]),
        ("<i2", {"PixelPaddingValue": 1, "PixelPaddingRangeLimit": -5}, [1, 1, 1, 0]),
        ("<i2", {"PixelPaddingValue": 7}, None),
    ],
)
def test_padding_is_found_in_stored_values(
    tmp_path: Path, syntax: str, dtype: str, fields: dict[str, int], padding: list[int] | None
) -> None:
    raw = np.array([[-5, 0, 1, 9]], "<i2").view(dtype)

    path = write_object(
        tmp_path / "f", raw, syntax, RescaleSlope="2", RescaleIntercept="100", **fields
    )
    (found,) = frames_of(path)
    assert found.values.tolist() == [[v * 2 + 100 for v in raw[0].tolist()]]
    assert (None if found.padding is None else found.padding.tolist()) == (
        None if padding is None else [[bool(v) for v in padding]]
    )


def test_padding_may_leave_int16_and_is_clipped(tmp_path: Path) -> None:
    fields = {"PixelPaddingValue": 63536, "RescaleSlope": "1", "RescaleIntercept": "-1024"}
    path = write_object(tmp_path / "f", np.array([[63536, 1024]], "<u2"), **fields)
    (found,) = frames_of(path)
    assert (found.values.tolist(), found.values.dtype) == ([[32767, 0]], np.int16)
    assert found.padding is not None
    assert found.padding.tolist() == [[True, False]]


def test_padding_beyond_the_stored_bits_is_found_in_all_bits(tmp_path: Path) -> None:
    """63536 is 0xF830; its lower twelve bits, 0x830, are 2096, which is a value of an image."""
    raw = np.array([[63536, 2096, 0, 4095]], "<u2")
    bits = {"BitsStored": 12, "HighBit": 11, "PixelPaddingValue": 63536}
    (found,) = frames_of(write_object(tmp_path / "f", raw, **bits))
    assert found.values.tolist() == [[2096, 2096, 0, 4095]]
    assert found.padding is not None
    assert found.padding.tolist() == [[True, False, False, False]]


def test_padding_within_the_stored_bits_is_found_below_an_overlay(tmp_path: Path) -> None:
    raw = np.array([[0x8005, 5, 6]], "<u2")
    bits = {"BitsStored": 12, "HighBit": 11, "PixelPaddingValue": 5}
    (found,) = frames_of(write_object(tmp_path / "f", raw, **bits))
    assert found.padding is not None
    assert found.padding.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("dtype", "stored", "slope", "flags"),
    [
        ("<u4", 32, "1", ("VALUE_ROUNDED",)),
        ("<i4", 25, "0.5", ("VALUE_ROUNDED",)),
        ("<u4", 24, "1", ()),
        ("<i4", 12, "1", ()),
    ],
)
def test_values_that_float32_may_round_are_flagged(
    tmp_path: Path, dtype: str, stored: int, slope: str, flags: tuple[str, ...]
) -> None:
    bits = {"BitsStored": stored, "HighBit": stored - 1}
    scale = {"RescaleSlope": slope, "RescaleIntercept": "0", "Modality": "MR"}
    path = write_object(tmp_path / "f", np.array([[1, 2]], dtype), **bits, **scale)
    assert refs_of(path)[0].flags == flags


@pytest.mark.parametrize(
    ("dtype", "value", "code"),
    [
        ("<f4", np.inf, "VALUE_RANGE"),
        ("<f4", -np.inf, "VALUE_RANGE"),
        ("<f8", 1e300, "VALUE_RANGE"),
        ("<f8", np.nan, ""),
        ("<f4", 3e38, ""),
    ],
)
def test_float_pixels_must_be_finite_or_no_number(
    tmp_path: Path, dtype: str, value: float, code: str
) -> None:
    values = np.array([[0.5, value]], dtype)

    def edit(ds: Dataset) -> None:
        del ds.PixelData, ds.RescaleSlope, ds.RescaleIntercept
        ds.Rows, ds.Columns, ds.BitsAllocated = 1, 2, 8 * values.itemsize
        setattr(
            ds, "FloatPixelData" if dtype == "<f4" else "DoubleFloatPixelData", values.tobytes()
        )

    path = one_slice(tmp_path / "f", edit)
    if code:
        assert code_of(path) == code
    else:
        np.testing.assert_array_equal(frames_of(path)[0].values, values.astype("<f4"))


@pytest.mark.parametrize(("dtype", "prefix"), [("<f4", "Float"), ("<f8", "DoubleFloat")])
def test_float_pixels_and_their_padding(tmp_path: Path, dtype: str, prefix: str) -> None:
    values = np.array([[0.5, -7.25], [np.nan, 1e6]], dtype)
    keyword = f"{prefix}PixelData"

    def edit(ds: Dataset) -> None:
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
        del ds.RescaleSlope, ds.RescaleIntercept
        ds.Rows, ds.Columns, ds.BitsAllocated = 2, 2, 8 * values.itemsize
        setattr(ds, keyword, values.tobytes())
        setattr(ds, f"{prefix}PixelPaddingValue", -7.25)

    (found,) = frames_of(one_slice(tmp_path / "f", edit))
    assert found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, values.astype(np.float32))
    assert found.padding is not None
    assert found.padding.tolist() == [[False, True], [False, False]]


def enhanced(path: Path, shared: Dataset, frames: list[Dataset], **elements: Any) -> Path:
    values = np.stack([GREY[:4, :5] + 10 * n for n in range(len(frames))])
    groups = {
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames,
    }
    return write_object(path, values, **{**groups, **elements})


def scaling(slope: float, intercept: float) -> list[Dataset]:
    return [item(RescaleSlope=str(slope), RescaleIntercept=str(intercept))]


def test_groups_of_a_frame_over_shared_ones_over_the_top_level(tmp_path: Path) -> None:
    shared = item(
        PixelValueTransformationSequence=scaling(1, -1024),
        PixelMeasuresSequence=[item(PixelSpacing=["0.5", "0.25"])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])],
        FrameVOILUTSequence=[item(WindowCenter="40", WindowWidth="400")],
    )
    frames = [
        item(PlanePositionSequence=[item(ImagePositionPatient=["0", "0", str(z)])])
        for z in (9, 3, 6)
    ]
    frames[1].PixelValueTransformationSequence = scaling(2, 5)
    frames[1].FrameVOILUTSequence = [item(WindowCenter="1", WindowWidth="2")]
    frames[2].PlaneOrientationSequence = [
        item(ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"])
    ]
    path = enhanced(
        tmp_path / "f",
        shared,
        frames,
        RescaleSlope="100",
        PixelSpacing=["9", "9"],
        ImagePositionPatient=["7", "7", "7"],
    )
    refs = refs_of(path)
    assert [ref.position for ref in refs] == [(0, 0, 9), (0, 0, 3), (0, 0, 6)]
    assert [ref.pixel_spacing for ref in refs] == [(0.5, 0.25)] * 3
    assert [ref.orientation for ref in refs][1:] == [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)]
    assert [ref.window and ref.window.center for ref in refs] == [40, 1, 40]
    assert [ref.dtype for ref in refs] == ["int16", "float32", "int16"]
    first, second, third = (read_frame(ref).values for ref in refs)
    assert (first == GREY[:4, :5].astype(int) - 1024).all()
    assert (second == (GREY[:4, :5] + 10.0) * 2 + 5).all()
    assert (third == GREY[:4, :5].astype(int) + 20 - 1024).all()


def test_groups_must_be_as_many_as_frames(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "f", item(), [item(), item(), item()], NumberOfFrames=2)
    assert code_of(path) == "ELEM_INVALID"


def test_rt_dose(tmp_path: Path) -> None:
    """32 bits, a scaling of its own, frames along the normal at given distances."""
    (values,) = {pixels.values.shape for pixels in frames_of(WHEEL / "rtdose.dcm")}
    refs = refs_of(WHEEL / "rtdose.dcm")
    ds = pydicom.dcmread(WHEEL / "rtdose.dcm")
    assert (len(refs), values) == (15, (10, 10))
    expected = ds.pixel_array[7] * float(ds.DoseGridScaling)
    assert (read_frame(refs[7]).values == expected.astype(np.float32)).all()
    z = float(ds.ImagePositionPatient[2])
    assert [ref.position[2] - z for ref in refs if ref.position] == ds.GridFrameOffsetVector


# P10: colour


def test_planar_configuration(tmp_path: Path) -> None:
    for planar, data in ((0, COLOUR), (1, np.moveaxis(COLOUR, -1, 0))):
        fields = {"PlanarConfiguration": planar, "PixelData": data.tobytes()}
        path = write_object(tmp_path / "f", COLOUR, **fields)
        assert (values_of(path) == COLOUR).all()
        assert values_of(path).dtype == np.uint8


YBR = np.array([[[76, 85, 255], [76, 85, 255]], [[150, 44, 21], [29, 255, 107]]], np.uint8)
FROM_YBR = [[[254, 0, 0], [254, 0, 0]], [[0, 255, 1], [0, 0, 254]]]  # red, red, green, blue


def test_ybr_full(tmp_path: Path) -> None:
    path = write_object(tmp_path / "f", YBR, PhotometricInterpretation="YBR_FULL")
    assert values_of(path).tolist() == FROM_YBR
    assert stored_of(path).space == "YBR_FULL"


def test_colours_are_the_same_bytes_on_every_cpu() -> None:
    """Products of matrices are not: shards of nodes of two kinds would differ."""
    code = (
        "import hashlib\nimport numpy as np\nfrom medpsp.dicom.values import luma, ybr_to_rgb\n"
        "cube = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)\n"
        "print(hashlib.sha256(luma(cube).tobytes() + ybr_to_rgb(cube).tobytes()).hexdigest())\n"
    )
    assert len(prints(code)) == 1


def test_grey_is_the_nearest_to_the_luma_of_a_colour() -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (300, 300, 3), np.uint8)
    thousandths = colours.astype(np.int64) @ [299, 587, 114]
    found = luma(colours)
    assert (thousandths % 1000 == 500).sum() > 10  # halves, which floats would round by chance
    assert np.abs(1000 * found.astype(np.int64) - thousandths).max() <= 500
    greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    np.testing.assert_array_equal(luma(greys), greys[..., 0])


def test_ybr_full_422_shares_chroma_between_two_pixels(tmp_path: Path) -> None:
    data = bytes([76, 76, 85, 255, 29, 29, 255, 107])  # Y Y B R for two pixels
    fields = {"PhotometricInterpretation": "YBR_FULL_422", "PixelData": data}
    path = write_object(tmp_path / "f", YBR, **fields)
    assert values_of(path).tolist() == [[[254, 0, 0]] * 2, [[0, 0, 254]] * 2]


def test_brightness_where_grey_is_asked_for(tmp_path: Path) -> None:
    path = write_object(tmp_path / "f", np.array([[[255, 0, 0], [9, 9, 9]]], np.uint8))
    values = values_of(path, colour="grey")
    assert (values.tolist(), values.dtype) == ([[76, 9]], np.int16)


@pytest.mark.parametrize(
    ("adobe", "jfif", "ids", "sampling", "tag", "space"),
    [
        (None, False, (1, 2, 3), (0x11,) * 3, "RGB", "RGB"),
        (None, False, (1, 2, 3), (0x11,) * 3, "YBR_FULL_422", "YBR_FULL_422"),
        (None, False, (1, 2, 3), (0x21, 0x11, 0x11), "RGB", "YBR_FULL"),
        (None, False, (82, 71, 66), (0x11,) * 3, "YBR_FULL", "RGB"),  # ids R, G, B
        (None, True, (1, 2, 3), (0x11,) * 3, "RGB", "YBR_FULL"),
        (0, False, (1, 2, 3), (0x11,) * 3, "YBR_FULL", "RGB"),
        (1, False, (1, 2, 3), (0x11,) * 3, "RGB", "YBR_FULL"),
    ],
)
def test_colour_space_of_a_jpeg(
    adobe: int | None,
    jfif: bool,
    ids: tuple[int, ...],
    sampling: tuple[int, ...],
    tag: str,
    space: str,
) -> None:
    stream = b"\xff\xd8"
    if jfif:
        stream += b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    if adobe is not None:
        stream += b"\xff\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe])
    parts = b"".join(bytes([n, s, 0]) for n, s in zip(ids, sampling, strict=True))
    stream += b"\xff\xc0\0\x11\x08\0\x28\0\x24\x03" + parts + b"\xff\xda\0\x02"
    assert jpeg_space(stream, tag) == space


@pytest.mark.parametrize("colorspace", ["RGB", "YCBCR"])
def test_jpeg_colour_is_right_whatever_the_tag_says(tmp_path: Path, colorspace: str) -> None:
    stream = jpeg(COLOUR, level=100, outcolorspace=colorspace, subsampling="444")
    for tag in ("RGB", "YBR_FULL"):
        data = fragmented([stream])
        fields = {"PixelData": data, "PhotometricInterpretation": tag}
        values = values_of(write_object(tmp_path / "f", COLOUR, BASELINE, **fields))
        assert np.abs(values.astype(int) - COLOUR).max() <= 3


@pytest.mark.parametrize("syntax", [*NATIVE, JPEG_LS, RLE])
@pytest.mark.parametrize("tag", ["YBR_RCT", "YBR_ICT", "YBR_PARTIAL_420"])
def test_transforms_of_other_codecs_are_refused(tmp_path: Path, syntax: str, tag: str) -> None:
    path = write_object(tmp_path / "f", COLOUR, syntax, PhotometricInterpretation=tag)
    assert code_of(path) == "PHOTOMETRIC_UNSUPPORTED"


@pytest.mark.parametrize("tag", ["RGB", "YBR_RCT", "YBR_ICT", "YBR_FULL", "YBR_FULL_422"])
def test_jpeg_2000_with_a_component_transform_is_rgb_whatever_the_tag_says(
    tmp_path: Path, tag: str
) -> None:
    data = fragmented([jpeg2k(COLOUR, reversible=True, mct=True)])
    fields = {"PixelData": data, "PhotometricInterpretation": tag}
    np.testing.assert_array_equal(
        values_of(write_object(tmp_path / "f", COLOUR, J2K, **fields)), COLOUR
    )


@pytest.mark.parametrize(("tag", "space"), [("RGB", "RGB"), ("YBR_FULL", "YBR_FULL")])
def test_jpeg_2000_without_a_component_transform_is_what_the_tag_says(
    tmp_path: Path, tag: str, space: str
) -> None:
    data = fragmented([jpeg2k(COLOUR, reversible=True, mct=False)])
    fields = {"PixelData": data, "PhotometricInterpretation": tag}
    found = stored_of(write_object(tmp_path / "f", COLOUR, J2K, **fields))
    assert found.space == space
    np.testing.assert_array_equal(found.values, COLOUR)


def palette(entries: list[int], bits: int, first: int = 0) -> dict[str, Any]:
    """Red is the entries, green half of them, blue nothing."""
    fields: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    tables = {"Red": entries, "Green": [v // 2 for v in entries], "Blue": [0] * len(entries)}
    for name, table in tables.items():
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [len(table), first, bits]
        data = np.array(table, f"<u{bits // 8}").tobytes()
        fields[f"{name}PaletteColorLookupTableData"] = data + b"\0" * (len(data) % 2)
    return fields


@pytest.mark.parametrize(
    ("entries", "bits", "red"),
    [
        ([0, 10, 200, 255], 8, [0, 10, 200, 255]),
        ([0, 2560, 51200, 65535], 16, [0, 10, 200, 255]),
        ([0, 10, 200, 255], 16, [0, 10, 200, 255]),  # 8-bit entries in a table of 16 bits
    ],
)
def test_palettes(tmp_path: Path, entries: list[int], bits: int, red: list[int]) -> None:
    indices = np.array([[5, 6], [7, 8], [4, 9]], np.uint8)  # 4 is below the table, 9 beyond it
    path = write_object(tmp_path / "f", indices, **palette(entries, bits, first=5))
    values = values_of(path)
    assert values[..., 0].ravel().tolist() == [*red, red[0], red[-1]]
    assert np.abs(values[..., 1].astype(int) - values[..., 0] // 2).max() <= 1
    assert not values[..., 2].any()


@pytest.mark.parametrize(
    ("dtype", "first", "written"),
    [("<i2", -31, -31), ("<i2", -31, 65505), ("<u2", 65505, 65505), ("<u2", 40000, -25536)],
)
def test_first_value_of_a_palette_has_the_sign_of_the_pixels(
    tmp_path: Path, dtype: str, first: int, written: int
) -> None:
    indices = np.array([[first, first + 1, first + 3]], np.int64).astype(dtype)
    fields = palette([0, 10 * 256, 200 * 256, 255 * 256], 16)
    for name in ("Red", "Green", "Blue"):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [4, written, 16]
    path = write_object(tmp_path / "f", indices, **fields)
    for _ in range(2):  # the header is read once for all frames
        assert values_of(path)[0, :, 0].tolist() == [0, 10, 255]


def test_segmented_palette(tmp_path: Path) -> None:
    fields = palette([0] * 8, 16)
    for name in ("Red", "Green", "Blue"):
        del fields[f"{name}PaletteColorLookupTableData"]
        # discrete: two entries, then linear: six more up to 61440
        segments = struct.pack("<4H3H", 0, 2, 0, 4096, 1, 6, 61440)
        fields[f"Segmented{name}PaletteColorLookupTableData"] = segments
    path = write_object(tmp_path / "f", np.arange(8, dtype=np.uint8)[None], **fields)
    ramp = [0, 16, 53, 90, 128, 165, 202, 240]  # 4096 + k * 57344 / 6, by 256
    assert np.abs(values_of(path)[0, :, 0].astype(int) - ramp).max() <= 1


# P11, P14: native lengths


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shape", [(3, 5, 6), (4, 1, 9), (2, 8, 8), (1, 1, 1)])
def test_one_bit_frames_follow_without_padding(
    tmp_path: Path, shape: tuple[int, int, int], order: str
) -> None:
    """30, 9, 64, 1 bits a frame."""
    bits = (np.random.default_rng(0).random(shape) < 0.5).astype(np.uint8)
    packed = np.packbits(bits, bitorder="little").tobytes()
    syntax = NATIVE[1] if order == "<" else ExplicitVRBigEndian
    fields = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    data = packed + b"\0" * (len(packed) % 2)
    path = write_object(tmp_path / "f", bits, syntax, PixelData=data, **fields)
    for number in range(len(bits)):
        assert (stored_of(path, number).values == bits[number]).all()


def test_eight_bits_in_big_endian_words(tmp_path: Path) -> None:
    values = np.arange(27, dtype=np.uint8).reshape(3, 9, 1)  # three frames of nine pixels
    path = write_object(tmp_path / "f", values, ExplicitVRBigEndian)
    ds = pydicom.dcmread(path)
    ds["PixelData"].VR = "OW"
    ds.PixelData = np.frombuffer(values.tobytes() + b"\0", "<u2").astype(">u2").tobytes()
    ds.save_as(path)
    assert [stored_of(path, n).values.ravel().tolist() for n in range(3)] == [
        list(range(9 * n, 9 * n + 9)) for n in range(3)
    ]


@pytest.mark.parametrize("change", [-2880, -2, 0, 2, 1000])
def test_native_length(tmp_path: Path, change: int) -> None:
    data = (GREY.tobytes() + b"\0" * 1000)[: GREY.nbytes + change]
    path = write_object(tmp_path / "f", GREY, PixelData=data)
    if change < 0:
        assert code_of(path) == "PIX_TRUNCATED"
    else:  # some devices pad
        assert (values_of(path) == GREY).all()


# P15: fragments


def three_frames() -> tuple[NDArray[Any], list[bytes]]:
    values = np.stack([GREY, GREY + 1, GREY + 2])
    return values, [jpegls(frame) for frame in values]


def offsets_of(frames: list[bytes], cuts: int = 1) -> list[int]:
    lengths = [len(fragmented([frame], cuts, tail=b"")) - 8 for frame in frames]
    return [0, *np.cumsum(lengths)[:-1].tolist()]


@pytest.mark.parametrize("case", ["empty", "full", "zeros", "wrong", "split", "split full", "tail"])
def test_frames_of_fragments(tmp_path: Path, case: str) -> None:
    values, frames = three_frames()
    data = {
        "empty": fragmented(frames),
        "full": fragmented(frames, table=offsets_of(frames)),
        "zeros": fragmented(frames, table=[0, 0, 0]),
        "wrong": fragmented(frames, table=[0, 8, 99999]),
        "split": fragmented(frames, cuts=4),
        "split full": fragmented(frames, cuts=4, table=offsets_of(frames, 4)),
        "tail": fragmented(frames, tail=b"\xfe\xff\x00\xe0\0\0\0\0"),  # and no delimiter
    }[case]
    path = write_object(tmp_path / "f", values, JPEG_LS, PixelData=data)
    assert all((p.values == v).all() for p, v in zip(frames_of(path), values, strict=True))


def test_extended_offsets(tmp_path: Path) -> None:
    values, frames = three_frames()
    starts = struct.pack("<3Q", *offsets_of(frames))
    lengths = struct.pack("<3Q", *map(len, frames))
    fields = {"ExtendedOffsetTable": starts, "ExtendedOffsetTableLengths": lengths}
    path = write_object(tmp_path / "f", values, JPEG_LS, **fields)
    assert all((p.values == v).all() for p, v in zip(frames_of(path), values, strict=True))


def test_deflated_frames_in_several_fragments_need_the_table(tmp_path: Path) -> None:
    from launch.codestreams import DEFLATED_FRAME, deflated

    values = np.stack([GREY, GREY[::-1]])
    frames = [deflated(frame) for frame in values]
    data = fragmented(frames, cuts=2, table=offsets_of(frames, 2))
    path = write_object(tmp_path / "f", values, DEFLATED_FRAME, PixelData=data)
    assert (frames_of(path)[1].values == values[1]).all()
    write_object(path, values, DEFLATED_FRAME, PixelData=fragmented(frames, cuts=2))
    assert code_of(path) == "DEC_ERROR"


def test_delimiters_inside_a_codestream(tmp_path: Path) -> None:
    comment = b"\xff\xfe\0\x12\xfe\xff\xdd\xe0\0\0\0\0\xfe\xff\x00\xe0\0\0\0\0"
    stream = jpegls(GREY)
    data = fragmented([stream[:2] + comment + stream[2:]])
    assert (values_of(write_object(tmp_path / "f", GREY, JPEG_LS, PixelData=data)) == GREY).all()


@pytest.mark.parametrize(
    ("syntax", "frames", "number", "code"),
    [
        (JPEG_LS, 2, 3, "PIX_TRUNCATED"),
        (JPEG_LS, 3, 2, "DEC_ERROR"),
        (JPEG_LS, 3, 1, "DEC_ERROR"),  # not the first alone, in silence
        (RLE, 3, 2, "DEC_ERROR"),
    ],
)
def test_fragments_that_are_not_as_many_as_frames(
    tmp_path: Path, syntax: str, frames: int, number: int, code: str
) -> None:
    values = np.stack([GREY] * number)
    data = fragmented([ENCODERS[syntax](GREY)] * frames)
    path = write_object(tmp_path / "f", values, syntax, PixelData=data, NumberOfFrames=number)
    assert code_of(path) == code


def test_a_fragment_that_the_file_does_not_hold(tmp_path: Path) -> None:
    path = write_object(tmp_path / "f", GREY, JPEG_LS)
    path.write_bytes(path.read_bytes()[:-40])
    assert code_of(path) == "PIX_TRUNCATED"


def test_rle_segments(tmp_path: Path) -> None:
    data = {
        "few": rle_of([literal(GREY.tobytes())]),
        "short": rle_of([literal(GREY.tobytes()[:1438]), literal(GREY.tobytes()[:1440])]),
        "long": rle_of([literal(GREY.tobytes()[:1446]), literal(GREY.tobytes()[:1440])]),
        "far": rle(GREY)[:4] + struct.pack("<I", 2**31) + rle(GREY)[8:],
    }
    for frame in data.values():
        path = write_object(tmp_path / "f", GREY, RLE, PixelData=fragmented([frame]))
        assert code_of(path) in ("DEC_ERROR", "PIX_TRUNCATED")


def test_rle_of_one_bit(tmp_path: Path) -> None:
    bits = (GREY % 7 == 0).astype(np.uint8)[:5, :6]  # 30 bits in 4 bytes
    packed = literal(np.packbits(bits, bitorder="little").tobytes())
    fields = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    data = fragmented([rle_of([packed])])
    path = write_object(tmp_path / "f", bits, RLE, PixelData=data, **fields)
    assert (stored_of(path).values == bits).all()


@pytest.mark.parametrize("syntax", [JPEG_LS, NATIVE[1], RLE])
def test_frames_of_a_long_object_cost_the_same(tmp_path: Path, syntax: str) -> None:
    """The header is parsed and the fragments are counted once, not once a frame.

    Calls are counted, which no other load changes; the time, of this thread alone, has a wide bound
    for what works through all bytes in one call.
    """
    calls, cost = {}, {}
    for number in (50, 500):
        values = np.stack([GREY[:8, :8]] * number)
        refs = refs_of(write_object(tmp_path / "f", values, syntax))
        assert len(refs) == number
        calls[number] = calls_of(lambda refs=refs: [read_frame(ref) for ref in refs]) / number
        began = time.thread_time()
        for ref in refs:
            read_frame(ref)
        cost[number] = (time.thread_time() - began) / number
    assert calls[500] < 1.1 * calls[50]
    assert cost[500] < 5 * cost[50] + 2e-3


def calls_of(work: Callable[[], object]) -> int:
    """How many functions it calls in this thread, those of C included."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


# pydicom's own files

GREY_MR, BARS = "(64, 64) int16 127 2145 MONOCHROME2", "(100, 100, 3) uint8 0 255"
WHEEL_FILES = {
    "693_J2KI": "(512, 512) int16 -2971 2836 MONOCHROME2",
    "CT_small": "(128, 128) int16 128 2191 MONOCHROME2",
    "ExplVR_BigEnd": "(60, 80, 3) uint8 0 255 RGB",
    "ExplVR_BigEndNoMeta": "NOT_IMAGE",
    "ExplVR_LitEndNoMeta": "NOT_IMAGE",
    "GDCMJ2K_TextGBR": "(400, 400, 3) uint8 0 255 RGB",
    "J2K_pixelrep_mismatch": "(512, 512) int16 -2000 1896 MONOCHROME2",
    "JPEG-lossy": "(1024, 256) uint16 0 264 MONOCHROME2",
    "JPEG2000-embedded-sequence-delimiter": "DEC_ERROR",
    "JPEG2000": "(1024, 256) int16 -30 245 MONOCHROME2",
    "JPEGLSNearLossless_08": "(45, 10) uint8 0 255 MONOCHROME2",
    "JPEGLSNearLossless_16": "(50, 10) uint16 0 65535 MONOCHROME2",
    "JPGExtended": "(1024, 256) uint16 0 264 MONOCHROME2",
    "MR_small": GREY_MR,
    "MR_small_RLE": GREY_MR,
    "MR_small_bigendian": GREY_MR,
    "MR_small_expb": GREY_MR,
    "MR_small_implicit": GREY_MR,
    "MR_small_jp2klossless": GREY_MR,
    "MR_small_jpeg_ls_lossless": GREY_MR,
    "MR_small_padded": GREY_MR,
    "MR_truncated": "PIX_TRUNCATED",
    "SC_jpeg_no_color_transform": "(256, 256, 3) uint8 134 252 RGB",
    "SC_jpeg_no_color_transform_2": "(256, 256, 3) uint8 165 255 RGB",
    "SC_rgb_dcmtk_+eb+cr": f"{BARS} RGB",
    "SC_rgb_dcmtk_+eb+cy+n1": f"{BARS} YBR_FULL",
    "SC_rgb_dcmtk_+eb+cy+n2": f"{BARS} YBR_FULL",
    "SC_rgb_dcmtk_+eb+cy+np": f"{BARS} YBR_FULL",
    "SC_rgb_dcmtk_+eb+cy+s2": f"{BARS} YBR_FULL",
    "SC_rgb_dcmtk_+eb+cy+s4": f"{BARS} YBR_FULL",
    "SC_rgb_gdcm_KY": f"{BARS} RGB",
    "SC_rgb_jls_lossy_line": f"{BARS} RGB",
    "SC_rgb_jls_lossy_sample": f"{BARS} RGB",
    "SC_rgb_jpeg": "(256, 256, 3) uint8 134 252 RGB",
    "SC_rgb_jpeg_app14_dcmd": "(256, 256, 3) uint8 165 255 RGB",
    "SC_rgb_jpeg_dcmd": "(256, 256, 3) uint8 134 252 RGB",
    "SC_rgb_jpeg_dcmtk": f"{BARS} YBR_FULL",
    "SC_rgb_jpeg_gdcm": f"{BARS} RGB",
    "SC_rgb_jpeg_lossy_gdcm": f"{BARS} YBR_FULL",
    "SC_rgb_rle": f"{BARS} RGB",
    "SC_rgb_rle_16bit": "(100, 100, 3) uint16 0 65535 RGB BITS_UNSUPPORTED",
    "SC_rgb_rle_16bit_2frame": "(2, 100, 100, 3) uint16 0 65535 RGB BITS_UNSUPPORTED",
    "SC_rgb_rle_2frame": "(2, 100, 100, 3) uint8 0 255 RGB",
    "SC_rgb_rle_32bit": "(100, 100, 3) uint32 0 4294967295 RGB BITS_UNSUPPORTED",
    "SC_rgb_rle_32bit_2frame": "(2, 100, 100, 3) uint32 0 4294967295 RGB BITS_UNSUPPORTED",
    "SC_rgb_small_odd": "(3, 3, 3) uint8 52 176 RGB",
    "SC_rgb_small_odd_big_endian": "(3, 3, 3) uint8 52 176 RGB",
    "SC_rgb_small_odd_jpeg": "(3, 3, 3) uint8 78 178 YBR_FULL",
    "SC_ybr_full_422_uncompressed": f"{BARS} YBR_FULL",
    "UN_sequence": "HDR_TRUNCATED",
    "badVR": "ELEM_INVALID",  # NumberOfFrames is 1A
    "empty_charset_LEI": "HDR_TRUNCATED",
    "examples_jpeg2k": "(480, 640, 3) uint8 0 255 RGB",
    "examples_overlay": "(300, 484) uint16 0 1123 MONOCHROME2",
    "examples_palette": "(350, 800) uint8 0 255 PALETTE COLOR",
    "examples_rgb_color": "(240, 320, 3) uint8 0 255 RGB",
    "examples_ybr_color": "(30, 240, 320, 3) uint8 0 192 YBR_FULL",
    "image_dfl": "(512, 512) uint8 0 255 MONOCHROME2",
    "liver_1frame": "(512, 512) uint8 0 1 MONOCHROME2 LABEL_OBJECT",
    "liver_expb_1frame": "(512, 512) uint8 0 1 MONOCHROME2 LABEL_OBJECT",
    "meta_missing_tsyntax": "HDR_TRUNCATED",
    "nested_priv_SQ": "HDR_TRUNCATED",
    "no_meta": "NOT_DICOM",  # a stray byte before the first tag
    "no_meta_group_length": "HDR_TRUNCATED",
    "priv_SQ": "HDR_TRUNCATED",
    "reportsi": "NOT_IMAGE",
    "reportsi_with_empty_number_tags": "NOT_IMAGE",
    "rtdose": "(15, 10, 10) uint32 795000 1254000 MONOCHROME2",
    "rtdose_1frame": "(10, 10) uint32 795000 1254000 MONOCHROME2",
    "rtdose_expb": "(15, 10, 10) uint32 795000 1254000 MONOCHROME2",
    "rtdose_expb_1frame": "(10, 10) uint32 795000 1254000 MONOCHROME2",
    "rtdose_rle": "(15, 10, 10) uint32 795000 1254000 MONOCHROME2",
    "rtdose_rle_1frame": "(10, 10) uint32 795000 1254000 MONOCHROME2",
    "rtplan": "NOT_IMAGE",
    "rtplan_truncated": "HDR_TRUNCATED",
    "rtstruct": "LABEL_OBJECT",
    "test-SR": "NOT_IMAGE",
    "waveform_ecg": "NOT_IMAGE",
}
"""Of each .dcm of the wheel what its stored values are, and the code that keeps it from use."""


def all_stored(path: Path) -> tuple[NDArray[Any], str]:
    parsed = parse(Place(str(path)))
    layout = layout_of(parsed)
    frames = [stored_values(parsed, layout, n) for n in range(layout.frames)]
    values = np.stack([frame.values for frame in frames])
    return values[0] if layout.frames == 1 else values, frames[0].space


def described(path: Path) -> str:
    try:
        frames_of(path)
        code = ""
    except DicomError as error:
        code = error.code
        if code not in ("BITS_UNSUPPORTED", "LABEL_OBJECT") or path.stem == "rtstruct":
            return code
    values, space = all_stored(path)
    text = f"{values.shape} {values.dtype} {values.min()} {values.max()} {space} {code}"
    return text.strip()


def test_the_table_names_every_file_of_the_wheel() -> None:
    assert sorted(WHEEL_FILES) == sorted(path.stem for path in WHEEL.glob("*.dcm"))
    assert len(WHEEL_FILES) == 78


@pytest.mark.parametrize("name", WHEEL_FILES)
def test_pydicoms_own_files(name: str) -> None:
    """Equal to pydicom's array, where pydicom reads it by itself or by its own RLE decoder."""
    path = WHEEL / f"{name}.dcm"
    assert described(path) == WHEEL_FILES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path, force=True)
        syntax = ds.file_meta.get("TransferSyntaxUID", "")
        if not WHEEL_FILES[name].startswith("(") or syntax not in (*NATIVE, RLE):
            return
        how = {"decoding_plugin": "pydicom"} if syntax == RLE else {}
        expected = pixel_array(ds, raw=True, **how)
    np.testing.assert_array_equal(all_stored(path)[0], expected)


def test_gzip_and_implicit_files_hold_the_same_picture() -> None:
    whole = values_of(WHEEL / "MR_small.dcm")
    for name in ("MR_small_implicit.dcm", "zipMR.gz"):
        assert (values_of(WHEEL / name) == whole).all()
    assert refs_of(WHEEL / "zipMR.gz")[0].flags == ("GZIP",)


@pytest.mark.parametrize(
    ("name", "greatest"),
    [
        ("SC_rgb_jpeg_gdcm", 0),
        ("SC_rgb_gdcm_KY", 0),
        ("SC_rgb_jls_lossy_line", 2),
        ("SC_rgb_jls_lossy_sample", 2),
        ("SC_rgb_dcmtk_+eb+cr", 2),
        ("SC_rgb_dcmtk_+eb+cy+n2", 6),
        ("SC_rgb_dcmtk_+eb+cy+s4", 6),
        ("SC_rgb_jpeg_dcmtk", 6),
        ("SC_ybr_full_422_uncompressed", 6),
        ("SC_rgb_dcmtk_+eb+cy+n1", 77),  # chroma of one pixel in four, at the edges of bars
        ("SC_rgb_jpeg_lossy_gdcm", 75),
    ],
)
def test_colour_bars(name: str, greatest: int) -> None:
    apart = np.abs(
        values_of(WHEEL / f"{name}.dcm").astype(int) - values_of(WHEEL / "SC_rgb_rle.dcm")
    )
    assert apart.max() <= greatest
    assert apart.mean() < 3


def test_palette_file() -> None:
    ds = pydicom.dcmread(WHEEL / "examples_palette.dcm")
    expected = apply_color_lut(ds.pixel_array, ds) >> 8
    assert (values_of(WHEEL / "examples_palette.dcm") == expected).all()


def test_twelve_bit_jpeg_is_the_picture_of_another_file() -> None:
    lossy = all_stored(WHEEL / "JPGExtended.dcm")[0].astype(int)
    other = all_stored(WHEEL / "JPEG2000.dcm")[0].astype(int)
    assert np.corrcoef(lossy.ravel(), other.ravel())[0, 1] > 0.9


def test_implicit_header_with_padding_of_ambiguous_vr(tmp_path: Path) -> None:
    fields = {"PixelPaddingValue": -2000}
    path = write_object(tmp_path / "f", np.array([[-2000, 5]], "<i2"), NATIVE[1], **fields)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    ds.save_as(path, implicit_vr=True, little_endian=True)
    (found,) = frames_of(path)
    assert found.padding is not None
    assert found.padding.tolist() == [[True, False]]
