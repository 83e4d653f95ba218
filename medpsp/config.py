"""The one configuration tree. Defaults live here and nowhere else; `configio` reads it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medpsp.dataconfig import DataConfig, Fraction, Node

BACKBONES = ("mobilenetv3_large_100", "efficientnet_b0", "resnet18", "convnext_tiny")
Side = Annotated[int, Field(ge=32, le=4096)]


class ModelConfig(Node):
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
    in_channels: Literal[1, 3] = Field(default=1, description="3: RGB; grey slices are repeated.")

    @model_validator(mode="after")
    def _wide_enough(self) -> ModelConfig:
        least = 2 * len(self.bins)  # one channel of a 1 x 1 bin has no variance to normalise by
        if self.psp_channels < least:
            raise ValueError(
                f"psp_channels {self.psp_channels}: {len(self.bins)} bins need {least}"
            )
        return self

    @model_validator(mode="after")
    def _known_backbone(self) -> ModelConfig:
        if self.backbone not in BACKBONES:
            near = difflib.get_close_matches(self.backbone, BACKBONES, n=1, cutoff=0.3)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"unknown backbone '{self.backbone}'{hint} (known: {', '.join(BACKBONES)})"
            )
        return self


class LossConfig(Node):
    """0.7 Dice + 0.3 Focal(gamma 2) unless changed."""

    dice: Annotated[float, Field(ge=0)] = 0.7
    focal: Annotated[float, Field(ge=0)] = 0.3
    gamma: Annotated[float, Field(ge=0)] = 2.0
    aux: Annotated[float, Field(ge=0)] = 0.4
    class_weights: Literal["none", "inverse", "median_frequency"] = "median_frequency"

    @model_validator(mode="after")
    def _something_to_lose(self) -> LossConfig:
        if self.dice + self.focal == 0:
            raise ValueError("dice and focal are both 0: nothing would be learnt")
        return self


class StageConfig(Node):
    """One stage of the progressive schedule."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # part of a folder name
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


class TrainConfig(Node):
    """The training loop."""

    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] = DEFAULT_STAGES
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=16, description="Slices in one global step, over all ranks."
    )
    size: tuple[Side, Side] = (256, 256)
    ranks: Annotated[int, Field(ge=1)] = 1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    loader_workers: Annotated[int, Field(ge=0)] = 0
    shuffle: Literal["full", "shard"] = Field(
        default="full",
        description="shard: samples of `shuffle_shards` shards at a time are shuffled together, "
        "for file systems that are slow at random reads.",
    )
    shuffle_shards: Annotated[int, Field(ge=1)] = 16
    eval_every: Annotated[int, Field(ge=1)] = 200
    log_every: Annotated[int, Field(ge=1)] = 20
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0, description="torch threads a rank; 0: cores divided by ranks."
    )


class ExportConfig(Node):
    """The ONNX files."""

    opset: Literal[18, 19, 20] = 18
    calibration_slices: Annotated[int, Field(ge=1)] = 64
    parity_tolerance: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="Difference of logits from the network's, over the largest one."
    )
    int8_min_dice: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="Mean Dice of the int8 masks against the fp32 masks."
    )


class Config(Node):
    """Everything that decides a run."""

    out: Path = Path("runs/default")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _enough_for_batch_norm(self) -> Config:
        train, stride = self.train, self.model.output_stride
        cells = -(-train.size[0] // 32) * -(-train.size[1] // 32) * (32 // stride) ** 2
        if cells * (train.batch_size // train.ranks) == 1:
            raise ValueError(
                f"train.size {train.size[0]} x {train.size[1]} at output stride {stride} leaves "
                "one cell and a rank has one slice: BatchNorm needs two values; take a larger "
                "size or train.batch_size"
            )
        return self

    @property
    def shards(self) -> Path:
        """Folder of the shards of this run."""
        return self.out / "shards"
