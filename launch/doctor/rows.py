"""A row of the report, and how it looks in a terminal and in a log file."""

from __future__ import annotations

import enum
import os
import pwd
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTH = 100
_WHAT, _VERDICT = 19, 9
_INDENT = " " * (_WHAT + _VERDICT)


class Verdict(enum.StrEnum):
    """Of a check; a note is for people, a problem ends the command with 1."""

    ok = enum.auto()
    note = enum.auto()
    problem = enum.auto()


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        what: Was checked.
        verdict: Of it.
        found: In words.
        todo: Where it is not ok.
    """

    what: str
    verdict: Verdict
    found: str
    todo: str = ""

    def tree(self) -> dict[str, str]:
        """JSON values; `row_of` reads them."""
        return asdict(self)


def row_of(tree: dict[str, str]) -> Row:
    """The inverse of `Row.tree`."""
    return Row(tree["what"], Verdict(tree["verdict"]), tree["found"], tree["todo"])


def ok(what: str, found: str) -> Row:
    """Nothing to do."""
    return Row(what, Verdict.ok, found)


def note(what: str, found: str, todo: str) -> Row:
    """Something to know."""
    return Row(what, Verdict.note, found, todo)


def problem(what: str, found: str, todo: str) -> Row:
    """Something that will fail."""
    return Row(what, Verdict.problem, found, todo)


def merged(rows: Iterable[Row]) -> list[Row]:
    """Neighbours that are ok and of one thing become one row."""
    found: list[Row] = []
    for row in rows:
        last = found[-1] if found else None
        if last and row.verdict is last.verdict is Verdict.ok and row.what == last.what:
            found[-1] = ok(row.what, f"{last.found}, {row.found}")
        else:
            found.append(row)
    return found


def lines_of(row: Row) -> list[str]:
    """Aligned, at most `WIDTH` wide where words allow it."""
    head = f"{row.what:<{_WHAT - 1}} {row.verdict:<{_VERDICT}}"
    found = _wrapped(row.found, head, _INDENT)
    return found + (_wrapped(row.todo, f"{_INDENT}do: ", f"{_INDENT}    ") if row.todo else [])


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    plain = text.encode("utf-8", "backslashreplace").decode()
    return textwrap.wrap(
        plain,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def private(text: object) -> str:
    """A path or the words of somebody else, without the names of this host and of its user."""
    told, home = " ".join(str(text).split()), str(Path.home())
    if len(home) > 1:
        told = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", told)
    user, host = _user(), os.uname().nodename
    if user:
        told = re.sub(rf"(?<=/){re.escape(user)}(?=/|\W|$)", "$USER", told)
    for name in {host, host.partition(".")[0]} - {"", "localhost"}:
        told = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "$HOST", told)
    return told


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a number without a name
        return ""
