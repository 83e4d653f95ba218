"""JSON with raw arrays behind it, over a pipe. Nothing that comes in is unpickled."""

from __future__ import annotations

import json
import math
import operator
import select
import struct
import time
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<QI")  # bytes of JSON, number of arrays
MAX_ANSWER = 1 << 33
_DTYPES = frozenset("|b1 |u1 |i1 <u2 <i2 <u4 <i4 <i8 <u8 <f4 <f8".split())


def send(pipe: IO[bytes], tree: Any, arrays: list[NDArray[Any]]) -> None:
    """Write a tree of JSON values and arrays after it."""
    whole = [np.ascontiguousarray(a, a.dtype.newbyteorder("<")) for a in arrays]
    text = json.dumps([tree, [[a.dtype.str, a.shape] for a in whole]]).encode()
    for part in (
        HEADER.pack(len(text), len(whole)),
        text,
        *(a.data.cast("B") for a in whole if a.size),
    ):
        view = part
        while view:
            view = view[pipe.write(view) :]  # type: ignore[call-overload]


def receive(pipe: IO[bytes], deadline: float = math.inf) -> tuple[Any, list[NDArray[Any]]]:
    """Read what `send` wrote.

    Raises:
        EOFError: The other end closed, or sent what `send` does not write.
        TimeoutError: ``deadline`` of the monotonic clock has passed.
    """
    length, count = HEADER.unpack(_read(pipe, HEADER.size, deadline))
    if length > MAX_ANSWER:
        raise EOFError
    try:
        tree, described = json.loads(_read(pipe, length, deadline))
        kinds = [(str(dtype), [operator.index(n) for n in shape]) for dtype, shape in described]
    except (ValueError, TypeError, RecursionError):
        raise EOFError from None
    arrays = []
    for dtype, shape in kinds[:count]:
        size = math.prod(shape)
        if dtype not in _DTYPES or min(shape, default=0) < 0 or size * int(dtype[2:]) > MAX_ANSWER:
            raise EOFError
        data = _read(pipe, size * int(dtype[2:]), deadline)
        arrays.append(np.frombuffer(data, dtype).reshape(shape))
    return tree, arrays


def _read(pipe: IO[bytes], count: int, deadline: float) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        if deadline < math.inf:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
        got = pipe.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        view = view[got:]
    return data
