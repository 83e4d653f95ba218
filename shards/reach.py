"""What cannot be read today is not gone: a look before shards that exist are changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from medpsp.dicom.codes import told_codes
from medpsp.dicom.walk import NOWHERE
from medpsp.errors import ShardError
from shards.bucket import written_names
from shards.commit import PASSING, read_commit
from shards.index import OBJECTS, file_sha256, read_manifest
from shards.planfile import Plan
from shards.slots import PLAN, read_unread

_FOLDER = "FOLDER_UNREADABLE"
CODES = PASSING - {"SOURCE_CHANGED"} | {_FOLDER}
"""Of objects that may be there, and readable the next time."""
_FURTHER = ("SYMLINK_DUPLICATE", "SYMLINK_FOLDER", "SYMLINK_LOOP", "SYMLINK_OUTSIDE")
"""Of names that gave no slice: with nothing behind them now, nothing is missing."""
_SHOWN = 3
Filters = list[list[tuple[str, str, object]]]


def require_reach(plan: Plan, found: dict[str, str], root: Path, settings: str) -> set[str]:
    """Refuse a plan that changes what is written while something is out of reach that was not.

    Only new shards may be added then: images, label objects or masks that are missing for a while
    would take patients, slices or labels out of the others.

    Args:
        plan: That is to be carried out.
        found: Of `unread`.
        root: Folder of the shards.
        settings: ``WriteSettings.text``.

    Returns:
        What the next plan may miss, too. Not what the last run still met: that stays a loss, though
        this plan changes nothing.

    Raises:
        ShardError: With the codes of what cannot be read.
    """
    lost = _lost(plan, found, root) if found else {}
    if not lost:
        return set(found)
    planned = {entry.name: entry.digest(settings) for entry in plan.shards}
    written = written_names(root)
    changed = 0
    for name in written:
        commit = read_commit(root, name)
        changed += commit is None or planned.get(name) != commit.digest
    if changed:
        codes = told_codes(Counter(lost.values()))
        some = ", ".join([*sorted(lost)[:_SHOWN], *["..."] * (len(lost) > _SHOWN)])
        raise ShardError(
            f"data.archive: {len(lost)} objects that are new or could be read cannot be read now "
            f"({codes}; {some}), and {changed} of {len(written)} shards would change or go; make "
            "them readable, move them out of the archive, or take another `out`"
        )
    return set(found) - _met(root, lost)


def unread(plan: Plan) -> dict[str, str]:
    """Name and code of what cannot be read now, as far as that may pass.

    The name is a ``file_id``, of a frame ``file_id/frame``: one that is missing does not tell that
    the others are.
    """
    found: dict[str, str] = {}
    for batch in plan.gathered.rows.batches():
        names = ("file_id", "frame", "code", "detail")
        for file_id, frame, code, detail in zip(
            *(batch[n].to_pylist() for n in names), strict=True
        ):
            if code in CODES or (code == "NOT_REGULAR" and detail == NOWHERE):
                found[file_id if frame < 0 else f"{file_id}/{frame}"] = code
    return found


def _lost(plan: Plan, found: dict[str, str], root: Path) -> dict[str, str]:
    """Of what cannot be read now: what could be, or may hold what could be."""
    known = _known(root)
    lost = {n: code for n, code in found.items() if not {n, _object(n)} & known}
    if _FOLDER in lost.values() and not _hides(plan, root):
        # one that was met by the last run and is not known hid something before it was published
        met = _objects(root, [[("code", "==", _FOLDER)]]) or set()
        return {name: code for name, code in lost.items() if code != _FOLDER or name in met}
    return lost


def _hides(plan: Plan, root: Path) -> bool:
    """Whether an object of what is published may be in a folder that cannot be read now."""
    seen = _objects(root, None)
    if seen is None:
        return True
    for item in plan.gathered.planned:
        seen.difference_update(ref.file_id for ref in item.series.slices)
    for batch in plan.gathered.rows.batches():
        seen.difference_update(batch["file_id"].to_pylist())
    return bool(seen)


def _known(root: Path) -> set[str]:
    """What the last plan could not read either, and names that never were files of their own.

    Shards of an earlier version say only what gave no slice. That is not enough where the plan is
    lost or damaged: label objects and second copies give none either. What was published as out of
    reach is known then.
    """
    told = read_unread(root / PLAN)
    none = ("kept", "==", 0)
    only: Filters = [[none, ("code", "in", _FURTHER)]]
    if told is None and _is_published(root, PLAN):
        only = [[none]]
    elif told is None:
        dead = ("code", "==", "NOT_REGULAR"), ("detail", "==", NOWHERE)
        only += [[none, ("code", "in", CODES)], [none, *dead]]
    known = (told or set()) | (_objects(root, only) or set())
    if torn := {_object(name) for name in known} - known:  # of a frame; is there any other?
        known |= torn & (_objects(root, [[none]]) or set())
    return known


def _met(root: Path, lost: dict[str, str]) -> set[str]:
    """Of what is lost now: what the last run met, or may have met."""
    seen = _objects(root, None)
    if seen is None:
        return set(lost) if written_names(root) else set()
    return {name for name, code in lost.items() if _object(name) in seen or code == _FOLDER}


def _object(name: str) -> str:
    """Of a name of `unread`."""
    return name.partition("/")[0]


def _objects(root: Path, only: Filters | None) -> set[str] | None:
    """``file_id`` of the objects of what is published; None where nothing says so."""
    import pyarrow.parquet as pq

    if not _is_published(root, OBJECTS):
        return None
    table = pq.read_table(root / OBJECTS, columns=["file_id"], filters=only)
    return set(table["file_id"].to_pylist())


def _is_published(root: Path, name: str) -> bool:
    """Whether a table is the one of the manifest: a later run may not have been published."""
    try:
        return read_manifest(root).tables[name] == file_sha256(root / name)
    except (OSError, ShardError, KeyError):
        return False
