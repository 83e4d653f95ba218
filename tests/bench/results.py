"""Figures of the benches as rows that say what is wanted: printed, and kept for `page`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "bench"


class Missing(Exception):
    """Something to measure is not there: the row says so."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: it should reach ``least``, or not pass ``most``; ``why`` there is none.

    A ``disturbed`` one is shown, but neither met nor missed.

    Attributes:
        value: Mostly a ratio.
        ours: What it was made of, with its unit; so `theirs`.
    """

    label: str
    value: float | None
    least: float | None = None
    most: float | None = None
    unit: str = ""
    why: str = ""
    disturbed: bool = False
    ours: str = ""
    theirs: str = ""

    @property
    def verdict(self) -> str:
        """Empty where nothing is wanted of the figure."""
        if self.value is None:
            return self.why or "not measured"
        if not self.goal:
            return ""
        if self.disturbed:
            return "DISTURBED: other processes had the cores, run it again"
        low = self.least is not None and not self.value >= self.least
        high = self.most is not None and not self.value <= self.most
        return "MISSED" if low or high else "ok"

    @property
    def goal(self) -> str:
        """What is wanted; empty where nothing is."""
        if self.least is not None:
            return f">= {self.least:g}"
        return f"<= {self.most:g}" if self.most is not None else ""

    @property
    def shown(self) -> str:
        """The figure with its unit."""
        return "-" if self.value is None else f"{self.value:.4g} {self.unit}".strip()

    @property
    def text(self) -> str:
        """As it is printed."""
        both = f"  ({self.ours}, {self.theirs})" if self.ours else ""
        return f"{self.label:76} {self.shown:>14}  {self.goal:9} {self.verdict}{both}".rstrip()


def report(
    bench: str,
    section: str,
    rows: Sequence[Row],
    facts: Mapping[str, object],
    lines: Sequence[str] = (),
) -> None:
    """Print what a section found, and put it into the results file of its bench."""
    print(f"\n== {section}  (load {os.getloadavg()[0]:.1f})")
    for name, value in facts.items():
        print(f"  {name}: {value}")
    for text in (*lines, *(row.text for row in rows)):
        print("  " + text, flush=True)
    path = FOLDER / f"{bench}.json"
    tree = json.loads(path.read_text()) if path.exists() else {}
    tree[section] = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "facts": {name: str(value) for name, value in facts.items()},
        "lines": list(lines),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1))


def machine() -> str:
    """Cores, processor, system and Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {model}, {platform.system()}, Python {python}"


def versions(*names: str) -> str:
    """Of packages in this environment."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
