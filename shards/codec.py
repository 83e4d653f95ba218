"""How one slice becomes the bytes of a chunk and back; every chunk ends with its CRC32C.

Chunks of `blosc` can be read by any Zarr v3 reader. The codec `medpsp.frame` of the profiles dense,
jpegls and htj2k is ours: 4 bytes of offset (int32, little endian), then one codestream of 16-bit
values; modality value = decoded value + offset, modulo 2^16. So a frame that comes in JPEG-LS or
HTJ2K can keep its bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import imagecodecs
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

Kind = Literal["blosc", "jpegxl", "jpegls", "htj2k"]
FRAME_CODEC = "medpsp.frame"
CRC_BYTES = 4
OFFSET = struct.Struct("<i")
_BLOSC_SIZE = struct.Struct("<I")  # bytes of the values, at byte 4 of its header
_BLOSC_BLOCK = 2**20
"""A slice of CT is one block: blosc's own choice for zstd, 32 KiB, takes 1.7 times the CPU to write
and 1.9 times to read, for 0.4 % of the disk. Blocks without limit leave the cache on a large slice.
"""
_blosc_decode: Any = imagecodecs.blosc2_decode  # its stub allows no arrays
_CNAMES = ("lz4", "lz4hc", "zstd", "zlib", "blosclz")  # all that blosc2 can decode of blosc
MIDDLE = 32768
"""Offset between int16 and the unsigned values of a codestream that we encode ourselves."""

_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE}
blosc.use_threads = False  # contexts of the call: several threads may code at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One way to code a slice.

    Attributes:
        kind: blosc, or the codestream of a frame.
        cname, level, shuffle: Of blosc.
        typesize: Bytes of a value.
    """

    kind: Kind = "blosc"
    cname: str = "zstd"
    level: int = 1
    shuffle: str = "shuffle"
    typesize: int = 2

    def encode(self, values: NDArray[Any]) -> bytes:
        """The chunk of (H, W) or (H, W, 3) values, CRC32C included."""
        return with_crc(self.encode_payload(values))

    def decode_into(self, chunk: bytes | memoryview, out: NDArray[Any]) -> None:
        """Check the CRC32C of a chunk and decode it into ``out``, C-contiguous.

        Raises:
            ValueError: The chunk is damaged, or of another size or dtype than ``out``.
        """
        self.decode_payload(checked(chunk), out)

    def encode_payload(self, values: NDArray[Any]) -> bytes:
        """`encode` without the CRC32C."""
        if self.kind != "blosc":
            unsigned = np.ascontiguousarray(values).view(np.uint16) ^ np.uint16(MIDDLE)
            return OFFSET.pack(-MIDDLE) + _ENCODERS[self.kind](unsigned)
        payload: bytes = blosc.compress(
            np.ascontiguousarray(values, values.dtype.newbyteorder("<")),
            self.cname.encode(),
            self.level,
            _SHUFFLES[self.shuffle],
            min(values.nbytes, _BLOSC_BLOCK),
            self.typesize,
        )
        return payload

    def decode_payload(self, payload: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """`decode_into` without the CRC32C."""
        try:
            if self.kind == "blosc":
                (size,) = _BLOSC_SIZE.unpack_from(payload.data, 4)
                if size != out.nbytes:
                    raise ValueError(f"a chunk of {size} bytes, expected {out.nbytes}")
                # reads blosc 1 as well, in 5 to 35 % less time than blosc 1 itself; no threads
                _blosc_decode(payload, out=out.reshape(-1).view(np.uint8), numthreads=1)
                return
            (offset,) = OFFSET.unpack_from(payload.data)
            stored = _DECODERS[self.kind](payload[OFFSET.size :].tobytes())
        except (RuntimeError, struct.error) as error:
            raise ValueError(str(error)) from None
        if stored.shape != out.shape or stored.dtype.itemsize != out.itemsize:
            raise ValueError(f"a codestream of {stored.shape} {stored.dtype}, expected {out.shape}")
        # modulo 2**16, whatever the sign: the values fitted when they were written
        np.add(stored.view(np.uint16), np.uint16(offset % 2**16), out=out.view(np.uint16))


def with_crc(payload: bytes) -> bytes:
    """A payload with its CRC32C behind it, as the Zarr v3 codec crc32c lays it."""
    crc: int = google_crc32c.value(payload)
    return payload + crc.to_bytes(CRC_BYTES, "little")


def checked(chunk: bytes | memoryview | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The payload of a chunk, a view.

    Raises:
        ValueError: Its CRC32C does not match.
    """
    data = np.frombuffer(chunk, np.uint8)  # google_crc32c takes arrays, but no memoryview
    payload = data[:-CRC_BYTES]
    expected = data[-CRC_BYTES:].tobytes()
    if len(data) < CRC_BYTES or google_crc32c.value(payload) != int.from_bytes(expected, "little"):
        raise ValueError("CRC32C does not match")
    return payload


def frame_chunk(codestream: bytes, offset: int) -> bytes:
    """The chunk of a codestream whose values lie ``offset`` below the modality values."""
    return with_crc(OFFSET.pack(offset) + codestream)


def image_codec(profile: str, dtype: str) -> Codec:
    """The codec of the images of one bucket; codestreams hold int16 only."""
    typesize = np.dtype(dtype).itemsize
    if profile == "fast":
        return Codec(cname="lz4", level=5, typesize=typesize)
    if profile == "default" or dtype != "int16":
        # a level above 1 buys under 1 % on CT noise
        return Codec(cname="zstd", level=1, typesize=typesize)
    kinds: dict[str, Kind] = {"dense": "jpegxl", "jpegls": "jpegls", "htj2k": "htj2k"}
    return Codec(kind=kinds[profile])


LABEL = Codec(cname="zstd", level=3, shuffle="noshuffle", typesize=1)
"""Labels are runs of one value, where shuffling only costs."""


def codec_of(metadata: dict[str, Any]) -> Codec | None:
    """The codec of the inner chunks of an array from its zarr.json; None if it is not of ours.

    Ours is: sharding of whole slices with bytes (little endian) and blosc, or `medpsp.frame`,
    then crc32c; the index at the end with bytes and crc32c.
    """
    try:
        (sharding,) = metadata["codecs"]
        config = sharding["configuration"]
        names = [codec["name"] for codec in config["codecs"]]
        if sharding["name"] != "sharding_indexed" or not _is_ours(metadata, config):
            return None
        first = config["codecs"][0].get("configuration", {})
        if names == [FRAME_CODEC, "crc32c"] and metadata["data_type"] == "int16":
            return Codec(kind=first["codec"]) if first["codec"] in _DECODERS else None
        if names != ["bytes", "blosc", "crc32c"] or first.get("endian", "little") != "little":
            return None
        blosc_settings = config["codecs"][1]["configuration"]
        if blosc_settings["cname"] not in _CNAMES:
            return None
        return Codec(
            cname=blosc_settings["cname"],
            level=blosc_settings["clevel"],
            shuffle=blosc_settings["shuffle"],
            typesize=blosc_settings["typesize"],
        )
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _is_ours(metadata: dict[str, Any], config: dict[str, Any]) -> bool:
    index = config["index_codecs"]
    return (
        config["index_location"] == "end"
        and [codec["name"] for codec in index] == ["bytes", "crc32c"]
        and index[0]["configuration"]["endian"] == "little"
        and list(config["chunk_shape"]) == [1, *metadata["shape"][1:]]
        and metadata["chunk_grid"]["name"] == "regular"
        and metadata["chunk_grid"]["configuration"]["chunk_shape"][1:] == metadata["shape"][1:]
        and not metadata.get("storage_transformers")
        and metadata.get("chunk_key_encoding", {}).get("name") == "default"
        and _separator(metadata) == "/"
    )


def _separator(metadata: dict[str, Any]) -> object:
    return metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")


def _jpegxl(values: NDArray[np.uint16]) -> bytes:
    # effort 1 is denser than zstd on CT and takes half its time; the next ones take many times that
    return bytes(imagecodecs.jpegxl_encode(values, lossless=True, effort=1, numthreads=1))


def _htj2k(values: NDArray[np.uint16]) -> bytes:
    return bytes(imagecodecs.htj2k_encode(values, reversible=True))


_ENCODERS = {
    "jpegxl": _jpegxl,
    "jpegls": lambda values: bytes(imagecodecs.jpegls_encode(values)),
    "htj2k": _htj2k,
}
_DECODERS = {
    "jpegxl": lambda data: imagecodecs.jpegxl_decode(data, numthreads=1),
    "jpegls": imagecodecs.jpegls_decode,
    "htj2k": imagecodecs.htj2k_decode,
}
