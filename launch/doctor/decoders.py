"""Every transfer syntax that medpsp reads: a frame of each is written, and decoded as in a run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian

from launch.codestreams import ENCODERS, fragmented, known_syntax, set_syntax
from launch.doctor.rows import Row, note, ok, problem
from launch.phantom import Phantom, write_series
from medpsp.dicom.codestream import CODECS, LOSSY
from medpsp.dicom.decode import NATIVE
from medpsp.dicom.sandbox import Sandbox
from medpsp.errors import SourceError
from medpsp.types import Place, ReadPolicy

NAMES = {
    "1.2.840.10008.1.2": "Implicit Little Endian",
    "1.2.840.10008.1.2.1": "Explicit Little Endian",
    "1.2.840.10008.1.2.1.99": "Deflated",
    "1.2.840.10008.1.2.2": "Explicit Big Endian",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.8.1": "Deflated Frame",
    "1.2.840.10008.1.2.4.50": "JPEG Baseline",
    "1.2.840.10008.1.2.4.51": "JPEG Extended (12 bit)",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless (Process 14)",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless SV1",
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS Near-lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.201": "HTJ2K Lossless",
    "1.2.840.10008.1.2.4.202": "HTJ2K Lossless RPCL",
    "1.2.840.10008.1.2.4.203": "HTJ2K",
}
"""Of all that there are, shorter than the standard's."""
SIDE = 32
BASELINE = "1.2.840.10008.1.2.4.50"
LOSSY_SHARE = 0.03
"""Of the range of values, by which a lossy frame may be off."""
AGAIN = "pip install --force-reinstall imagecodecs"


def decoder_rows() -> list[Row]:
    """A row of what decodes, and one for each transfer syntax that does not."""
    fine, rows = [], []
    with tempfile.TemporaryDirectory(prefix="medpsp-") as folder, Sandbox(seconds=5) as box:
        for number, syntax in enumerate((*NATIVE, *CODECS)):
            name = NAMES[syntax]
            try:
                path = write_frame(Path(folder) / str(number), syntax)
            except (ImportError, RuntimeError, ValueError) as error:
                found = f"{name}: not tried, since it cannot be encoded ({type(error).__name__})"
                rows.append(note("decoders", found, AGAIN))
                continue
            if fault := _fault(box, path, syntax):
                rows.append(problem("decoders", f"{name}: {fault}", AGAIN))
            else:
                fine.append(name)
    total = len(NATIVE) + len(CODECS)
    if not rows:
        return [ok("decoders", f"all {total} transfer syntaxes: {', '.join(fine)}")]
    return [ok("decoders", f"{len(fine)} of {total} transfer syntaxes: {', '.join(fine)}"), *rows]


def stored_frame(syntax: str) -> NDArray[np.uint16]:
    """(SIDE, SIDE) stored values, of 12 bits, or of 8 where the syntax has no more."""
    row, column = np.indices((SIDE, SIDE))
    step = 4 if syntax == BASELINE else 64
    return ((row + column) * step).astype(np.uint16)


def write_frame(folder: Path, syntax: str) -> Path:
    """Write a CT slice of one of the transfer syntaxes."""
    stored = stored_frame(syntax)
    native = syntax in NATIVE
    phantom = Phantom(
        shape=(1, SIDE, SIDE), syntax=UID(syntax) if native else ExplicitVRLittleEndian
    )
    (path,) = write_series(folder, "DOCTOR", stored.astype(np.int16)[None] - 1024, phantom)
    if native:
        return path
    ds = dcmread(path)
    if syntax == BASELINE:
        stored = stored.astype(np.uint8)
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = fragmented([ENCODERS[syntax](stored)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = known_syntax(syntax)
    ds.save_as(path, enforce_file_format=True)
    set_syntax(path, syntax)
    return path


def _fault(box: Sandbox, path: Path, syntax: str) -> str:
    """Why a frame does not come back as it was written; empty where it does."""
    try:
        (ref,) = box.headers(Place(str(path)), "doctor", ReadPolicy())
        values = box.frame(ref).values
    except SourceError as error:
        return str(error)
    stored = stored_frame(syntax).astype(np.int64)
    off = int(np.abs(values.astype(np.int64) + 1024 - stored).max())
    allowed = LOSSY_SHARE * int(stored.max()) if syntax in LOSSY else 0
    return f"decodes to other values, by up to {off}" if off > allowed else ""
