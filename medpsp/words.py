"""Numbers and lists in lines for people."""

from __future__ import annotations

from collections.abc import Sequence


def many(count: int, one: str) -> str:
    """A number of things: 1 patient, 2 patients, 2 series, 2 classes."""
    if count == 1:
        return f"{count} {one}"
    end = "es" if one.endswith(("ss", "ch")) else "" if one.endswith("s") else "s"
    return f"{count} {one}{end}"


def listed(words: Sequence[str]) -> str:
    """Words with commas, and an "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
