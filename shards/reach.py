"""What cannot be read today is not gone: a look before shards that exist are changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from medpsp.dicom.codes import told_codes
from medpsp.dicom.walk import NOWHERE
from medpsp.errors import ShardError
from shards.commit import PASSING, committed_names, read_commit
from shards.index import OBJECTS, file_sha256, read_manifest
from shards.planfile import Plan
from shards.slots import PLAN, read_unread

CODES = PASSING - {"SOURCE_CHANGED"} | {"FOLDER_UNREADABLE"}
"""Of objects that may be there, and readable the next time."""
_FURTHER = ("SYMLINK_DUPLICATE", "SYMLINK_FOLDER", "SYMLINK_LOOP", "SYMLINK_OUTSIDE")
"""Of names that gave no slice: with nothing behind them now, nothing is missing."""
_SHOWN = 3


def require_reach(plan: Plan, found: dict[str, str], root: Path, settings: str) -> None:
    """Refuse a plan that changes what is written while something is out of reach that was not.

    Only new shards may be added then: images, label objects or masks that are missing for a while
    would take patients, slices or labels out of the others.

    Args:
        plan: That is to be carried out.
        found: Of `unread`.
        root: Folder of the shards.
        settings: ``WriteSettings.text``.

    Raises:
        ShardError: With the codes of what cannot be read.
    """
    known = _known(root) if found else set()
    lost = {file_id: code for file_id, code in found.items() if file_id not in known}
    if not lost:
        return
    planned = {entry.name: entry.digest(settings) for entry in plan.shards}
    written = committed_names(root)
    changed = 0
    for name in written:
        commit = read_commit(root, name)
        changed += commit is None or planned.get(name) != commit.digest
    if changed:
        codes = told_codes(Counter(lost.values()))
        some = ", ".join([*sorted(lost)[:_SHOWN], *["..."] * (len(lost) > _SHOWN)])
        raise ShardError(
            f"data.archive: {len(lost)} objects cannot be read that the last run did not miss "
            f"({codes}; {some}), and {changed} of {len(written)} shards would change or go; make "
            "them readable, move them out of the archive, or take another `out`"
        )


def unread(plan: Plan) -> dict[str, str]:
    """``file_id`` and code of what cannot be read now, as far as that may pass."""
    found: dict[str, str] = {}
    for batch in plan.gathered.rows.batches():
        names = ("file_id", "code", "detail")
        for file_id, code, detail in zip(*(batch[n].to_pylist() for n in names), strict=True):
            if code in CODES or (code == "NOT_REGULAR" and detail == NOWHERE):
                found[file_id] = code
    return found


def _known(root: Path) -> set[str]:
    """What the last plan could not read either, and names that never were files of their own.

    Shards of an earlier version say only what gave no slice. A table that is not of what is
    written, because a later run was not published, says nothing.
    """
    import pyarrow.parquet as pq

    told = read_unread(root / PLAN)
    only: list[tuple[str, str, object]] = [("kept", "==", 0)]
    if told is not None:
        only.append(("code", "in", _FURTHER))
    try:
        if read_manifest(root).tables[OBJECTS] != file_sha256(root / OBJECTS):
            return told or set()
    except (OSError, ShardError, KeyError):
        return told or set()
    table = pq.read_table(root / OBJECTS, columns=["file_id"], filters=only)
    return (told or set()) | set(table["file_id"].to_pylist())
