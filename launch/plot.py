"""Line plots in a page: points in, SVG out, with their words and their numbers beside it.

A line is known by its dashes as well as by its colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launch.curves import Points
from shards.page import Html, figure, join, table, tag

WIDE, HIGH = 340, 190
"""Of a plot in CSS pixels where three stand in a row: its letters are then as large as others."""
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 20, 30
LETTER = 6.2
"""Width of a letter of a mark, on average."""
COLOURS = 8
"""Kinds of lines in the style sheet; the next line has the first one again."""
DOTS = 40
"""Points up to which each has a dot."""
BINS, ROWS = 150, 12
"""Parts of the axis of which the lowest and the highest point are drawn; rows of the numbers."""


class Line(NamedTuple):
    """A curve and its name."""

    name: str
    points: Points


class Axes(NamedTuple):
    """Last step and highest value; both begin at 0."""

    last: int
    top: float

    def x(self, step: int) -> float:
        """Place of a step."""
        return LEFT + (WIDE - LEFT - RIGHT) * step / self.last

    def y(self, value: float) -> float:
        """Place of a value; what is below 0 is at the bottom."""
        return TOP + (HIGH - TOP - BOTTOM) * (1 - max(value, 0.0) / self.top)


def plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    marks: Sequence[tuple[str, int]] = (),
    top: float | None = None,
) -> Html:
    """A box with one plot, what each line does in words, and its numbers to be opened.

    Args:
        name: Of the place in the page.
        title: Of the box.
        lines: Those without points are said to have none.
        marks: Name and first step of stages.
        top: Highest value of the axis; none: that of the points.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return figure(title, tag("p", "Nothing was written yet.", css="quiet"))
    highest = max(value for line in drawn for _, value in line.points)
    axes = Axes(max(step for line in drawn for step, _ in line.points), top or highest or 1.0)
    parts = (
        *_scales(axes),
        *_marks(axes, marks),
        *(part for kind, line in enumerate(drawn) for part in _curve(axes, line, kind)),
    )
    words = f"{name}-words"
    svg = tag(
        "svg", *parts, viewBox=f"0 0 {WIDE} {HIGH}", role="img", css="plot",
        aria_label=f"{title}, by step", aria_describedby=words,
    )  # fmt: skip
    legend = (
        tag("li", _sample(kind), tag("strong", line.name), tag("em", f" {_words(line.points)}"))
        for kind, line in enumerate(drawn)
    )
    numbers = tag("details", tag("summary", "Numbers"), _numbers(drawn))
    return figure(title, svg, tag("ul", *legend, css="lines", id=words), numbers)


def thinned(points: Points) -> Points:
    """At most two points for each of `BINS` parts of the axis, its lowest and its highest."""
    if len(points) <= 2 * BINS:
        return points
    last = points[-1][0]
    parts: dict[int, Points] = {}
    for point in points:
        parts.setdefault(point[0] * BINS // (last + 1), []).append(point)
    chosen = (
        point
        for part in parts.values()
        for point in {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    )
    return sorted(chosen)


def ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to ``top``, at least one above 0 and at most ``most``."""
    size = 10.0 ** math.floor(math.log10(top / most))
    step = next(size * k for k in (1, 2, 5, 10) if top / (size * k) <= most)
    return [step * n for n in range(int(top / step + 1e-9) + 1)]


def _scales(axes: Axes) -> Iterator[Html]:
    for value in ticks(axes.top):
        y = axes.y(value)
        yield tag("path", d=f"M{LEFT} {y:.1f}H{WIDE - RIGHT}")
        yield _text(LEFT - 5, y + 4, _three(value), "end")
    for step in ticks(axes.last, 4):
        if step.is_integer():
            yield _text(axes.x(int(step)), HIGH - BOTTOM + 15, f"{step:.0f}", "middle")
    yield _text(WIDE - RIGHT, HIGH - 2, "step", "end")


def _marks(axes: Axes, marks: Sequence[tuple[str, int]]) -> Iterator[Html]:
    """A line where each stage begins, and its name where there is room for it."""
    free = 0.0
    for name, step in marks:
        if step > axes.last:
            continue
        x = axes.x(step)
        yield tag("path", d=f"M{x:.1f} {TOP - 14}V{HIGH - BOTTOM}", css="stage")
        wide = LETTER * len(name)
        if x >= free and x + 3 + wide <= WIDE:
            yield _text(x + 3, TOP - 5, name, "start")
            free = x + 6 + wide


def _curve(axes: Axes, line: Line, kind: int) -> Iterator[Html]:
    points = thinned(line.points)
    places = [f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in points]
    css = f"c{kind % COLOURS}"
    yield tag("path", d="M" + "L".join(places), css=css)
    if len(points) <= DOTS:
        for place in places:
            x, y = place.split()
            yield tag("circle", cx=x, cy=y, r="2.2", css=css)


def _sample(kind: int) -> Html:
    path = tag("path", d="M0 5H30", css=f"c{kind % COLOURS}")
    return tag("svg", path, viewBox="0 0 30 10", css="plot sample", aria_hidden="true")


def _three(value: float) -> str:
    """As many digits as a plot shows."""
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _words(points: Points) -> str:
    """Where a curve begins and ends, and its lowest and highest point."""
    (first, begin), (last, end) = points[0], points[-1]
    if first == last:
        return f"{_three(begin)} at step {first}"
    low, high = (choose(points, key=lambda point: point[1]) for choose in (min, max))
    return (
        f"{_three(begin)} at step {first}, {_three(end)} at step {last}; "
        f"lowest {_three(low[1])} at {low[0]}, highest {_three(high[1])} at {high[0]}"
    )


def _numbers(lines: Sequence[Line]) -> Html:
    """Some steps, evenly spread, the last one among them."""
    steps = sorted({step for line in lines for step, _ in line.points})
    count = min(ROWS, len(steps))
    chosen = sorted(
        {steps[-1 - round(n * (len(steps) - 1) / max(1, count - 1))] for n in range(count)}
    )
    known = [dict(line.points) for line in lines]
    rows = ((step, *(_three(of[step]) if step in of else "–" for of in known)) for step in chosen)
    head = ("step", *(line.name for line in lines))
    some = tag("p", count, " of ", len(steps), " steps.", css="quiet")
    note = some if count < len(steps) else ""
    return join([table(head, rows, range(len(head)), css="narrow"), note])
