"""The page of comparisons, docs/benchmarks.md, from what the benches left in runs/bench.

    python tests/bench/page.py

The results are copied to tests/bench/results, so that the page can be made, and checked, anywhere.
A figure that misses what is wanted stands near the top, with its reason from reasons.json: the
first whose pattern fits "SECTION: LABEL", or "not known yet".
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medpsp.modelconfig import BACKBONES
from tests.bench.results import FOLDER, ROOT, Row

KEPT = Path(__file__).with_name("results")
REASONS = Path(__file__).with_name("reasons.json")
PAGE = ROOT / "docs" / "benchmarks.md"
UNKNOWN = "not known yet"
HEAD = ("", "figure", "spread", "ours", "theirs", "wanted", "")
"""Of a table; a column in which nothing stands is left out."""
STAMP = ("when", "machine", "load")
INTRO = """# Benchmarks

Ours and theirs do the same work by turns, on one machine. A ratio is the median of the ratios of
single rounds, *spread* is the smallest and the largest of them, *ours* and *theirs* are medians.
*Wanted* was set beforehand, or is that we are not behind; where other processes had the cores
(DISTURBED) a figure is neither met nor missed. `make bench` runs all benches but GPU and
accuracy (about an hour on two quiet cores, 40 minutes without MEDPSP_DATA) and writes this page
from their results, which lie in `tests/bench/results`; only the reasons are written by hand.
"""
Chapter = tuple[str, str, str]
CHAPTERS: dict[str, Chapter] = {
    "shards": (
        "From DICOM to shards",
        "make bench-shards",
        "CPU time of one slice from DICOM files to a committed shard. The *floor* reads the files, "
        "compresses by the same codec, hashes and writes, and does nothing else.",
    ),
    "reading": (
        "Reading",
        "make bench-shards bench-train",
        "Headers of an archive, single slices in random order from the page cache, batches, and "
        "training pairs with augmentation.",
    ),
    "train": (
        "A step of training",
        "make bench-train",
        "CPU time. The head `shallow` does what smp.PSPNet does; `refine`, the usual one, decodes "
        "as smp.Unet does. Loops of others are given our network and our loss.",
    ),
    "gpu": (
        "A step on a GPU",
        "python tests/bench/gpu.py --results tests/bench/results",
        "Everything that `fit` does in a step, against peers in a bare loop. The head `shallow` "
        "does what smp.PSPNet does, `refine`, the usual one, decodes as smp.Unet does: it "
        "multiplies about twice as much an image as smp.PSPNet, which scales its mask up from "
        "stride 8.",
    ),
    "accuracy": (
        "Accuracy at equal CPU seconds",
        "make bench-accuracy",
        "By how much the Dice of test patients is ahead of other networks, seed by seed, each "
        "seed with a split of its own. The wanted figure is the standard deviation over seeds. "
        "It takes hours, so `make bench` does not run it: the tables are of runs of their own, "
        "with their dates. Further runs, of which only the figures were kept, stand in "
        "DECISIONS.md (120 s on hippocampus and sunnybrook, and ResNet18 on sunnybrook).",
    ),
    "export": (
        "Exported files",
        "make bench-export",
        "One image of 512 x 512 through torch, our ONNX files and OpenVINO's int8 by NNCF, each "
        "in a process of its own: networks that learnt a phantom for 200 steps. Then what each "
        "file costs in Dice on real scans, where MEDPSP_DATA names a folder of them.",
    ),
    "device": (
        "On the device",
        "make bench-export",
        "Whole commands: `medpsp predict` against MONAI with highdicom, its memory over the length "
        "of a series, and the base install.",
    ),
}
ELSEWHERE = {
    ("shards", "headers"): "reading",
    ("shards", "random"): "reading",
    ("shards", "loader"): "reading",
    ("train", "pairs for training"): "reading",
    ("export", "series"): "device",
    ("export", "flat"): "device",
    ("export", "cold"): "device",
}
"""Sections that stand in another chapter than that of their bench."""


@dataclass(frozen=True)
class Section:
    """What a bench found at one go."""

    name: str
    facts: dict[str, Any]
    rows: list[Row]

    @property
    def split(self) -> tuple[str, str]:
        """The backbone in its name, and the name without it; the first is empty where none is."""
        words = self.name.split(" ")
        found = next((word for word in words if word in BACKBONES), "")
        return found, " ".join(word for word in words if word != found)


Chapters = dict[str, list[Section]]
"""Sections by the key of their chapter."""


def main() -> None:
    KEPT.mkdir(exist_ok=True)
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem in CHAPTERS:
            shutil.copyfile(path, KEPT / path.name)
    PAGE.write_text(page(chapters(KEPT), reasons()))
    print(f"{PAGE.relative_to(ROOT)}: from {', '.join(p.name for p in sorted(KEPT.iterdir()))}")


def chapters(folder: Path) -> Chapters:
    """All results of a folder, in the order of the page."""
    found: Chapters = {key: [] for key in CHAPTERS}
    for bench in CHAPTERS:
        path = folder / f"{bench}.json"
        for name, tree in (json.loads(path.read_text()) if path.exists() else {}).items():
            section = Section(name, tree["facts"], [Row(**row) for row in tree["rows"]])
            found[ELSEWHERE.get((bench, name), bench)].append(section)
    return found


def reasons() -> dict[str, str]:
    """Why we lose: text by a pattern of ``SECTION: LABEL``."""
    found: dict[str, str] = json.loads(REASONS.read_text())
    return found


def page(found: Chapters, why: dict[str, str]) -> str:
    """Markdown."""
    parts = [INTRO, *_summary(found), *_behind(found, why)]
    for key, (title, command, text) in CHAPTERS.items():
        parts += [f"## {title}", "", f"{text} `{command}`", ""]
        if not found[key]:
            parts += ["Not run.", ""]
        for sections in _together(found[key]):
            parts += [*_table(sections), ""]
    return "\n".join(parts).rstrip() + "\n"


def _summary(found: Chapters) -> Iterator[str]:
    """How many figures are met, by chapter."""
    yield from ("## In short", "")
    yield from _head("chapter", "measured", "wanted figures", "met", "missed", "no figure")
    for key, (title, _, _) in CHAPTERS.items():
        rows = [row for section in found[key] for row in section.rows if row.goal]
        verdicts = [row.verdict for row in rows]
        met, missed = verdicts.count("ok"), verdicts.count("MISSED")
        counts = (len(rows), met, missed, len(rows) - met - missed)
        days = _range(str(section.facts["when"])[:10] for section in found[key])
        link = f"[{title}](#{title.lower().replace(' ', '-')})"
        yield _line(link, days or "not run", *map(str, counts))
    yield ""


def _behind(found: Chapters, why: dict[str, str]) -> Iterator[str]:
    """What was missed, and why: a line for each reason of a chapter."""
    yield from ("## Where we lose", "")
    yield from _head("chapter", "figures, and what was wanted", "why")
    for key, sections in found.items():
        lines: dict[str, dict[str, list[str]]] = {}
        for section in sections:
            for row in section.rows:
                if row.verdict == "MISSED":
                    figures = lines.setdefault(reason(f"{section.name}: {row.label}", why), {})
                    figure = f"{row.label} **{row.shown}** ({row.goal})"
                    figures.setdefault(section.name, []).append(plain(figure))
        for text, figures in lines.items():
            cell = "<br>".join(f"{plain(n)}: {'; '.join(rows)}" for n, rows in figures.items())
            yield f"| {CHAPTERS[key][0]} | {cell} | {plain(text)} |"
    yield ""


def reason(place: str, why: dict[str, str]) -> str:
    """Of the first pattern that fits."""
    return next((text for part, text in why.items() if fnmatchcase(place, part)), UNKNOWN)


def _together(sections: Sequence[Section]) -> Iterator[list[Section]]:
    """Sections that differ in the backbone only, in one list; others alone."""
    groups: dict[Any, list[Section]] = {}
    for number, section in enumerate(sections):
        backbone, name = section.split
        groups.setdefault(name if backbone else number, []).append(section)
    yield from groups.values()


def _table(sections: list[Section]) -> Iterator[str]:
    """Rows of one section, or with a column for each backbone."""
    yield from (f"### {sections[0].split[1].strip(', ')}", "")
    yield from _facts(sections)
    if any(section.split[0] for section in sections):
        yield from _columns(sections)
        return
    table = [
        (row.label, row.shown, row.spread, row.ours, row.theirs, row.goal, _said(row.verdict))
        for row in sections[0].rows
    ]
    used = [number for number in range(len(HEAD)) if any(cells[number] for cells in table)]
    if used:
        yield from _head(*(HEAD[number] for number in used))
    for cells in table:
        yield _line(*(cells[number] for number in used))


def _columns(sections: list[Section]) -> Iterator[str]:
    yield from _head("", *(section.split[0] for section in sections))
    found = [{row.label: row for row in section.rows} for section in sections]
    for label in dict.fromkeys(label for rows in found for label in rows):
        yield _line(label, *(_cell(rows[label]) if label in rows else "" for rows in found))


def _cell(row: Row) -> str:
    """A figure with what is wanted of it."""
    goal = f" ({row.goal})" if row.goal else ""
    return f"{row.shown}{goal} {_said(row.verdict)}".strip()


def _said(verdict: str) -> str:
    short = verdict.partition(": other processes")[0]
    return f"**{short}**" if short == "MISSED" else short


def _facts(sections: list[Section]) -> Iterator[str]:
    """Where and when in a line; then what is the same for all, once, and the rest by backbone."""
    when, load = (_range(str(section.facts[n]) for section in sections) for n in ("when", "load"))
    several = len({section.facts["machine"] for section in sections}) > 1
    machine = "on several machines" if several else sections[0].facts["machine"]
    yield from (f"*{when}; {machine}; load {load}.*", "")
    names = [name for name in dict.fromkeys(n for s in sections for n in s.facts)]
    lines = []
    for name in names:
        if name in STAMP and not (name == "machine" and several):
            continue
        values = [(s.split[0], str(s.facts[name])) for s in sections if name in s.facts]
        if len({value for _, value in values}) == 1:
            lines.append(f"- {name}: {values[0][1]}")
        else:
            lines += [f"- {name}, {backbone}: {value}" for backbone, value in values]
    yield from [*map(plain, lines), ""] if lines else []


def _range(values: Any) -> str:
    """The only one, or the first and the last in order."""
    found = sorted(set(values))
    return " to ".join(dict.fromkeys((*found[:1], *found[-1:])))


def _head(*cells: str) -> Iterator[str]:
    yield _line(*cells)
    yield "|" + "---|" * len(cells)


def _line(*cells: str) -> str:
    return f"| {' | '.join(map(plain, cells))} |"


def plain(text: str) -> str:
    """As Markdown shows it, with signs in place of two characters."""
    signs = {"|": "\\|", ">= ": "≥\u00a0", "<= ": "≤\u00a0", "+-": "±", "<": "&lt;", "_": "\\_"}
    for found, sign in signs.items():
        text = text.replace(found, sign)
    return text


if __name__ == "__main__":
    main()
