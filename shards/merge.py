"""A walk and the partitions of a catalogue as two sorted streams: what stays, what is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from medpsp.dicom.walk import Entry, order_key
from shards.partition import Files, Part

FILES_AT_ONCE = 256
"""Files of one request to a child."""


class Piece(NamedTuple):
    """A step of a merge; pieces come in the order of the walk.

    Attributes:
        part: The partition that the rows of this step replace; None behind the last one.
        keep: First row and end of what stays of it, or None.
        entries: To be read.
        past: Nothing of the partition comes after this.
        last: Nothing that goes into its range comes after this.
        unchanged: The partition stays as it is, and nothing else goes into its range.
    """

    part: Part | None
    keep: tuple[int, int] | None = None
    entries: Sequence[Entry] = ()
    past: bool = False
    last: bool = False
    unchanged: bool = False


class _Walk:
    """A walk that can be looked into."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries = entries
        self.take()

    def take(self) -> None:
        self.entry = next(self._entries, None)
        self.key = order_key(self.entry.name) if self.entry else ""

    def within(self, bound: str | None) -> Entry | None:
        """The next entry, if it does not lie beyond a bound."""
        return self.entry if bound is None or self.key <= bound else None


def merged(
    entries: Iterator[Entry], parts: Sequence[Part], files_of: Callable[[Part], Files], full: int
) -> Iterator[Piece]:
    """Compare a walk with what is known.

    Args:
        entries: Of the walk.
        parts: In its order.
        files_of: Of a partition; none of one that is damaged.
        full: Rows from which on the last partition takes no more files behind its last.
    """
    walk = _Walk(entries)
    for part in parts:
        opened = part is parts[-1] and part.rows < full
        bound = None if opened else order_key(part.last)
        yield from _Group(part, files_of(part)).pieces(walk, bound)
    if walk.entry:
        yield from _Group(None, Files()).pieces(walk, None)


class _Group:
    """The walk within the range of one partition."""

    def __init__(self, part: Part | None, files: Files) -> None:
        self._part, self._files = part, files
        self._next = 0
        self._kept: tuple[int, int] | None = None
        self._fresh: list[Entry] = []
        self._silent = True

    def pieces(self, walk: _Walk, bound: str | None) -> Iterator[Piece]:
        while entry := walk.within(bound):
            if self._known(entry, walk.key):
                yield from self._keep()
            else:
                if self._kept:
                    yield self._flush()
                self._fresh.append(entry)
                if len(self._fresh) >= FILES_AT_ONCE:
                    yield self._flush()
            walk.take()
        whole = (0, self._part.rows) if self._part else None
        if self._silent and not self._fresh and self._kept == whole and whole:
            yield Piece(self._part, past=True, last=True, unchanged=True)
            return
        self._next = len(self._files.keys)
        yield self._flush(last=True)

    def _known(self, entry: Entry, key: str) -> bool:
        """Whether the partition has this file; those before it are gone."""
        keys = self._files.keys
        while self._next < len(keys) and keys[self._next] < key:
            self._next += 1
        if self._next == len(keys) or keys[self._next] != key:
            return False
        self._next += 1
        return self._files.same(self._next - 1, entry)

    def _keep(self) -> Iterator[Piece]:
        start, stop = self._files.starts[self._next - 1 : self._next + 1]
        if self._kept and self._kept[1] == start:
            self._kept = self._kept[0], stop
            return
        if self._kept or self._fresh:
            yield self._flush()
        self._kept = start, stop

    def _flush(self, *, last: bool = False) -> Piece:
        piece = Piece(
            self._part, self._kept, self._fresh, self._next == len(self._files.keys), last
        )
        self._kept, self._fresh, self._silent = None, [], False
        return piece
