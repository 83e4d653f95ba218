"""164 files of public repositories: exact pixels, or the reason code that is written down here.

The manifest holds what pydicom and its plug-ins make of each file. A file counts as exact if its
stored values hash to the manifest's, and as a twin if the manifest has no pixels for it: the tests
below compare it with another file of the same picture (SC1_JPLY alone has none). Each frame that
the `Sandbox` gives must be the one that `read_frame` gives here.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import UID

from medpsp.dicom.decode import layout_of, stored_values
from medpsp.dicom.parse import parse
from medpsp.dicom.read import read_frame
from medpsp.dicom.sandbox import Sandbox
from medpsp.errors import DicomError
from medpsp.types import Place, ReadPolicy

KEEP = ReadPolicy(burned_in="keep", non_volumes="keep")
Row = dict[str, str]

# (beginning of the manifest's `expected`): (stored values, what the Sandbox makes of it)
CLASSES = {
    "readable": ("exact", "read"),
    "readable as label object": ("exact", "LABEL_OBJECT"),
    "readable only with force": ("exact", "read"),
    "reject: DICM magic and nothing else": ("HDR_TRUNCATED", "HDR_TRUNCATED"),
    "reject: not DICOM": ("NOT_DICOM", "NOT_DICOM"),
    "reject: not readable": ("NOT_DICOM", "NOT_DICOM"),
    "reject: truncated": ("PIX_TRUNCATED", "PIX_TRUNCATED"),
    "skip: no pixel data": ("HDR_REQUIRED_MISSING", "NOT_IMAGE"),
    "skip: no pixel data (RTSTRUCT": ("HDR_REQUIRED_MISSING", "LABEL_OBJECT"),
    # decoders that the manifest's did not have
    "reject: pixel decode error (RuntimeError: Unable to decode as exceptions were raised by all "
    "available plugins:   gdcm: GDCM does not support 'JPEG Extended'": ("twin", "read"),
    "reject: pixel decode error (RuntimeError: Unable to decode as exceptions were raised by all "
    "available plugins:   pylibjpeg: The decoded segment": ("twin", "LABEL_OBJECT"),
    "reject: unsupported transfer syntax 1.2.840.10008.1.2.8.1": ("twin", "LABEL_OBJECT"),
}
COLOUR_OVER_8_BITS = ("exact", "BITS_UNSUPPORTED")
NO_ROWS = ("HDR_REQUIRED_MISSING", "HDR_TRUNCATED")  # an image object of which the rest is cut
FILES = {
    "VL5_J2KI.dcm": ("near", "read"),
    "SC_rgb_16bit.dcm": COLOUR_OVER_8_BITS,
    "SC_rgb_16bit_2frame.dcm": COLOUR_OVER_8_BITS,
    "SC_rgb_32bit.dcm": COLOUR_OVER_8_BITS,
    "SC_rgb_expb_16bit.dcm": COLOUR_OVER_8_BITS,
    "SC_rgb_expb_16bit_2frame.dcm": COLOUR_OVER_8_BITS,
    "SC_rgb_expb_32bit.dcm": COLOUR_OVER_8_BITS,
    "TOSHIBA_J2K_SIZ1_PixRep0.dcm": ("exact", "SIGN_MISMATCH"),
    "GH1339.dcm": ("twin", "read"),  # no delimiter after the pixels: pydicom drops them
    "emri_small_jpeg_2k_lossless_too_short.dcm": ("twin", "read"),
    "GH340.dcm": ("HDR_REQUIRED_MISSING", "HDR_REQUIRED_MISSING"),
    "GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length.dcm": ("HDR_TRUNCATED", "HDR_TRUNCATED"),
    "multiframe.dcm": ("DEC_ERROR", "DEC_ERROR"),  # JPEG of 55 columns, Columns is 240
    "empty.dcm": ("FILE_EMPTY", "FILE_EMPTY"),
    "GH178.dcm": ("PIX_TRUNCATED", "PIX_TRUNCATED"),
    "GH179A.dcm": ("HDR_TRUNCATED", "HDR_TRUNCATED"),
    "GH626.dcm": ("HDR_TRUNCATED", "HDR_TRUNCATED"),
    "GH223.dcm": NO_ROWS,
    "GH487.dcm": NO_ROWS,
    "no-meta-length-test.dcm": NO_ROWS,
}
LOSSY_TWINS = {  # 12-bit JPEG against the same picture from elsewhere: greatest and mean difference
    "MG1": ("MG1_J2KI", 192, 13.3),
    "MR2": ("MR2_J2KI.dcm", 68, 6.1),
    "MR3": ("MR3_J2KR", 55, 4.5),
    "MR4": ("MR4_UNC", 40, 3.1),
    "RG3": ("RG3_JLSL", 48, 1.8),
    "XA1": ("XA1_JLSL", 116, 2.2),
}


@pytest.fixture(scope="module")
def manifest(data: Path) -> list[Row]:
    csv.field_size_limit(2**30)
    with (data / "decode" / "MANIFEST.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, Path]:
    """By file name; where one name occurs twice the first by path counts."""
    paths = sorted((data / "decode").rglob("*"), reverse=True)
    return {path.name: path for path in paths if path.is_file()}


def stored(path: Path) -> NDArray[Any]:
    """Stored values of all frames: (F, ...) where there are several."""
    parsed = parse(Place(str(path)))
    layout = layout_of(parsed)
    frames = [stored_values(parsed, layout, n).values for n in range(layout.frames)]
    return np.stack(frames) if len(frames) > 1 else frames[0]


def rgb(path: Path) -> NDArray[np.int64]:
    with Sandbox() as box:
        return box.frame(box.headers(Place(str(path)), "", KEEP)[0]).values.astype(np.int64)


def pixels_of(path: Path, row: Row) -> str:
    try:
        values = stored(path)
    except DicomError as error:
        return error.code
    if not row["raw_min"]:
        return "twin"
    shape = "x".join(str(n) for n in values.shape)
    if (shape, float(values.min()), float(values.max())) != (
        row["raw_shape"],
        float(row["raw_min"]),
        float(row["raw_max"]),
    ):
        return "different"
    hashes = {  # the manifest hashes big endian files as they are stored
        hashlib.sha1(values.astype(values.dtype.newbyteorder(order)).tobytes()).hexdigest()[:16]
        for order in "<>"
    }
    return "exact" if row["raw_sha1_16"] in hashes else "near"


def path_through(box: Sandbox, path: Path) -> str:
    try:
        refs = box.headers(Place(str(path)), "id", KEEP)
        for ref in refs:
            there, here = box.frame(ref), read_frame(ref)
            assert there.values.dtype == here.values.dtype == np.dtype(ref.dtype)
            np.testing.assert_array_equal(there.values, here.values)
            assert (there.padding is None) == (here.padding is None)
    except DicomError as error:
        return error.code
    return "read"


def named(pixels: str, path: str) -> str:
    """One word for the table: what is refused counts by what the archive's owner is told."""
    if path == "read" or pixels in ("exact", "near", "twin"):
        return pixels if path == "read" else f"{pixels} but {path}"
    return path


def expected_of(row: Row) -> tuple[str, str]:
    name = Path(row["path"]).name
    fits = [key for key in CLASSES if row["expected"].startswith(key)]
    return FILES.get(name) or CLASSES[max(fits, key=len)]


def test_every_file_is_exact_or_has_its_code(
    data: Path, manifest: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes, wrong = defaultdict(Counter[str]), []
    with Sandbox() as box:
        for row in manifest:
            path = data / row["path"]
            found = pixels_of(path, row), path_through(box, path)
            if found != expected_of(row):
                wrong.append((path.name, found, expected_of(row)))
            syntax = UID(row["ts_uid"]).name if row["ts_uid"] else "none"
            outcomes[syntax][named(*found)] += 1
    with capsys.disabled():
        print()
        for syntax, counts in sorted(outcomes.items()):
            listed = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
            print(f"  {syntax[:48]:48} {sum(counts.values()):3}: {listed}")
    assert not wrong
    assert len(manifest) == sum(sum(counts.values()) for counts in outcomes.values()) == 164
    total = sum(outcomes.values(), Counter())
    assert sum(n for what, n in total.items() if what.startswith("exact")) == 111
    assert sum(n for what, n in total.items() if what.startswith(("near", "twin"))) == 14


def test_twelve_bit_jpeg_is_the_same_picture(found: dict[str, Path]) -> None:
    for name, (twin, greatest, mean) in LOSSY_TWINS.items():
        lossy, whole = (stored(found[file]).astype(int) for file in (f"{name}_JPLY", twin))
        apart = np.abs(lossy - whole)
        assert apart.max() <= greatest
        assert apart.mean() <= mean
        assert np.corrcoef(lossy.ravel(), whole.ravel())[0, 1] > 0.996


def test_files_that_no_decoder_of_the_manifest_reads(found: dict[str, Path]) -> None:
    whole = stored(found["liver_expb.dcm"])
    assert whole.shape == (3, 512, 512)
    assert (stored(found["liver_deflate.dcm"]) == whole).all()
    assert (stored(found["liver_rle.dcm"]) == whole).all()
    odd = stored(found["liver_nonbyte_aligned.dcm"])
    assert (stored(found["liver_nonbyte_aligned_deflate.dcm"]) == odd).all()
    assert (stored(found["liver_nonbyte_aligned_rle.dcm"]) == odd).all()
    enhanced = stored(found["emri_small.dcm"])
    assert (stored(found["emri_small_jpeg_2k_lossless_too_short.dcm"]) == enhanced).all()


def test_no_delimiter_after_a_whole_codestream(found: dict[str, Path]) -> None:
    import imagecodecs

    data = found["GH1339.dcm"].read_bytes()
    codestream = data[data.index(b"\xff\xd8\xff") :]
    other = imagecodecs.jpegsof3_decode(codestream)  # not the decoder that reads it else
    assert (stored(found["GH1339.dcm"]) == other).all()


def test_lossy_jpeg2000_is_off_by_one_level_at_most(found: dict[str, Path]) -> None:
    import pydicom

    path = found["VL5_J2KI.dcm"]
    other = pixel_array(pydicom.dcmread(path), raw=True, decoding_plugin="pillow")
    assert np.abs(stored(path).astype(int) - other).max() <= 1


@pytest.mark.parametrize(
    ("name", "greatest"),
    [
        ("SC_rgb_2frame.dcm", 0),
        ("SC_rgb_expb.dcm", 0),  # 8 bits in big endian words
        ("SC_rgb_dcmtk_ebcr_dcmd.dcm", 2),
        ("SC_rgb_dcmtk_ebcyn1_dcmd.dcm", 77),  # chroma of one pixel in four, at the edges of bars
        ("SC_rgb_gdcm2k_uncompressed.dcm", 0),
        ("SC_ybr_full_uncompressed.dcm", 6),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", 75),  # tagged RGB, components of unlike sampling
    ],
)
def test_colour_bars(found: dict[str, Path], name: str, greatest: int) -> None:
    apart = np.abs(rgb(found[name]) - rgb(found["SC_rgb.dcm"]))
    assert apart.max() <= greatest
    assert apart.mean() <= 3


def test_one_picture_in_two_encodings(found: dict[str, Path]) -> None:
    assert (rgb(found["VL1_UNC"]) == rgb(found["VL1_J2KR"])).all()
    assert (rgb(found["VL3_UNC"]) == rgb(found["VL3_RLE"])).all()
    lossy = np.abs(rgb(found["HTJ2KLossless_08_RGB.dcm"]) - rgb(found["HTJ2K_08_RGB.dcm"]))
    assert lossy.max() <= 4


def test_palette(found: dict[str, Path]) -> None:
    import pydicom

    ds = pydicom.dcmread(found["no-pixel-spacing.dcm"])
    values = rgb(found["no-pixel-spacing.dcm"])
    assert (values == apply_color_lut(ds.pixel_array, ds) >> 8).all()  # a table of 16 bits
    assert values[30, 30].tolist() == [13, 23, 40]  # the dark blue bar behind the maker's name
