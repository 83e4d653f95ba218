"""Figures of the benches as rows that say what is wanted: printed, and kept for `page`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "bench"


class Missing(Exception):
    """Something to measure is not there: the row says so."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: it should reach ``least``, or not pass ``most``.

    A ``disturbed`` one is shown, but neither met nor missed.

    Attributes:
        value: Mostly a ratio.
        why: There is no figure, or nothing is wanted of it.
        ours: What it was made of, with its unit; so `theirs`.
        spread: The figures of single rounds.
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
    spread: str = ""

    @property
    def verdict(self) -> str:
        """Empty where nothing is wanted of the figure."""
        if self.value is None:
            return self.why or "not measured"
        if not self.goal:
            return self.why
        if self.disturbed:
            return "DISTURBED: other processes had the cores, run it again"
        low = self.least is not None and not self.value >= self.least
        high = self.most is not None and not self.value <= self.most
        return "MISSED" if low or high else "ok"

    @property
    def goal(self) -> str:
        """What is wanted; empty where nothing is."""
        if self.least is not None:
            return f">= {self.least:.4g}"
        return f"<= {self.most:.4g}" if self.most is not None else ""

    @property
    def shown(self) -> str:
        """The figure with its unit."""
        return "-" if self.value is None else f"{_digits(self.value)} {self.unit}".strip()

    @property
    def kept(self) -> dict[str, object]:
        """As it is in a file: what is as usual is left out."""
        found = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, usual) in found.items() if value != usual}

    @property
    def text(self) -> str:
        """As it is printed."""
        both = f"  ({self.ours}, {self.theirs})" if self.ours else ""
        spread = f"  {self.spread}" if self.spread else ""
        line = f"{self.label:76} {self.shown:>14}  {self.goal:9} {self.verdict}{both}{spread}"
        return line.rstrip()


def _digits(value: float) -> str:
    """Four digits, and whole numbers as they are."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def paired(
    label: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str = "ms",
    *,
    least: float | None = None,
    most: float | None = None,
) -> Row:
    """The median of the ratios, round by round: theirs / ours, with ``most`` ours / theirs."""
    if not ours or not theirs:
        return Row(label=label, value=None, least=least, most=most)
    pairs = zip(ours, theirs, strict=True)
    ratios = sorted(a / b if most is not None else b / a for a, b in pairs)
    mine, other = (f"{_digits(statistics.median(times))} {unit}" for times in (ours, theirs))
    return Row(
        label=label,
        value=statistics.median(ratios),
        least=least,
        most=most,
        ours=mine,
        theirs=other,
        spread=f"{_digits(ratios[0])} to {_digits(ratios[-1])}",
    )


def report(
    bench: str,
    section: str,
    rows: Sequence[Row],
    facts: Mapping[str, object],
    lines: Sequence[str] = (),
    folder: Path | None = None,
) -> None:
    """Print what a section found, and put it into the results file of its bench.

    Facts ``when``, ``machine`` and ``load`` are now and here where they are not given.
    """
    load = f"{os.getloadavg()[0]:.1f}"
    print(f"\n== {section}  (load {load})")
    for name, value in facts.items():
        print(f"  {name}: {value}")
    for text in (*lines, *(row.text for row in rows)):
        print("  " + text, flush=True)
    path = (folder or FOLDER) / f"{bench}.json"
    tree = json.loads(path.read_text()) if path.exists() else {}
    stamp = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "load": load}
    tree[section] = {
        "facts": {**stamp, **facts},
        "lines": list(lines),
        "rows": [row.kept for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n")


def run_sections(bench: str, works: Mapping[str, Callable[[], object]]) -> None:
    """One after the other; one that fails costs the others nothing.

    Raises:
        SystemExit: Some failed, by name. What is not there to be measured is no failure.
    """
    failed = []
    for name, work in works.items():
        began = time.monotonic()
        try:
            work()
        except Missing as error:
            report(bench, name, [], {"not measured": str(error)})
        except Exception as error:  # noqa: BLE001 - the other sections have their rows all the same
            traceback.print_exc()
            report(bench, name, [], {"not measured": f"failed with {type(error).__name__}"})
            failed.append(name)
        print(f"\n{name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{bench}: failed: {', '.join(failed)}")


def machine() -> str:
    """Cores, processor, system and Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in reversed(lines))
    }
    model = about.get("model name", platform.machine())
    family = f" of family {about['cpu family']}" if "cpu family" in about else ""
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {model}{family}, {platform.system()}, Python {python}"


def versions(*names: str) -> str:
    """Of packages in this environment."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
