"""Frames that keep their bytes: only where decoding them gives the modality values, and clean."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate

from medpsp.dicom.codestream import Layout
from medpsp.dicom.passthrough import SYNTAXES, clean_j2k, clean_jpegls, kept_codestream
from medpsp.dicom.read import read_headers, read_pixels
from medpsp.types import Place, ReadPolicy, SliceRef
from shards.codec import Codec, frame_chunk

LAYOUT = Layout(
    rows=16,
    columns=20,
    samples=1,
    frames=1,
    allocated=16,
    stored=16,
    high=15,
    signed=True,
    floating=False,
    photometric="MONOCHROME2",
)
STORED = np.random.default_rng(3).integers(-1024, 3072, (16, 20)).astype(np.int16)
NAME = b"DOE^JANE"


def jpegls(values: np.ndarray = STORED) -> bytes:
    """JPEG-LS knows no sign: PixelRepresentation says what the bits mean."""
    return bytes(imagecodecs.jpegls_encode(values.view(np.uint16)))


def htj2k(values: np.ndarray = STORED) -> bytes:
    return bytes(imagecodecs.htj2k_encode(values, reversible=True))


ENCODED = {"jpegls": jpegls, "htj2k": htj2k}


def with_segment(stream: bytes, marker: bytes, text: bytes = NAME) -> bytes:
    """A segment after the first one: SOF55 or SIZ must stay in front."""
    first = 2 if marker != b"\xff\x64" else 4 + int.from_bytes(stream[4:6], "big")
    segment = marker + struct.pack(">H", len(text) + 2) + text
    return stream[:first] + segment + stream[first:]


@pytest.mark.parametrize("marker", [b"\xff\xfe", b"\xff\xe0", b"\xff\xe8", b"\xff\xef"])
def test_comments_of_jpegls_are_left_out(marker: bytes) -> None:
    clean = clean_jpegls(with_segment(jpegls(), marker), LAYOUT)
    assert clean is not None
    assert NAME not in clean
    np.testing.assert_array_equal(imagecodecs.jpegls_decode(clean).view(np.int16), STORED)


def test_comments_of_htj2k_are_left_out() -> None:
    clean = clean_j2k(with_segment(htj2k(), b"\xff\x64"), LAYOUT)
    assert clean is not None
    assert NAME not in clean
    np.testing.assert_array_equal(imagecodecs.htj2k_decode(clean), STORED)


@pytest.mark.parametrize("kind", ["jpegls", "htj2k"])
def test_what_follows_the_end_is_left_out(kind: str) -> None:
    clean = {"jpegls": clean_jpegls, "htj2k": clean_j2k}[kind](ENCODED[kind]() + NAME, LAYOUT)
    assert clean is not None
    assert NAME not in clean


@pytest.mark.parametrize("kind", ["jpegls", "htj2k"])
def test_every_cut_and_every_flip_of_the_header_is_whole_or_nothing(kind: str) -> None:
    clean = {"jpegls": clean_jpegls, "htj2k": clean_j2k}[kind]
    stream = ENCODED[kind]()
    for length in range(0, len(stream) - 2, 7):
        assert clean(stream[:length], LAYOUT) is None
    for at in range(80):
        broken = bytearray(stream)
        broken[at] ^= 0xFF
        found = clean(bytes(broken), LAYOUT)  # no exception, and nothing longer than it was
        assert found is None or len(found) <= len(stream)


@pytest.mark.parametrize(
    "change",
    [{"rows": 15}, {"columns": 21}, {"stored": 15, "high": 14}, {"signed": False, "stored": 12}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["jpegls", "htj2k"])
def test_a_codestream_unlike_its_header_is_not_kept(kind: str, change: dict[str, Any]) -> None:
    clean = {"jpegls": clean_jpegls, "htj2k": clean_j2k}[kind]
    assert clean(ENCODED[kind](), LAYOUT) is not None
    assert clean(ENCODED[kind](), replace(LAYOUT, **change)) is None


def written(folder: Path, kind: str, **changes: Any) -> SliceRef:
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    ds.Rows, ds.Columns, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 20, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, -24
    for keyword in ("PixelPaddingValue", "SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in ds:
            del ds[keyword]
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.file_meta.TransferSyntaxUID = SYNTAXES[kind][0]
    ds.PixelData = encapsulate([ENCODED[kind]()])
    ds["PixelData"].VR = "OB"
    ds.save_as(folder / "x.dcm")
    (ref,) = read_headers(Place(str(folder / "x.dcm")), "0" * 16, ReadPolicy())
    return ref


@pytest.mark.parametrize("kind", ["jpegls", "htj2k"])
def test_a_kept_frame_decodes_to_the_modality_values(kind: Any, tmp_path: Path) -> None:
    ref = written(tmp_path, kind)
    kept = kept_codestream(ref, kind)
    assert kept is not None
    assert kept.offset == -24
    out = np.empty((16, 20), np.int16)
    Codec(kind=kind).decode_into(frame_chunk(kept.data, kept.offset), out)
    np.testing.assert_array_equal(out, read_pixels(ref))
    np.testing.assert_array_equal(out, STORED - 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"RescaleSlope": 2},
        {"RescaleIntercept": -1024.5},
        {"PixelRepresentation": 0, "BitsStored": 12, "HighBit": 11},
        {"BitsStored": 14, "HighBit": 15},
        {"BitsStored": 14, "HighBit": 13},
    ],
    ids=str,
)
def test_a_frame_whose_values_need_more_than_an_offset_is_not_kept(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    ref = written(tmp_path, "jpegls", **changes)
    assert kept_codestream(ref, "jpegls") is None


def test_a_frame_of_another_syntax_is_not_kept(tmp_path: Path) -> None:
    assert kept_codestream(written(tmp_path, "jpegls"), "htj2k") is None
