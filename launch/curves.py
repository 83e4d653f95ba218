"""The curves of a training run, out of the event files that it wrote for TensorBoard."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

Points = list[tuple[int, float]]
"""Steps that are done, counted from 1, and the value then."""

RANKS = "perf/ranks"


class Start(NamedTuple):
    """One process that trained: seconds from its first event to its last one, and its ranks."""

    seconds: float
    ranks: int


class Curves(NamedTuple):
    """All scalars by tag, and a row for each start of the training that is there."""

    points: dict[str, Points]
    starts: tuple[Start, ...]

    def of(self, tag: str) -> Points:
        """Points of a tag; none where it was never written."""
        return self.points.get(tag, [])

    @property
    def last(self) -> int:
        """Highest step with a loss; 0 for none."""
        return max((step for step, _ in self.of("train/loss")), default=0)


def read_curves(folder: Path, ranks: int) -> Curves:
    """Read every event file of a run, in the order in which they were begun.

    A process that goes on from a checkpoint says from which step on it replaces what is there, as
    TensorBoard understands it. A file that is cut short or damaged ends there, also as TensorBoard
    has it. Their names hold that of the machine: none is in an error.

    Args:
        folder: Of the events.
        ranks: As many as a start had that does not say so.

    Raises:
        OSError: Not readable.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: dict[str, Points] = defaultdict(list)
    starts: list[Start] = []
    try:
        for path in sorted(folder.glob("events.out.tfevents.*")):
            times, told = [], ranks
            for event in LegacyEventFileLoader(str(path)).Load():
                times.append(event.wall_time)
                if event.HasField("session_log"):
                    if event.step <= 1:  # from the first step on: another training
                        starts.clear()
                    for tag, known in points.items():
                        points[tag] = [point for point in known if point[0] < event.step]
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        points[value.tag].append((event.step, value.simple_value))
                        told = int(value.simple_value) if value.tag == RANKS else told
            if times:
                starts.append(Start(max(times) - min(times), told))
    except DecodeError:
        raise OSError("an event file holds something else") from None
    return Curves(dict(points), tuple(starts))
