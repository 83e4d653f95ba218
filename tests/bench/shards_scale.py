"""The tables of docs/scale.md from what the bench measured: a calculation, written in place.

python tests/bench/shards_scale.py [runs/bench/shards.json] [docs/scale.md]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- calculated -->", "<!-- end -->"
SLICES, NODES = (10**6, 10**7, 10**8), (1, 16, 256)


@dataclass(frozen=True)
class Assumed:
    """What the calculation takes for granted."""

    cores: int = 32  # of a node
    node_gb: float = 1.0  # GB/s that one node moves to and from the storage
    storage_gb: float = 20.0  # GB/s of the storage as a whole
    opens: int = 20_000  # files a second that its metadata server opens
    shard: int = 128  # slices of a shard


@dataclass(frozen=True)
class Costs:
    """Of one slice: CPU seconds and bytes."""

    scan: float
    scan_name: str
    convert: float
    source: float
    image: float
    rest: float


def main(results: str = "runs/bench/shards.json", page: str = "docs/scale.md") -> None:
    tree = json.loads(Path(results).read_text())
    path = Path(page)
    text = path.read_text()
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    path.write_text(head + BEGIN + "\n" + tables(tree, Assumed()) + tail)


def tables(tree: dict[str, Any], assumed: Assumed) -> str:
    """Measured costs, then sizes, then hours, as Markdown."""
    lines = ["", "Measured, one core, warm files:", "", "| step | CPU ms a slice | seen |"]
    lines.append("|---|---|---|")
    for section, name in (
        ("headers", "ours, whole scan to the catalogue"),
        ("headers", "ours scan_header"),
        ("headers", "ours read_headers"),
        ("convert native", "ours default"),
        ("convert native", "ours fast"),
        ("convert native", "ours dense"),
        ("convert native", "ours default, labels"),
        ("convert jpegls", "ours default"),
        ("convert rle", "ours default"),
        ("convert jpeglossless", "ours default"),
    ):
        found = median(tree, section, name)
        if found is not None:
            facts = tree[section]["facts"]
            seen = f"{facts['when']}, load {facts['load']}"
            lines.append(f"| {section}: {name} | {found:.3f} | {seen} |")
    profiles = {p: costs(tree, p) for p in ("default", "fast", "dense")}
    lines += ["", "Calculated, bytes and files:", ""]
    lines += ["| slices | source TB | default TB | fast TB | dense TB | files in the shards |"]
    lines.append("|---|---|---|---|---|---|")
    source = profiles["default"].source
    for count in SLICES:
        total = " | ".join(f"{count * (c.image + c.rest) / 1e12:.2f}" for c in profiles.values())
        files = 3 * -(-count // assumed.shard)
        lines.append(f"| {power(count)} | {count * source / 1e12:.2f} | {total} | {files:,} |")
    scan_name = profiles["default"].scan_name
    part = "" if "whole" in scan_name else ", reading alone, without the catalogue"
    lines += ["", f"Calculated; the scan is `{scan_name}`{part}:", ""]
    lines += ["| slices | nodes | scan | convert, default | convert, fast | limit (default) |"]
    lines.append("|---|---|---|---|---|---|")
    for count in SLICES:
        for nodes in NODES:
            scan = max(
                count * profiles["default"].scan / assumed.cores, count / assumed.opens
            )  # one node plans
            slow, why = convert(profiles["default"], count, nodes, assumed)
            fast, _ = convert(profiles["fast"], count, nodes, assumed)
            cells = " | ".join(map(hours, (scan, slow, fast)))
            lines.append(f"| {power(count)} | {nodes} | {cells} | {why} |")
    return "\n".join([*lines, "", ""])


def convert(cost: Costs, count: int, nodes: int, assumed: Assumed) -> tuple[float, str]:
    """Seconds of a conversion, and what takes them."""
    moved = cost.source + cost.image + cost.rest
    rate = min(nodes * assumed.node_gb, assumed.storage_gb) * 1e9
    limits = {
        "cores": count * cost.convert / (nodes * assumed.cores),
        "network of the nodes" if rate < assumed.storage_gb * 1e9 else "storage": count
        * moved
        / rate,
        "metadata server": count / assumed.opens,
    }
    why = max(limits, key=lambda name: limits[name])
    return limits[why], why


def power(count: int) -> str:
    """Of ten."""
    return f"10^{len(str(count)) - 1}"


def hours(seconds: float) -> str:
    """Two digits, minutes below an hour."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def costs(tree: dict[str, Any], profile: str) -> Costs:
    """Of a profile for native CT."""
    for name in ("ours, whole scan to the catalogue", "ours scan_header", "ours read_headers"):
        scan = median(tree, "headers", name)
        if scan is not None:
            break
    image, *rest = (
        figure(tree, "sizes", f"{profile}: {part}") for part in ("image", "label", "commit")
    )
    native = median(tree, "convert native", f"ours {profile}")
    if scan is None or native is None or image is None or None in rest:
        raise SystemExit("the sections headers, convert and sizes have to be run first")
    return Costs(
        scan=scan / 1e3,
        scan_name=name,
        convert=native / 1e3,
        source=float(tree["convert native"]["facts"]["bytes a file"]),
        image=image,
        rest=sum(size or 0.0 for size in rest),
    )


def median(tree: dict[str, Any], section: str, name: str) -> float | None:
    """CPU ms a slice; None where it was not measured."""
    return figure(tree, section, f"{name}: CPU time")


def figure(tree: dict[str, Any], section: str, label: str) -> float | None:
    """Of a row; None where there is none."""
    rows = tree.get(section, {}).get("rows", [])
    return next((row["value"] for row in rows if row["label"] == label), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
