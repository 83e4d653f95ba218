"""Slices back from disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from medpsp.errors import ShardError


class ShardReader:
    """Reads single slices; arrays are opened on first use in each process.

    zarr keeps threads, which do not survive a fork: after one the arrays are opened anew.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pid = -1
        self._arrays: dict[str, Any] = {}

    def read(self, bucket: str, slot: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Image (H, W) in modality values or (H, W, 3) RGB, and label (H, W) in class indices.

        Raises:
            ShardError: The slice is missing or its CRC32C does not match.
        """
        return self._one(f"{bucket}/image", slot), self._one(f"{bucket}/label", slot)

    def _one(self, path: str, slot: int) -> NDArray[Any]:
        if self._pid != os.getpid():
            self._pid, self._arrays = os.getpid(), {}
        try:
            if path not in self._arrays:
                self._arrays[path] = zarr.open_array(self.root / path, mode="r")
            array = self._arrays[path]
            place = [slot // array.shards[0], *(0 for _ in array.shape[1:])]
            shard = self.root / path / "c" / "/".join(str(i) for i in place)
            if not shard.is_file():  # zarr would hand out the fill value
                raise FileNotFoundError(shard.name)
            return np.asarray(array[slot])
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise ShardError(
                f"shards {self.root}: {path} slot {slot} cannot be read "
                f"({type(error).__name__}); run `medpsp check`, delete the damaged shard and run "
                "`medpsp shards` again"
            ) from None
