"""The part of the configuration that says how to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from medpsp.dataconfig import Fraction, Node

Side = Annotated[int, Field(ge=32, le=4096)]
Preset = Literal["progressive", "article", "onecycle"]


class LossConfig(Node):
    """0.7 Dice + 0.3 Focal(gamma 2) unless changed."""

    dice: Annotated[float, Field(ge=0)] = Field(
        default=0.7, description="Weight of 1 - Dice over the foreground classes of the batch."
    )
    focal: Annotated[float, Field(ge=0)] = Field(
        default=0.3, description="Weight of the focal loss over all classes."
    )
    gamma: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="Of the focal loss; 0: cross-entropy."
    )
    aux: Annotated[float, Field(ge=0)] = Field(
        default=0.4, description="Weight of the same loss on the map of `model.aux`."
    )
    class_weights: Literal["none", "inverse", "median_frequency", "effective_number"] = Field(
        default="median_frequency",
        description="Of the focal loss, from the pixels of the training patients; "
        "median_frequency: its square root.",
    )

    @model_validator(mode="after")
    def _something_to_lose(self) -> LossConfig:
        if self.dice + self.focal == 0:
            raise ValueError("dice and focal are both 0: nothing would be learnt")
        return self


class StageConfig(Node):
    """One stage of the progressive schedule."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        description="Letters, digits, _ and -: part of a folder name."
    )
    steps: Annotated[int, Field(ge=0)] = Field(default=0, description="Optimiser steps.")
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Passes over the slices of the stage, in place of steps."
    )
    lr: Annotated[float, Field(gt=0)] = Field(description="Rate of AdamW at its start.")
    lr_end: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Rate at the end; none: of the next stage, 5 % after the last."
    )
    shape: Literal["cosine", "poly", "constant"] = Field(
        default="cosine", description="How lr becomes lr_end; poly: power 0.9."
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Share of the training patients; stages are nested."
    )
    augment: Literal["none", "low", "mid", "high"] = Field(
        default="mid",
        description="low: rotation and brightness; mid: grid distortion, too; high: and elastic.",
    )
    trains: Literal["all", "backbone", "head"] = Field(
        default="all", description="What is not named is frozen, its statistics too."
    )

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if (self.steps == 0) == (self.epochs is None):
            raise ValueError("steps or epochs: give one of them, above 0")
        return self


def _stage(name: str, steps: int, **rest: Any) -> StageConfig:
    return StageConfig(name=name, steps=max(1, steps), **rest)


def _progressive(steps: int) -> tuple[StageConfig, ...]:
    warm, broad = round(0.15 * steps), round(0.25 * steps)
    return (
        _stage("warm", warm, lr=1e-3, fraction=0.2, augment="low"),
        _stage("broad", broad, lr=1e-3, fraction=0.6, augment="mid"),
        _stage("full", steps - max(1, warm) - max(1, broad), lr=1e-3, augment="high"),
    )


def _article(steps: int) -> tuple[StageConfig, ...]:
    third = steps // 3
    flat: dict[str, Any] = {"shape": "constant"}
    return (
        _stage("backbone", third, lr=1e-4, fraction=0.2, augment="low", trains="backbone", **flat),
        _stage("head", third, lr=5e-5, fraction=0.6, augment="mid", trains="head", **flat),
        _stage("all", steps - 2 * third, lr=1e-5, augment="high", **flat),
    )


def _onecycle(steps: int) -> tuple[StageConfig, ...]:
    rise = max(1, round(0.3 * steps))
    return (
        _stage("rise", rise, lr=4e-5, lr_end=1e-3),
        _stage("fall", steps - rise, lr=1e-3, lr_end=4e-9),
    )


PRESETS: dict[Preset, Callable[[int], tuple[StageConfig, ...]]] = {
    "progressive": _progressive,
    "article": _article,
    "onecycle": _onecycle,
}
"""Total steps to stages. ``article`` is the usual recipe taken literally, for pretrained weights;
``onecycle`` the control (Smith & Topin 2019, with torch's factors)."""


HOW = frozenset(
    {"loader_workers", "threads", "resume", "save_every", "log_every", "most_bad_steps"}
    | {"first_step_seconds", "step_seconds"}
)
"""Settings of `TrainConfig` that say how a job works, and leave what it makes as it is."""


class TrainConfig(Node):
    """The training loop."""

    preset: Preset = Field(
        default="progressive", description="Makes `stages` where none are given."
    )
    steps: Annotated[int, Field(ge=3)] = Field(default=6000, description="Of the preset.")
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, validate_default=True)] = Field(
        default=(), description="Stages of your own, in place of the preset."
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=16, description="Slices in one global step, over all ranks and micro-batches."
    )
    accumulate: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Micro-batches of a step. Dice is a ratio of sums: each has its own, and the "
        "mean of them is not the Dice of the whole batch.",
    )
    size: tuple[Side, Side] = Field(
        default=(256, 256),
        description="Rows and columns that the network sees at once, in crops and in tiles.",
    )
    ranks: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Processes that train together: a GPU each, or all on the CPU, where one uses "
        "all cores.",
    )
    engine: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        default="ddp", description="zero1-3: DeepSpeed; slower, for networks that do not fit."
    )
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        default="fp32", description="bf16: autocast; slow on CPUs without it. fp64: for tests."
    )
    channels_last: bool = Field(
        default=False, description="Memory layout of images and weights, for GPUs."
    )
    compile: bool | Literal["reduce-overhead"] = Field(
        default=False,
        description="torch.compile; a minute or two at each stage. reduce-overhead: with CUDA "
        "graphs, for GPUs that wait for the CPU.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=1e-2, description="Of AdamW; biases and norms do not decay."
    )
    clip_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Largest norm of the gradient; longer ones are shortened to it."
    )
    head_lr: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Rate of all but the backbone, over the rate of the stage."
    )
    ema: Fraction = Field(
        default=0.0,
        description="Decay of the averaged weights that are scored and exported; 0: none.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=20, description="First steps of the run, in which the rate rises."
    )
    flips: bool = Field(default=False, description="Mirror at random; loses left and right.")
    window_jitter: Fraction = Field(
        default=0.0, description="Share by which width and centre of a window vary, in widths."
    )
    transforms: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="Transforms of albumentations after ours: name, and its arguments.",
    )
    augment_on: Literal["cpu", "device"] = Field(
        default="cpu", description="device: in batches where the network runs, for GPUs."
    )
    foreground: Fraction = Field(
        default=0.0, description="Share of the samples drawn among slices with foreground."
    )
    loader_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Processes of a rank that make batches; 0: the rank itself does."
    )
    shuffle: Literal["full", "shard"] = Field(
        default="full",
        description="shard: samples of `shuffle_shards` shards at a time are shuffled together, "
        "for file systems that are slow at random reads.",
    )
    shuffle_shards: Annotated[int, Field(ge=1)] = Field(default=16, description="See `shuffle`.")
    eval_every: Annotated[int, Field(ge=1)] = Field(
        default=200, description="Steps between scores of the validation patients."
    )
    save_every: Annotated[int, Field(ge=1)] = Field(
        default=200, description="Steps between checkpoints: what SIGKILL may cost."
    )
    log_every: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Steps between points of the curves."
    )
    resume: Literal["auto", "must", "never"] = Field(
        default="auto",
        description="auto: go on from a checkpoint where there is one; must: refuse to begin "
        "without; never: refuse to begin where there is one (it deletes nothing).",
    )
    most_bad_steps: Annotated[int, Field(ge=1)] = Field(
        default=5, description="Steps in a row with NaN that are left out before training ends."
    )
    first_step_seconds: Annotated[int, Field(ge=1)] = Field(
        default=900, description="A rank that takes longer for its first step of a stage hangs."
    )
    step_seconds: Annotated[int, Field(ge=1)] = Field(
        default=300, description="A rank that takes longer for any other step hangs."
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="torch threads a rank, which sleep while they wait for one another "
        "unless OMP_WAIT_POLICY or GOMP_SPINCOUNT says otherwise; 0: cores divided by ranks.",
    )

    @field_validator("stages", mode="wrap")
    @classmethod
    def _stages_of_preset(cls, value: Any, handler: Any, info: ValidationInfo) -> Any:
        if value is not None and value != ():
            return handler(value)
        if not {"preset", "steps"} <= info.data.keys():
            return ()  # they say what is wrong themselves
        return PRESETS[info.data["preset"]](info.data["steps"])

    @field_validator("transforms")
    @classmethod
    def _named(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for item in value:
            if not isinstance(item.get("name"), str):
                raise ValueError("transforms: each needs a name, for example GaussNoise")
        return value

    @model_validator(mode="after")
    def _shared_evenly(self) -> TrainConfig:
        if self.batch_size % (self.accumulate * self.ranks):
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {self.ranks} ranks with "
                f"{self.accumulate} micro-batches each; take a multiple of both"
            )
        if self.augment_on == "device" and self.transforms:
            raise ValueError(
                "transforms: albumentations runs on the CPU only; set train.augment_on=cpu"
            )
        if self.compile and self.engine != "ddp":
            raise ValueError(f"compile: with engine ddp only, not {self.engine}")
        if self.compile == "reduce-overhead" and self.accumulate > 1:
            raise ValueError(
                "compile reduce-overhead: not with accumulate above 1, as CUDA graphs overwrite "
                "the gradients of the micro-batch before; set train.compile=true"
            )
        if self.engine == "zero3" and self.ema:
            raise ValueError(
                "ema: not with engine zero3, where no rank holds the weights; take zero2"
            )
        return self


class EvaluateConfig(Node):
    """How slices are predicted, and the held-out patients scored."""

    size: tuple[Side, Side] | None = Field(
        default=None,
        description="Rows and columns that the network sees at once; none: train.size, which is "
        "what it knows.",
    )
    overlap: Annotated[float, Field(ge=0, le=0.9)] = Field(
        default=0.5, description="Least share of such a tile that lies in the next one."
    )
    flips: bool = Field(default=False, description="Mean over mirrored images (TTA).")
    nsd_mm: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="Tolerance of the normalised surface Dice, mm."
    )
    bootstrap: Annotated[int, Field(ge=100, le=100_000)] = Field(
        default=2000, description="Resamples of the patients behind an interval."
    )
    postprocess: Literal["none", "choose"] = Field(
        default="none",
        description="choose: largest component and hole filling for each class, where that is "
        "better on the validation patients.",
    )
