"""Installed distributions: what brought them, their licences, and how CycloneDX names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

LONGEST_LICENCE = 64
"""Characters; some distributions put the whole text into the field."""


def installed(root: str, extras: Iterable[str] = ()) -> dict[str, Distribution]:
    """A distribution and, by name, all that its requirements have brought here.

    What is not installed is left out; empty where ``root`` is not.

    Args:
        root: Name of the distribution.
        extras: Those of its extras that count as well as its base.
    """
    return {name: of for name, (of, _) in requirement_graph(root, extras).items()}


def requirement_graph(
    root: str, extras: Iterable[str] = ()
) -> dict[str, tuple[Distribution, set[str]]]:
    """As `installed`, each with the names of those among them that it asks for."""
    found: dict[str, tuple[Distribution, set[str]]] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("", root, extra) for extra in ("", *extras)]
    while waiting:
        asker, name, extra = waiting.pop()
        here = find(name)
        if here is None:
            continue
        if asker:
            found[asker][1].add(name_of(here))
        if (name, extra) not in seen:
            seen.add((name, extra))
            found.setdefault(name_of(here), (here, set()))
            waiting += [(name_of(here), *one) for one in required(here, extra)]
    return dict(sorted(found.items()))


def required(of: Distribution, extra: str = "") -> Iterator[tuple[str, str]]:
    """(name, extra) of what a distribution asks for on this machine; "" is the base of a name."""
    for line in of.requires or ():
        try:
            one = Requirement(line)
        except InvalidRequirement:  # of years ago, before PEP 508
            continue
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            yield from ((one.name, more) for more in ("", *sorted(one.extras)))


def find(name: str) -> Distribution | None:
    """The installed distribution of a name, if any."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def name_of(of: Distribution) -> str:
    """As PyPI and purl spell it."""
    return re.sub(r"[-_.]+", "-", str(of.metadata["Name"])).lower()


def library(of: Distribution, scope: str) -> dict[str, Any]:
    """A component of CycloneDX: name, version, purl, licence; ``scope`` unless it is empty."""
    name = name_of(of)
    purl = f"pkg:pypi/{name}@{of.version.replace('+', '%2B')}"
    part: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": of.version,
        "purl": purl,
    }
    if scope:
        part["scope"] = scope
    if licence := licence_of(of):
        part["licenses"] = [licence]
    return part


def licence_of(of: Distribution) -> Mapping[str, Any]:
    """The SPDX expression (PEP 639), else what the distribution says in words; empty without."""

    def field(name: str) -> list[str]:
        return [str(text) for text in of.metadata.get_all(name) or ()]

    if expression := field("License-Expression"):
        return {"expression": expression[0]}
    classified = {
        text.rsplit("::", 1)[1].strip()
        for text in field("Classifier")
        if text.startswith("License ::")
    }
    said = [text.strip() for text in field("License") if len(text) <= LONGEST_LICENCE]
    name = " and ".join(sorted(classified - {"OSI Approved"})) or " ".join(said)
    return {"license": {"name": name}} if name else {}
