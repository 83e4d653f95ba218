"""The one configuration tree. Defaults live here and nowhere else; `configio` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from medpsp.dataconfig import DataConfig, Node
from medpsp.exportconfig import ExportConfig
from medpsp.modelconfig import BACKBONES, ModelConfig
from medpsp.tiles import Tiling
from medpsp.trainconfig import EvaluateConfig, LossConfig, StageConfig, TrainConfig

__all__ = [
    "BACKBONES",
    "Config",
    "EvaluateConfig",
    "ExportConfig",
    "LossConfig",
    "ModelConfig",
    "StageConfig",
    "TrainConfig",
]


class Config(Node):
    """Everything that decides a run."""

    out: Path = Field(default=Path("runs/default"), description="Folder of the run.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="Of first weights, order, augmentation, dropout and bootstrap."
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _terms_of_known_classes(self) -> Config:
        if unknown := sorted(set(self.export.codes) - set(self.data.classes)):
            raise ValueError(
                f"export.codes: {', '.join(unknown)}; classes are {', '.join(self.data.classes)}"
            )
        return self

    @model_validator(mode="after")
    def _enough_for_batch_norm(self) -> Config:
        self.check_batch_norm(self.train.ranks)
        return self

    def check_batch_norm(self, ranks: int) -> None:
        """Refuse a share of a batch that has no variance.

        Args:
            ranks: As many as there are: another launcher may start more than ``train.ranks``.

        Raises:
            ValueError: A rank would have one value a channel.
        """
        train, stride = self.train, self.model.output_stride
        if self.model.norm == "group":
            return
        cells = -(-train.size[0] // 32) * -(-train.size[1] // 32) * (32 // stride) ** 2
        if cells * (train.batch_size // ranks // train.accumulate) == 1:
            raise ValueError(
                f"train.size {train.size[0]} x {train.size[1]} at output stride {stride} leaves "
                "one cell and a rank has one slice: BatchNorm needs two values; take a larger "
                "size or train.batch_size, or model.norm=group"
            )

    @property
    def tiling(self) -> Tiling:
        """How much of a slice the network sees at once, wherever it predicts."""
        return Tiling(self.evaluate.size or self.train.size, self.evaluate.overlap)

    @property
    def shards(self) -> Path:
        """Folder of the shards of this run."""
        return self.out / "shards"
