"""One shard on disk in the Zarr v3 sharding layout: chunks end to end, their index behind them.

The index has 16 bytes a slot, offset and length (uint64, little endian), both 2^64 - 1 where the
slot is empty, and its CRC32C.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import threading
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medpsp.durable import sync
from shards.codec import CRC_BYTES, checked, with_crc

ABSENT = 2**64 - 1
_PAIR = 16

INDEX_BYTES = 2**26
"""Of the indexes that `OpenShards` keeps in memory."""


class ShardWriter:
    """Puts chunks into a temporary file; `commit` puts that in place, whole and durable.

    Args:
        path: Of the shard; folders above it are made.
        slots: Slots of a shard.

    Attributes:
        partial: The temporary file; another process may append chunks there, see `adopt`.
    """

    def __init__(self, path: Path, slots: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # several machines may write the same shard after a lost one was given up
        self.partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        self._file = self.partial.open("x+b", buffering=0)
        self._index = np.full((slots, 2), ABSENT, dtype="<u8")
        self._sha = hashlib.sha256()
        self._at = 0
        self._buffer = bytearray()

    def append(self, slot: int, chunk: bytes) -> None:
        """Add the chunk of a slot, counted within the shard."""
        append_all(self._file.fileno(), chunk)
        self.adopt(slot, len(chunk))

    def adopt(self, slot: int, size: int) -> None:
        """Take the next ``size`` bytes of the temporary file as the chunk of a slot.

        Raises:
            OSError: They are not there.
        """
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        piece = memoryview(self._buffer)[:size]
        if os.preadv(self._file.fileno(), [piece], self._at) != size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._index[slot] = self._at, size
        self._sha.update(piece)
        self._at += size

    def trim(self) -> None:
        """Drop what was written and not adopted: who wrote it died over it."""
        if os.fstat(self._file.fileno()).st_size != self._at:
            self._file.truncate(self._at)
        self._file.seek(self._at)

    def commit(self) -> tuple[str, int]:
        """Write the index, sync, rename; returns SHA-256 and size in bytes of the file."""
        self.trim()
        index = with_crc(self._index.tobytes())
        append_all(self._file.fileno(), index)
        self._sha.update(index)
        os.fsync(self._file.fileno())
        self._file.close()
        self.partial.replace(self.path)
        sync(self.path.parent)
        return self._sha.hexdigest(), self._at + len(index)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self.partial.unlink(missing_ok=True)


def append_all(handle: int, data: bytes) -> None:
    """Write all of ``data``; one call may write less, on a full disk for example."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def read_shard_index(handle: int, slots: int) -> NDArray[np.uint64]:
    """(slots, 2) offset and length of every chunk; `ABSENT` twice for an empty slot.

    Args:
        handle: File descriptor of the shard.
        slots: Slots of a shard.

    Raises:
        ValueError: The file is too short, its CRC32C does not match, or a chunk lies outside.
        OSError: It cannot be read.
    """
    size, need = os.fstat(handle).st_size, slots * _PAIR + CRC_BYTES
    if size < need:
        raise ValueError(f"{size} bytes, its index alone has {need}")
    index = np.frombuffer(checked(os.pread(handle, need, size - need)), "<u8").reshape(slots, 2)
    used = index[index[:, 0] != ABSENT]
    # lengths first: the sum of two large numbers wraps
    if (used > size - need).any() or (used.sum(axis=1) > size - need).any():
        raise ValueError("a chunk lies outside the shard")
    return index


_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in its place would wait for ever


class OpenShard:
    """An open shard file; closed with the last reference to it.

    Attributes:
        handle: File descriptor.
        index: (slots, 2), as `read_shard_index` gives it.
    """

    __slots__ = ("handle", "index")

    def __init__(self, handle: int) -> None:
        self.handle, self.index = handle, np.empty((0, 2), np.uint64)

    def __del__(self) -> None:
        os.close(self.handle)


class _Known(NamedTuple):
    """The index of a file, and what tells whether it is still the same one."""

    identity: tuple[int, int, int]
    pairs: NDArray[np.uint64]


class OpenShards(threading.local):
    """Shard files for reading: the last used ones open, the indexes of many more known.

    A child of a fork may use them on: a descriptor shared with it is read at given places only.
    Every thread has files and memory of its own.

    Args:
        most: To keep open; less where the limit of the process is low.
    """

    def __init__(self, most: int) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, most if soft == resource.RLIM_INFINITY else min(most, soft // 4))
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._known_bytes = 0
        self._space = np.empty(0, np.uint8)

    def get(self, path: str, slots: int) -> OpenShard:
        """A shard of ``slots`` slots, opened if it is not.

        Raises:
            ValueError: Its index is damaged.
            OSError: It cannot be opened or read.
        """
        shard = self._open.get(path)
        if shard is not None:
            self._open.move_to_end(path)
            return shard
        while len(self._open) >= self._most:
            self._open.popitem(last=False)
        try:
            handle = os.open(path, _READ)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                raise
            self._open.clear()  # others of this process have them all
            handle = os.open(path, _READ)
        shard = self._open[path] = OpenShard(handle)
        try:
            shard.index = self._index(path, handle, slots)
        except (OSError, ValueError):
            del self._open[path]
            raise
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead of other slices
        return shard

    def _index(self, path: str, handle: int, slots: int) -> NDArray[np.uint64]:
        status = os.fstat(handle)
        identity = status.st_ino, status.st_size, status.st_mtime_ns
        known = self._known.pop(path, None)
        if known is None or known.identity != identity:
            self._known_bytes -= known.pairs.nbytes if known else 0
            known = _Known(identity, read_shard_index(handle, slots))
            self._known_bytes += known.pairs.nbytes
        self._known[path] = known
        while self._known_bytes > INDEX_BYTES and len(self._known) > 1:
            self._known_bytes -= self._known.popitem(last=False)[1].pairs.nbytes
        return known.pairs

    def chunk(self, shard: OpenShard, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of a shard, in memory that the next call uses again.

        Raises:
            ValueError: The file ends before.
            OSError: It cannot be read.
        """
        if size > len(self._space):  # fresh pages each time would cost as much as the reading
            self._space = np.empty(size + size // 4, np.uint8)
        piece = self._space[:size]
        got = os.preadv(shard.handle, [piece.data], offset)
        while got < size:  # network file systems may read less
            more = os.preadv(shard.handle, [piece[got:].data], offset + got)
            if more == 0:
                raise ValueError(f"the file ends after {got} of {size} bytes")
            got += more
        return piece

    def clear(self) -> None:
        """Close all; the indexes stay known."""
        self._open.clear()
