"""Parts of a self-contained HTML page: values in, escaped HTML out. Nothing of ours is known here.

No script, no font, no address: the page shows the same on a machine without a network, and its
Content-Security-Policy lets nothing in.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
BINS, WIDTH, HEIGHT = 24, 288, 72
"""Of a histogram: most bars, and size in CSS pixels."""


class Html(str):
    """Text that is HTML already; whatever else goes into a page is escaped."""

    __slots__ = ()


def html(value: object) -> Html:
    """Any value as HTML: numbers with thin spaces between thousands, text escaped."""
    if isinstance(value, Html):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Html(f"{value:,}".replace(",", "\u202f"))
    return Html(escape(str(value)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; ``css`` stands for the attribute class, an underscore for a hyphen."""
    known = {"class" if k == "css" else k.replace("_", "-"): v for k, v in attributes.items()}
    given = "".join(f' {k}="{escape(str(v))}"' for k, v in known.items() if v not in ("", None))
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after another."""
    return Html("".join(html(part) for part in parts))


def coded(text: str) -> Html:
    """A line of text; what stands in backticks is code."""
    return Html(re.sub("`([^`]+)`", r"<code>\1</code>", escape(text)))


def percent(share: float) -> str:
    """A share in two or three digits; never 0 or 100 % for what is not."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 1e-4:
        return "< 0.01 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.{2 if share < 0.0995 else 3}g} %"


def number(value: float) -> str:
    """Four significant digits, no exponent where a person needs none."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int], css: str = ""
) -> Html:
    """A table; columns in ``numbers`` are set to the right. The keyboard scrolls a wide one."""
    right = set(numbers)

    def line(name: str, cells: Sequence[object], **attributes: str) -> Html:
        each = (
            tag(name, cell, css="n" if i in right else "", **attributes)
            for i, cell in enumerate(cells)
        )
        return tag("tr", *each)

    body = tag("tbody", *(line("td", row) for row in rows))
    whole = tag("table", tag("thead", line("th", head, scope="col")), body, css=css)
    return tag(
        "div", whole, css="scroll", tabindex=0, role="group", aria_label=f"table by {head[0]}"
    )


def meter(share: float, full: float, text: str, colour: str = "") -> Html:
    """A number with a bar before it, as long as its part of ``full``; 0 leaves the bar out."""
    if not full:
        return tag("span", tag("i", css="bar none"), tag("span", text), css="meter")
    part = share / full if math.isfinite(share) else 0.0
    style = f"width:{100 * min(part, 1.0):.2f}%" + (f";background:{colour}" if colour else "")
    bar = tag("i", tag("b", style=style), css="bar")
    return tag("span", bar, tag("span", text), css="meter")


def tally(items: Iterable[tuple[str, int]], most: int = 10) -> Html:
    """Names, their number and a bar of their share, the commonest first; the rest in one line."""
    ordered = sorted(items, key=lambda item: (-item[1], item[0]))
    total = max(1, sum(count for _, count in ordered))
    shown = [(name or "not recorded", count) for name, count in ordered[:most]]
    if len(ordered) > most:
        rest = sum(count for _, count in ordered[most:])
        shown.append((f"{len(ordered) - most} others", rest))
    lines = (
        tag("tr", tag("th", name, scope="row"), tag("td", meter(n, total, percent(n / total))),
            _right(n))
        for name, n in shown
    )  # fmt: skip
    return tag("table", tag("tbody", *lines), css="tally")


def _right(count: int) -> Html:
    return tag("td", count, css="n")


def figure(title: str, *content: object) -> Html:
    """A titled box."""
    return tag("div", tag("h3", title), *content, css="box")


def histogram(values: NDArray[np.float64], unit: str = "") -> Html:
    """Bars over the range of the finite values, their median and range in words."""
    unit = f" {unit}" if unit else ""
    finite = values[np.isfinite(values)]
    missing = len(values) - len(finite)
    rest = tag("p", f"not known for {missing} of {len(values)}", css="quiet") if missing else ""
    if not len(finite):
        return join([tag("p", "not known for any", css="quiet")])
    low, middle, high = (float(f(finite)) for f in (np.min, np.median, np.max))
    if number(low) == number(high):
        return join([tag("p", tag("strong", f"{number(low)}{unit}"), " in all"), rest])
    bars, _ = np.histogram(finite, bins=min(BINS, max(6, len(np.unique(finite)))))
    step = WIDTH / len(bars)
    tall = (HEIGHT - 4) * bars / bars.max()
    drawn = (
        tag(
            "rect",
            x=f"{i * step:.2f}",
            y=f"{HEIGHT - max(t, 1.5):.2f}",
            width=f"{step - 1:.2f}",
            height=f"{max(t, 1.5):.2f}",
        )
        for i, t in enumerate(tall)
        if t
    )
    at = f"{(middle - low) / (high - low) * WIDTH:.2f}"
    line = tag("line", x1=at, x2=at, y1=0, y2=HEIGHT)
    base = tag("path", d=f"M0 {HEIGHT}H{WIDTH}")
    label = f"median {number(middle)}, from {number(low)} to {number(high)}{unit}"
    box = f"0 0 {WIDTH} {HEIGHT + 1}"
    svg = tag("svg", *drawn, line, base, viewBox=box, role="img", aria_label=label)
    ends = tag("div", tag("span", number(low)), tag("span", f"{number(high)}{unit}"), css="ends")
    text = tag("p", "median ", tag("strong", f"{number(middle)}{unit}"))
    return join([text, svg, ends, rest])


def stacked(parts: Sequence[tuple[str, int]]) -> Html:
    """One bar of all parts, with its legend; the names are also CSS classes."""
    total = max(1, sum(count for _, count in parts))
    pieces = (
        tag("b", css=name, style=f"width:{100 * count / total:.3f}%", title=f"{count} {name}")
        for name, count in parts
        if count
    )
    legend = (
        tag("li", tag("i", css=name), tag("strong", count), f" {name} ", tag("em", percent(c)))
        for name, count in parts
        for c in [count / total]
    )
    return join([tag("div", *pieces, css="stack"), tag("ul", *legend, css="legend")])


def pairs(items: Iterable[tuple[object, object]]) -> Html:
    """Names and values."""
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in items))


def picture(png: bytes, alt: str, css: str = "") -> Html:
    """An image whose bytes are in the page."""
    data = base64.b64encode(png).decode()
    return Html(f'<img class="{css}" src="data:image/png;base64,{data}" alt="{escape(alt)}">')


def page(title: str, content: Iterable[object]) -> str:
    """The whole document."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>\n{style}</style>"
    )
    body = tag("main", *content)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
