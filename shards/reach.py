"""What cannot be read today is not gone: a look before shards that exist are changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from medpsp.dicom.walk import NOWHERE
from medpsp.errors import ShardError
from shards.commit import COMMITS, PASSING, read_commit
from shards.index import OBJECTS
from shards.planfile import Plan

CODES = PASSING - {"SOURCE_CHANGED"} | {"FOLDER_UNREADABLE"}
"""Of objects that may be there, and readable the next time."""


def require_reach(plan: Plan, root: Path, settings: str) -> None:
    """Refuse a plan that changes what is written while something is out of reach that was not.

    Only new shards may be added then: images, label objects or masks that are missing for a while
    would take patients, slices or labels out of the others.

    Args:
        plan: That is to be carried out.
        root: Folder of the shards.
        settings: ``WriteSettings.text``.

    Raises:
        ShardError: With the codes of what cannot be read.
    """
    lost = _lost(plan, root)
    if not lost:
        return
    planned = {entry.name: entry.digest(settings) for entry in plan.shards}
    written = [path.stem for path in (root / COMMITS).glob("*.json")]
    changed = 0
    for name in written:
        commit = read_commit(root, name)
        changed += commit is None or planned.get(name) != commit.digest
    if changed:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(lost.items()))
        raise ShardError(
            f"data.archive: {lost.total()} objects cannot be read that the last run did not miss "
            f"({codes}), and {changed} of {len(written)} shards would change or go; make them "
            "readable, or move them out of the archive"
        )


def _lost(plan: Plan, root: Path) -> Counter[str]:
    """Codes of the objects that cannot be read, and could for the last run."""
    found: dict[str, str] = {}
    for batch in plan.gathered.rows.batches():
        names = ("file_id", "code", "detail")
        for file_id, code, detail in zip(*(batch[n].to_pylist() for n in names), strict=True):
            if code in CODES or (code == "NOT_REGULAR" and detail == NOWHERE):
                found[file_id] = code
    known = _known(root) if found else set()
    return Counter(code for file_id, code in found.items() if (file_id, code) not in known)


def _known(root: Path) -> set[tuple[str, str]]:
    """Objects that the last run could not read either, and its codes of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        only = [("code", "in", [*CODES, "NOT_REGULAR"])]
        table = pq.read_table(root / OBJECTS, columns=["file_id", "code"], filters=only)
    except (OSError, pa.ArrowException):
        return set()
    return set(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
