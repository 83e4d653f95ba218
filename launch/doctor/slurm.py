"""SLURM: its programs, its controller, and whether its partitions take what a profile asks."""

from __future__ import annotations

import math
import shutil
from typing import Any

from launch.doctor.rows import Row, note, ok, problem
from launch.slurmstate import Partition, partitions
from medpsp.errors import LaunchError

SLURM_S = 8.0
PROGRAMS = ("sbatch", "srun", "scontrol")
NO_SLURM = "nothing, unless `--cluster` is to be used: apt install slurm-client, and its slurm.conf"


def slurm_rows(profile: dict[str, Any] | None, minutes: dict[str, int]) -> list[Row]:
    """Its programs, its controller, its partitions, and whether they have what is asked.

    Args:
        profile: Of ``--cluster``, as JSON values; None without.
        minutes: The longest that a job of the profile asks, by kind (cpu, gpu).
    """
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    make = problem if profile is not None else note
    if missing:
        todo = NO_SLURM if profile is None else "submit from a machine that has them"
        return [make("SLURM", f"no {', '.join(missing)} on the path", todo)]
    try:
        found = partitions(SLURM_S)
    except LaunchError as error:
        late = "no answer" in str(error)
        said = f"no answer within {SLURM_S:.0f} s" if late else "no controller answers"
        todo = "`scontrol ping` says more; is slurm.conf (SLURM_CONF) the cluster's, is munged up?"
        return [make("SLURM", f"its programs are there, {said}", todo)]
    names = ", ".join(
        f"{p.name}{'*' if p.default else ''} ({p.nodes} nodes{'' if p.up else ', not up'})"
        for p in found
    )
    rows = [ok("SLURM", f"partitions {names}" if names else "no partition")]
    for kind, most in minutes.items():
        wanted = ((profile or {}).get(kind) or {}).get("partition")
        rows += _partition_rows(kind, wanted, most, found)
    return rows


def _partition_rows(
    kind: str, wanted: str | None, minutes: int, found: list[Partition]
) -> list[Row]:
    what, there = f"profile {kind}", ", ".join(p.name for p in found)
    names = wanted.split(",") if wanted else [p.name for p in found if p.default]
    fits = [p for p in found if p.name in names]
    if not fits:
        asked = f"partition {wanted}, which is not there" if wanted else "no partition, no default"
        return [problem(what, asked, f"set {kind}.partition to one of {there}")]
    if not any(p.up for p in fits):
        todo = f"ask who runs the cluster, or set {kind}.partition to one of {there}"
        return [problem(what, f"partition {', '.join(names)} is not up", todo)]
    most = max(math.inf if p.minutes is None else p.minutes for p in fits)
    if minutes > most:
        found_text = f"a job asks {minutes} min, partition {', '.join(names)} gives {most:.0f}"
        return [problem(what, found_text, f"set {kind}.minutes, or minutes of the job, to less")]
    return [ok(what, f"partition {', '.join(p.name for p in fits)}")]
