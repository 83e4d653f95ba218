"""Where the partitions of a catalogue lie: a private folder, or a file without a name.

A list says which partitions count. It is replaced by rename after they are durable, and what it
does not name is swept away, so whatever ends the process leaves a whole catalogue behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from medpsp.errors import ShardError
from shards.index import write_bytes_durably
from shards.partition import Part, sha256
from shards.sealed import read_sealed, sealed_bytes

log = logging.getLogger("medpsp")
LIST = "catalog.json"
_LOCK = ".lock"
_OURS = re.compile(r"[0-9a-f]{64}\.parquet|\..*\.partial")
_DAMAGED = "catalogue: a partition is not what was written; run again"


class PartStore(Protocol):
    """Partitions by name."""

    def parts(self) -> list[Part]:
        """Those that count, in the order of the walk."""

    def put(self, part: Part, data: pa.Buffer) -> None:
        """Add one; it counts with the next `commit`."""

    def get(self, part: Part) -> pa.Buffer:
        """The bytes of one; ShardError where they are not what was put."""

    def commit(self, parts: Sequence[Part]) -> None:
        """Let these count, and forget all others."""


class FolderStore:
    """Partitions in a folder of their own, one file each.

    Args:
        folder: Made with mode 0700.
        identity: What must be equal for partitions to be of use.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity
        self._there: set[str] = set()
        self._damaged: set[str] = set()

    def parts(self) -> list[Part]:
        """Those that count, in the order of the walk; none of another identity.

        Raises:
            ShardError: There can be no such folder.
        """
        with _saying():
            private_folder(self._folder)
            found = self._listed()
            self._there = {self._path(part).name for part in found}
            for path in self._folder.iterdir():
                if _OURS.fullmatch(path.name) and path.name not in self._there:
                    path.unlink()
        return found

    def put(self, part: Part, data: pa.Buffer) -> None:
        """Add one, durably.

        Raises:
            ShardError: It cannot be written.
        """
        if self._path(part).name not in self._there - self._damaged:
            with _saying():
                write_bytes_durably(self._path(part), data, mode=0o600)

    def get(self, part: Part) -> pa.Buffer:
        """The bytes of one.

        Raises:
            ShardError: They are not what was written.
        """
        path = self._path(part)
        try:
            data = path.read_bytes()
        except OSError as error:
            self._damaged.add(path.name)
            raise ShardError(f"catalogue: cannot be read ({type(error).__name__})") from None
        if sha256(data) != part.name:
            self._damaged.add(path.name)
            raise ShardError(_DAMAGED)
        return pa.py_buffer(data)

    def commit(self, parts: Sequence[Part]) -> None:
        """Let these count, and delete all others.

        Raises:
            ShardError: The list cannot be written.
        """
        tree = {"identity": self._identity, "parts": parts}
        with _saying():
            write_bytes_durably(self._folder / LIST, sealed_bytes(tree), mode=0o600)
            named = {self._path(part).name for part in parts}
            for name in self._there - named:
                (self._folder / name).unlink(missing_ok=True)
        self._there = named

    def known(self) -> list[Part]:
        """Those that count, of whatever identity, for who only reads; nothing is swept.

        Raises:
            ShardError: Their list is damaged.
        """
        try:
            return [Part(*row) for row in read_sealed(self._folder / LIST)["parts"]]
        except FileNotFoundError:
            return []
        except (ShardError, KeyError, TypeError, ValueError):
            raise ShardError("catalogue: its list is damaged; run `medpsp shards` again") from None

    def _listed(self) -> list[Part]:
        try:
            tree = read_sealed(self._folder / LIST)
            if tree["identity"] != self._identity:
                log.info("catalogue: of another archive, policy or version; made anew")
                return []
            return [Part(*row) for row in tree["parts"]]
        except FileNotFoundError:
            return []
        except (ShardError, KeyError, TypeError, ValueError):
            log.warning("catalogue: its list is damaged; all files are read again")
            return []

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.name}.parquet"


class NamelessStore:
    """Partitions in a file without a name: whatever ends this process, nothing is left."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._spans: dict[str, tuple[int, int]] = {}

    def parts(self) -> list[Part]:
        """None: every scan begins anew."""
        return []

    def put(self, part: Part, data: pa.Buffer) -> None:
        """Add one.

        Raises:
            ShardError: It cannot be written.
        """
        with _saying():
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        self._spans[part.name] = start, len(memoryview(data))

    def get(self, part: Part) -> pa.Buffer:
        """The bytes of one.

        Raises:
            ShardError: They are not what was written.
        """
        start, size = self._spans[part.name]
        data = os.pread(self._file.fileno(), size, start)
        if sha256(data) != part.name:
            raise ShardError(_DAMAGED)
        return pa.py_buffer(data)

    def commit(self, parts: Sequence[Part]) -> None:
        """Nothing: who made them knows them."""


def private_folder(folder: Path) -> None:
    """Make a folder below ``data.index``, which is made too; mode 0700 both.

    Raises:
        OSError: It cannot be made.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def locked(index: Path | None) -> Iterator[None]:
    """Keep other commands out of ``data.index``; the lock ends with the process.

    Raises:
        ShardError: Another command is at work there, or nothing can be written.
    """
    if index is None:
        yield
        return
    with _saying():
        index.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(index / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ShardError(
            "data.index: another command is at work there; wait for it, or take another folder"
        ) from None
    except OSError:  # Lustre that is mounted without flock
        log.warning("data.index: its file system has no locks; let one command work there")
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _saying() -> Iterator[None]:
    """An OSError quotes a path; its number is enough."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else type(error).__name__
        raise ShardError(f"data.index: cannot be written ({why})") from None
