"""What a run folder tells about its run: each part as a value, or the line that says why not.

Nothing is written, no lock is taken and no network is loaded: a run may be at work meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from launch.chain import Told
from launch.curves import Curves, read_curves
from launch.rundir import RunDir
from launch.runtypes import DOSSIER, EVALUATION, REACHED, TOLD, Evaluation, Reached
from medpsp.config import Config
from medpsp.configio import load_config
from medpsp.deploy.dossier import Facts
from medpsp.errors import ConfigError, ShardError
from shards.figures import Columns, read_columns
from shards.index import INDEX, Manifest, read_manifest
from shards.sealed import is_sealed_page

T = TypeVar("T")


class Lack(NamedTuple):
    """A part that is not there, in one line; ``damaged`` where it should be."""

    line: str
    damaged: bool = False


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that is known of a run.

    Attributes:
        config: Its ``out`` is the folder as it lies now.
        reached: Checkpoints, and those that do not say how far they came.
        stages: Name, first step (from 1) and steps of each; none where it is not known yet.
        pictures: The page of the evaluation.
    """

    config: Config
    run: RunDir
    manifest: Manifest | Lack
    columns: Columns | Lack
    curves: Curves | Lack
    reached: tuple[list[Reached], list[Lack]]
    stages: list[tuple[str, int, int]]
    best: Reached | Lack
    evaluation: Evaluation | Lack
    pictures: str | Lack
    dossier: Facts | Lack
    jobs: dict[str, Told | Lack]

    @property
    def damaged(self) -> list[str]:
        """A line for each file that is not what it should be."""
        parts = (
            *(self.manifest, self.columns, self.curves, self.best, self.evaluation, self.pictures),
            *(self.dossier, *self.jobs.values(), *self.reached[1]),
        )
        lines = [part.line for part in parts if isinstance(part, Lack) and part.damaged]
        return list(dict.fromkeys(lines))

    @property
    def step(self) -> int:
        """How far training has come."""
        seen = 0 if isinstance(self.curves, Lack) else self.curves.last
        return max((seen, *(one["step"] for one in self.reached[0])))


def config_of(root: Path) -> tuple[Config, RunDir]:
    """Resolved configuration of a run, and its folder as it lies now.

    Raises:
        ConfigError: It is none.
    """
    run = RunDir(root)
    if not run.config.is_file():
        raise ConfigError(f"{root}: no config.yaml there, so it is no run of medpsp")
    return load_config(run.config).model_copy(update={"out": root}), run


def require_begun(root: Path) -> None:
    """Refuse a folder in which nothing was done yet.

    Raises:
        ConfigError: It is no run, or none has begun.
    """
    config, run = config_of(root)
    traces = (config.shards, run.checkpoints, run.evaluation, run.export, run.jobs)
    if not any(path.exists() for path in traces):
        raise ConfigError(
            f"{root}: no run has begun there, as it holds neither shards nor checkpoints, scores "
            f"or export; `medpsp run {quote(str(run.config))}` begins it"
        )


def facts_of(config: Config, run: RunDir) -> RunFacts:
    """Everything; ``out`` of the configuration is the folder of the run."""
    manifest, reached = manifest_of(config), checkpoints_of(run)
    return RunFacts(
        config=config,
        run=run,
        manifest=manifest,
        columns=manifest if isinstance(manifest, Lack) else columns_of(config, manifest),
        curves=curves_of(config, run),
        reached=reached,
        stages=stages_of(config, reached[0]),
        best=best_of(run),
        evaluation=evaluation_of(run),
        pictures=evaluation_page_of(run),
        dossier=dossier_of(run),
        jobs=jobs_of(run),
    )


def manifest_of(config: Config) -> Manifest | Lack:
    """What the shards are."""
    if not config.shards.is_dir():
        return Lack("No shards yet: `medpsp shards` makes them.")
    try:
        return read_manifest(config.shards)
    except ShardError as error:
        return _lack_of_shards(config, error)


def columns_of(config: Config, manifest: Manifest) -> Columns | Lack:
    """Every slice."""
    try:
        return read_columns(config.shards / INDEX, len(manifest.classes))
    except ShardError as error:
        return _lack_of_shards(config, error)


def _lack_of_shards(config: Config, error: ShardError) -> Lack:
    return Lack(str(error).replace(str(config.shards), "shards").removeprefix("shards "), True)


def curves_of(config: Config, run: RunDir) -> Curves | Lack:
    """What training wrote for TensorBoard."""
    try:
        found = read_curves(run.tensorboard, config.train.ranks)
    except OSError as error:
        return Lack(f"tensorboard: cannot be read ({error.strerror or error})", True)
    if not found.starts and any(run.tensorboard.glob("events.*")):
        return Lack("tensorboard: nothing can be read of the event files", True)
    if not found.last:
        return Lack("No curves yet: training writes them.")
    return found


def checkpoints_of(run: RunDir) -> tuple[list[Reached], list[Lack]]:
    """How far the checkpoints have come, and those that do not say so."""
    again = "`medpsp train` goes on from the newest whole one"
    places = sorted(run.checkpoints.glob("st*-*/meta.json"))
    good, damaged = list[Reached](), list[Lack]()
    for path in places:
        one = _read(run, path, REACHED, ("", again))
        if isinstance(one, Lack):
            damaged.append(one)
        else:
            good.append(one)
    return good, damaged


def best_of(run: RunDir) -> Reached | Lack:
    """The checkpoint that evaluation and export take."""
    lines = ("Not trained yet: `medpsp train` does that.", "`medpsp train` marks the best one left")
    return _read(run, run.checkpoints / "best" / "meta.json", REACHED, lines)


def stages_of(config: Config, reached: list[Reached]) -> list[tuple[str, int, int]]:
    """Name, first step and steps of every stage; none where epochs are not steps yet."""
    stages = [(stage.name, stage.steps) for stage in config.train.stages]
    if any(stage.epochs is not None for stage in config.train.stages):
        newest = max(reached, key=lambda one: one["step"], default=None)
        stages = newest["schedule"]["stages"] if newest else []
    found, begins = [], 1
    for name, steps in stages:
        found.append((name, begins, steps))
        begins += steps
    return found


def evaluation_of(run: RunDir) -> Evaluation | Lack:
    """Scores of the held-out patients."""
    lines = ("Not evaluated yet: `medpsp evaluate` does that.", "run `medpsp evaluate` again")
    return _read(run, run.evaluation, EVALUATION, lines)


def evaluation_page_of(run: RunDir) -> str | Lack:
    """The page with the pictures, as it was written."""
    path = run.evaluation.with_suffix(".html")
    try:
        data = path.read_bytes()
    except OSError:
        return Lack("No pictures: `medpsp evaluate` draws them.")
    if not is_sealed_page(data):
        return Lack(f"{path.name}: is not what was written; run `medpsp evaluate` again", True)
    return data.decode()


def dossier_of(run: RunDir) -> Facts | Lack:
    """What the export measured."""
    lines = ("Not exported yet: `medpsp export` does that.", "run `medpsp export` again")
    return _read(run, run.export_report, DOSSIER, lines)


def jobs_of(run: RunDir) -> dict[str, Told | Lack]:
    """What the jobs of `medpsp run` said last, in the order of their beginning."""
    found: dict[str, Told | Lack] = {}
    for path in sorted(run.jobs.glob("*.json")):
        hidden = path.name.startswith(".")  # where ranks met
        if path not in (run.chain, run.planned) and not hidden:
            told = _read(run, path, TOLD, ("", "the job writes it anew when it runs again"))
            found[path.stem] = told
    return dict(sorted(found.items(), key=lambda item: _began(item[1])))


def _began(told: Told | Lack) -> float:
    return 0.0 if isinstance(told, Lack) else told.began


def _read(run: RunDir, path: Path, kind: TypeAdapter[T], lines: tuple[str, str]) -> T | Lack:
    """A JSON file.

    Args:
        run: That it belongs to.
        path: Below its folder.
        kind: What it must be.
        lines: Where it is not there, and what to do where it is damaged.
    """
    name = path.relative_to(run.root)
    try:
        return kind.validate_json(path.read_bytes())
    except FileNotFoundError:
        return Lack(lines[0])
    except OSError as error:
        return Lack(f"{name}: cannot be read ({error.strerror}); {lines[1]}", True)
    except ValidationError as error:
        fault: Any = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "not JSON"
        return Lack(f"{name}: damaged ({where}); {lines[1]}", True)
