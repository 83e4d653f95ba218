"""docs/licences.md: every pinned distribution, its licence, and why it may be here.

python -m tests.licences >docs/licences.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from medpsp.deploy.packages import find, installed, licence_of

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("", "shards", "train", "export", "cluster", "receive", "docs", "dev")
"""In this order a distribution belongs to the first that brings it."""

SUITABLE = frozenset(
    {
        *("0BSD", "3-Clause BSD License", "BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause"),
        *("Apache 2.0", "Apache Software License", "Apache Software License 2.0", "Apache-2.0"),
        *("Apache-2.0 WITH LLVM-exception", "BSL-1.0", "CC0-1.0", "ISC", "ISC License (ISCL)"),
        *("MIT", "MIT License", "MIT-CMU", "PSF-2.0", "Zlib"),
    }
)
"""As distributions write them: they ask for their notice and no more."""

MPL = "changes to its own files stay under the MPL; nothing of it is changed or copied here"
NVIDIA = (
    "NVIDIA's licence: free to use, not open; torch asks for it on Linux; training only, and "
    "nothing of it is passed on"
)
REASONS = {
    "certifi": MPL,
    "hypothesis": MPL,
    "pathspec": MPL,
    "tqdm": MPL,
    "hjson": "MIT or the Academic Free License 3.0, by choice",
    "pytest-timeout": "MIT; `DFSG approved` is Debian's word for it",
    "cuda-toolkit": "states none: a list of requirements of NVIDIA without a file of its own",
}
"""Of distributions whose own licence is another; those of `nvidia-` all have `NVIDIA`."""

INTRODUCTION = """\
medpsp is Apache-2.0. `make` installs what `constraints.txt` pins; here are the licence that each
distribution states, and the extra that brings it (a device has `base`). A test fails where a
licence does not suit Apache-2.0 and has no reason below."""

GNU = re.compile(r"GNU (?:LESSER |LIBRARY |AFFERO )?GENERAL PUBLIC LICENSE\s+Version \d", re.I)
BUNDLED = {
    "numpy": "libgfortran and libquadmath: GPL 3 with GCC's exception for run-time libraries, LGPL",
    "opencv-python-headless": "FFmpeg: LGPL 2.1, in shared libraries that can be replaced",
    "pillow": "scripts of XZ Utils, which are not in the wheel; liblzma itself is 0BSD",
    "scipy": "libgfortran and libquadmath: GPL 3 with GCC's exception for run-time libraries, LGPL",
    "setuptools": "autocommand: LGPL 3, a module of its own; nothing of ours imports it",
}
"""Distributions with the text of a GNU licence in their licence files, and for what."""


def pins() -> dict[str, str]:
    """Name to version, of .ci/hashes.txt."""
    text = (ROOT / ".ci/hashes.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==([^\s;]+)", text, re.MULTILINE))


def stated(of: Distribution) -> str:
    """The licence in one line; empty where none is stated."""
    found = licence_of(of)
    return str(found.get("expression") or found.get("license", {}).get("name", ""))


def suits(licence: str) -> bool:
    """Whether a statement suits Apache-2.0: of parts joined by OR any, by AND all.

    One with brackets around a choice is left to a person, so it does not.
    """
    if " OR " in licence and "(" in licence:
        return False
    return any(
        all(part in SUITABLE for part in re.split(" AND | and ", choice))
        for choice in licence.split(" OR ")
    )


def reason_for(name: str, licence: str) -> str:
    """Why a distribution may be here; empty where its licence says it, and where nothing does."""
    if suits(licence):
        return ""
    return NVIDIA if name.startswith("nvidia-") else REASONS.get(name, "")


def gnu_texts(of: Distribution) -> Iterator[str]:
    """Licence files that hold the text of a GNU licence."""
    for file in of.files or ():
        path = Path(str(of.locate_file(file)))
        named = re.search("licen[cs]e|copying|notice", file.name, re.IGNORECASE)
        if named and file.suffix in ("", ".txt", ".md", ".rst") and path.is_file():
            if GNU.search(path.read_text(encoding="utf-8", errors="replace")):
                yield str(file)


def brought_by() -> dict[str, str]:
    """Name to the extra that brings it; "base" for what a device has."""
    found: dict[str, str] = {}
    for extra in EXTRAS:
        for name in installed("medpsp", [extra] if extra else []):
            found.setdefault(name, extra or "base")
    return found


def page() -> str:
    """All of docs/licences.md.

    Raises:
        PackageNotFoundError: A pinned distribution is not installed.
    """
    by, lines, reasons = brought_by(), [], set()
    for name, version in pins().items():
        licence = stated(distribution(name))
        why = reason_for(name, licence)
        mark = f" ({'nvidia' if why == NVIDIA else name})" if why else ""
        reasons |= {(mark.strip(" ()"), why)} if why else set()
        lines.append(f"| {name} | {version} | {licence or 'none stated'}{mark} | {by[name]} |")
    return "\n".join(
        (
            *("# Licences", ""),
            INTRODUCTION,
            "",
            "| distribution | version | licence | for |",
            "|---|---|---|---|",
            *lines,
            *("", "## Why others may be here", "", "| distribution | why |", "|---|---|"),
            *(f"| {name} | {why} |" for name, why in sorted(reasons)),
            *("", "## Libraries within wheels", ""),
            "These wheels carry the text of a GNU licence, for a library that is built into them.",
            *("", "| distribution | for |", "|---|---|"),
            *(f"| {name} | {what} |" for name, what in BUNDLED.items() if find(name)),
            *("", "albumentations stays at 2.0.8, the last under MIT: its successor is AGPL."),
            "",
        )
    )


if __name__ == "__main__":
    print(page(), end="")
