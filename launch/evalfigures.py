"""Tables and diagrams of scores, for several pages: values in, HTML out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.scores import doubt_of
from launch.trained import BY_CASE, FEW_PATIENTS, POOLED
from medpsp.intensity import class_colour
from medpsp.train.pictures import Rgb
from medpsp.words import many
from shards.page import Html, join, percent, table, tag
from shards.sections import section

SIDE = 300
"""CSS pixels of the reliability diagram, and below it of the bars of its counts."""

BARS = 46
CASES = "cases"
"""Place of the pictures in the page of an evaluation."""

METRICS = {"dice": BY_CASE, "dice_pooled": POOLED, "iou": "IoU, mean of cases",
           "hd95_mm": "HD95, mm", "nsd": "NSD"}  # fmt: skip
"""Of `evaluation.json`, see `launch.scores`, and their names in tables."""


def estimate(of: dict[str, float | None]) -> Html:
    """A value with its interval below it."""
    value, low, high = (of[key] for key in ("value", "low", "high"))
    if value is None:
        return Html("–")
    inside = (
        "" if low is None or high is None else tag("small", f"{_digits(low)} to {_digits(high)}")
    )
    return join([_digits(value), inside])


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 1.0005 else f"{value:.3g}"


def lifted_cases(page: str) -> Html:
    """The part with the pictures out of the page of an evaluation."""
    begin = f'<section id="{CASES}">'
    inside = page.partition(begin)[2].partition("</section>")[0]
    return Html(f"{begin}{inside}</section>")


def look_section(lines: Sequence[object]) -> Html:
    """What a reader should know first; empty where there is nothing."""
    if not lines:
        return Html()
    return section("doubts", "Worth a look", tag("ul", *(tag("li", x) for x in lines)), css="look")


def doubts_of(result: Mapping[str, Any]) -> Iterator[object]:
    """What a reader of scores should know first."""
    if result["split"] == "val":
        yield (
            "No patient is in test: these are the validation patients, and training chose its "
            "best step by them. The scores are too good."
        )
    if result["patients"] < FEW_PATIENTS:
        yield (
            f"Only {many(result['patients'], 'patient')} held out: so few show little of how "
            "patients differ, and the 95 % intervals are too narrow. New patients may well score "
            "outside them."
        )
    for name, of in result["classes"].items():
        yield from _doubts_of_class(name, of)


def _doubts_of_class(name: str, of: Mapping[str, Any]) -> Iterator[Html]:
    if doubt := doubt_of(of):
        yield join([tag("strong", name), f" is {doubt} than a mask that ignores the image."])
    if of["missed"]:
        where = many(of["missed"], "case")
        yield join([tag("strong", name), " was missed altogether in ", where, "."])
    if of["invented"]:
        where = many(of["invented"], "case")
        yield join([tag("strong", name), " was invented in ", where, "."])
    if of["dice"]["value"] is None:
        yield join([tag("strong", name), " is in no held-out case."])


def scores_table(result: Mapping[str, Any]) -> Iterator[Html]:
    """Every class with its intervals."""
    yield tag(
        "p", "With 95 % intervals over patients; the constant mask is the floor.", css="quiet"
    )
    head = (
        "class", BY_CASE, POOLED, "constant mask, pooled", "IoU, mean of cases", "HD95, mm",
        f"NSD at {result['settings']['nsd_mm']:g} mm", "present", "missed", "invented",
        "absent",
    )  # fmt: skip
    estimates = ("dice", "dice_pooled", "dice_constant_mask", "iou", "hd95_mm", "nsd")
    states = ("present", "missed", "invented", "absent")
    rows = (
        (swatch(class_colour(index), name), *(estimate(of[k]) for k in estimates),
         *(of[k] for k in states))
        for index, (name, of) in enumerate(result["classes"].items(), 1)
    )  # fmt: skip
    yield table(head, rows, range(1, len(head)))


def swatch(colour: Rgb, name: str) -> Html:
    """A name with its colour."""
    style = "background:rgb({},{},{})".format(*colour)
    return join([tag("span", css="swatch", style=style), name])


def reliability(calibration: dict[str, Any]) -> Iterator[Html]:
    """What the probabilities are worth: text and diagram."""
    ece = calibration["ece"]
    inside = "" if ece["low"] is None else f" ({ece['low']:.3f} to {ece['high']:.3f})"
    yield tag("p", "Expected calibration error ", tag("strong", f"{ece['value']:.3f}"), inside, ".")
    yield tag(
        "p",
        "Of all voxels to which the network gives some probability, how many are right? On the "
        "line the two agree; below it the network is too sure. Bars underneath: number of voxels, "
        "logarithmic. Most voxels are easy background, which makes the error small: look at the "
        "shape too.",
        css="quiet",
    )
    yield tag("div", _diagram(calibration["bins"]), style=f"max-width:{SIDE + 70}px")


def _diagram(bins: Sequence[dict[str, Any]]) -> Html:
    step, low = SIDE / len(bins), SIDE + 26
    most = math.log10(max(2, *(b["voxels"] for b in bins)) + 1)
    parts = [_text(x * SIDE, SIDE + 16, f"{x:g}", "middle") for x in (0, 0.5, 1)]
    parts += [_text(-6, SIDE * (1 - y) + 4, f"{y:g}", "end") for y in (0, 0.5, 1)]
    parts += [_text(SIDE / 2, low + BARS + 18, "probability given", "middle")]
    parts += [_text(6, 12, "share that is right", "start")]
    for place, of in enumerate(bins):
        if not of["voxels"]:
            continue
        tall = math.log10(of["voxels"] + 1) / most * BARS
        title = tag(
            "title",
            f"{of['voxels']} voxels, mean probability {of['confidence']:.3f}, "
            f"right {of['accuracy']:.3f}",
        )
        parts += [
            _rect(
                place * step, SIDE * (1 - of["accuracy"]), step - 1, SIDE * of["accuracy"], title
            ),
            _rect(place * step, low + BARS - tall, step - 1, tall, title, "opacity:.45"),
        ]
    parts += [
        tag("line", x1=0, y1=SIDE, x2=SIDE, y2=0, style="stroke-dasharray:5 4"),
        tag("path", d=f"M0 0V{SIDE}H{SIDE}", style="fill:none;stroke:var(--quiet)"),
        *(
            tag("circle", cx=f"{SIDE * of['confidence']:.1f}",
                cy=f"{SIDE * (1 - of['accuracy']):.1f}", r=4,
                style="fill:var(--mark);stroke:var(--card)")
            for of in bins if of["voxels"]
        ),
    ]  # fmt: skip
    box = f"-34 -8 {SIDE + 44} {low + BARS + 32}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label="reliability diagram")


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    style = "fill:var(--quiet);font-size:12px"
    return tag("text", text, x=f"{x:.0f}", y=f"{y:.0f}", text_anchor=anchor, style=style)


def _rect(x: float, y: float, wide: float, high: float, title: Html, style: str = "") -> Html:
    size = {"x": x, "y": y, "width": wide, "height": high}
    return tag("rect", title, **{k: f"{v:.2f}" for k, v in size.items()}, style=style)


def confusion_table(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Iterator[Html]:
    """Truth in rows, prediction in columns."""
    yield tag(
        "p",
        "Voxels of all cases. Each row is a true class, and says what it was taken for; the shade "
        "is the share of the row.",
        css="quiet",
    )
    rows = (
        (tag("strong", name), *(_cell(n, sum(row)) for n in row), sum(row))
        for name, row in zip(names, counts, strict=True)
    )
    head = ("truth", *(f"as {name}" for name in names), "voxels")
    yield table(head, rows, range(1, len(head)))


def _cell(count: int, total: int) -> Html:
    share = count / total if total else 0.0
    style = (
        f"display:block;padding:2px 8px;border-radius:4px;"
        f"background:color-mix(in srgb,var(--fill) {35 * share:.0f}%,transparent)"
    )
    return tag("span", percent(share) if total else "–", tag("small", count), style=style)
