"""What is looked at before a lab comes up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from processes import LabError


def real_cluster() -> str:
    """What answers where SLURM is set up on this machine; empty for nothing, or for a lab."""
    if (
        not shutil.which("scontrol")
        or (Path(os.environ.get("SLURM_CONF", "/")).parent / "../lab.json").exists()
    ):
        return ""
    try:
        done = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    lines = [line for line in done.stdout.splitlines() if "is UP" in line]
    return lines[0] if lines else ""


def require_place(root: Path) -> None:
    """Refuse a folder that a lab cannot have.

    Raises:
        LabError: Of another user, not empty, or with a name that its daemons do not take.
    """
    if root.exists() and root.stat().st_uid != os.geteuid():
        raise LabError(f"{root}: of another user; take another --root")
    if root.exists() and any(root.iterdir()):
        raise LabError(f"{root}: not empty; `down` first, or another --root")
    if len(os.fsencode(root)) > 80:
        raise LabError(f"{root}: too long for the sockets in it (80 bytes at most)")
    if not re.fullmatch(r"[\w./+@=-]+", str(root), re.ASCII):
        raise LabError(f"{root}: slurm.conf takes no blanks or quotes in it; another --root")
