"""Stored values of one frame: sizes are checked before memory is asked for, then one decoder.

Native pixels are read here, compressed ones by `codestream`.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.dicom.codestream import CODECS, LOSSY, MAX_FRAME_BYTES, Layout
from medpsp.dicom.deidentify import uid_name
from medpsp.dicom.fragments import frame_bytes, frames_of
from medpsp.dicom.header import Header
from medpsp.dicom.parse import BIG, DEFLATED, EXPLICIT, IMPLICIT, Parsed, refusing
from medpsp.errors import DicomError

MAX_FRAMES = 200_000
"""Of one object, image or SEG: a header may claim any number."""
NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG)


def layout_of(parsed: Parsed[Header]) -> Layout:
    """Read and check what describes the pixels.

    Raises:
        DicomError: HDR_REQUIRED_MISSING, ELEM_INVALID, SIZE_LIMIT, BITS_UNSUPPORTED.
    """
    ds = parsed.header
    floating = parsed.pixel_keyword in ("FloatPixelData", "DoubleFloatPixelData")
    needed = ["Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"]
    needed += [] if floating else ["BitsStored", "PixelRepresentation"]
    for keyword in needed:
        if ds.get(keyword) in (None, ""):
            raise DicomError("HDR_REQUIRED_MISSING", f"no {keyword}")
    for keyword in ("PixelRepresentation", "PlanarConfiguration"):
        if (ds.get(keyword) or 0) not in (0, 1):
            raise DicomError("ELEM_INVALID", f"{keyword} is neither 0 nor 1")
    allocated = int(ds.BitsAllocated)
    stored = allocated if floating else int(ds.BitsStored)
    high = stored - 1 if floating or ds.get("HighBit") in (None, "") else int(ds.HighBit)
    layout = Layout(
        rows=int(ds.Rows),
        columns=int(ds.Columns),
        samples=int(ds.get("SamplesPerPixel") or 1),
        frames=int(ds.get("NumberOfFrames") or 1),
        allocated=allocated,
        stored=stored,
        high=high,
        signed=not floating and int(ds.PixelRepresentation) == 1,
        floating=floating,
        photometric=str(ds.PhotometricInterpretation),
    )
    if min(layout.rows, layout.columns) < 1 or not 1 <= layout.frames <= MAX_FRAMES:
        raise DicomError(
            "SIZE_LIMIT", f"{layout.frames} frames of {layout.rows} x {layout.columns}"
        )
    if layout.samples not in (1, 3) or allocated not in ({32, 64} if floating else {1, 8, 16, 32}):
        raise DicomError(
            "BITS_UNSUPPORTED", f"{layout.samples} samples of {allocated} bits allocated"
        )
    if not 0 < stored <= high + 1 <= allocated:
        raise DicomError("BITS_UNSUPPORTED", f"BitsStored {stored}, HighBit {high} of {allocated}")
    if layout.frame_bytes > MAX_FRAME_BYTES:
        raise DicomError(
            "SIZE_LIMIT", f"a frame of {layout.frame_bytes} bytes, at most {MAX_FRAME_BYTES}"
        )
    return layout


def check_pixels(parsed: Parsed[Header], layout: Layout) -> None:
    """Native pixels must be as long as the header says, and every frame must have its fragments.

    PS3.5 A.4 keeps the two forms apart.

    Raises:
        DicomError: PIX_TRUNCATED, TS_MISMATCH, TS_UNSUPPORTED, TS_MISSING, and the codes of
            `frames_of`.
    """
    if not parsed.pixel_keyword:
        raise DicomError("PIX_TRUNCATED", "no Pixel Data (7FE0,0010); the file may be cut short")
    guessed = "GUESSED_TS" in parsed.flags
    if parsed.syntax not in NATIVE:
        if parsed.syntax not in CODECS:
            raise DicomError("TS_UNSUPPORTED", f"transfer syntax: {uid_name(parsed.syntax)}")
        if parsed.length != -1 or layout.floating:
            raise DicomError("TS_MISMATCH", "native pixels under a compressed transfer syntax")
        frames_of(parsed, layout.frames)
        return
    if parsed.length == -1:
        code = "TS_MISSING" if guessed else "TS_MISMATCH"
        raise DicomError(code, "fragments of pixels under a native or unknown transfer syntax")
    need = native_bytes(layout)
    have = min(parsed.length, parsed.available)
    if have < need:
        raise DicomError("PIX_TRUNCATED", f"{have} bytes of pixels, expected {need}")
    if guessed and parsed.length not in (need, need + need % 2):
        raise DicomError("TS_MISSING", f"{parsed.length} bytes of pixels, expected {need}")


def native_bytes(layout: Layout) -> int:
    """Bytes of all native frames; 1-bit frames follow one another without padding (PS3.5 8.1.1)."""
    return math.ceil(layout.frames * _frame_pixels(layout) * layout.allocated / 8)


def _frame_pixels(layout: Layout) -> int:
    pixels = layout.rows * layout.columns * layout.samples
    return pixels // 3 * 2 if layout.photometric == "YBR_FULL_422" else pixels


class Stored(NamedTuple):
    """Stored values (H, W) or (H, W, 3) of one frame, as `stored_values` says.

    ``space`` is MONOCHROME1, MONOCHROME2, PALETTE COLOR, RGB or YBR_FULL; ``whole`` is the values
    with all bits allocated.
    """

    values: NDArray[Any]
    space: str
    whole: NDArray[Any]
    flags: tuple[str, ...] = ()


def stored_values(parsed: Parsed[Header], layout: Layout, frame: int) -> Stored:
    """Stored values of one frame, and the colour space that they are in.

    Only the BitsStored bits that end at HighBit count, sign-extended where PixelRepresentation
    says so (PS3.5 8.1.1); float pixels come as they are.

    A signed JPEG 2000 codestream under PixelRepresentation 0 comes as unsigned, as the tag says,
    with the flag SIGN_MISMATCH.

    Raises:
        DicomError: PIX_TRUNCATED, DEC_ERROR, PHOTOMETRIC_UNSUPPORTED where the codestream does not
            say what a component transform of JPEG 2000 or of MPEG has become, and the codes of
            `check_pixels`.
    """
    check_pixels(parsed, layout)
    if not 0 <= frame < layout.frames:
        raise DicomError("PIX_TRUNCATED", f"frame {frame + 1} of {layout.frames}")
    with refusing("DEC_ERROR", "pixels not decodable"):
        if parsed.syntax in NATIVE:
            raw, space = _native(parsed, layout, frame), layout.photometric
        else:
            raw, space = _compressed(parsed, layout, frame)
        if space in ("YBR_RCT", "YBR_ICT", "YBR_PARTIAL_420"):
            raise DicomError("PHOTOMETRIC_UNSUPPORTED", f"{space} is not of this transfer syntax")
        if "YBR" in space:
            space = "YBR_FULL"
        if layout.floating:
            return Stored(raw, space, raw)
        whole = raw.view(f"{'i' if layout.signed else 'u'}{raw.dtype.itemsize}")
        if raw.dtype.kind == "i" and not layout.signed:
            return Stored(whole, space, whole, ("SIGN_MISMATCH",))
        return Stored(_meaning(raw, layout, parsed.syntax in LOSSY), space, whole)


def _buffer(parsed: Parsed[Header]) -> memoryview:
    """The bytes of an object where they lie: mapped, or in memory."""
    stream: Any = parsed.stream
    return memoryview(stream.getbuffer() if isinstance(stream, BytesIO) else stream)


def _native(parsed: Parsed[Header], layout: Layout, frame: int) -> NDArray[Any]:
    """Our own: pydicom 3.0 reads too few bytes of a 1-bit frame that crosses one more byte.

    Grey little endian pixels are not copied: whoever changes or keeps them makes others of them.
    """
    pixels = _frame_pixels(layout)
    bits = pixels * layout.allocated
    start, end = frame * bits // 8, math.ceil((frame + 1) * bits / 8)
    swapped = parsed.syntax == BIG and layout.allocated == 8 and parsed.pixel_vr == "OW"
    skip = start % 2 if swapped else 0
    at = parsed.value_at + start - skip
    data = _buffer(parsed)[at : parsed.value_at + end + (end % 2 if swapped else 0)]
    if swapped:  # 8-bit pixels as big endian words (PS3.5 8.1.1)
        words = np.frombuffer(data, ">u2").astype("<u2").tobytes()
        data = memoryview(words)[skip : skip + pixels]
    if layout.allocated == 1:
        values = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        values = values[frame * bits % 8 :][:pixels]
    else:
        kind = "f" if layout.floating else "u"
        dtype = np.dtype(f"{'>' if parsed.syntax == BIG else '<'}{kind}{layout.allocated // 8}")
        values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=layout.samples > 1)
    if layout.photometric == "YBR_FULL_422":  # Y Y B R stand for two pixels
        y, chroma = values.reshape(-1, 4)[:, :2], values.reshape(-1, 4)[:, None, 2:]
        values = np.concatenate([y[..., None], np.repeat(chroma, 2, axis=1)], axis=2)
    elif layout.samples == 3 and int(parsed.header.get("PlanarConfiguration") or 0) == 1:
        planes = values.reshape(3, layout.rows, layout.columns)
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    return values.reshape(layout.shape)


def _compressed(parsed: Parsed[Header], layout: Layout, frame: int) -> tuple[NDArray[Any], str]:
    stream = frame_bytes(parsed, layout.frames, frame)
    raw, space = CODECS[parsed.syntax](stream, layout)
    if raw.shape != layout.shape:
        raise DicomError("DEC_ERROR", f"decoded shape {raw.shape}, header says {layout.shape}")
    width = max(1, layout.allocated // 8)
    if raw.dtype.itemsize > width:
        raise DicomError(
            "DEC_ERROR", f"codestream of {raw.dtype}, {layout.allocated} bits allocated"
        )
    return raw.astype(f"{raw.dtype.kind}{width}", copy=False), space


def _meaning(raw: NDArray[Any], layout: Layout, lossy: bool) -> NDArray[Any]:
    """The bits that count, with their sign (PS3.5 8.1.1)."""
    if layout.allocated == 1:
        return raw
    bits, stored, kind = 8 * raw.dtype.itemsize, layout.stored, "i" if layout.signed else "u"
    if lossy and (raw.dtype.kind == "i" or not layout.signed):
        return raw  # rounding may step over the range, where a mask would wrap it
    top = bits - 1 - (stored - 1 if lossy else layout.high)
    whole = raw.view(f"u{bits // 8}")
    if stored == bits:
        return whole.view(f"{kind}{bits // 8}")
    if kind == "u" and top == bits - stored:
        return np.asarray(whole & (2**stored - 1))
    moved = (whole << top).view(f"{kind}{bits // 8}")
    moved >>= bits - stored
    return moved
