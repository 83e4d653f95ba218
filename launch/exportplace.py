"""Where an export is made, and how it takes the place of an earlier one."""

from __future__ import annotations

import os
from dataclasses import replace

from launch.rundir import VARIANTS, RunDir
from medpsp.durable import sync, sync_all
from medpsp.errors import ExportError


def beside(target: RunDir) -> RunDir:
    """The same run with a folder of half a work, from which files can be renamed.

    Raises:
        ExportError: They could not in the end, which is better known before the work.
    """
    folder = target.export.resolve()  # a link may lead to another disk
    part = folder.with_name(f".{folder.name}.partial")
    why = ""
    if folder.exists() and not folder.is_dir():
        why = "a file"
    elif not folder.parent.is_dir():
        why = "a link to nowhere"
    elif not all(os.access(p, os.W_OK | os.X_OK) for p in (folder.parent, folder) if p.exists()):
        why = "not to be written"
    elif folder.exists() and folder.stat().st_dev != folder.parent.stat().st_dev:
        why = "a disk of its own, into which nothing can be renamed"
    if why:
        raise ExportError(f"export {target.export}: {why}; move it away, and export again")
    return replace(target, export_name=str(part))


def take_the_place(run: RunDir, target: RunDir) -> list[str]:
    """Of an earlier export, whose dossier goes first and comes last; what else is there stays.

    Returns:
        Model files of the earlier one that have no successor.
    """
    sync_all(run.export)
    target.export.mkdir(exist_ok=True)
    made = {path.name for path in run.export.iterdir()}
    models = {target.fp32.name, *(target.variant(name).name for name in VARIANTS)}
    papers = sorted(made - models, key=lambda name: (name == target.export_report.name, name))
    gone = sorted(name for name in models - made if (target.export / name).exists())
    for name in (*papers, *gone):
        (target.export / name).unlink(missing_ok=True)
    for name in (*sorted(made & models), *papers):
        (run.export / name).replace(target.export / name)
    sync(target.export)
    run.export.rmdir()
    return gone
