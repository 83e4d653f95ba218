"""One pass over the elements of an ordinary header: where they are, not what they mean.

What pydicom would read otherwise than by the letter of PS3.5 7.1 is `Unusual` here, and left to it.

Slices of a series have the same elements at nearly the same places. A walk depends on nothing but
the words that it looked at, tags, VRs and lengths: where the next file has the same words there,
its walk would be the same, so that comparing them in one go (`Shape.again`) is the walk.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

UNDEFINED = 0xFFFFFFFF
MAX_DEPTH = 16
"""Sequences in sequences; deeper ones are unusual."""
MOST_MOVES = 8
"""Elements of another length than in the file before; with more of them a walk is as fast."""

_WORD = struct.Struct("<IHH").unpack_from  # tag (its group in the low half), VR, length
_LONG = struct.Struct("<I").unpack_from
_PAIR = struct.Struct("<II").unpack_from  # tag and length where VRs are implicit


def word_of(code: str) -> int:
    """A VR as the number that its two bytes are."""
    return int.from_bytes(code.encode("ascii"), "little")


def swapped(tag: int) -> int:
    """A tag as the number that its four bytes are in a little endian file, and back."""
    return tag >> 16 | (tag & 0xFFFF) << 16


_SHORT = frozenset(word_of(vr) for vr in EXPLICIT_VR_LENGTH_16)
_EXTENDED = frozenset(word_of(vr) for vr in EXPLICIT_VR_LENGTH_32)
_SQ = word_of("SQ")
_ITEM, _ITEM_END, _SEQUENCE_END = (swapped(t) for t in (0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD))
_CHARSET = swapped(0x00080005)


class Unusual(Exception):
    """pydicom is to read this object."""


class Field(NamedTuple):
    """A wanted element; ``vr`` is empty where VRs are implicit.

    ``word`` is the index of its word among those looked at.
    """

    tag: int
    vr: str
    word: int


class Walk:
    """What a walk looked at; its methods raise `Unusual`, or struct.error at the end of the data.

    Args:
        data: The file from its start.
        wanted: Tags, `swapped`, to keep; False for those whose presence is unusual.
    """

    def __init__(self, data: bytes, wanted: Mapping[int, bool]) -> None:
        self.data, self.wanted = data, wanted
        self.looked: list[int] = []
        self.bits: list[int] = []
        self.fields: list[Field] = []

    def look(self, at: int) -> None:
        """Note a word that must be the same in the next file; see `Shape.bits` for others."""
        self.looked.append(at)
        self.bits.append(0)

    def meta(self, at: int) -> int:
        """Group 0002, always explicit (PS3.10 7.1); the place of the data set behind it."""
        while True:
            tag, vr, length = _WORD(self.data, at)
            if tag & 0xFFFF != 2:
                return at
            self.look(at)
            if vr in _SHORT:
                self.bits[-1] = 48
                if tag in self.wanted:
                    self._keep(tag, vr.to_bytes(2, "little").decode(), length)
                at += 8 + length
            else:
                at = self._behind_extended(at, vr, 0)

    def data_set(self, at: int, implicit: bool) -> int:
        """The place of the first element of group 7FE0 or above."""
        return self._implicit(at) if implicit else self._explicit(at)

    def _keep(self, tag: int, vr: str, length: int) -> None:
        if length == UNDEFINED or not self.wanted[tag]:
            raise Unusual
        self.fields.append(Field(swapped(tag), vr, len(self.looked) - 1))

    def _explicit(self, at: int) -> int:
        data, wanted, looked, bits = self.data, self.wanted, self.looked, self.bits
        while True:
            tag, vr, length = _WORD(data, at)
            if tag & 0xFFFF > 0x7FDF:
                return at
            looked.append(at)
            if vr in _SHORT:
                bits.append(48)
                if tag in wanted:
                    self._keep(tag, vr.to_bytes(2, "little").decode(), length)
                at += 8 + length
                continue
            bits.append(0)
            if tag in wanted:  # none of the wanted has another VR
                raise Unusual
            at = self._behind_extended(at, vr, 0)

    def _behind_extended(self, at: int, vr: int, depth: int) -> int:
        if vr not in _EXTENDED:
            raise Unusual
        self.look(at + 4)
        (length,) = _LONG(self.data, at + 8)
        if length != UNDEFINED:
            return int(at + 12 + length)
        if vr != _SQ:
            raise Unusual
        return self._behind_items(at + 12, False, depth)

    def _implicit(self, at: int) -> int:
        data, wanted, looked, bits = self.data, self.wanted, self.looked, self.bits
        while True:
            tag, length = _PAIR(data, at)
            if tag & 0xFFFF > 0x7FDF:
                return at
            looked.append(at)
            bits.append(0 if length == UNDEFINED else 32)
            if tag in wanted:
                self._keep(tag, "", length)
            if length == UNDEFINED:
                at = self._behind_items(self._implicit_sequence(tag, at), True, 0)
            else:
                at += 8 + length

    def _implicit_sequence(self, tag: int, at: int) -> int:
        """Where the items of an element of undefined length begin: only a sequence has them."""
        try:
            vr = dictionary_VR(swapped(tag))
        except KeyError:  # private: the first item tells
            vr = "SQ" if _LONG(self.data, at + 8)[0] == _ITEM else ""
        if vr != "SQ":
            raise Unusual
        return at + 8

    def _behind_items(self, at: int, implicit: bool, depth: int) -> int:
        """Behind a sequence of undefined length (PS3.5 7.5)."""
        if depth > MAX_DEPTH:
            raise Unusual
        while True:
            tag, length = _PAIR(self.data, at)
            self.look(at)
            at += 8
            if tag == _SEQUENCE_END and length == 0:
                return at
            if tag != _ITEM:
                raise Unusual
            end = None if length == UNDEFINED else at + length
            at = self._behind_item(at, end, implicit, depth)

    def _behind_item(self, at: int, end: int | None, implicit: bool, depth: int) -> int:
        while end is None or at < end:
            tag, length = _PAIR(self.data, at)
            self.look(at)
            if tag == _ITEM_END and end is None and length == 0:
                return at + 8
            if tag & 0xFFFF == 0xFFFE or tag == _CHARSET:
                raise Unusual
            at = self._behind_element(at, implicit, depth)
        if at != end:
            raise Unusual
        return at

    def _behind_element(self, at: int, implicit: bool, depth: int) -> int:
        """Behind an element of an item, whose word was looked at."""
        if implicit:
            tag, length = _PAIR(self.data, at)
            if length != UNDEFINED:
                return int(at + 8 + length)
            return self._behind_items(self._implicit_sequence(tag, at), True, depth + 1)
        _, vr, length = _WORD(self.data, at)
        if vr in _SHORT:
            return int(at + 8 + length)
        return self._behind_extended(at, vr, depth + 1)


class Shape(NamedTuple):
    """Where the elements of one file are, and of others like it.

    Attributes:
        at: (L,) int64 places of the words that were looked at, the pixel element's last.
        words: (L,) uint64, what stands there.
        bits: Of each word, the bit where a length starts that may differ; 0 for none.
        fields: (F,) index of the words of the wanted elements; the next word is behind them.
        known: Whatever the caller keeps for files of this shape.
    """

    at: NDArray[np.int64]
    words: NDArray[np.uint64]
    bits: tuple[int, ...]
    fields: NDArray[np.int64]
    known: Any

    def values(self, data: bytes) -> list[bytes]:
        """The raw values of the wanted elements."""
        starts, ends = self.at[self.fields].tolist(), self.at[self.fields + 1].tolist()
        return [data[a + 8 : b] for a, b in zip(starts, ends, strict=True)]

    def again(self, data: bytes) -> Shape | None:
        """The shape of another file, or None where only a walk can tell.

        A flexible word with the same tag and VR and another length moves all that follow.
        """
        view = words_of(data)
        at, words, begin = self.at, self.words, 0
        for moves in range(MOST_MOVES + 1):
            if at[-1] >= len(view):
                return None
            same = view[at[begin:]] == words[begin:]
            k = begin + int(same.argmin())
            if same[k - begin]:
                return self if at is self.at else self._replace(at=at, words=words)
            old, new, bits = int(words[k]), int(view[at[k]]), self.bits[k]
            if not bits or (old ^ new) & ((1 << bits) - 1) or new >> bits == UNDEFINED:
                return None
            if moves == 0:
                at, words = at.copy(), words.copy()
            at[k + 1 :] += (new >> bits) - (old >> bits)
            words[k] = new
            begin = k + 1
        return None


def words_of(data: bytes) -> NDArray[np.uint64]:
    """The eight bytes from every place on, as numbers; nothing is copied."""
    return np.ndarray((max(0, len(data) - 7),), np.dtype("<u8"), data, strides=(1,))


def shape_of(walk: Walk, known: Any) -> Shape:
    """The shape of a file that was walked to its pixels."""
    at = np.array(walk.looked, dtype=np.int64)
    return Shape(
        at=at,
        words=words_of(walk.data)[at],
        bits=tuple(walk.bits),
        fields=np.array([field.word for field in walk.fields], dtype=np.int64),
        known=known,
    )
