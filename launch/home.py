"""Where the configuration of a run lies."""

from __future__ import annotations

from pathlib import Path

from medpsp.errors import ConfigError


def require_home(path: Path, out: Path) -> None:
    """A run that was moved or copied: its file still says where it was, and work would go there.

    Raises:
        ConfigError: The file lies in the folder of a run, which is not ``out``.
    """
    here = path.parent
    moved = path.name == "config.yaml" and (here / "checkpoints").is_dir()
    if moved and not (out.exists() and out.samefile(here)):
        raise ConfigError(
            f"config {path}: lies in the folder of a run, but says out: {out}; give out={here} "
            f"with it for a run that was moved or copied, or out={out}"
        )
