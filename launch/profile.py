"""The site profile of a cluster: what its SLURM wants to be told. One YAML file in ``slurm/``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator

from launch.rundir import find_shipped, shipped
from medpsp.dataconfig import Node
from medpsp.errors import ConfigError

Line = Annotated[str, Field(min_length=1, max_length=1000)]


class Resources(Node):
    """What one kind of job asks for."""

    partition: Line | None = Field(default=None, description="None: the cluster's default.")
    cpus: Annotated[int, Field(ge=1)] = Field(default=4, description="Of a task; a rank is one.")
    memory_gb: Annotated[float, Field(ge=0)] | None = Field(
        default=16.0, description="Of a node. 0: all that it has; none: nothing is asked."
    )
    minutes: Annotated[int, Field(ge=1)] = Field(default=24 * 60, description="Wall-clock limit.")
    gpus: Annotated[int, Field(ge=0)] = Field(default=0, description="Of a task.")
    gres: Line | None = Field(
        default=None, description="In place of gpus, for a node, such as gpu:h100:8."
    )
    constraint: Line | None = Field(default=None, description="Features of the nodes.")


class Profile(Node):
    """A cluster. ``cpu`` jobs: shards, check, export; ``gpu`` jobs: train and evaluate."""

    cpu: Resources = Field(default=Resources(), description="Of shards, check and export.")
    gpu: Resources = Field(
        default=Resources(gpus=1), description="Of train and evaluate; gpus: 1 unless told."
    )
    minutes: dict[Line, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Of single jobs, by name, in place of their kind's."
    )
    ranks_per_node: Annotated[int, Field(ge=1)] = Field(
        default=1, description="train.ranks are spread over nodes of this many."
    )
    parts: Annotated[int, Field(ge=1, le=10000)] = Field(
        default=16, description="Elements of the array that converts."
    )
    parallel: Annotated[int, Field(ge=1)] = Field(default=16, description="Of them at once.")
    account: Line | None = Field(default=None, description="Asked by many sites.")
    qos: Line | None = Field(default=None, description="Quality of service.")
    reservation: Line | None = Field(default=None, description="Name of a reservation.")
    exclude: Line | None = Field(default=None, description="Nodes, as SLURM writes them.")
    mail_user: Line | None = Field(default=None, description="Address for mail_type.")
    mail_type: Line | None = Field(default=None, description="Such as END,FAIL.")
    extra: dict[Line, Annotated[str, Field(max_length=1000)]] = Field(
        default={}, description="Further options of sbatch; an empty value: a bare flag."
    )
    setup: tuple[Line, ...] = Field(
        default=(), description="Shell lines before each job: module load, NCCL variables."
    )
    srun: tuple[Line, ...] = Field(default=(), description="Further options of srun.")
    python: Line | None = Field(
        default=None,
        description="Command that starts Python, as `apptainer exec --nv medpsp.sif python3`; "
        "none: the Python of the submitting process.",
    )
    scratch: Line | None = Field(
        default=None, description="Node-local folder for temporary files; shell variables work."
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        default=5, description="Times that a job is queued again after a fault or its time limit."
    )
    signal_seconds: Annotated[int, Field(ge=1)] = Field(
        default=120,
        description="Before its time limit a job is asked to save and end; at most a quarter of "
        "the limit.",
    )

    @field_validator("*", mode="after")
    @classmethod
    def _one_line(cls, value: object) -> object:
        if any(mark in text for text in _texts(value) for mark in "\n\r\0"):
            raise ValueError("holds a line break")
        return value

    def kind(self, gpu: bool) -> Resources:
        """Of a job."""
        return self.gpu if gpu else self.cpu


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)


def shipped_profiles() -> list[str]:
    """Names that `load_profile` knows."""
    return shipped("slurm")


def profile_place(name: str) -> str:
    """A name that stands for the same profile in any folder."""
    return str(Path(name).absolute()) if Path(name).is_file() else name


def load_profile(name: str) -> Profile:
    """A path to a YAML file, or the name of a shipped one.

    Raises:
        ConfigError: Neither, not YAML, or a key or value that is not legal.
    """
    path = find_shipped("cluster", name, "slurm")
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return Profile.model_validate(tree)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster {path}: cannot be read ({type(error).__name__})") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "profile"
            legal = ", ".join(Profile.model_fields)
            hint = f"; legal: {legal}" if fault["type"] == "extra_forbidden" else ""
            text = fault["msg"].removeprefix("Value error, ")
            raise ConfigError(f"cluster {path}: {where}: {text}{hint}") from None
        raise ConfigError(f"cluster {path}: not YAML; mend the file") from None
