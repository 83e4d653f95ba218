"""The lines of a proposal that say what the labels are."""

from __future__ import annotations

from collections.abc import Iterator

from launch.new.choices import Choice, Evidence, Line, Open
from launch.new.labelfacts import BACKGROUND, TITLES, Labels, codes_of, names_hidden
from medpsp.dicom.codes import told_codes
from medpsp.words import listed, many


def label_lines(found: Evidence) -> Iterator[Line]:
    """Where labels are, which classes they hold, and what is wrong with them."""
    labels = found.labels
    if not labels.kind:
        yield from _no_labels(labels)
        return
    if labels.folder:
        where = "They lie in the archive." if labels.folder == found.places.archive else "As given."
        yield Choice("data.labels", str(labels.folder), where)
    often = f"{labels.files - labels.unmatched} of {many(labels.files, TITLES[labels.kind])}"
    who = many(max(kind.patients for kind in found.kept.values()), "patient")
    beside = f" Not used: {listed(labels.beside)}." if labels.beside else ""
    none = sum(found.kinds[n].series - kind.series for n, kind in found.kept.items())
    bare = f" {many(none, 'series')} have none and are left out." if none else ""
    rest = f" Not the others: {told_codes(labels.codes)}." if labels.codes else ""
    why = f"Series are there for {often}, of {who}.{rest}{bare}{beside}"
    yield Choice("data.label_format", labels.kind, why)
    if labels.kind == "nifti":
        also = "".join(f" {other} would find others." for other in labels.others)
        one = " A series takes one mask: unite them if both hold classes." if also else ""
        yield Choice("data.label_pattern", labels.pattern, f"It finds {often}.{also}{one}")
    yield from _classes(labels)
    yield from _tried(labels)


def _no_labels(labels: Labels) -> Iterator[Line]:
    yield Choice(
        "data.classes", [BACKGROUND, "structure_1"], "A stand-in: at least two are needed."
    )
    why = f"Labels: {labels.fault}." if labels.fault else "Labels: none found."
    yield Open(
        "data",
        f"{why} Without any, `medpsp shards` converts the images and nothing can be trained. Give "
        "the folder of DICOM SEG, RTSTRUCT or NIfTI masks with --labels, or set data.label_format, "
        "data.labels, data.label_pattern, data.label_names and data.classes by hand.",
    )


def _classes(labels: Labels) -> Iterator[Line]:
    found = labels.found
    if labels.named:
        why = "Names in the labels that at least half of the patients have."
        if found.merged:
            why += f" {listed(found.merged)}: names that differ by the modality they were drawn on."
        if labels.overlap:
            why += " From large to small: where they overlap the later one wins."
    else:
        why = "From the values in the masks; the names are ours, put the real ones in their places."
    yield Choice("data.classes", list(labels.classes), why)
    if labels.spelt:
        yield Choice("data.label_names", labels.spelt, "How names are spelt; case is ignored.")
    if labels.numbers:
        yield Choice("data.label_map", labels.numbers, "Values of the masks to places in classes.")
    if labels.rare_values:
        yield Open(
            "data",
            f"One mask alone of those tried holds {listed([str(v) for v in labels.rare_values])}: "
            "no class is made of it, and such a mask is quarantined. A class? Add it to "
            "data.classes and data.label_map.",
        )
    if found.rare:
        rare = listed([f"{name} ({count})" for name, count in found.rare.items()])
        yield Open(
            "data",
            f"Left out, in fewer than half of the patients with labels: {rare}. Where they were "
            "not drawn they would count as background; add those that were looked for in all.",
        )
    if found.hidden:
        yield Open(
            "data",
            f"{names_hidden(found.hidden)}. Add what is a class to data.label_names.",
        )


def _tried(labels: Labels) -> Iterator[Line]:
    tried, bad = labels.tried, [one for one in labels.tried if one.code]
    if labels.overlap:
        count = sum(one.overlap for one in tried)
        yield Choice(
            "data.label_overlap",
            "priority",
            f"In {count} of {len(tried)} series tried two classes lie on one voxel; they would be "
            "quarantined.",
        )
    if bad:
        yield Open(
            "data",
            f"Of {len(tried)} series tried the masks of {len(bad)} cannot be laid on: "
            f"{codes_of(tried)} (docs/codes.md). Their slices are quarantined; look at them before "
            "data.max_reject_fraction is raised.",
        )
