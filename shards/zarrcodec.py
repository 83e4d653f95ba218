"""The codec `medpsp.frame` for zarr-python, which finds it by the entry point zarr.codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration
from zarr.registry import register_codec

from shards.codec import FRAME_CODEC, Codec, Kind


@dataclass(frozen=True)
class FrameCodec(ArrayBytesCodec):
    """A slice of int16 as 4 bytes of offset and a codestream; see `shards.codec`."""

    codec: Kind
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """From its part of a zarr.json."""
        _, configuration = parse_named_configuration(data, FRAME_CODEC)
        return cls(codec=cast(Kind, configuration["codec"]))

    def to_dict(self) -> dict[str, JSON]:
        """Its part of a zarr.json."""
        return {"name": FRAME_CODEC, "configuration": {"codec": self.codec}}

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        values = np.empty(chunk_spec.shape, dtype=np.int16)
        Codec(kind=self.codec).decode_payload(chunk_data.as_numpy_array(), values[0])
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(cast(Any, values))

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        payload = Codec(kind=self.codec).encode_payload(chunk_data.as_numpy_array()[0])
        return chunk_spec.prototype.buffer.from_bytes(payload)

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """Not known before the codestream is made."""
        raise NotImplementedError


register_codec(FRAME_CODEC, FrameCodec)
