"""What a proposal is: values with reasons, and what it is made from. Pure values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.new.facts import Kind
from launch.new.labelfacts import Labels
from launch.new.machine import Machine


class Choice(NamedTuple):
    """A value of the configuration and why it is that.

    Attributes:
        key: With dots.
        value: One that is the default is not written; its reason is.
        why: A sentence or two.
    """

    key: str
    value: Any
    why: str


class Open(NamedTuple):
    """What could not be decided, and what to do: a comment of a section, and a line for people."""

    section: str
    text: str


Line = Choice | Open


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Paths of the proposal.

    Attributes:
        file: The configuration to be written.
        key: For `data.key_file`; None where the environment has the key.
        index: That was looked at in place of the archive, if any.
    """

    archive: Path
    file: Path
    key: Path | None = None
    index: Path | None = None


class Pace(NamedTuple):
    """Of training on this machine: seconds a step, and how they are known."""

    seconds: float
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known.

    Attributes:
        met, read: Files, or objects of an index: how many there are, and were looked at.
        kinds: Of all images, by modality.
        kept: Modalities to be used, and figures of their series, with masks where there are labels.
        used: Figures of all of these together.
        left: Modality to the reason why it is left out.
        labels: What was found.
        patients: Of the series to be used, their places in the split (0 to 1) where a key is
            there, else as many Nones.
        codes: Of objects in no series.
        objects: With a slice in the series to be used.
        machine: To train on.
        pace: Of the network that all this asks for; None where it is not known.
    """

    places: Places
    met: int
    read: int
    kinds: dict[str, Kind]
    kept: dict[str, Kind]
    used: Kind
    left: dict[str, str]
    labels: Labels
    patients: Sequence[float | None]
    codes: Counter[str]
    objects: int
    machine: Machine
    pace: Pace | None = None

    @property
    def whole(self) -> bool:
        """Whether all of the archive was looked at."""
        return self.met == self.read
