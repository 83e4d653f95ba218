"""Tables and diagrams of the evaluation page: values in, HTML out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from shards.page import Html, join, percent, table, tag

SIDE = 300
"""CSS pixels of the reliability diagram, and below it of the bars of its counts."""

BARS = 46


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
