"""`make audit`: known vulnerabilities of what .ci/hashes.txt pins, asked of OSV by pip-audit.

Ends with 0 where all were asked about and none is known, 1 where one is, 2 where the advisories
could not be had, or not of all: then nothing is known, which is not the same as nothing found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.licences import ROOT

TOOL = "pip-audit==2.10.1"
"""In an environment of its own: no part of an install needs it."""


def ask(pinned: Path) -> subprocess.CompletedProcess[str]:
    """What pip-audit says of a file of pins with hashes, as JSON."""
    uv = Path(sys.executable).parent / "uv"
    how = ["--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]
    which = ["--disable-pip", "--require-hashes", "--requirement", str(pinned)]
    command = [str(uv), "tool", "run", "--quiet", "--from", TOOL, "pip-audit", *how, *which]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def verdict(told: str, problem: str) -> tuple[int, list[str]]:
    """Exit code, and lines for people.

    Args:
        told: What pip-audit printed: JSON, or nothing where it failed.
        problem: What it wrote to its error stream.
    """
    try:
        asked: list[dict[str, Any]] = json.loads(told)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (problem.strip() or "it said nothing").splitlines()[-1]
        return 2, [f"audit: the advisories could not be had, so nothing is known: {last}"]
    lines = []
    for one in asked:
        for found in one.get("vulns", ()):
            names = ", ".join([found["id"], *found.get("aliases", ())])
            mended = ", ".join(found.get("fix_versions", ())) or "no version yet"
            lines.append(f"audit: {one['name']} {one['version']}: {names}; mended in {mended}")
    skipped = [one["name"] for one in asked if "skip_reason" in one]
    if skipped or not asked:
        names = ", ".join(skipped[:6]) + (" ..." if len(skipped) > 6 else "")
        lines.append(f"audit: not asked about {len(skipped)} of {len(asked)} packages: {names}")
    lines.append(f"audit: {len(asked) - len(skipped)} packages were asked about")
    known = any("vulns" in one and one["vulns"] for one in asked)
    return (1 if known else 2 if skipped or not asked else 0), lines


def main() -> int:
    done = ask(ROOT / ".ci/hashes.txt")
    code, lines = verdict(done.stdout, done.stderr)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
