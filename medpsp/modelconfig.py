"""The part of the configuration that says which network."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medpsp.dataconfig import Fraction, Node, WindowConfig

BACKBONES = ("mobilenetv3_large_100", "efficientnet_b0", "resnet18", "convnext_tiny")
OTHER = "timm/"
"""In front of the name of any other timm model that gives feature maps."""
STRIDE_OF_HEAD = {"refine": 16, "classic": 8, "shallow": 8}
"""Where ``model.output_stride`` is not given."""


def usual_of_head(tree: dict[str, Any]) -> dict[str, Any]:
    """What follows from the head of a section, unless it says otherwise; nothing of no head."""
    head = str(tree.get("head", "refine"))
    if head not in STRIDE_OF_HEAD:
        return {}
    return {"output_stride": STRIDE_OF_HEAD[head], "aux": head == "classic"}


class ModelConfig(Node):
    """PSPNet: a timm backbone, the pyramid, a head."""

    backbone: str = Field(
        default="resnet18",
        description=f"{', '.join(BACKBONES)}, or {OTHER}NAME for any other timm model.",
    )
    head: Literal["refine", "classic", "shallow"] = Field(
        default="refine",
        description="refine: the backbone ends at the output stride, the pyramid stands in for the "
        "rest, and a light decoder goes down to the finest map; shallow: the same without the "
        "decoder; classic: a dilated backbone and direct upsampling, as Zhao et al. 2017.",
    )
    output_stride: Literal[8, 16, 32] = Field(
        default=16, description="Of the map that is pooled; not given: 16 for refine, else 8."
    )
    bins: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = Field(
        default=(1, 3, 5, 7), description="(1, 2, 3, 6) are those of Zhao et al. 2017."
    )
    psp_channels: Annotated[int, Field(ge=8)] = Field(
        default=128, description="Of the pyramid; Zhao et al. 2017 have 512."
    )
    decoder_channels: Annotated[int, Field(ge=8)] = Field(
        default=32,
        description="Of the finest map of refine; each coarser one has twice as many, up to "
        "psp_channels: so all cost about the same.",
    )
    norm: Literal["batch", "group", "sync"] = Field(
        default="batch",
        description="group: GroupNorm, the same for any batch and any number of ranks; sync: "
        "BatchNorm over all ranks, on CUDA only.",
    )
    dropout: Fraction = Field(
        default=0.2, description="Share of channels behind the pyramid that a sample goes without."
    )
    aux: bool = Field(
        default=False, description="A second loss on a middle map; not given: for classic only."
    )
    pretrained: bool | Path = Field(
        default=False,
        description="true: timm's weights, downloaded; a path: a .safetensors or .pth file of the "
        "whole timm model.",
    )
    in_channels: Annotated[int, Field(ge=1, le=3)] = Field(
        default=1, description="Of one slice. 3: RGB; grey slices are repeated."
    )
    windows: tuple[WindowConfig, ...] = Field(
        default=(),
        description="A channel each, in place of the one window of the series; grey only.",
    )
    context: Annotated[int, Field(ge=0, le=8)] = Field(
        default=0, description="Neighbouring slices on either side as channels (2.5-D)."
    )

    @property
    def channels(self) -> int:
        """Input channels of the network: of all slices and windows together."""
        return (len(self.windows) or self.in_channels) * (2 * self.context + 1)

    @property
    def untrained(self) -> ModelConfig:
        """The same network without pretrained weights."""
        return self.model_copy(update={"pretrained": False})

    @model_validator(mode="before")
    @classmethod
    def _of_head(cls, tree: Any) -> Any:
        # the field itself says what is wrong with a head
        return {**usual_of_head(tree), **tree} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        least = 2 * len(self.bins)  # one channel of a 1 x 1 bin has no variance to normalise by
        if self.psp_channels < least:
            raise ValueError(
                f"psp_channels {self.psp_channels}: {len(self.bins)} bins need {least}"
            )
        if self.head == "shallow" and self.output_stride == 32:
            raise ValueError("output_stride 32: a shallow backbone ends at 8 or 16")
        if self.in_channels == 2:
            raise ValueError("in_channels 2: a slice is grey (1) or RGB (3); see model.windows")
        if self.windows and self.in_channels != 1:
            raise ValueError("windows: they are of grey slices, in_channels must be 1")
        return self

    @model_validator(mode="after")
    def _known_backbone(self) -> ModelConfig:
        if self.backbone not in BACKBONES and not self.backbone.startswith(OTHER):
            near = difflib.get_close_matches(self.backbone, BACKBONES, n=1, cutoff=0.3)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"unknown backbone '{self.backbone}'{hint} (known: {', '.join(BACKBONES)}, "
                f"others as {OTHER}NAME)"
            )
        return self
