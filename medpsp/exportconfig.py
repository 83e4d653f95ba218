"""The part of the configuration that says what files are exported, and what they say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from medpsp.dataconfig import Node

Term = tuple[
    Annotated[str, Field(min_length=1, max_length=16)],
    Annotated[str, Field(min_length=1, max_length=16)],
    Annotated[str, Field(min_length=1, max_length=64)],
]
"""Coding scheme designator, code value, code meaning (PS3.3 8.8)."""
REASON = "your reason"
"""What a refusal writes in the place of the reason that a user gives."""
Gate = Literal[
    "cpu_dice",
    "cpu_drop",
    "trt_dice",
    "trt_drop",
    "half_dice",
    "half_drop",
    "saturation",
    "latency",
]


LEAST_REASON = 8
"""Characters."""


class ClassTerms(Node):
    """What a class is, in coded terms."""

    category: Term = Field(description="Segmented Property Category: scheme, code, meaning.")
    type: Term = Field(description="Segmented Property Type, likewise.")


class ExportConfig(Node):
    """The ONNX files."""

    opset: Literal[11, 13, 18, 19, 20] = Field(
        default=18, description="13: for old runtimes. 11: for older ones, fp32 only."
    )
    variants: tuple[Literal["cpu", "trt", "half"], ...] = Field(
        default=("cpu", "trt", "half"),
        description="Beside fp32: int8 for CPUs (U8S8), int8 for TensorRT (S8S8), fp16.",
    )
    calibration_slices: Annotated[int, Field(ge=1)] = Field(
        default=64, description="Of training patients, one tile each."
    )
    validation_slices: Annotated[int, Field(ge=1)] = Field(
        default=128, description="Of validation patients, on which the files are compared."
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        default=100.0, description="Of the values that an int8 range holds; 100: all (MinMax)."
    )
    restore_layers: Annotated[int, Field(ge=0)] = Field(
        default=8, description="Layers that go back to fp32, the noisiest first, if int8 needs it."
    )
    confidence: bool = Field(
        default=False, description="A third output: softmax of the chosen class. Costs time."
    )
    parity_tolerance: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="Difference of logits from the network's, over the largest one."
    )
    allow: dict[Gate, str] = Field(
        default={}, description="Gates that may fail: name to reason, which the dossier shows."
    )
    codes: dict[str, ClassTerms] = Field(
        default={}, description="Class to coded terms; without: SCT 85756007, Tissue."
    )
    licence: str = Field(default="", description="Of the model, as the file says it.")
    intended_use: str = Field(
        default="Research only. Not a medical device.", description="As the file says it."
    )

    @field_validator("allow")
    @classmethod
    def _a_reason(cls, value: dict[Gate, str]) -> dict[Gate, str]:
        for name, text in value.items():
            if len(text.strip()) < LEAST_REASON or text.strip().lower() == REASON:
                raise ValueError(
                    f"{name}: '{text}' is no reason; say in {LEAST_REASON} characters or more why "
                    "the file is good enough, as the dossier shows it"
                )
        return value

    @field_validator("variants")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("the same one twice")
        return value

    @model_validator(mode="after")
    def _int8_needs_13(self) -> ExportConfig:
        if self.opset < 13 and self.variants:
            raise ValueError(
                "opset 11 has no per-channel int8: set export.variants=[], or export.opset=13"
            )
        return self
