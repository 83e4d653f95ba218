"""The parts of the report that are numbers: objects, remarks, splits, images, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from medpsp.dicom.codes import code_of
from medpsp.intensity import class_colour
from medpsp.types import SPLITS, STATUSES
from shards.figures import (
    Columns,
    Floats,
    Lost,
    class_shares,
    count_flags,
    count_lost,
    count_reasons,
    count_splits,
    first_of_series,
)
from shards.index import ObjectRow
from shards.page import (
    Html,
    figure,
    histogram,
    join,
    meter,
    number,
    percent,
    stacked,
    table,
    tag,
    tally,
)


def section(name: str, title: str, *content: object, css: str = "") -> Html:
    """A part of the page with its place in the list of links."""
    return tag("section", tag("h2", title), *content, id=name, css=css)


def status_of(status: str) -> Html:
    """A status with its colour."""
    return tag("span", tag("i", css=status), status, css="status")


def found_section(objects: list[ObjectRow], found: dict[str, int]) -> Html:
    """Objects by status, whose numbers add up, and why each is not kept."""
    total = sum(found.values())
    terms = (join([found[s], " ", s, " + " if s != STATUSES[-1] else " = "]) for s in STATUSES)
    reasons = count_reasons((o.status, o.code, o.detail) for o in objects)
    rows = [
        (
            join([tag("code", r.code), tag("small", _details(r.details, r.objects))]),
            status_of(r.status),
            r.objects,
            percent(r.objects / total),
            code_of(r.code).meaning,
            code_of(r.code).action,
        )
        for r in reasons
    ]
    head = ("reason", "status", "objects", "share", "what it means", "what to do")
    lost = count_lost((o.status, o.code, o.frames, o.kept) for o in objects)
    labels = sum(1 for o in objects if o.code == "LABEL_USED")
    return section(
        "found",
        "What was found",
        tag("p", "An object is a file, or a member of a zip or tar file.", css="quiet"),
        stacked([(status, found[status]) for status in STATUSES]),
        tag("p", *terms, tag("strong", total, " objects"), ": each has a row in ",
            tag("code", "objects.parquet"), ".", css="quiet"),
        tag("p", labels, " of the kept objects hold labels.", css="quiet") if labels else "",
        table(head, rows, (2, 3)) if rows else tag("p", "Nothing was left out."),
        *_lost(lost),
    )  # fmt: skip


def _details(details: tuple[tuple[str, int], ...], objects: int) -> str:
    """The commonest details; of those that are all different, one as an example."""
    said = [(text, count) for text, count in details if text]
    if not said:
        return ""
    if said[0][1] in (1, objects):
        return said[0][0] if said[0][1] == objects else f"for example: {said[0][0]}"
    return "; ".join(f"{text} ({count})" for text, count in said)


def _lost(lost: list[Lost]) -> Iterator[Html]:
    if lost:
        yield tag("p", "Objects that are kept but for some of their frames:")
        rows = [
            (tag("code", code), objects, frames, code_of(code).meaning, code_of(code).action)
            for code, objects, frames in lost
        ]
        head = ("reason", "objects", "frames lost", "what it means", "what to do")
        yield table(head, rows, (1, 2))


def flags_section(columns: Columns) -> Html:
    """What is unusual about slices that are kept."""
    total = len(columns.series)
    rows = [
        (
            tag("code", f.code),
            f.slices,
            percent(f.slices / total),
            f.series,
            code_of(f.code).meaning,
            code_of(f.code).action,
        )
        for f in count_flags(columns)
    ]
    head = ("code", "slices", "share", "series", "what it means", "what to do")
    padded = int((columns.padding > 0).sum())
    return section(
        "flags",
        "Remarks on kept slices",
        table(head, rows, (1, 2, 3)) if rows else tag("p", "None."),
        tag("p", padded, " slices hold padding, up to ", percent(float(columns.padding.max())),
            " of their pixels.", css="quiet") if padded else "",
    )  # fmt: skip


def splits_section(columns: Columns) -> Html:
    """How much is in each split."""
    sizes = count_splits(columns)
    rows = [
        (split, *size, percent(size.labelled / size.slices if size.slices else float("nan")))
        for split, size in sizes.items()
    ]
    head = ("split", "patients", "series", "slices", "labelled slices", "of its slices")
    text = "A patient is in one split only, by a keyed hash or by the split lists."
    return section(
        "splits",
        "Splits",
        tag("p", text, css="quiet"),
        table(head, rows, range(1, 6), css="narrow"),
    )


def images_section(columns: Columns) -> Html:
    """Modalities, matrices, spacings, windows, scanners."""
    first = first_of_series(columns)
    boxes = [
        figure("Matrix and pixel type, slices", tally(_buckets(columns))),
        figure("Manufacturer, slices", tally(Counter(columns.manufacturer.tolist()).items())),
        figure("Body part, slices", tally(Counter(columns.body_part.tolist()).items())),
        figure(
            "Where pixel spacing is from, slices",
            tally(Counter(columns.spacing_source.tolist()).items()),
        ),
        figure("Pixel spacing (rows), series", histogram(columns.spacing[first, 0], "mm")),
        figure("Slice distance, series", histogram(columns.spacing[first, 2], "mm")),
        figure("Slices in a series", histogram(_lengths(columns))),
    ]
    return section("images", "Images", _modalities(columns), tag("div", *boxes, css="boxes"))


def _buckets(columns: Columns) -> list[tuple[str, int]]:
    names, counts = np.unique(columns.bucket, return_counts=True)
    words = (str(name).replace("x", " × ", 1).replace("_", ", ") for name in names)
    return list(zip(words, counts.tolist(), strict=True))


def _lengths(columns: Columns) -> Floats:
    return np.unique(columns.series, return_counts=True)[1].astype(np.float64)


def _modalities(columns: Columns) -> Html:
    rows = []
    for modality in np.unique(columns.modality).tolist():
        here = columns.modality == modality
        rows.append(
            (
                modality,
                len(np.unique(columns.patient[here])),
                len(np.unique(columns.series[here])),
                int(here.sum()),
                _window(columns.window[here]),
                percent(float(np.isfinite(columns.voi_width[here]).mean())),
                ", ".join(np.unique(columns.photometric[here]).tolist()),
            )
        )
    head = (
        "modality", "patients", "series", "slices", "window shown to the network (centre / width)",
        "slices with a window in the file", "photometric",
    )  # fmt: skip
    return table(head, rows, (1, 2, 3, 5))


def _window(windows: Floats) -> str:
    distinct = np.unique(windows, axis=0)
    center, width = np.median(windows, axis=0).tolist()
    if len(distinct) == 1:
        return f"{number(center)} / {number(width)}"
    low, high = windows.min(axis=0).tolist(), windows.max(axis=0).tolist()
    return (
        f"{len(distinct)} windows, median {number(center)} / {number(width)}, centre "
        f"{number(low[0])} to {number(high[0])}, width {number(low[1])} to {number(high[1])}"
    )


def classes_section(classes: tuple[str, ...], columns: Columns) -> Html:
    """How often each class occurs, by pixels and by slices, in labelled slices of each split."""
    shares = class_shares(columns)
    here = [split for split in SPLITS if np.isfinite(shares[split][0]).any()]
    if not here:
        return section("classes", "Classes", tag("p", "No slice has a label."))
    rows = []
    for index, name in enumerate(classes):
        colour = "rgb({},{},{})".format(*class_colour(index)) if index else ""
        swatch = tag("span", css="swatch", style=f"background:{colour or 'transparent'}")
        pixels = [float(shares[split][0][index]) for split in here]
        slices = [percent(float(shares[split][1][index])) for split in here]
        bars = [meter(p, 1.0, percent(p), colour) for p in pixels]
        rows.append((join([swatch, name]), *bars, *slices))
    head = (
        "class",
        *(f"{split}, share of pixels" for split in here),
        *(f"{split}, of slices" for split in here),
    )
    ignored = float(columns.histogram[columns.labelled, -1].sum()) / float(
        columns.histogram[columns.labelled].sum()
    )
    text = f"Of the labelled slices; pixels to ignore ({percent(ignored)}) do not count."
    numbers = range(1 + len(here), 1 + 2 * len(here))
    return section("classes", "Classes", tag("p", text, css="quiet"), table(head, rows, numbers))
