"""Every path of a run, and the shipped configurations."""

from __future__ import annotations

import difflib
import fcntl
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.home import kept, require_home
from medpsp.config import Config
from medpsp.configio import dump_yaml, load_config
from medpsp.errors import ConfigError, LaunchError

log = logging.getLogger("medpsp")
RANKS_LOCK = ".ranks.lock"
REASONS = "MEDPSP_RANK_REASONS"
"""Set for ranks that a command of ours started: the folder where a failing one leaves its line."""
VARIANTS = {"cpu": "int8", "trt": "int8.trt", "half": "fp16"}
"""In the names of exported files."""
SAID = {"cpu": "int8 QDQ U8S8", "trt": "int8 QDQ S8S8", "half": "fp16"}
"""What the metadata of each of them calls it."""
_locked: set[Path] = set()
_private: set[Path] = set()
_places: list[Path] = []
made: list[Path] = []
"""Run folders that this process made, and those above them that it had to make, deepest first."""


@dataclass(frozen=True)
class RunDir:
    """Places below the out folder of a run."""

    root: Path
    export_name: str = "export"

    @classmethod
    def create(cls, config: Config) -> RunDir:
        """Make the folder and put the resolved configuration into it.

        Raises:
            LaunchError: The folder cannot be made.
        """
        run = cls(config.out)
        try:
            run.logs.mkdir(parents=True, exist_ok=True)
            text = dump_yaml(config).encode()
            # ranks read and write this at the same time: never cut it short under a reader
            if not run.config.is_file() or run.config.read_bytes() != text:
                partial = run.config.with_name(f".config.{os.getpid()}.partial")
                partial.write_bytes(text)
                partial.replace(run.config)
        except OSError as error:
            raise LaunchError(f"out {config.out}: cannot be written ({error.strerror})") from None
        return run

    @property
    def config(self) -> Path:
        """Resolved configuration, read by the jobs."""
        return self.root / "config.yaml"

    @property
    def logs(self) -> Path:
        """One file a command."""
        return self.root / "logs"

    @property
    def jobs(self) -> Path:
        """What was submitted to a cluster, and what its jobs say."""
        return self.root / "jobs"

    @property
    def chain(self) -> Path:
        """Which jobs were submitted last."""
        return self.jobs / "chain.json"

    @property
    def planned(self) -> Path:
        """Which jobs were begun last on this machine."""
        return self.jobs / "local.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the run."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def evaluation(self) -> Path:
        """Scores of the held-out patients."""
        return self.root / "evaluation.json"

    @property
    def page(self) -> Path:
        """All of the run on one page."""
        return self.root / "run.html"

    @property
    def export(self) -> Path:
        """Folder of the ONNX files."""
        return self.root / self.export_name

    @property
    def fp32(self) -> Path:
        """ONNX, fp32."""
        return self.export / "model.onnx"

    @property
    def int8(self) -> Path:
        """ONNX, int8 for CPUs."""
        return self.variant("cpu")

    def variant(self, name: str) -> Path:
        """ONNX: ``cpu`` int8 for CPUs, ``trt`` int8 for TensorRT, ``half`` fp16."""
        return self.export / f"model.{VARIANTS[name]}.onnx"

    @property
    def export_report(self) -> Path:
        """All figures of the export."""
        return self.export / "dossier.json"

    def lock(self, shared: bool = False) -> None:
        """Keep other commands out of this folder until the process ends.

        Args:
            shared: Only those that do not share it.

        Raises:
            LaunchError: Another one is at work here, or ranks of one that was killed.
        """
        root = self.root.resolve()
        if root in _locked:
            return
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._hold(".lock", kind, "another medpsp command is")
        if not shared:  # ranks outlive for a while whoever started them
            who = "ranks of an earlier medpsp command are"
            os.close(self._hold(RANKS_LOCK, fcntl.LOCK_EX, who))
        _locked.add(root)

    def lock_as_rank(self, leads: bool) -> None:
        """Let nobody begin here while this rank lives.

        Args:
            leads: It is the first of ranks that no command of ours started.

        Raises:
            LaunchError: The folder cannot be written, or another command is at work here.
        """
        if leads:
            self._hold(".lock", fcntl.LOCK_EX, "another medpsp command is")
        self._hold(RANKS_LOCK, fcntl.LOCK_SH, "another medpsp command is")

    def _hold(self, name: str, kind: int, who: str) -> int:
        """An open file with a lock that goes with the process."""
        try:
            new = [path for path in (self.root, *self.root.parents) if not path.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            if kind == fcntl.LOCK_EX:  # else it is not this process's alone
                made.extend(new)
            handle = os.open(self.root / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LaunchError(f"out {self.root}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise LaunchError(
                f"out {self.root}: {who} at work there; wait for its end, or use another out folder"
            ) from None
        except OSError:  # a file system without locks
            log.warning("out %s: cannot be locked; start only one command on it", self.root)
        return handle

    def log_to(self, name: str) -> None:
        """Append log lines to ``logs/<name>.log`` as well."""
        handler = logging.FileHandler(
            self.logs / f"{name}.log", encoding="utf-8", errors="backslashreplace"
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("medpsp").addHandler(handler)


def data_folder(name: str) -> Path:
    """``configs`` or ``slurm``: beside the packages in a checkout, in medpsp_data in a wheel."""
    top = Path(__file__).resolve().parent.parent
    for place in (top / name, top / "medpsp_data" / name):
        if place.is_dir():
            return place
    raise LaunchError(f"{name}: shipped files not found beside {top}; install medpsp again")


def shipped(folder: str) -> list[str]:
    """Names of the YAML files of a `data_folder`."""
    return sorted(path.stem for path in data_folder(folder).glob("*.yaml"))


def shipped_configs() -> list[str]:
    """Names that `find_config` knows."""
    return shipped("configs")


def find_config(name: str) -> Path:
    """A path to a YAML file, or the name of a shipped one.

    Raises:
        ConfigError: Neither.
    """
    return find_shipped("config", name, "configs")


def find_shipped(what: str, name: str, folder: str) -> Path:
    """A path to a YAML file, or one of a `data_folder` by its name.

    Args:
        what: It is, for the message.
        name: Path or name.
        folder: As for `data_folder`.

    Raises:
        ConfigError: Neither.
    """
    if (path := Path(name)).is_file():
        return path
    known = shipped(folder)
    if name in known:
        return data_folder(folder) / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"shipped: {', '.join(known)}"
    raise ConfigError(f"{what} '{name}': no such file and no shipped name; {hint}")


def keep_private(*folders: Path | None) -> None:
    """Folders of patients: a path below them is in no message of this process."""
    _private.update(folder.resolve() for folder in folders if folder)


def keep_place(folder: Path) -> None:
    """A folder that this process writes to: looked at where an error names no path."""
    _places.append(folder)


def places() -> tuple[Path, ...]:
    """All that were kept."""
    return tuple(_places)


def told_path(error: OSError) -> str:
    """The path of an error for a message; empty where it may name a patient."""
    if not error.filename:
        return ""
    path = Path(os.fsdecode(error.filename))
    inside = any(path.absolute().is_relative_to(folder) for folder in _private)
    return "" if inside else str(path)


def open_run(
    name: str,
    overrides: tuple[str, ...],
    shared: bool = False,
    refuse: Callable[[Config], None] | None = None,
    trains: bool = True,
) -> tuple[Config, RunDir]:
    """Load a configuration and make its run folder.

    Args:
        name: As for `find_config`.
        overrides: As for `load_config`.
        shared: As for `RunDir.lock`.
        refuse: Raises where what is in the folder belongs to something else; nothing is written.
        trains: As for `launch.home.kept`.
    """
    config = load_config(path := find_config(name), overrides)
    if not any(text.startswith("out=") for text in overrides):
        require_home(path, config.out)
    keep_private(config.data.archive, config.data.labels)
    archive, root = config.data.archive.resolve(), config.out.resolve()
    if config.data.source == "dicom" and root.is_relative_to(archive):
        raise ConfigError(
            f"out: {config.out} lies inside data.archive, where it would be scanned; take a folder "
            "outside it"
        )
    run = RunDir(config.out)
    keep_place(run.root)
    if "WORLD_SIZE" not in os.environ:
        run.lock(shared)
    else:  # ranks work in the folder of the one that started them
        run.lock_as_rank(REASONS not in os.environ and os.environ.get("RANK") == "0")
    if refuse:
        refuse(config)
    return config, RunDir.create(config if trains else kept(run.config, config))
