"""What the children of a scan run: source files to rows of the catalogue, many files a request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from medpsp.dicom import labelref, tasks
from medpsp.dicom.checked import checked_refs
from medpsp.dicom.container import Found, objects_of
from medpsp.dicom.parse import refusing
from medpsp.dicom.read import read_headers, scan_header
from medpsp.dicom.sandbox import Answer
from medpsp.dicom.scan import Read, no_image, read_object
from medpsp.errors import SourceError
from medpsp.types import Place, ReadPolicy, SliceRef
from shards.headers import RowBuffer

ROWS_AT_ONCE, SECONDS_AT_ONCE = 4096, 0.5
"""Rows of an answer, and the time between two: each has the limits of one object."""


def scan(root: str, files: list[list[str]], policy: dict[str, Any]) -> Iterator[Answer]:
    """Read files: each answer is the number of those that are done, and a `headers.Packed`.

    Args:
        root: Ends in a slash.
        files: Name below the root, code and detail of each; one with a code is not opened.
        policy: Of `ReadPolicy`.
    """
    rules, rows, until = tasks.policy_of(policy), RowBuffer(), time.monotonic() + SECONDS_AT_ONCE
    for number, (name, code, detail) in enumerate(files):
        listed = Found(name, Place(root + name), code, detail)
        for member, item in _read(listed, rules):
            rows.add(number, member, item)
            if len(rows) >= ROWS_AT_ONCE or time.monotonic() > until:
                yield number, list(rows.take())
                until = time.monotonic() + SECONDS_AT_ONCE
    yield len(files), list(rows.take())


def main(seconds: int, memory_mib: int) -> None:
    """Answer requests from stdin until it closes."""
    tasks.main(seconds, memory_mib, {**tasks.TASKS, "scan": scan})


def _read(file: Found, policy: ReadPolicy) -> Iterable[tuple[str, Read]]:
    """What each object of a file is, behind its member."""
    if file.code:
        return [("", read_object(_HERE, file, "", policy))]
    try:
        refs = scan_header(file.place.path, "", policy)
    except SourceError as error:
        return [("", no_image(_HERE, file.place, "", error))]
    if refs is not None:
        return [("", Read("", refs))]
    found = objects_of(file.name, file.place.path)
    return ((item.place.member, read_object(_HERE, item, "", policy)) for item in found)


class _Here:
    """Reads in this process what a `Sandbox` would let its child read."""

    def headers(self, place: Place, file_id: str, policy: ReadPolicy) -> list[SliceRef]:
        with refusing("DEC_ERROR", "not readable"):
            refs = read_headers(place, file_id, policy)
        return checked_refs([asdict(ref) for ref in refs])

    def label_head(self, place: Place) -> tuple[str, str]:
        try:
            with refusing("DEC_ERROR", "not readable"):
                return labelref.label_head(place)
        except SourceError:
            return "", ""


_HERE = _Here()
