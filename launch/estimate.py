"""What a chain will need of disk, memory and time, as far as that can be told beforehand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from launch.measure import measured
from launch.profile import Profile
from launch.rundir import RunDir
from medpsp.config import Config
from medpsp.progress import duration
from medpsp.stages import total_steps
from shards.preflight import WORKER_MIB

COUNTED = 50_000
"""Files that are looked at; of a larger archive only that it is larger is said."""
SCAN_S, CONVERT_S, LABELLED_S = 0.08e-3, 2.0e-3, 3.4e-3
"""CPU seconds of a 512 x 512 slice, as docs/scale.md has them; with masks the last one."""
RATIO = 2.3
"""Bytes of native files over bytes of their shards, zstd; compressed files shrink hardly at all."""


@dataclass(frozen=True)
class Found:
    """Of an archive.

    Attributes:
        files, size: Regular files, and their bytes.
        more: There are more than that.
    """

    files: int
    size: int
    more: bool


def look(archive: Path) -> Found:
    """Count files, no more than `COUNTED`; nothing is opened."""
    files = size = 0
    for folder, _, names in os.walk(archive):
        for name in names:
            if files == COUNTED:
                return Found(files, size, True)
            try:
                size += os.lstat(os.path.join(folder, name)).st_size
                files += 1
            except OSError:
                continue
    return Found(files, size, False)


def estimates(config: Config, profile: Profile, run: RunDir) -> list[str]:
    """Lines for people; what is assumed stands in them."""
    return [*_shards(config, profile, look(config.data.archive)), *_training(config, run)]


def _shards(config: Config, profile: Profile, found: Found) -> list[str]:
    least = "more than " if found.more else ""
    each = LABELLED_S if config.data.labels else CONVERT_S
    workers = min(profile.parts, profile.parallel) * profile.cpu.cpus
    seconds = found.files * (SCAN_S / profile.cpu.cpus + each / workers)
    need = shard_memory_gb(config, profile)
    lines = [
        f"archive   {least}{found.files} files, {found.size / 1e9:.3g} GB",
        f"shards    {least}{found.size / RATIO / 1e9:.3g} GB if the files are native, "
        f"{found.size / 1e9:.3g} GB at most; {least}{duration(seconds)} with {workers} cores, one "
        "512 x 512 slice a file",
        f"memory    {need:.1f} GB for {profile.cpu.cpus} shard tasks on a node",
    ]
    asked = profile.cpu.memory_gb
    if asked and asked < need:
        lines.append(
            f"          the profile asks for {asked:g} GB (cpu.memory_gb): a file that needs its "
            "limit may be killed; raise it, or lower data.decode_memory_mib"
        )
    return lines


def shard_memory_gb(config: Config, profile: Profile) -> float:
    """What the shard tasks of a node may take together."""
    return profile.cpu.cpus * (config.data.decode_memory_mib + WORKER_MIB) / 1024


def _training(config: Config, run: RunDir) -> list[str]:
    from medpsp.model.psp import build_model
    from medpsp.train.memory import checkpoint_bytes, checkpoints_kept

    stages = config.train.stages
    model = build_model(config.model.untrained, len(config.data.classes))
    params = sum(p.numel() for p in model.parameters())
    kept = checkpoint_bytes(model, config.train) * checkpoints_kept(config.train)
    lines = [
        f"training  {params / 1e6:.1f} M parameters: {16 * params / 2**20:.0f} MiB a rank before "
        f"activations, {kept / 1e9:.2g} GB of checkpoints at most"
    ]
    found = [one for path in run.root.glob("scale/*") if (one := measured(RunDir(path)))]
    same = [
        one
        for one in found
        if (one["backbone"], one["ranks"]) == (config.model.backbone, config.train.ranks)
    ]
    if same and all(stage.epochs is None for stage in stages):
        steps = total_steps(stages)
        seconds = steps * (same[0]["step_s"] + same[0]["data_s"])
        lines.append(f"          {steps} steps, {duration(seconds)} as `medpsp scale` measured")
    else:
        lines.append("          time: `medpsp scale` measures a step; epochs depend on the shards")
    return lines
