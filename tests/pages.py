"""What the pages say: their fenced blocks, commands and inline codes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("quickstart", "README")
"""Their commands make what the others work on."""
PAGES = sorted(
    (ROOT / "README.md", *(ROOT / "docs").glob("*.md")),
    key=lambda path: (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem),
)
LANGUAGES = ("sh", "console", "yaml", "python", "text")
FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")


@dataclass(frozen=True)
class Block:
    """What stands in a fence.

    Attributes:
        language: Behind the fence; empty where it says none.
        title: Name of a file, or empty.
    """

    language: str
    title: str
    text: str


def blocks(text: str) -> list[Block]:
    found = []
    for language, rest, inner in FENCE.findall(text):
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(language, title[1] if title else "", inner))
    return found


def commands(text: str) -> list[str]:
    """Of the sh blocks, and those of console blocks behind a prompt; one string each."""
    found = []
    for block in blocks(text):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif block.language != "sh":
            continue
        bare = (" ".join(COMMENT.sub("", line).split()) for line in lines)
        found += [line for line in bare if line]
    return found


def outside_fences(text: str) -> str:
    return FENCE.sub("", text)


def inline(text: str) -> list[str]:
    """What stands in single backticks, fences left out."""
    return re.findall(r"`([^`\n]+)`", outside_fences(text))
