"""The flat way of a file says the same as pydicom's, or leaves the file to it."""

from __future__ import annotations

import ast
import os
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pydicom
import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import medpsp.dicom
from launch.codestreams import ENCODERS
from launch.phantom import Phantom
from medpsp.dicom import flat, flatscan, flatwalk, opened
from medpsp.dicom.codes import CODES
from medpsp.dicom.flatvalues import KEYWORDS, META, FlatHeader, value_of
from medpsp.dicom.parse import parse
from medpsp.dicom.read import read_frame, read_headers, scan_header
from medpsp.dicom.values import padding_mask, rescale
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy, SliceRef
from tests.encoded import write_object
from tests.factory import one_slice, set_raw, stored
from tests.mutate import NATIVE, WHEEL, damaged, sources
from tests.trapmaker import Archive, Volume, enhanced
from tests.twoways import POLICIES, Ways, outcome, revalue

SEED, INPUTS = 7, 600
GREY = np.arange(40 * 36, dtype="<u2").reshape(40, 36)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Nothing is known of the files of another test."""
    flat._Last.shape = None
    flatscan._plan.cache_clear()
    opened._opened.cache_clear()


def scanned(path: Path, policy: ReadPolicy | None = None) -> list[SliceRef] | None:
    return scan_header(str(path), "id", policy or ReadPolicy())


def long(path: Path, policy: ReadPolicy | None = None) -> list[SliceRef]:
    return read_headers(Place(str(path)), "id", policy or ReadPolicy())


def test_every_file_of_the_wheel() -> None:
    ways = Ways()
    for path in sorted(path for path in WHEEL.rglob("*") if path.is_file()):
        ways.add(path)
    assert ways.apart == []
    assert ways.counts["flat"] >= 73
    assert ways.counts["pixels"] >= 90


@pytest.mark.parametrize("syntax", [*NATIVE, *ENCODERS])
def test_every_syntax(tmp_path: Path, syntax: str) -> None:
    ways = Ways()
    short = syntax not in NATIVE[2:]  # not deflated, not big endian
    assert ways.add(write_object(tmp_path / "grey", GREY, syntax)) == short
    several = np.stack([GREY, GREY + 1])
    assert not ways.add(write_object(tmp_path / "frames", several, syntax))
    if not syntax.endswith("4.51"):
        colour = np.stack([GREY % 251, GREY % 17, GREY % 5], axis=-1).astype(np.uint8)
        assert ways.add(write_object(tmp_path / "colour", colour, syntax)) == short
    assert ways.apart == []


def test_archives_with_traps(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    archive.add(Volume())
    ways = Ways()
    assert all(ways.add(archive.path(k)) for k in range(20))
    enhanced(Archive(tmp_path), [Volume(code=1)], [(0, k) for k in range(20)])
    assert not ways.add(tmp_path / "enhanced")
    assert ways.apart == []


def test_damaged_files(tmp_path: Path) -> None:
    """Files of one kind follow one another, so that shapes and templates are met again."""
    found = [s for s in sources(tmp_path, 40_000) if s.kind in ("dicom", "seg", "rtstruct")]
    ways, path = Ways(), tmp_path / "x"
    for n in range(INPUTS):
        rng = Random(f"{SEED} {n}")
        source = found[n // 4 % len(found)]
        other = rng.choice(found)
        data = revalue(source.data, rng) if n % 2 else damaged(source, other, rng)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        ways.add(path, f"{n} {source.name}")
    assert ways.apart == []
    assert ways.counts["flat"] > INPUTS // 5
    assert ways.counts["pixels"] > INPUTS // 5


def full(ds: Dataset) -> None:
    """Most of what may be asked for, of the kinds that a series has."""
    ds.AcquisitionDate = ds.ContentDate = ds.StudyDate = "20200102"
    ds.AcquisitionTime, ds.ContentTime, ds.TriggerTime = "101112.5", "101113", "12.5"
    ds.AcquisitionDateTime, ds.AcquisitionNumber, ds.EchoNumbers = "20200102101112.5", 3, [1, 2]
    ds.EchoTime, ds.KVP, ds.ConvolutionKernel, ds.Manufacturer = "2.50", "120", "B30f", "GE MEDICAL"
    ds.BodyPartExamined, ds.RescaleType, ds.SpecificCharacterSet = "HEAD", "HU", "ISO_IR 100"
    ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = 4000, 4010
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = [40, 50], [400, 500], "LINEAR"
    ds.TemporalPositionIdentifier, ds.DiffusionBValue = 1, 800.0
    ds.DiffusionGradientOrientation, ds.GridFrameOffsetVector = [0.0, 0.0, 1.0], [0, 1]
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        ds[keyword].VR = "US"


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_other_values_in_one_header(tmp_path: Path, syntax: UID) -> None:
    """What a template keeps of one slice must not leak into the next."""
    one_slice(tmp_path / "x", full, Phantom(shape=(1, 40, 36), syntax=syntax))
    data, ways = (tmp_path / "x").read_bytes(), Ways()
    assert ways.add(tmp_path / "x")
    for n in range(150):
        path = tmp_path / f"{n}"
        path.write_bytes(revalue(data, Random(f"{SEED} {syntax} {n}")))
        ways.add(path)
        path.unlink()
        (tmp_path / "x").write_bytes(data)  # the template of the whole one stays the first
        assert ways.add(tmp_path / "x")
    assert ways.apart == []
    assert ways.counts["flat"] > 200


def test_a_series_is_worked_out_once(tmp_path: Path) -> None:
    """Slices differ in place, number and time; the lengths of these differ too."""

    def edit(ds: Dataset, k: int) -> None:
        full(ds)
        ds.ContentTime, ds.AcquisitionTime = f"1011{k:02d}", f"1011{k:02d}.{10**k if k < 5 else k}"
        ds.AcquisitionNumber, ds.WindowWidth = k // 3, [400 + k // 5, 500]
        ds.SOPInstanceUID = f"1.2.3.{k**4}"

    archive = Archive(tmp_path)
    archive.add(Volume(), edit)
    paths = [archive.path(k) for k in range(20)]
    with mock.patch("medpsp.dicom.flatscan.slices_of", wraps=flatscan.slices_of) as whole:
        found = [scanned(path) for path in paths]
    assert found == [long(path) for path in paths]
    assert repr(found) == repr([long(path) for path in paths])
    assert len({ref.times for refs in found for ref in refs or []}) == 20
    assert whole.call_count == 1


@pytest.mark.parametrize(
    ("keyword", "first"),
    [
        ("SOPInstanceUID", b""),
        ("SOPInstanceUID", b"1\\2"),
        ("ImagePositionPatient", b""),
        ("ImagePositionPatient", b"1\\2\\x"),
        ("ImagePositionPatient", b"1\\2\\nan"),
        ("WindowCenter", b""),
        ("WindowWidth", b"0"),
        ("WindowWidth", b"none"),
        ("AcquisitionNumber", b"x"),
        ("AcquisitionNumber", b""),
        ("ContentTime", b""),
        ("AcquisitionDateTime", b"a\\b"),
    ],
)
def test_a_template_of_a_strange_slice(tmp_path: Path, keyword: str, first: bytes) -> None:
    """The strange slice comes first, then the sound one, then both again."""
    sound = one_slice(tmp_path / "sound", full)
    strange = one_slice(tmp_path / "strange", lambda ds: (full(ds), set_raw(ds, keyword, first)))
    ds = pydicom.dcmread(strange)  # all else is the same
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert ds[name] == pydicom.dcmread(sound)[name]
    ways = Ways()
    assert all(ways.add(path) for path in (strange, sound, strange, sound))
    assert ways.apart == []


def test_any_slice_may_be_the_first_of_its_series(tmp_path: Path) -> None:
    data, path, ways = one_slice(tmp_path / "x", full).read_bytes(), tmp_path / "y", Ways()
    keywords = [keyword for group in flatscan.VARYING.values() for keyword in group]
    for n in range(400):
        if n % 5 == 0:
            flatscan._plan.cache_clear()
        path.write_bytes(revalue(data, Random(f"{SEED} first {n}"), keywords))
        ways.add(path)
        path.unlink()
    assert ways.apart == []
    assert ways.counts["flat"] > 120


def test_the_same_elements_are_compared_and_not_walked(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    archive.add(Volume(), lambda ds, k: setattr(ds, "PatientID", "P" * (k + 1)))
    with mock.patch("medpsp.dicom.flat._walked", wraps=flat._walked) as walked:
        assert all(scanned(archive.path(k)) == long(archive.path(k)) for k in range(20))
    assert walked.call_count == 1


def test_whatever_the_code_asks_for_is_known() -> None:
    """Keywords of DICOM in the sources of an image's way; `FlatHeader` raises for others."""
    folder = Path(str(medpsp.dicom.__file__)).parent
    asked = set()
    for name in ("slices", "frames", "pixels", "deidentify", "decode", "read", "passthrough"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            words = [node.value] if isinstance(node, ast.Constant) else []
            words += [node.attr] if isinstance(node, ast.Attribute) else []
            asked |= {w for w in words if isinstance(w, str) and tag_for_keyword(w) is not None}
    within = {  # of items only: where there are any, pydicom reads the object
        "CTImageFrameTypeSequence", "CTReconstructionSequence", "CTXRayDetailsSequence",
        "CardiacSynchronizationSequence", "FrameContentSequence", "FrameVOILUTSequence",
        "MRDiffusionSequence", "MREchoSequence", "MRImageFrameTypeSequence",
        "PixelMeasuresSequence", "PixelValueTransformationSequence", "PlaneOrientationSequence",
        "PlanePositionSequence", "PhysicalDeltaX", "PhysicalDeltaY", "PhysicalUnitsXDirection",
        "PhysicalUnitsYDirection", "RegionDataType", "RegionLocationMaxX1", "RegionLocationMaxY1",
        "RegionLocationMinX0", "RegionLocationMinY0", "RegionSpatialFormat",
        "", "Date", "Time",  # parts of others, below
        "PixelData", "FloatPixelData", "DoubleFloatPixelData",  # of `Parsed`, not of the header
    }  # fmt: skip
    assert asked - within <= {*KEYWORDS, *META}
    assert len(asked) > 60
    made = {f"{c}PaletteColorLookupTableDescriptor" for c in ("Red", "Green", "Blue")}
    made |= {f"{p}PixelPadding{w}" for p in ("", "Float", "DoubleFloat") for w in ("Value",)}
    made |= {f"{w}{p}" for w in ("Acquisition", "Content") for p in ("Date", "Time")}
    assert made <= KEYWORDS


def test_an_unknown_keyword_is_no_absent_element() -> None:
    header = FlatHeader({"Rows": ("US", b"\2\0")})
    assert (header.get("Rows"), header.Rows, "Rows" in header) == (2, 2, True)
    assert header.get("Columns") is None
    assert "Columns" not in header
    with pytest.raises(AttributeError):
        _ = header.Columns
    with pytest.raises(KeyError):
        header.get("PatientName")
    with pytest.raises(KeyError):
        _ = "PatientName" in header


@pytest.mark.parametrize("edit", [
    lambda ds: setattr(ds, "Modality", "PT"),
    lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"),
    lambda ds: setattr(ds, "BurnedInAnnotation", "YES"),
    lambda ds: setattr(ds, "BitsAllocated", 12),
    lambda ds: delattr(ds, "PhotometricInterpretation"),
    lambda ds: set_raw(ds, "RescaleSlope", b"none"),
    lambda ds: set_raw(ds, "ImagePositionPatient", b"1\\2"),
])  # fmt: skip
def test_refusals_are_the_same(tmp_path: Path, edit: object) -> None:
    path, policy = one_slice(tmp_path / "x", edit), ReadPolicy(modalities=("CT", "MR"))  # type: ignore[arg-type]
    found = outcome(lambda: scanned(path, policy))
    assert isinstance(found, tuple)
    assert found[0] in CODES
    assert found == outcome(lambda: long(path, policy))


def test_what_is_no_ordinary_file_is_left(tmp_path: Path) -> None:
    path = one_slice(tmp_path / "x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(path.read_bytes()[:400])
    for name in ("fifo", "empty", "short", "absent", "a\0b"):
        assert scanned(tmp_path / name) is None
        assert flat.parse_flat(str(tmp_path / name)) is None
    assert scanned(tmp_path) is None
    for source in sources(tmp_path):
        if source.kind not in ("dicom", "seg", "rtstruct"):
            (tmp_path / "other").write_bytes(source.data)
            assert scanned(tmp_path / "other") is None


def float_pixels(ds: Dataset) -> None:
    ds.FloatPixelData = b"\0\0\0\0" * (ds.Rows * ds.Columns)
    del ds.PixelData


UNUSUAL = {
    "two frames": lambda ds: setattr(ds, "NumberOfFrames", 2),
    "an unknown character set": lambda ds: set_raw(ds, "SpecificCharacterSet", b"ISO_IR 13"),
    "a text beyond ASCII": lambda ds: set_raw(ds, "Manufacturer", "Müller".encode("latin-1")),
    "an escape sequence": lambda ds: set_raw(ds, "PatientID", b"\x1b$Bab"),
    "a table": lambda ds: setattr(ds, "VOILUTSequence", [Dataset()]),
    "regions": lambda ds: setattr(ds, "SequenceOfUltrasoundRegions", [Dataset()]),
    "groups": lambda ds: setattr(ds, "SharedFunctionalGroupsSequence", [Dataset()]),
    "a palette": lambda ds: setattr(ds, "PhotometricInterpretation", "PALETTE COLOR"),
    "a label": lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.4"),
    "a private syntax": lambda ds: set_raw(ds, "TransferSyntaxUID", b"1.2.3"),
    "float pixels": float_pixels,
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_the_unusual_is_left(tmp_path: Path, what: str) -> None:
    ways = Ways()
    assert ways.add(one_slice(tmp_path / "sound"))
    assert not ways.add(one_slice(tmp_path / "x", UNUSUAL[what]))
    assert ways.apart == []


def nested(data: bytes, content: bytes) -> bytes:
    """Elements in front of Rows."""
    at = data.index(b"\x28\x00\x10\x00")
    return data[:at] + content + data[at:]


ITEM, ITEM_END, END = (struct.pack("<HH", 0xFFFE, e) for e in (0xE000, 0xE00D, 0xE0DD))
OPEN, NONE = b"\xff\xff\xff\xff", b"\0\0\0\0"
SQ, TEXT = b"\x08\x00\x40\x11SQ\0\0", b"\x08\x00\x50\x11UI\x04\x001.2\0"
PLAIN_SQ, PLAIN_TEXT = b"\x08\x00\x40\x11", b"\x08\x00\x50\x11\x04\0\0\x001.2\0"


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("items", "ordinary"),
    [
        ([], True),
        ([ITEM + NONE], True),
        ([ITEM + OPEN, ITEM_END + NONE], True),
        ([ITEM + OPEN, "text", ITEM_END + NONE, ITEM + OPEN, "text", ITEM_END + NONE], True),
        ([ITEM + b"\x0c\0\0\0", "text"], True),
        ([ITEM + b"\x0a\0\0\0", "text"], False),  # the element is longer than its item
        ([ITEM + OPEN, "text"], False),
        ([ITEM + OPEN, "text", ITEM_END + b"\1\0\0\0"], False),
        (["text"], False),
        ([ITEM + OPEN, "sequence", ITEM + NONE, END + NONE, "text", ITEM_END + NONE], True),
        ([ITEM + OPEN, "sequence"] * 40 + [END + NONE, ITEM_END + NONE] * 40, False),
        ([ITEM + OPEN, b"\x08\x00\x05\x00CS\x06\0ISO_IR", ITEM_END + NONE], False),
    ],
)  # fmt: skip
def test_sequences_of_undefined_length(
    tmp_path: Path, plain: bool, items: list[str | bytes], ordinary: bool
) -> None:
    syntax = ImplicitVRLittleEndian if plain else ExplicitVRLittleEndian
    one_slice(tmp_path / "sound", phantom=Phantom(shape=(1, 40, 36), syntax=syntax))
    sequence, text = (PLAIN_SQ, PLAIN_TEXT) if plain else (SQ, TEXT)
    words: dict[str | bytes, bytes] = {"sequence": sequence + OPEN, "text": text}
    inner = b"".join(words[w] if isinstance(w, str) else w for w in items)
    data = nested((tmp_path / "sound").read_bytes(), sequence + OPEN + inner + END + NONE)
    (tmp_path / "x").write_bytes(data)
    ways = Ways()
    assert ways.add(tmp_path / "x") == ordinary
    (tmp_path / "y").write_bytes(data)  # by its shape, where it has one
    assert ways.add(tmp_path / "y") == ordinary
    assert ways.apart == []


@pytest.mark.parametrize(("size", "ordinary"), [(2**15, True), (2**17, True), (2**19, False)])
def test_long_headers(tmp_path: Path, size: int, ordinary: bool) -> None:
    path = one_slice(tmp_path / "x", lambda ds: ds.add_new(0x00191010, "OB", bytes(size)))
    ways = Ways()
    assert ways.add(path) == ordinary
    assert ways.apart == []


def test_the_next_long_header_is_read_at_once(tmp_path: Path) -> None:
    for n in range(3):
        one_slice(tmp_path / f"{n}", lambda ds: ds.add_new(0x00191010, "OB", bytes(2**16)))
    with mock.patch("medpsp.dicom.flat._walked", wraps=flat._walked) as walked:
        assert all(scanned(tmp_path / f"{n}") for n in range(3))
    assert walked.call_count == 2  # of the first file, twice


def test_elements_out_of_order_and_twice(tmp_path: Path) -> None:
    data = one_slice(tmp_path / "x").read_bytes()
    late = nested(data, b"\x08\x00\x60\x00CS\x02\x00MR")  # (0008,0060) stands there already
    (tmp_path / "twice").write_bytes(late)
    at = data.index(b"\x08\x00\x60\x00CS")
    moved = nested(data[:at] + data[at + 10 :], data[at : at + 10])
    (tmp_path / "moved").write_bytes(moved)
    ways = Ways()
    assert not ways.add(tmp_path / "twice")
    assert ways.add(tmp_path / "moved")
    assert ways.apart == []


def test_pixels_of_an_ordinary_file_need_no_pydicom(tmp_path: Path) -> None:
    values = np.arange(-1000, 440).reshape(40, 36)
    path = stored(tmp_path / "x", values, 16, 1, RescaleIntercept=-24)
    (ref,) = scanned(path) or []
    with mock.patch("medpsp.dicom.opened.parse", side_effect=AssertionError):
        found = read_frame(ref)
    np.testing.assert_array_equal(found.values, values - 24)
    assert found.values.flags.writeable
    assert found.values.flags.owndata or found.values.base.flags.owndata


def test_pixels_that_are_cut_short(tmp_path: Path) -> None:
    path = one_slice(tmp_path / "x")
    (ref,) = scanned(path) or []
    path.write_bytes(path.read_bytes()[:-100])
    assert scanned(path) == [ref]
    with pytest.raises(DicomError, match="PIX_TRUNCATED"):
        read_frame(ref)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = stored(tmp_path / "x", np.full((4, 4), 7))
    (ref,) = scanned(path) or []
    before = read_frame(ref).values
    os.utime(stored(path, np.full((4, 4), 9)), ns=(1, 1))
    assert (read_frame(ref).values == before + 2).all()
    assert (read_frame(replace(ref, frame=0)).values == before + 2).all()


def slow_rescale(values: np.ndarray, offset: float, padding: np.ndarray | None) -> object:
    """As `rescale` to int16 by its definition."""
    wide = values.astype(np.int64) + int(offset)
    beyond = (wide < -32768) | (wide > 32767)
    if (beyond if padding is None else beyond & ~padding).any():
        return "VALUE_RANGE"
    return wide.clip(-32768, 32767).astype(np.int16)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4"])
@pytest.mark.parametrize(
    "offset", [0, 1, -1, -1024, 32767, -32768, 65535, -65536, 40000, -(2.0**31)]
)
def test_rescaling_whole_numbers(dtype: str, offset: float) -> None:
    info = np.iinfo(dtype)
    edges = [0, 1, 127, 255, 32767, 32768, 65535, -1, -128, -32768, info.min, info.max]
    edges += [e - int(offset) + d for e in (-32768, 32767) for d in (-1, 0, 1)]
    held = sorted({e for e in edges if info.min <= e <= info.max})
    for n in range(len(held)):
        for m in range(n, len(held)):
            values = np.array([[held[n], held[m]]], dtype)
            for padding in (None, np.array([[True, False]]), np.array([[True, True]])):
                expected = slow_rescale(values, offset, padding)
                found: object
                try:
                    found = rescale(values, (1.0, float(offset)), "int16", padding)
                except DicomError as error:
                    found = error.code
                if isinstance(expected, str) or isinstance(found, str):
                    assert found == expected
                else:
                    assert isinstance(found, np.ndarray)
                    assert found.dtype == np.int16
                    assert not np.shares_memory(found, values)
                    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"])
def test_padding_by_whole_numbers_and_by_floats(dtype: str) -> None:
    values = np.array([[-3, -2, -1, 0, 1, 2, 3, 120]]).astype(dtype)
    ends = [None, -70000.0, -2.0, 0.0, 0.5, 2.0, 120.0, 65536.0, 1e10, float("inf"), float("nan")]
    for value in ends:
        for limit in ends:
            found = padding_mask(values, value, limit)
            if value is None:
                assert found is None
                continue
            low, high = sorted((value, value if limit is None else limit))
            wide = values.astype(np.float64)
            expected = (wide >= low) & (wide <= high)
            assert (found is None) == (not expected.any())
            assert found is None or (found == expected).all()


def test_values_are_pydicoms() -> None:
    assert type(value_of("DS", b"1.50")) is pydicom.valuerep.DSfloat
    assert str(value_of("DS", b"1.50\\2 ")) == "[1.50, 2]"
    assert value_of("CS", b"A \0") == "A"
    assert value_of("CS", b"") == ""
    assert value_of("US", b"") is None


def test_walks_of_the_same_file_agree(tmp_path: Path) -> None:
    data = one_slice(tmp_path / "x", full).read_bytes()
    shape = flat._walked(data)
    again = shape.again(data)
    assert again is shape
    assert shape.values(data) == [data[a + 8 : b] for a, b in zip(
        shape.at[shape.fields], shape.at[shape.fields + 1], strict=True)]  # fmt: skip
    assert shape.again(data[:300]) is None
    with pytest.raises(EOFError):
        flat.flat_of(data[:300])
    assert flatwalk.swapped(flatwalk.swapped(0x00080060)) == 0x00080060


def test_policies_do_not_mix(tmp_path: Path) -> None:
    path = one_slice(tmp_path / "x", lambda ds: setattr(ds, "BurnedInAnnotation", "YES"))
    for policy in (*POLICIES, *POLICIES):
        assert outcome(lambda p=policy: scanned(path, p)) == outcome(lambda p=policy: long(path, p))
    assert parse(Place(str(path))).flags == ()
