"""The one configuration tree. Defaults live here and nowhere else.

YAML files give values, dotted overrides (``train.batch_size=16``) change them, `load_config`
returns a frozen tree or raises `ConfigError` with the key, the value found and what is legal.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medpsp.errors import ConfigError

BACKBONES = ("mobilenetv3_large_100", "efficientnet_b0", "resnet18", "convnext_tiny")
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class WindowConfig(_Node):
    """A fixed window in modality units (HU for CT)."""

    center: float
    width: Annotated[float, Field(gt=0)]


class SplitConfig(_Node):
    """Shares of patients held out. A patient's place is a threshold of a keyed hash."""

    val: Fraction = 0.2
    test: Fraction = 0.2

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must stay below 1, got {self.val + self.test:g}")
        return self


class VocConfig(_Node):
    """Folder names of a VOC-style archive, below ``data.archive``."""

    images: str = "JPEGImages"
    masks: str = "SegmentationClass"
    lists: str = "ImageSets/Segmentation"
    patient_pattern: str = Field(
        default="^(.+)$", description="Regular expression on the stem; group 1 is the patient."
    )


class DataConfig(_Node):
    """What to read and how to turn it into shards."""

    source: Literal["dicom", "voc"] = "dicom"
    archive: Path
    labels: Path | None = Field(default=None, description="Root of the masks; none: unlabelled.")
    label_pattern: str = Field(
        default="{PatientID}.nii.gz",
        description="Mask of a series below `labels`; fields: PatientID, SeriesInstanceUID, "
        "Modality, folder (of the series, relative to the archive).",
    )
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)]
    label_map: dict[int, int] = Field(
        default={}, description="Mask value to class index; empty: the value is the index."
    )
    modalities: tuple[str, ...] = ("CT", "MR")
    window: WindowConfig | None = Field(
        default=None,
        description="None: 40/400 for CT, the full range for 8-bit images, else percentiles "
        "0.5-99.5 of the series.",
    )
    split: SplitConfig = SplitConfig()
    voc: VocConfig = VocConfig()
    key_file: Path | None = Field(
        default=None, description="Key of the pseudonyms, mode 0600; none: MEDPSP_KEY or ~/.config."
    )
    crosswalk: Path | None = Field(
        default=None, description="If set, file_id to real path is written there, mode 0600."
    )
    shard_slices: Annotated[int, Field(ge=1, le=4096)] = 128
    workers: Annotated[int, Field(ge=1)] = 2
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _map_into_classes(self) -> DataConfig:
        for value, index in self.label_map.items():
            if not (0 <= index < len(self.classes) or index == 255):
                raise ValueError(
                    f"label_map sends {value} to {index}; classes are 0..{len(self.classes) - 1} "
                    "and 255 is ignore"
                )
        return self


class ModelConfig(_Node):
    """PSPNet: a timm backbone, the pyramid, a head."""

    backbone: str = "resnet18"
    head: Literal["refine", "classic"] = Field(
        default="refine",
        description="classic: dilated backbone and direct upsampling; refine: a light decoder "
        "from the pyramid to the finest map of stride >= 2.",
    )
    output_stride: Literal[8, 16, 32] = 32
    bins: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 3, 5, 7)
    psp_channels: Annotated[int, Field(ge=8)] = 128
    decoder_channels: Annotated[int, Field(ge=8)] = 64
    dropout: Fraction = 0.2
    aux: bool = True
    pretrained: bool | Path = False
    in_channels: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _known_backbone(self) -> ModelConfig:
        if self.backbone not in BACKBONES:
            near = difflib.get_close_matches(self.backbone, BACKBONES, n=1, cutoff=0.3)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"unknown backbone '{self.backbone}'{hint} (known: {', '.join(BACKBONES)})"
            )
        return self


class LossConfig(_Node):
    """0.7 Dice + 0.3 Focal(gamma 2) unless changed."""

    dice: Annotated[float, Field(ge=0)] = 0.7
    focal: Annotated[float, Field(ge=0)] = 0.3
    gamma: Annotated[float, Field(ge=0)] = 2.0
    aux: Annotated[float, Field(ge=0)] = 0.4
    class_weights: Literal["none", "inverse", "median_frequency"] = "median_frequency"


class StageConfig(_Node):
    """One stage of the progressive schedule."""

    name: str
    steps: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Share of the training patients; stages are nested."
    )
    augment: Literal["none", "low", "mid", "high"] = "mid"
    trains: Literal["all", "backbone", "head"] = "all"


DEFAULT_STAGES = (
    StageConfig(name="warm", steps=1000, lr=1e-3, fraction=0.2, augment="low"),
    StageConfig(name="broad", steps=2000, lr=5e-4, fraction=0.6, augment="mid"),
    StageConfig(name="full", steps=4000, lr=1e-4, fraction=1.0, augment="high"),
)


class TrainConfig(_Node):
    """The training loop."""

    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] = DEFAULT_STAGES
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=16, description="Slices in one global step, over all ranks."
    )
    size: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] = (256, 256)
    ranks: Annotated[int, Field(ge=1)] = 1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    loader_workers: Annotated[int, Field(ge=0)] = 0
    eval_every: Annotated[int, Field(ge=1)] = 200
    log_every: Annotated[int, Field(ge=1)] = 20
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0, description="torch threads a rank; 0: cores divided by ranks."
    )


class ExportConfig(_Node):
    """The ONNX files."""

    opset: Literal[18, 19, 20] = 18
    calibration_slices: Annotated[int, Field(ge=1)] = 64
    parity_tolerance: Annotated[float, Field(gt=0)] = 1e-4
    int8_min_dice: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="Mean Dice of the int8 masks against the fp32 masks."
    )


class Config(_Node):
    """Everything that decides a run."""

    out: Path = Path("runs/default")
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()

    @property
    def shards(self) -> Path:
        """Folder of the shards of this run."""
        return self.out / "shards"


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file and apply overrides of the form ``a.b=c``.

    Raises:
        ConfigError: File missing or not YAML, unknown key, value out of range.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path}: cannot be read ({type(error).__name__}); give the path of a YAML file"
        ) from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ConfigError(f"config {path}: not YAML (line {line}); mend the file") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: expected a mapping at the top, got {_kind(tree)}")
    for text in overrides:
        _override(tree, text)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"config {path}: {_explain(error)}") from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{text}': expected key=value, for example train.batch_size=8")
    node: Any = tree
    default: Any = {k: v for k, v in Config.model_fields.items() if k != "data"}
    default = {k: v.get_default().model_dump(mode="json") for k, v in default.items()
               if isinstance(v.get_default(), _Node)}  # so that a list left to its default has items
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        where = ".".join(parts[: depth + 1])
        default = default.get(part) if isinstance(default, dict) else None
        if isinstance(node, list):
            node = node[_list_index(node, part, where)]
        else:
            node = node.setdefault(part, default if isinstance(default, list) else {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override '{text}': '{where}' holds a value, not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override '{text}': '{value}' is not a YAML value") from None
    last = parts[-1]
    node[_list_index(node, last, key) if isinstance(node, list) else last] = parsed


def _list_index(node: list[Any], part: str, where: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"override '{where}': expected an index below {len(node)}, got '{part}'")


def _explain(error: ValidationError) -> str:
    """One line for the first fault, with the near miss of an unknown key."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    count = len(faults)
    where = ".".join(str(part) for part in fault["loc"]) or "config"
    if fault["type"] == "extra_forbidden":
        legal = _keys_at(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), legal, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"legal: {', '.join(legal)}"
        text = f"{where}: unknown key; {hint}"
    elif fault["type"] == "missing":
        text = f"{where}: required, but not given"
    else:
        got = fault["input"]
        shown = repr(got) if isinstance(got, str | int | float | bool | None) else _kind(got)
        text = f"{where}: {fault['msg'].removeprefix('Value error, ')}"
        text += "" if fault["type"] == "value_error" else f", got {shown}"
    return text + (f" (and {count - 1} more)" if count > 1 else "")


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names legal at a place of the tree, read off the JSON Schema."""
    schema = Config.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc:
        node = node.get("items", {}) if isinstance(part, int) else node["properties"][part]
        options = [node, *node.get("anyOf", [])]
        ref = next((o["$ref"] for o in options if "$ref" in o), None)
        if ref:
            node = schema["$defs"][ref.rsplit("/", 1)[-1]]
    return sorted(node.get("properties", {}))


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML; `load_config` reads it back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
