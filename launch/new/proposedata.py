"""The `data` section of a proposal: each function looks at the evidence and gives lines of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launch.new.choices import Choice, Evidence, Line, Open
from launch.new.facts import Kind
from launch.new.proposelabels import label_lines
from launch.new.proposewindow import window_lines
from launch.new.shares import FEW, chance_of_none, shares_of
from medpsp.dataconfig import DataConfig
from medpsp.dicom.codes import code_of
from medpsp.words import listed, many
from shards.preflight import WORKER_MIB

LARGE = 100_000
"""Objects from which on a second scan is worth an index."""
_RARE_COLOUR = 0.1
_MOST_REFUSED = 0.3
_WORKERS = 32


def data_lines(found: Evidence) -> Iterator[Line]:
    """Everything of the section, in any order."""
    yield Choice("data.archive", str(found.places.archive), _looked_at(found))
    yield from label_lines(found)
    yield _modalities(found)
    yield from _colour(found)
    yield from _burned_in(found)
    yield from _rejects(found)
    yield from window_lines(found)
    yield from _split(found)
    yield from _means(found)


def _looked_at(found: Evidence) -> str:
    what = "objects of the index" if found.places.index else "files"
    how = "" if found.whole else ", a sample: what is rare may be missing below"
    kinds = [
        f"{many(kind.slices, f'{name} slice')} of {many(kind.patients, 'patient')}"
        for name, kind in found.kinds.items()
    ]
    skipped = found.codes["MODALITY_SKIPPED"]
    rest = f" The index knows {skipped} of other modalities, and not which." if skipped else ""
    seen = f"{found.read} of {found.met} {what} were looked at{how}"
    return f"As given. {seen}: {listed(kinds)}.{rest}"


def _modalities(found: Evidence) -> Choice:
    names = sorted(found.kept)
    why = f"{listed(names)}: " + ("labelled." if found.labels.kind else "what there is most of.")
    if len(names) > 1:
        why += " One network for all; a single one here makes a network for that alone."
    reasons: dict[str, list[str]] = {}
    for name, reason in found.left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, some in reasons.items():
        why += f" Without {listed(some)}: {reason}."
    return Choice("data.modalities", names, why)


def _colour(found: Evidence) -> Iterator[Line]:
    used = found.used
    if not used.colour:
        return
    often = (
        f"Of {used.looked} images looked at that are stored in colour {used.coloured} show colours"
    )
    if not used.looked:
        yield Open(
            "data",
            f"{used.colour:.0%} of the slices are stored in colour, but none of those looked at "
            "could be decoded: decide between data.colour=grey and model.in_channels=3.",
        )
    elif not used.coloured:
        yield Choice("data.colour", "grey", f"{often}: the brightness says all, in a third of it.")
    elif used.colour < _RARE_COLOUR:
        yield Choice("data.colour", "grey", f"Only {used.colour:.0%} of the slices are in colour.")
    else:
        yield Choice("model.in_channels", 3, f"{often}.")


def _burned_in(found: Evidence) -> Iterator[Line]:
    kind = found.kept.get("US")
    if kind and kind.suspected and kind.blankable:
        yield Choice(
            "data.burned_in",
            "blank",
            f"Ultrasound shows names beside its picture. {kind.blankable} of {kind.asked} looked "
            "at say where the picture is: all else is blanked. Those that do not are quarantined.",
        )
    for name, other in found.kept.items():
        if other.suspected and not (name == "US" and other.blankable):
            yield Open(
                "data",
                f"{other.suspected:.0%} of the {name} slices may show a name, and nothing says "
                "where: they are quarantined. Look at them; data.burned_in=keep if they are clean.",
            )


def refused_share(found: Evidence) -> float:
    """Share of the objects of which the headers say that they will be quarantined."""
    bad = sum(n for code, n in found.codes.items() if code_of(code).status == "quarantined")
    suspects = found.objects * suspects_left(found.used, found.kept)
    return (bad + suspects) / max(1, bad + found.objects)


def suspects_left(used: Kind, kept: dict[str, Kind]) -> float:
    """Share of the slices that stay quarantined as they may show a name."""
    total = 0.0
    for name, kind in kept.items():
        saved = kind.blankable / kind.asked if name == "US" and kind.asked else 0.0
        total += kind.slices * kind.suspected * (1 - saved)
    return total / used.slices


def _rejects(found: Evidence) -> Iterator[Line]:
    share, suspects = refused_share(found), suspects_left(found.used, found.kept)
    if share <= 0.05:
        return
    codes = {c: n for c, n in found.codes.items() if code_of(c).status == "quarantined"}
    said = [f"{codes[code]} {code}" for code in sorted(codes)]
    said += ["PHI_BURNED_IN as above"] if suspects else []
    what = f"{share:.1%} of the objects are quarantined by their headers ({', '.join(said)})"
    if share - suspects > _MOST_REFUSED or share >= 1:
        yield Open(
            "data",
            f"{what}: `medpsp shards` stops at 5 %. Find out why (docs/codes.md) before "
            "data.max_reject_fraction is raised.",
        )
        return
    yield Choice(
        "data.max_reject_fraction",
        min(1.0, math.ceil(share * 100 + 1) / 100),
        f"{what}, above the usual 5 %. Look into the report, mend what can be, and lower it.",
    )


def _split(found: Evidence) -> Iterator[Line]:
    count = len(found.patients)
    if not found.whole or not found.labels.complete:
        text = f"At least {count} patients, not all were looked at: the usual shares."
        yield Choice("data.split", {"val": 0.2, "test": 0.2}, text)
        return
    if count == 1:
        yield Open(
            "data",
            "There is one patient: training and validation need one each, so `medpsp shards` will "
            "refuse. Add patients.",
        )
        return
    shares = shares_of(found.patients)
    if shares.counts:
        train, val, test = shares.counts
        why = (
            f"With the key: val {val}, test {test} of {count} patients, {train} for training. "
            "Shares are compared with the keyed hash of each patient: they need not be the "
            "fractions that come out."
        )
    elif count < FEW:
        none = chance_of_none(shares.val, count)
        why = f"{count} patients, and the key decides who is where: {none:.0%} of the keys leave "
        why += "validation empty, which `medpsp shards` refuses."
        yield Open(
            "data",
            "data.split: the key is not there yet. Make it, delete this file, run `medpsp new` "
            f"again: the shares then fit the {count} patients.",
        )
    else:
        why = f"{count} patients: enough for each side with almost any key."
    if count < FEW:
        why += " So few patients make scores that say little: look at the intervals."
    yield Choice("data.split", {"val": shares.val, "test": shares.test}, why)


def _means(found: Evidence) -> Iterator[Line]:
    places, machine = found.places, found.machine
    if places.key:
        yield Choice("data.key_file", str(places.key), "Made by `medpsp key new`, once; keep it.")
    usual = DataConfig.model_fields["decode_memory_mib"].default
    each = (usual + WORKER_MIB) / 1024
    workers = max(1, min(machine.cores, int(machine.memory_gib / each), _WORKERS))
    yield Choice(
        "data.workers",
        workers,
        f"This machine has {many(machine.cores, 'core')} and {machine.memory_gib:.0f} GiB; each "
        f"may take {each:.1f}.",
    )
    if places.index:
        yield Choice("data.index", str(places.index), "What was looked at; later runs go on in it.")
    elif found.met >= LARGE:
        index = f"runs/{places.file.stem}-index"
        yield Choice(
            "data.index", index, "So large that later scans should read only what is new. Private."
        )
