"""One page about the scores of the held-out patients, for those who read images.

Shown are pseudonyms, numbers, words of closed vocabularies, and pictures of what may be shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.evalfigures import (
    CASES,
    confusion_table,
    doubts_of,
    estimate,
    look_section,
    reliability,
    scores_table,
    swatch,
)
from launch.evalpictures import draw_case
from launch.scores import Case
from launch.trained import BY_CASE, shown
from medpsp.config import Config
from medpsp.errors import ShardError
from medpsp.intensity import class_colour
from medpsp.train.pictures import BOTH, PREDICTED, TRUTH
from medpsp.words import many
from shards.figures import read_columns
from shards.index import INDEX
from shards.page import Html, join, page, pairs, picture, table, tag
from shards.sections import section
from shards.thumbs import withheld

if TYPE_CHECKING:
    from shards.reader import ShardReader

WIDE, TALL = "width:345px;max-width:100%", "height:345px"
"""Of a picture: 150 CSS pixels of the archive report, by `evalpictures.LARGER`."""
ROW = "width:100%;display:flex;flex-wrap:wrap;gap:12px 22px"
"""Of a case: what it is, and beside it its pictures."""

CONVENTIONS = (
    ("case", "One series of a patient, in 3-D. Each counts once in a mean of cases."),
    ("Dice, IoU", "2 TP / (truth + predicted) and TP / (truth or predicted), of voxels."),
    ("pooled", "Of the voxels of all cases together: large organs and long series weigh more."),
    (
        "HD95",
        "Greater of the two directed 95th percentiles of distances between boundary voxels, mm.",
    ),
    (
        "NSD",
        "Share of the boundary voxels of both masks that lie within the tolerance of the other "
        "(Nikolov et al. 2018; voxels unweighted, as in Metrics Reloaded, Maier-Hein et al. 2024).",
    ),
    (
        "absent, missed, invented",
        "A class in neither truth nor prediction counts in no mean. One that is in truth or in "
        "prediction alone has Dice, IoU and NSD 0 and no HD95: look at their number beside HD95.",
    ),
    (
        "not known",
        "Voxels without a label and slices that are missing in a series are taken out of truth and "
        "prediction; a mask has no surface on them.",
    ),
    (
        "no distances",
        "HD95 and NSD are left out where a series does not tell the distance between its slices.",
    ),
    (
        "intervals",
        "95 %, percentiles of a bootstrap over patients, whose cases stay together. None of one "
        "patient.",
    ),
    ("ECE", "Expected calibration error of the highest probability, 15 bins of equal width."),
    (
        "constant mask",
        "The best mask that never looks at the image: the mean label of the training slices, cut "
        "at the frequency of the best Dice. A score is worth what it is above it.",
    ),
)


def evaluation_page(
    config: Config, result: dict[str, Any], cases: Sequence[Case], reader: ShardReader
) -> str:
    """The page of `evaluation.html`: no script, nothing from a network.

    Args:
        config: Of the run.
        result: What goes into `evaluation.json`.
        cases: All of them.
        reader: Of the shards, for the pictures.
    """
    names = config.data.classes
    several = several_groups(result)
    parts = (
        _title(result),
        _doubts(result, cases),
        section("scores", "Scores", *scores_table(result), _single_groups(result)),
        *(
            section(f"by-{n}", f"By {by}", _stratum(groups, by))
            for n, (by, groups) in enumerate(several.items())
        ),
        section("calibration", "Calibration", *reliability(result["calibration"])),
        section("confusion", "Confusion", *confusion_table(result["confusion"], names)),
        section(CASES, "Worst, median and best case", *_drawn(config, cases, reader)),
        section("how", "How it was measured", pairs(CONVENTIONS), _settings(result)),
    )
    return page("Evaluation", (part for part in parts if part))


def several_groups(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Groupings that say more than all cases together do."""
    return {by: groups for by, groups in result["strata"].items() if len(groups) > 1}


def _single_groups(result: dict[str, Any]) -> Html:
    alone = {by: next(iter(of)) for by, of in result["strata"].items() if len(of) == 1}
    if not alone:
        return Html()
    said = ", ".join(f"{by} ({name})" for by, name in alone.items())
    text = f"No table by {said}: all cases are of one group."
    return tag("p", text, css="quiet", style="margin-top:10px")


def _title(result: dict[str, Any]) -> Html:
    lead = (
        many(result["patients"], "held-out patient"), " (", result["split"], "), ",
        many(result["cases"], "case"), ", ", many(result["slices"], "slice"),
        "; network of step ", result["step"], ".",
    )  # fmt: skip
    links = (
        ("scores", "Scores"),
        *((f"by-{n}", f"By {by}") for n, by in enumerate(several_groups(result))),
        ("calibration", "Calibration"), ("confusion", "Confusion"), (CASES, "Cases"),
        ("how", "How it was measured"),
    )  # fmt: skip
    nav = tag("nav", *(tag("a", text, href=f"#{name}") for name, text in links))
    return tag("header", tag("h1", "Evaluation"), tag("p", *lead, css="lead"), nav)


def _doubts(result: dict[str, Any], cases: Sequence[Case]) -> Html:
    """What a reader should know first; empty where there is nothing."""
    lines: list[object] = [*doubts_of(result)]
    flat = sum(not np.isfinite(case.z_step) for case in cases)
    if flat:
        lines.append(
            f"Without a known distance between slices: {many(flat, 'case')}, no HD95, no NSD."
        )
    if choice := result["postprocess"]:
        used = [f"{n}: {s}" for n, s in choice["chosen"].items() if s != "none"]
        lines.append(
            f"Predictions were cleaned as the validation patients chose ({', '.join(used)}); the "
            "exported file does not do so."
            if used
            else "No cleaning made the validation patients better: none was used."
        )
    return look_section(lines)


def _stratum(groups: dict[str, Any], by: str) -> Html:
    head = (
        by,
        "patients",
        "cases",
        "class",
        BY_CASE,
        "IoU",
        "HD95, mm",
        "NSD",
        "missed",
        "invented",
    )
    rows = [
        (
            *((name, of["patients"], of["cases"]) if first else ("", "", "")),
            label,
            *(estimate(scores[k]) for k in ("dice", "iou", "hd95_mm", "nsd")),
            scores["missed"],
            scores["invented"],
        )
        for name, of in groups.items()
        for first, (label, scores) in zip(
            [True] + [False] * len(of["classes"]), of["classes"].items(), strict=False
        )
    ]
    return table(head, rows, (1, 2, *range(4, len(head))))


def _drawn(config: Config, cases: Sequence[Case], reader: ShardReader) -> Iterator[Html]:
    columns = read_columns(config.shards / INDEX, len(config.data.classes))
    reasons = {
        str(columns.series[row]): why
        for row, why in withheld(columns, config.data.burned_in).items()
    }
    yield tag(
        "p",
        "By the mean Dice over the classes. Each shows the slice with the most wrong voxels: left "
        "the true classes, right the contours. Point at a case, or go to it by Tab, to see it "
        "without them.",
        css="quiet",
    )
    lines = ((TRUTH, "truth"), (PREDICTED, "prediction"), (BOTH, "where both agree"))
    classes = ((class_colour(k), name) for k, name in enumerate(config.data.classes) if k)
    for what, each in (("left", classes), ("right", lines)):
        items = (tag("li", swatch(colour, name)) for colour, name in each)
        yield tag("ul", tag("li", tag("em", what)), *items, css="legend")
    drawn = (
        _case(rank, case, reader, reasons.get(case.series, ""), config.data.classes)
        for rank, case in ranked(cases)
    )
    yield tag("div", *drawn, css="cases")


def ranked(cases: Sequence[Case]) -> list[tuple[str, Case]]:
    """The worst, median and best case by mean Dice; of many the three worst."""
    scored = sorted(
        (case for case in cases if np.isfinite(case.mean_dice)),
        key=lambda case: (case.mean_dice, case.patient, case.series),
    )
    last = len(scored) - 1
    places = {(last + 1) // 2: "median", 0: "worst", last: "best"}
    if last == 0:
        places = {0: "the only one"}
    elif last >= 7:
        places |= {1: "second worst", 2: "third worst"}
    return [(places[n], case) for n, case in enumerate(scored) if n in places]


def _case(rank: str, case: Case, reader: ShardReader, hidden: str, names: Sequence[str]) -> Html:
    dice = ", ".join(
        f"{name} {shown(None if np.isnan(d) else d)}"
        for name, d in zip(names[1:], case.dice[1:], strict=True)
    )
    about = f"{case.modality}, {case.scanner or 'scanner unknown'}, {many(case.slices, 'slice')}"
    header = tag(
        "header",
        tag("strong", rank),
        tag("span", "patient ", tag("code", case.patient)),
        tag("span", "series ", tag("code", case.series)),
        tag("em", about),
        tag("em", f"Dice {dice}"),
        style="flex:1 1 250px;flex-direction:column;align-items:flex-start",
    )
    place = f"slice {case.drawn.slice_index}"
    nothing = [([tag("span", f"not shown: {hidden}")], place)]
    frames = nothing if hidden else _frames(case, reader, place)
    figures = (
        tag("figure", tag("div", *f, css="frame", style=TALL), tag("figcaption", what), style=WIDE)
        for f, what in frames
    )
    pics = tag("div", *figures, css="pics", style="flex-wrap:wrap")
    return tag("article", header, pics, css="case", tabindex=0, style=ROW)


def _frames(case: Case, reader: ShardReader, place: str) -> list[tuple[list[Html], str]]:
    """Pictures on one another, and what they show."""
    try:
        drawn = draw_case(reader, case)
    except ShardError:
        return [([tag("span", "cannot be drawn")], place)]
    truth = f"{place}, {'true classes' if drawn.marked else 'no class is here in truth'}"
    layers = ((drawn.truth, truth), (drawn.contours, f"{place}, contours"))
    return [([picture(drawn.image, place), picture(p, what, "over")], what) for p, what in layers]


def _settings(result: dict[str, Any]) -> Html:
    shown_as = {True: "yes", False: "no", None: "none"}
    lines = (
        (tag("code", f"evaluate.{key}"), shown_as.get(value, value) if not isinstance(value, list)
         else " x ".join(map(str, value)))
        for key, value in result["settings"].items()
    )  # fmt: skip
    return join([tag("h3", "Settings", style="margin-top:18px"), pairs(lines)])
