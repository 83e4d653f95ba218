"""What `check` finds, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["damaged", "missing", "surplus", "partial", "rows", "label", "leak", "copy"]

BEYOND = frozenset({"surplus", "leak", "copy"})
"""Kinds that no conversion mends: files that are not ours, and what is so in the archive itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        kind: damaged and missing are files; surplus a file that nothing owns, partial one that was
            never finished; rows are tables and commits that disagree with each other or with the
            pixels; label is a value that is no class; leak the same patient or slice in two splits;
            copy nearly the same pictures of two patients in two splits.
        path: Relative to the root; empty for what is in no single file.
        text: What is wrong, for a person.
        shard: Name of the shard, empty where it is none.
        slot: Of the bucket; -1 where it is none.
    """

    kind: Kind
    path: str
    text: str
    shard: str = ""
    slot: int = -1

    def __str__(self) -> str:
        path = self.path.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
        place = f"{path} slot {self.slot}" if self.slot >= 0 else path
        return f"{place}: {self.text}" if place else self.text
