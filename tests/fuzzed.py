"""Damaged files through the real `Sandbox`: what became of each, and what it cost."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from medpsp.dicom.container import walk_objects
from medpsp.dicom.names import NameRule
from medpsp.dicom.sandbox import Sandbox
from medpsp.errors import SourceError
from medpsp.types import Place, ReadPolicy
from tests.labelled import series
from tests.mutate import Source, damaged

KEEP = ReadPolicy(burned_in="keep", non_volumes="keep")
RULE = NameRule(classes=("background", "liver"))
LABELS = ("seg", "rtstruct", "nifti")
TICK = 1 / os.sysconf("SC_CLK_TCK")
SUFFIXES = {"mask.nii": ".nii", "mask.nii.gz": ".nii.gz", "png": ".png"}


@dataclass
class Tally:
    """What a run found; a death is a child that ended during a call."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    escapes: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: str = ""
    peak_mib: float = 0.0
    largest: str = ""

    def add(self, other: Tally) -> None:
        self.inputs += other.inputs
        self.outcomes += other.outcomes
        self.escapes += other.escapes
        self.deaths += other.deaths
        if other.seconds > self.seconds:
            self.seconds, self.slowest = other.seconds, other.slowest
        if other.peak_mib > self.peak_mib:
            self.peak_mib, self.largest = other.peak_mib, other.largest


def outcome(box: Sandbox, kind: str, path: Path) -> str:
    """What the reader makes of a file: ``read``, or the reason code."""
    place = Place(str(path))
    try:
        if kind == "archive":
            return _outcomes_within(box, path.parent)
        if kind == "image":
            box.image(place)
            box.mask(place, (5, 6), {}, 2)
        elif kind in LABELS:
            _labels(box, kind, place)
        else:
            refs = box.headers(place, "id", KEEP)
            for ref in {refs[0].frame: refs[0], refs[-1].frame: refs[-1]}.values():
                box.frame(ref)
    except SourceError as error:
        return error.code
    return "read"


def _outcomes_within(box: Sandbox, folder: Path) -> str:
    """The worst of what a container holds, by the alphabet; every member has an outcome."""
    codes = []
    for found in walk_objects(folder):
        code = found.code
        if not code:
            try:
                box.frame(box.headers(found.place, "id", KEEP)[0])
            except SourceError as error:
                code = error.code
        codes.append(code or "read")
    return min(codes)


def _labels(box: Sandbox, kind: str, place: Place) -> None:
    if kind != "nifti":
        try:
            box.headers(place, "id", KEEP)
        except SourceError as error:
            if error.code != "LABEL_OBJECT":
                raise
        box.label_target(place)
    whole = replace(series(), masks=(place,), mask_kind=kind)
    box.labels(whole, RULE, "affine", "nearest")


def child_of(box: Sandbox) -> int:
    """The pid of a child that lives; started if need be."""
    with suppress(SourceError):
        box.headers(Place(os.devnull), "", KEEP)
    assert box._child
    return box._child.pid


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mib(pid: int) -> float:
    """Most resident memory since `forget_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def fuzz(found: list[Source], numbers: Iterable[int], seed: int, folder: Path) -> Tally:
    """Damage and read; input ``n`` is the same whatever the other numbers are."""
    tally = Tally()
    folder.mkdir(parents=True, exist_ok=True)
    with Sandbox(seconds=10) as box:
        for n in numbers:
            rng = Random(f"{seed} {n}")
            source = found[n % len(found)]
            data = damaged(source, rng.choice(found), rng)
            path = folder / f"{n}{SUFFIXES.get(source.name, '')}"
            path.write_bytes(data)
            _one(box, source, path, f"{n} {source.name}", tally)
            path.unlink()
    return tally


def _one(box: Sandbox, source: Source, path: Path, name: str, tally: Tally) -> None:
    child = child_of(box)
    forget_peak(child)
    before, own, reaped = cpu_seconds(child), time.process_time(), _reaped()
    tally.inputs += 1
    try:
        tally.outcomes[outcome(box, source.kind, path)] += 1
    except Exception as error:  # what may never happen  # noqa: BLE001
        tally.escapes.append(f"{name}: {error!r}")
    used = time.process_time() - own - before
    if box._child and box._child.pid == child and box._child.poll() is None:
        used += cpu_seconds(child)
        peak = peak_mib(child)
        if peak > tally.peak_mib:
            tally.peak_mib, tally.largest = peak, name
    else:
        tally.deaths.append(name)
        box.close()
        used += _reaped() - reaped
    if used > tally.seconds:
        tally.seconds, tally.slowest = used, name


def _reaped() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
