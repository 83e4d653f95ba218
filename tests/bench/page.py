"""The page of comparisons, docs/benchmarks.md, from what the benches left in runs/bench.

    python tests/bench/page.py

The results are copied to tests/bench/results, so that the page can be made, and checked, anywhere.
A figure that misses what is wanted stands at the top, with its reason from REASONS, or without one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.results import FOLDER, ROOT, Row

KEPT = Path(__file__).with_name("results")
PAGE = ROOT / "docs" / "benchmarks.md"
BENCHES = {
    "shards": ("From DICOM to shards, and reading them", "make bench-shards"),
    "train": ("Training", "make bench-train"),
    "accuracy": ("Accuracy at equal CPU seconds", "make bench-accuracy"),
    "export": ("Exported files and the device", "make bench-export"),
}
INTRO = """# Benchmarks

Ours and theirs ran in turn in one process tree, on one machine; a ratio is the median of paired
rounds. Nothing on this page is written by hand but the reasons: `make bench` runs the benches and
makes it anew (hours; the accuracy table needs real scans). *Wanted* is what we set out to reach.
"""
Found = dict[str, dict[str, Any]]
"""By section: when, facts, lines, rows."""


def main() -> None:
    KEPT.mkdir(exist_ok=True)
    for name in BENCHES:
        if (FOLDER / f"{name}.json").exists():
            shutil.copyfile(FOLDER / f"{name}.json", KEPT / f"{name}.json")
    PAGE.write_text(page(KEPT))
    print(f"{PAGE.relative_to(ROOT)}: from {', '.join(p.name for p in sorted(KEPT.iterdir()))}")


def page(folder: Path) -> str:
    """Markdown of all results in a folder."""
    found = {name: _results(folder / f"{name}.json") for name in BENCHES}
    reasons = json.loads((Path(__file__).with_name("reasons.json")).read_text())
    parts = [INTRO, *_behind(found, reasons)]
    for name, (title, command) in BENCHES.items():
        parts += [f"## {title}", f"`{command}`" if found[name] else f"Not run: `{command}`.", ""]
        for section, tree in found[name].items():
            parts += [*_section(section, tree), ""]
    return "\n".join(parts).rstrip() + "\n"


def rows_of(tree: dict[str, Any]) -> list[Row]:
    """Of a section."""
    return [Row(**row) for row in tree["rows"]]


def _results(path: Path) -> Found:
    found: Found = json.loads(path.read_text()) if path.exists() else {}
    return found


def _behind(found: dict[str, Found], reasons: dict[str, dict[str, str]]) -> Iterator[str]:
    """A table of what was missed, and why."""
    yield "## Where we are behind what we wanted"
    yield ""
    yield "| | figure | wanted | why |"
    yield "|---|---|---|---|"
    for bench, sections in found.items():
        for section, tree in sections.items():
            for row in rows_of(tree):
                if row.verdict == "MISSED":
                    label = f"{section}: {row.label}"
                    known = reasons.get(bench, {})
                    why = next((text for part, text in known.items() if part in label), "not known")
                    yield f"| {_cell(label)} | {row.shown} | {_cell(row.goal)} | {_cell(why)} |"
    yield ""


def _section(section: str, tree: dict[str, Any]) -> Iterator[str]:
    yield f"### {section}"
    yield ""
    for name, fact in tree["facts"].items():
        yield f"- {name}: {fact}"
    yield f"- when: {tree['when']}"
    rows = rows_of(tree)
    if rows:
        yield ""
        yield "| | figure | ours | theirs | wanted | |"
        yield "|---|--:|--:|--:|---|---|"
        for row in rows:
            cells = (row.label, row.shown, row.ours, row.theirs, row.goal, row.verdict)
            yield f"| {' | '.join(map(_cell, cells))} |"
    if tree["lines"]:
        yield ""
        yield "```text"
        yield from tree["lines"]
        yield "```"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
