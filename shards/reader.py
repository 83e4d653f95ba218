"""Slices back from disk: one read and one decode a slice, into the caller's memory.

No threads and no state that a fork could break: descriptors are only read at places given, so a
child may share them. Arrays of another layout than ours are read through zarr-python.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medpsp.errors import ShardError
from shards.codec import Codec, checked, codec_of
from shards.shardfile import ABSENT, OpenShards

HANDLES = 256
"""Files that a reader keeps open; less where the limit of the process is low."""

_DTYPES = ("int16", "float32", "uint8")
_ADVICE = "run `medpsp check --repair`"


class ShardReader:
    """Reads single slices and batches of them; CRC32C is always checked.

    One reader may serve several threads and live across a fork, and travels to other processes by
    pickle, which takes the folder alone along.

    Args:
        root: Folder of the shards.
        handles: Shards to keep open at most.
    """

    def __init__(self, root: Path, handles: int = HANDLES) -> None:
        self.root, self.handles = root, handles
        self._arrays: dict[tuple[str, str], _Array] = {}
        self._files = OpenShards(handles)

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, int]]:
        return type(self), (self.root, self.handles)

    def read(self, bucket: str, slot: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Image (H, W) in modality values or (H, W, 3) RGB, and label (H, W) in class indices.

        Raises:
            ShardError: The slice is missing or damaged.
        """
        image, label = (self._fresh(bucket, name, slot) for name in ("image", "label"))
        return image, label

    def read_into(
        self,
        bucket: str,
        slot: int,
        image: NDArray[Any] | None = None,
        label: NDArray[np.uint8] | None = None,
    ) -> None:
        """`read` into memory of the caller, C-contiguous and of the dtype on disk.

        Args:
            bucket: Name of the bucket.
            slot: Counted in the bucket.
            image: (H, W) or (H, W, 3); None reads no image.
            label: (H, W); None reads no label.

        Raises:
            ShardError: The slice is missing or damaged; the memory then holds anything.
            ValueError: The memory is of another shape, dtype or order.
        """
        if image is not None:
            self._array(bucket, "image", slot).read(slot, image)
        if label is not None:
            self._array(bucket, "label", slot).read(slot, label)

    def read_batch(
        self,
        bucket: str,
        slots: Sequence[int],
        images: NDArray[Any] | None = None,
        labels: NDArray[np.uint8] | None = None,
    ) -> None:
        """`read_into` for B slots, in their order.

        Args:
            bucket: Name of the bucket.
            slots: B of them, in any order; one may come twice.
            images: (B, H, W) or (B, H, W, 3); None reads no images.
            labels: (B, H, W); None reads no labels.

        Raises:
            ShardError: A slice is missing or damaged.
            ValueError: The memory is of another shape, dtype or order.
        """
        for name, stack in (("image", images), ("label", labels)):
            if stack is None:
                continue
            if len(stack) != len(slots):
                raise ValueError(f"{name}s for {len(stack)} slices, expected {len(slots)}")
            for out, slot in zip(stack, slots, strict=True):
                self._array(bucket, name, slot).read(slot, out)

    def frame(self, bucket: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape (H, W) or (H, W, 3) and dtype of the images of a bucket.

        Raises:
            ShardError: There is no such bucket.
        """
        array = self._array(bucket, "image", None)
        return array.frame, array.dtype

    def shard_slots(self, bucket: str) -> int:
        """Slots of a shard, or of a chunk where the layout has no shards.

        Raises:
            ShardError: There is no such bucket.
        """
        return self._array(bucket, "image", None).slots

    def will_need(self, bucket: str, shards: Iterable[int]) -> None:
        """Tell the kernel to fetch whole shards; one that cannot be read is no error yet."""
        for name in ("image", "label"):
            array = self._array(bucket, name, None)
            for number in shards:
                array.will_need(number)

    def close(self) -> None:
        """Close the files; the next read opens what it needs."""
        self._files.clear()

    def _fresh(self, bucket: str, name: str, slot: int) -> NDArray[Any]:
        array = self._array(bucket, name, slot)
        out = np.empty(array.frame, array.dtype)
        array.read(slot, out)
        return out

    def _array(self, bucket: str, name: str, slot: int | None) -> _Array:
        found = self._arrays.get((bucket, name))
        if found is None:
            path = f"{bucket}/{name}"
            try:
                found = _open_array(self.root, path, self._files)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise _failure(self.root, path, slot, error) from None
            self._arrays[bucket, name] = found
        return found


class _Array(Protocol):
    """One array of a bucket."""

    @property
    def frame(self) -> tuple[int, ...]:
        """Shape of one slice."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its values."""

    @property
    def slots(self) -> int:
        """Of a shard."""

    def read(self, slot: int, out: NDArray[Any]) -> None:
        """Read one slice."""

    def will_need(self, shard: int) -> None:
        """A hint."""


def _open_array(root: Path, path: str, files: OpenShards) -> _Array:
    folder = root / path
    if (folder / ".zarray").exists():  # Zarr v2
        return _Foreign(root, path)
    tree = json.loads((folder / "zarr.json").read_text())
    if not isinstance(tree, dict):
        raise ValueError("zarr.json is no object")
    codec = codec_of(tree)
    if codec is None or tree["data_type"] not in _DTYPES:
        return _Foreign(root, path)
    shape = tuple(tree["shape"])
    slots = tree["chunk_grid"]["configuration"]["chunk_shape"][0]
    if type(slots) is not int or slots < 1:
        raise ValueError(f"zarr.json says {slots!r} slots a shard, expected 1 or more")
    return _Ours(
        root=root,
        path=path,
        frame=shape[1:],
        dtype=np.dtype(tree["data_type"]).newbyteorder("<"),
        count=shape[0],
        slots=slots,
        codec=codec,
        files=files,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ours:
    """An array in our layout; ``count`` slots in all, ``slots`` a shard."""

    root: Path
    path: str
    frame: tuple[int, ...]
    dtype: np.dtype[Any]
    count: int
    slots: int
    codec: Codec
    files: OpenShards

    def read(self, slot: int, out: NDArray[Any]) -> None:
        _fits(out, self.frame, self.dtype)
        try:
            slot = _inside(slot, self.count)
            number, within = divmod(slot, self.slots)
            shard = self.files.get(self._file(number), self.slots)
            offset, size = shard.index[within].tolist()
            if offset == ABSENT:
                raise ValueError("the slot is empty")
            chunk = self.files.chunk(shard, offset, size)
            self.codec.decode_payload(checked(chunk), out)
        except (OSError, ValueError, IndexError, TypeError) as error:
            raise _failure(self.root, self.path, slot, error) from None

    def will_need(self, shard: int) -> None:
        try:
            found = self.files.get(self._file(shard), self.slots)
            os.posix_fadvise(found.handle, 0, 0, os.POSIX_FADV_WILLNEED)
        except (OSError, ValueError):
            return  # who reads it says so

    def _file(self, shard: int) -> str:
        return f"{self.root}/{self.path}/c/{shard}" + "/0" * len(self.frame)


class _Foreign:
    """An array of any other layout.

    By the spec a chunk that is not there has the fill value; a file that is lost looks the same,
    so that one is an error here.
    """

    def __init__(self, root: Path, path: str) -> None:
        self.root, self.path = root, path
        array = self._open()
        self.frame, self.dtype, self.count = array.shape[1:], array.dtype, array.shape[0]
        self._grid = array.shards or array.chunks
        self.slots = self._grid[0]

    def _open(self) -> Any:
        import zarr

        self._pid, self._array = os.getpid(), zarr.open_array(self.root / self.path, mode="r")
        return self._array

    def read(self, slot: int, out: NDArray[Any]) -> None:
        _fits(out, self.frame, self.dtype)
        try:
            slot = _inside(slot, self.count)
            # its threads survive no fork
            array = self._array if self._pid == os.getpid() else self._open()
            pieces = zip(self.frame, self._grid[1:], strict=True)
            for place in itertools.product(*(range(-(-have // of)) for have, of in pieces)):
                key = array.metadata.encode_chunk_key((slot // self.slots, *place))
                (self.root / self.path / key).stat()
            out[...] = array[slot]
        except (OSError, ValueError, RuntimeError, IndexError, TypeError) as error:
            raise _failure(self.root, self.path, slot, error) from None

    def will_need(self, shard: int) -> None:
        return


def _fits(out: NDArray[Any], frame: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if out.shape != frame or out.dtype != dtype:
        raise ValueError(f"memory of {out.shape} {out.dtype}, expected {frame} {dtype}")
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("memory that is not C-contiguous or not writeable")


def _inside(slot: int, count: int) -> int:
    slot = operator.index(slot)
    if not 0 <= slot < count:
        raise IndexError(f"the array has slots 0 to {count - 1}")
    return slot


def _failure(root: Path, path: str, slot: int | None, error: Exception) -> ShardError:
    place = path if slot is None else f"{path} slot {slot}"
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, FileNotFoundError):
        why = "its file is missing"
    return ShardError(f"shards {root}: {place} cannot be read ({why}); {_ADVICE}")
