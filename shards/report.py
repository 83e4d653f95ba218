"""One page about a set of shards: what was found, what is not there and why, what it looks like.

Shown are pseudonyms, numbers, words of closed vocabularies, and pictures of what is clean.
The same shards give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from medpsp.dicom.codes import code_of
from medpsp.errors import ShardError
from medpsp.intensity import CLASS_COLOURS, class_colour
from medpsp.types import STATUSES
from medpsp.words import many
from shards.figures import Columns, class_shares, count_flags, count_splits, read_columns
from shards.index import (
    INDEX,
    REPORT,
    Manifest,
    read_manifest,
    read_objects,
    reject_fraction,
    write_bytes_durably,
)
from shards.page import Html, join, number, page, pairs, percent, picture, tag
from shards.reader import ShardReader
from shards.sealed import sealed_page
from shards.sections import (
    classes_section,
    flags_section,
    found_section,
    images_section,
    section,
    splits_section,
)
from shards.thumbs import Case, choose_cases, draw, withheld


def write_report(root: Path, cases: int = 24) -> Path:
    """Write ``report.html`` beside the manifest of ``root``.

    Args:
        root: Folder of the shards.
        cases: Series to show pictures of, at most.

    Returns:
        The file.

    Raises:
        ShardError: Manifest, index or object table are missing, damaged, or contradict each
            other. A slice that cannot be drawn is none: its place says so.
    """
    manifest = read_manifest(root)
    objects = read_objects(root)
    columns = read_columns(root / INDEX, len(manifest.classes))
    counts = Counter(row.status for row in objects)
    found: dict[str, int] = {status: counts.get(status, 0) for status in STATUSES}
    if found != manifest.counts or sum(found.values()) != len(objects):
        raise ShardError(
            f"shards {root}: objects by status are {found}, the manifest says {manifest.counts}; "
            "run `medpsp shards` again"
        )
    parts = (
        _title(manifest, columns, found),
        _doubts(manifest, columns),
        found_section(objects, found),
        flags_section(columns),
        splits_section(columns),
        images_section(columns),
        classes_section(manifest.classes, columns),
        _cases(root, manifest, columns, cases),
        _about(manifest),
    )
    text = page("Archive report", (part for part in parts if part))
    write_bytes_durably(root / REPORT, sealed_page(text.encode("utf-8")))
    return root / REPORT


def _title(manifest: Manifest, columns: Columns, found: dict[str, int]) -> Html:
    patients, series = (len(np.unique(c)) for c in (columns.patient, columns.series))
    lead = (
        sum(found.values()), " objects found, ", found["kept"], " kept: ",
        manifest.slices, " slices of ", series, " series of ", patients, " patients.",
    )  # fmt: skip
    links = (
        ("found", "Found"), ("flags", "Remarks"), ("splits", "Splits"), ("images", "Images"),
        ("classes", "Classes"), ("cases", "Cases"), ("about", "How it was made"),
    )  # fmt: skip
    nav = tag("nav", *(tag("a", text, href=f"#{name}") for name, text in links))
    return tag("header", tag("h1", "Archive report"), tag("p", *lead, css="lead"), nav)


def _doubts(manifest: Manifest, columns: Columns) -> Html:
    """What a person should look at first; empty where there is nothing."""
    lines = []
    if quarantined := manifest.counts["quarantined"]:
        share = percent(reject_fraction(manifest))
        text = f" objects were quarantined, {share} of these and the kept ones; see below why."
        lines.append(join([quarantined, text]))
    graver = [f for f in count_flags(columns) if not code_of(f.code).action.startswith("Nothing")]
    lines += [
        join([f.slices, " kept slices carry ", tag("code", f.code), ": ", code_of(f.code).meaning])
        for f in graver
    ]
    sizes = count_splits(columns)
    for split, (_, slices) in class_shares(columns).items():
        if sizes[split].slices and not sizes[split].labelled:
            lines.append(join([tag("strong", split), " has no labelled slice."]))
        absent = [
            name
            for name, share in zip(manifest.classes, slices.tolist(), strict=True)
            if share == 0
        ]
        if absent:
            lines.append(join([tag("strong", split), " never shows: ", ", ".join(absent), "."]))
    unknown = int((~np.isfinite(columns.spacing[:, :2])).any(axis=1).sum())
    if unknown:
        lines.append(join([unknown, " slices have no pixel spacing: nothing in mm there."]))
    if not lines:
        return Html()
    return section("doubts", "Worth a look", tag("ul", *(tag("li", x) for x in lines)), css="look")


def _cases(root: Path, manifest: Manifest, columns: Columns, most: int) -> Html:
    hidden = withheld(columns, str(manifest.settings.get("burned_in")))
    cases = choose_cases(columns, hidden, most)
    reader = ShardReader(root)
    legend = (
        tag(
            "li",
            tag("span", css="swatch", style="background:rgb({},{},{})".format(*class_colour(i))),
            name,
        )
        for i, name in enumerate(manifest.classes)
        if i
    )
    series = len(np.unique(columns.series))
    notes = [
        f"{len(cases)} of {series} series, labelled ones first, of as many patients as can be."
    ]
    for reason, count in sorted(Counter(hidden.values()).items()):
        notes.append(f"Not shown: {count} that {reason}.")
    if len(manifest.classes) > len(CLASS_COLOURS):
        notes.append(f"Colours repeat after {len(CLASS_COLOURS) - 1} classes.")
    if manifest.settings.get("source") == "voc":
        notes.append("Plain images say nothing about names in their pixels: not checked.")
    text = (
        "Each at a quarter, half and three quarters of the labelled slices. Point at a case, "
        "or go to it by Tab, to see it without its label. Numbers are slice_index of index.parquet."
    )
    return section(
        "cases",
        "Cases",
        tag("p", " ".join(notes), css="quiet"),
        tag("p", text, css="quiet"),
        tag("ul", *legend, css="legend"),
        tag("div", *(_case(reader, columns, case) for case in cases), css="cases"),
    )


def _case(reader: ShardReader, columns: Columns, case: Case) -> Html:
    row = case.row
    if case.first >= 0:
        label = f"label on {case.first} to {case.last}"
    else:
        label = "label is empty" if case.labelled else "no label"
    number_of = many(case.slices, "slice")
    header = tag(
        "header",
        tag("span", "patient ", tag("code", columns.patient[row])),
        tag("span", "series ", tag("code", columns.series[row])),
        tag("em", f"{columns.modality[row]}, {columns.split[row]}, {number_of}, {label}"),
    )
    shown = (_thumb(reader, columns, slice_row) for slice_row in case.shown)
    return tag("article", header, tag("div", *shown, css="pics"), css="case", tabindex=0)


def _thumb(reader: ShardReader, columns: Columns, row: int) -> Html:
    thumb = draw(reader, columns, row)
    place = f"slice {columns.slice_index[row]}"
    if np.isfinite(z := float(columns.z_mm[row])):
        place += f", {number(round(z, 1))} mm"
    inside = [tag("span", "cannot be drawn")]
    if thumb:
        inside = [picture(thumb.image, place)]
        inside += [picture(thumb.label, "label", "over")] if thumb.label else []
    return tag("figure", tag("div", *inside, css="frame"), tag("figcaption", place))


def _about(manifest: Manifest) -> Html:
    made = [
        ("tool", manifest.tool),
        ("format", manifest.version),
        ("data_id", tag("code", manifest.data_id)),
        ("key fingerprint", tag("code", manifest.key_fingerprint)),
        ("shards", manifest.shards),
        ("classes", ", ".join(manifest.classes)),
    ]
    return section(
        "about",
        "How it was made",
        pairs(made),
        tag("h3", "De-identification", style="margin-top:18px"),
        pairs((key, _plain(value)) for key, value in manifest.deid.items()),
        tag("h3", "Settings that decide the data", style="margin-top:18px"),
        pairs(
            (tag("code", f"data.{key}"), tag("code", _plain(value)))
            for key, value in manifest.settings.items()
        ),
    )


def _plain(value: object) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
