"""Where the configuration of a run lies, and what of it stays."""

from __future__ import annotations

from pathlib import Path

from medpsp.config import Config
from medpsp.configio import load_config
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


def trains(job: str) -> bool:
    """Whether a job of the chain trains, or one after it, as a chain begins there; "" is all."""
    return job not in ("evaluate", "export")


def kept(path: Path, config: Config) -> Config:
    """What ``config.yaml`` says after a command that does not train: how a run was trained stays.

    Whoever gives their own file again, without the words that training had, would have the run say
    that it was trained in another way, and repeat it so.

    Args:
        path: Of that file.
        config: Of the command.
    """
    if not ((path.parent / "checkpoints").is_dir() and path.is_file()):
        return config
    try:
        old = load_config(path)
    except ConfigError:  # of another version, or damaged
        return config
    trained = {name: getattr(old, name) for name in ("model", "loss", "train", "seed")}
    return config.model_copy(update=trained)
