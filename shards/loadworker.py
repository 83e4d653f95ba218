"""A worker of the loader: it fills shared memory, batch after batch, until its pipe closes."""

from __future__ import annotations

import math
import mmap
import os
import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import MedpspError

ALIGNED = mmap.PAGESIZE
FAILURES = (
    *(MedpspError, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(MemoryError, AttributeError, ImportError, AssertionError),
)
"""What a task may raise; of anything else the worker dies, and its traceback is seen."""


class Spec(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """To a worker: a task and what its arrays are, or the next item and where its batch goes."""

    number: int = -1
    place: int = 0
    item: Any = None
    task: Any = None
    specs: tuple[Spec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """From a worker: a batch is made, or why not."""

    number: int
    note: Any = None
    error: Exception | None = None


def batch_bytes(specs: Sequence[Spec]) -> int:
    """Of the arrays of one batch, one behind the other, each on pages of its own."""
    return sum(_padded(spec.size) for spec in specs)


def arrays_at(memory: mmap.mmap, place: int, specs: Sequence[Spec]) -> tuple[NDArray[Any], ...]:
    """The arrays of the batch that begins at byte ``place``."""
    arrays = []
    for spec in specs:
        flat = np.frombuffer(memory, spec.dtype, math.prod(spec.shape), place)
        arrays.append(flat.reshape(spec.shape))
        place += _padded(spec.size)
    return tuple(arrays)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def main(pipe: int, handle: int, size: int, parent: int) -> None:
    """Work until the parent closes the pipe or is gone.

    Args:
        pipe: Descriptor of our end of it.
        handle: Descriptor of the shared memory.
        size: Its bytes.
        parent: Process id.
    """
    connection = Connection(pipe)
    # all pages now: each fault later would be time of a batch
    memory = mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(handle)
    now = Message()
    try:
        while True:
            while not connection.poll(1.0):
                if os.getppid() != parent:  # a child of it may hold the pipe open
                    return
            message: Message = connection.recv()
            if message.task is not None:
                now = message
                continue
            connection.send(_work(now, memory, message))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _work(now: Message, memory: mmap.mmap, message: Message) -> Told:
    arrays = arrays_at(memory, message.place, now.specs)
    try:
        return Told(number=message.number, note=now.task(message.item, arrays))
    except FAILURES as error:
        return Told(number=message.number, error=_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives the way, else one with its text."""
    error.add_note("In a worker of the loader:\n" + traceback.format_exc())
    try:
        if type(ForkingPickler.loads(ForkingPickler.dumps(error))) is type(error):
            return error
    except (pickle.PicklingError, TypeError, AttributeError, ImportError):
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
